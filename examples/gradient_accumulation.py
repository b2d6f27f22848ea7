"""Accumulate gradients over micro-batches with `num_items`: they are the gradients of one batch, whatever is ignored.

    python examples/gradient_accumulation.py
    python examples/gradient_accumulation.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

Without names both models are small and random, and read this file's bytes.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import linear_kd_loss

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="name or folder of a causal language model")
parser.add_argument("--teacher", help="the same, with the student's vocabulary")
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
text = Path(__file__).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if options.student else 5e-3)


def backward(input_ids, labels, num_items=None, share=1.0):
    """Add this batch's gradients to those of the student, and return its loss."""
    with torch.no_grad():
        teacher_hidden = teacher.base_model(input_ids).last_hidden_state
    heads = student.get_output_embeddings().weight, teacher_hidden, teacher.get_output_embeddings().weight
    student_hidden = student.base_model(input_ids).last_hidden_state
    loss = linear_kd_loss(student_hidden, *heads, labels, shift=True, temperature=2.0, num_items=num_items)
    (share * loss).backward()
    return loss.detach()


def gradients():
    """Return all gradients of the student as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (8,))]
    prompts = torch.randint(4, 60, (8, 1), device=device)  # tokens of each text that are not trained: few or many
    labels = input_ids.masked_fill(torch.arange(64, device=device) < prompts, -100)
    micro_batches = list(zip(input_ids.chunk(4), labels.chunk(4), strict=True))
    if step == 0:
        backward(input_ids, labels)
        whole = gradients()
        optimizer.zero_grad()
        _ = [backward(ids, own, share=1 / 4) for ids, own in micro_batches]
        means = gradients()
        optimizer.zero_grad()
    num_items = (labels[:, 1:] != -100).sum()  # of the whole batch; the first label of a text is never read
    loss = sum(backward(ids, own, num_items) for ids, own in micro_batches)
    if step == 0:
        for name, found in {"num_items": gradients(), "the mean of four means": means}.items():
            print(f"{name}: gradients off those of one batch by {(found - whole).norm() / whole.norm():.1e}")
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
