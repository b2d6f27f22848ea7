"""Two students learn from the labels and from each other (`teacher_grad`): one sweep gives both their gradients.

    python examples/mutual_learning.py
    python examples/mutual_learning.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-135M-Instruct

Without names both models are small and random, and read bytes.  The text is that of this file, or of --text.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import linear_kd_loss

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="name or folder of the first language model")
parser.add_argument("--teacher", help="the second one, with the same vocabulary")
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


first, second = load(options.student, 64), load(options.teacher, 128)
text = Path(options.text).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=1e-5 if options.student else 5e-3)

for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (8,))]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden, other_hidden = (model.base_model(input_ids).last_hidden_state for model in (first, second))
        head, other_head = (model.get_output_embeddings().weight for model in (first, second))
        # The first one's cross-entropy, and the divergence, whose gradient both get.
        both = linear_kd_loss(
            hidden,
            head,
            other_hidden,
            other_head,
            input_ids,
            shift=True,
            alpha=0.5,
            temperature=2.0,
            teacher_grad=True,
            return_parts=True,
        )
        # The second one's cross-entropy: alpha = 0 needs no teacher.
        other_ce = linear_kd_loss(other_hidden, other_head, None, None, input_ids, shift=True, alpha=0.0)
        loss = both.loss + 0.5 * other_ce
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = f"cross-entropies {both.ce:.4f} and {other_ce.detach():.4f}, divergence {both.divergence:.4f}"
    print(f"step {step + 1}: loss {loss.item():.4f} ({parts})")
