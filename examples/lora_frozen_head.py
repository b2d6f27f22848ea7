"""Distil into a LoRA adapter: the output head is frozen, and costs neither a weight gradient nor the memory of one.

    python examples/lora_frozen_head.py
    python examples/lora_frozen_head.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

Without names both models are small and random, and read bytes.  The text is that of this file, or of --text.
Needs peft (`pip install fused_kd[examples]`).
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import linear_kd_loss, plan_chunks

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


student, teacher = load(options.student, 64), load(options.teacher, 128).eval()
student = get_peft_model(student, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).get_base_model()
text = Path(options.text).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW(
    [p for p in student.parameters() if p.requires_grad], lr=1e-4 if options.student else 2e-2
)

# "all-linear" gives the head no adapter; lora_on_the_head.py has one.
head, teacher_head = (model.get_output_embeddings().weight for model in (student, teacher))
plans = {
    trained: plan_chunks(8 * 63, *head.shape, teacher_head.shape[1], dtype=torch.float32, weight_grad=trained)
    for trained in (True, False)
}
for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (8,))]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = student.base_model(input_ids).last_hidden_state
        with torch.no_grad():
            teacher_hidden = teacher.base_model(input_ids).last_hidden_state
        loss = linear_kd_loss(hidden, head, teacher_hidden, teacher_head, input_ids, shift=True, temperature=2.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
assert head.grad is None
sizes = [f"{plans[trained].peak_bytes / 1e6:.2f} MB" for trained in (True, False)]
print(f"a step of the loss takes {sizes[1]}; with a trained head it would take {sizes[0]}, by `plan_chunks`")
