"""Distil into LoRA adapters on every layer and on the output head, under a teacher whose head is int8.

    python examples/lora_on_the_head.py
    python examples/lora_on_the_head.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

Without names both models are small and random, and read bytes.  The text is that of this file, or of --text.
Needs peft (`pip install fused_kd[examples]`).
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.integrations.huggingface import student_arguments, teacher_arguments

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="name or folder of a causal language model")
parser.add_argument("--teacher", help="the same, with the student's vocabulary")
parser.add_argument("--text", type=Path, default=__file__)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def load(name, width):
    """Load a model, or make a small random one that reads bytes."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(device)


class Int8Head(torch.nn.Module):
    """Stands for the layer of a quantisation library: int8 numbers, and a scale for each token of the vocabulary."""

    def __init__(self, weight):
        super().__init__()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.stored = (weight / self.scale).round().to(torch.int8)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.stored * self.scale)


student, teacher = load(options.student, 64), load(options.teacher, 128).requires_grad_(False).eval()
config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
student = get_peft_model(student, config).get_base_model()
teacher.set_output_embeddings(Int8Head(teacher.get_output_embeddings().weight))
text = Path(options.text).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW(
    [p for p in student.parameters() if p.requires_grad], lr=1e-4 if options.student else 2e-2
)

heads = student_arguments(student.get_output_embeddings()) | teacher_arguments(teacher.get_output_embeddings())
for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (8,))]
    hidden = student.base_model(input_ids).last_hidden_state
    with torch.no_grad():
        teacher_hidden = teacher.base_model(input_ids).last_hidden_state
    loss = linear_kd_loss(hidden, teacher_hidden=teacher_hidden, labels=input_ids, shift=True, temperature=2.0, **heads)
    loss.backward()
    if step == options.steps - 1:
        own = kd_loss(student(input_ids).logits, teacher(input_ids).logits, input_ids, shift=True, temperature=2.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
print(f"off the loss of the models' own logits by {abs(loss - own).item() / own.item():.1e}")
