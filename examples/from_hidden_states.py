"""Distil a language model from hidden states: nothing of the size tokens x vocabulary is ever in memory.

    python examples/from_hidden_states.py
    python examples/from_hidden_states.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

Without names both models are small and random, and read bytes.  The text is that of this file, or of --text.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import linear_kd_loss

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
text = Path(options.text).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5 if options.student else 5e-3)

for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (8,))]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        student_hidden = student.base_model(input_ids).last_hidden_state  # [B, L, H_s]
        with torch.no_grad():
            teacher_hidden = teacher.base_model(input_ids).last_hidden_state  # [B, L, H_t]
        loss, ce, divergence, entropy = linear_kd_loss(
            student_hidden,
            student.get_output_embeddings().weight,
            teacher_hidden,
            teacher.get_output_embeddings().weight,
            input_ids,  # labels: -100 for each token that is not to be trained, such as padding
            shift=True,  # each position is scored with the label of the next one
            alpha=0.5,
            temperature=2.0,
            logit_softcap=getattr(student.config, "final_logit_softcapping", None),  # Gemma 2: 30
            return_parts=True,
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = f"cross-entropy {ce:.4f}, divergence {divergence:.4f}, the student's entropy {entropy:.4f}"
    print(f"step {step + 1}: loss {loss.item():.4f} ({parts})")
