"""Distil in Lightning: the loss is in `training_step`, which is what the Trainer's strategies (DDP, FSDP) wrap.

    python examples/lightning_module.py
    python examples/lightning_module.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

Without names both models are small and random, and read bytes.  The text is that of this file, or of --text.
Needs lightning (`pip install fused_kd[examples]`).
"""

import argparse
from pathlib import Path

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import LinearKDLoss

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="name or folder of a causal language model")
parser.add_argument("--teacher", help="the same, with the student's vocabulary")
parser.add_argument("--text", type=Path, default=__file__)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()


def load(name, width):
    """Load a model, or make a small random one that reads bytes."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, lr):
        super().__init__()
        self.student, self.teacher, self.lr = student, teacher.eval().requires_grad_(False), lr
        self.loss = LinearKDLoss(alpha=0.5, temperature=2.0, shift=True, return_parts=True)

    def training_step(self, input_ids, _):
        student_hidden = self.student.base_model(input_ids).last_hidden_state
        with torch.no_grad():
            teacher_hidden = self.teacher.base_model(input_ids).last_hidden_state
        head, teacher_head = (model.get_output_embeddings().weight for model in (self.student, self.teacher))
        found = self.loss(student_hidden, head, teacher_hidden, teacher_head, input_ids)
        self.log_dict({"ce": found.ce, "divergence": found.divergence})
        self.print(f"step {self.global_step + 1}: loss {found.loss.item():.4f}")
        return found.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=self.lr)


lightning.seed_everything(0, verbose=False)
student, teacher = load(options.student, 64), load(options.teacher, 128)
text = Path(options.text).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
trainer = lightning.Trainer(
    max_steps=options.steps,
    precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Distillation(student, teacher, lr=1e-5 if options.student else 5e-3)
trainer.fit(model, torch.utils.data.DataLoader(blocks, batch_size=8, shuffle=True, drop_last=True))
