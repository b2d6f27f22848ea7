"""The launches of the kernels on a few numbers per row, and of those that copy or scale rows, on a simulated chip.

Each call is made twice, and once by the CPU operators, which have the same interface.  What no call may read is poisoned:
memory between rows, and hidden states of rows that do not count.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fused_kd import rows
from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.divergences import Objective
from fused_kd.rows import CE, DIVERGENCE, RowOptions

from . import launches
from .launches import Outcome
from .simulator import MODULE

N, V = 1500, 1000  # several programs per launch, and a part of a block
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-13, F32: 1e-6, BF16: 0.0, torch.float16: 0.0, torch.int64: 0.0, torch.int32: 0.0}


class Call(NamedTuple):
    """The call of a function of a backend."""

    function: str
    arguments: tuple[Any, ...]
    target: Tensor | None = None  # the argument that is written; None: the function returns its results
    compared: int = 3  # results of a function that returns some
    read: Tensor | None = None  # mask of the rows of the first argument that are read; None: all

    def results(self, backend: Any) -> list[Tensor]:
        """Return copies of the results, with NaN where nothing has been written."""
        if self.target is not None and self.target is not self.arguments[0]:
            self.target.fill_(torch.nan)
        torch.use_deterministic_algorithms(True)
        returned = getattr(backend, self.function)(*self.arguments)
        torch.use_deterministic_algorithms(False)
        return [tensor.clone() for tensor in (returned[: self.compared] if self.target is None else [self.target])]


@dataclass(frozen=True)
class RowCase:
    name: str  # a key of CALLS


def row_weights(dtype: torch.dtype = torch.int64, **given: Any) -> Call:
    labels = torch.randint(V, (N,), dtype=dtype)
    labels[::4] = -100
    if given:  # otherwise `rows.row_weights` counts on labels that have been checked
        labels[1], labels[2] = V, -1
    tensors = [given.pop(name, None) for name in ("token_weights", "alpha", "num_items")]
    options = RowOptions(N, 0, V, -100, mean=True, alpha=0.3, num_items=None, temperature=2.5)
    call = Call("row_weights", (labels, *tensors, torch.empty(0), options._replace(**given)))
    return call._replace(compared=2 if given.get("sequence") else 1)


def row_losses(*options: bool, divergence: str = "forward_kl") -> Call:
    statistics = spread(torch.rand(stats.COUNT, N) + 1)
    counter = torch.zeros(1, 32, dtype=torch.int32)
    objective = Objective(temperature=2.5, divergence=divergence)
    return Call("row_losses", (statistics, some_weights(), counter, *options, F64, objective))


def scale(source: Tensor, target: Tensor | None = None, factors: tuple[float, ...] = (0.3,)) -> Call:
    target = source if target is None else target
    return Call("scale_", (source, [torch.tensor(factor) for factor in factors], target), target)


def unit_weights(upstream: Tensor | None) -> Call:
    return Call("unit_weights", (some_weights(), upstream, 1.0, 0.4))


def copy_counted(hidden: Tensor, dtype: torch.dtype) -> Call:
    weights = some_weights()
    target = torch.empty(hidden.shape, dtype=dtype)
    counted = (weights[CE] != 0) | (weights[DIVERGENCE] != 0)
    return Call("copy_counted", (hidden, weights, target), target, read=counted)


def some_weights() -> Tensor:
    return spread(torch.rand(3, N, dtype=F64) * (torch.arange(N) % 3 > 0))


def spread(values: Tensor, gap: int = 3) -> Tensor:
    """Return a copy with elements between its rows that belong to nobody."""
    memory = torch.full((*values.shape[:-1], values.shape[-1] + gap), torch.nan, dtype=values.dtype)
    return memory[..., : values.shape[-1]].copy_(values)


CALLS: dict[str, Callable[[], Call]] = {
    "row_weights mean": row_weights,
    "row_weights sum bool token_weights": lambda: row_weights(
        mean=False, token_weights=torch.ones(N, dtype=torch.bool)
    ),
    "row_weights i32 mean token_weights": lambda: row_weights(torch.int32, token_weights=torch.rand(N)),
    "row_weights num_items alpha": lambda: row_weights(alpha=torch.tensor(0.2), num_items=torch.tensor([7])),
    "row_weights mean token_weights alpha shift": lambda: row_weights(
        token_weights=torch.rand(N).to(BF16), alpha=torch.rand(N), sequence=300
    ),
    "row_losses ce+kl": lambda: row_losses(True, True, True, False),
    "row_losses ce+kl parts": lambda: row_losses(True, True, True, True),
    "row_losses ce+kl parts none reverse_kl": lambda: row_losses(True, True, False, True, divergence="reverse_kl"),
    "row_losses ce+kl parts mixed_kl": lambda: row_losses(True, True, True, True, divergence="mixed_kl"),
    "row_losses ce+kl parts jsd": lambda: row_losses(True, True, True, True, divergence="jsd"),
    "scale bf16 in place": lambda: scale(torch.randn(2, 3, 1500).to(BF16)),
    "scale fp32 in place padded": lambda: scale(spread(torch.randn(2, 3, 1501))),
    "scale in place by 1": lambda: scale(torch.randn(5000), factors=(4.0, 0.25)),
    "scale fp32 to bf16": lambda: scale(torch.randn(6, 1500), torch.empty(6, 1500, dtype=BF16), (3.0, 0.7)),
    "scale fp32 to bf16 transposed": lambda: scale(spread(torch.randn(600, 9)).T, torch.empty(9, 600, dtype=BF16)),
    "unit_weights": lambda: unit_weights(None),
    "unit_weights upstream": lambda: unit_weights(torch.randn(N)),
    "copy_counted bf16": lambda: copy_counted(torch.randn(N, 64).to(BF16), BF16),
    "copy_counted fp32 to bf16 padded": lambda: copy_counted(spread(torch.randn(N, 65)), BF16),
}
CASES = [RowCase(name) for name in CALLS]


def simulate(item: tuple[RowCase, str]) -> Outcome:
    """Run a case on a chip, in a worker that compiles."""
    from fused_kd.backends import triton as kernels

    launches.prepare_process()
    case, chip = item
    torch.manual_seed(0)
    call = CALLS[case.name]()
    expected = copy.deepcopy(call).results(rows if call.function == "row_weights" else cpu)
    found = []
    with importlib.import_module(MODULE).device(chip, check_races=True, check_init=True, cache_model=False) as device:
        for _ in range(2):
            again = copy.deepcopy(call)
            for index, view in enumerate(again.arguments):
                if isinstance(view, Tensor) and (view is not again.target or index == 0):
                    poison_between(view, again.read if index == 0 else None, device.poison)
            try:
                found.append(again.results(kernels))
            except Exception as error:
                return Outcome((), (f"{type(error).__name__}: {error}",))
    findings = [
        f"result {index} differs: {error}"
        for index, (result, other) in enumerate(zip(found[0], expected, strict=True))
        if (error := difference(result, other)) is not None
    ]
    if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*found, strict=True) if a.dim()):
        findings.append("a second run has other bits")
    return Outcome((), tuple(findings))


def difference(result: Tensor, other: Tensor) -> str | None:
    tolerance = TOLERANCE[result.dtype]
    try:
        torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return None


def poison_between(view: Tensor, read: Tensor | None, mark: Callable[[Tensor], Any]) -> None:
    """Mark what lies between the elements of a view, and its rows that are not read."""
    memory = launches.memory_of(view)
    values, inside = memory.clone(), torch.zeros(memory.shape, dtype=torch.bool)
    elements = inside.as_strided(view.shape, view.stride(), view.storage_offset())
    elements.fill_(True)
    if read is not None:
        elements &= read[:, None]
    places = inside.nonzero().flatten()
    if places.numel() == memory.numel():
        return
    mark(memory)
    block = launches.WRITE_BLOCK
    launches.write_kernel[(triton.cdiv(places.numel(), block),)](memory, values, places, places.numel(), block)
