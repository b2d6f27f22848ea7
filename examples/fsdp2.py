"""Distil under FSDP2: the loss inside the forward of the wrapped module, and the count of tokens over all ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M

One process per GPU, or two on a CPU.  Without names both models are small and random, and read this file's bytes.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fused_kd import linear_kd_loss

parser = argparse.ArgumentParser()
parser.add_argument("--student", help="name or folder of a causal language model")
parser.add_argument("--teacher", help="the same, with the student's vocabulary")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
torch.manual_seed(0)  # the same models on every rank


def load(name, width):
    """Load a model, or make a small random one that reads bytes."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(device)


class Distillation(torch.nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, ids, count):
        hidden = self.student.base_model(ids).last_hidden_state
        with torch.no_grad():
            teacher_hidden = self.teacher.base_model(ids).last_hidden_state
        heads = [model.get_output_embeddings().weight for model in (self.student, self.teacher)]  # whole only here
        num_items = count / dist.get_world_size()  # FSDP2 takes the mean of the ranks' gradients
        rest = {"shift": True, "temperature": 2.0, "num_items": num_items}
        return linear_kd_loss(hidden, heads[0], teacher_hidden, heads[1], ids, **rest)


mesh = init_device_mesh(device, (dist.get_world_size(),))
model = Distillation(load(options.student, 64), load(options.teacher, 128))
for layer in (*model.student.base_model.layers, *model.teacher.base_model.layers):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)  # with both heads: a head must not have a fully_shard of its own
text = Path(__file__).read_text()
tokens = AutoTokenizer.from_pretrained(options.student)(text).input_ids if options.student else list(text.encode())
blocks = torch.tensor(tokens[: len(tokens) // 64 * 64], device=device).view(-1, 64)
optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-5 if options.student else 5e-3)
torch.manual_seed(dist.get_rank())  # other texts on every rank
for step in range(options.steps):
    input_ids = blocks[torch.randint(len(blocks), (4,))]
    count = torch.tensor(input_ids[:, 1:].numel(), device=device)  # with padding: (labels[:, 1:] != -100).sum()
    dist.all_reduce(count)
    loss = model(input_ids, count)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss := loss.detach() / dist.get_world_size())
    if dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.4f}")
dist.destroy_process_group()
