"""The configurations of `fused-kd check`, and the errors of a loss against the float64 oracle in each of them."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kd_loss, reference
from ..divergences import (
    JSD,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from ..launching import ONE, TWO, launching
from .replacing import replaced_in
from .words import dtype_name

EPSILON = torch.finfo(torch.float32).eps
RATIO_BOUND = 2.0  # an error may be twice eager PyTorch's, or one float32 epsilon if that is more
MISROUNDED_BOUND = 0.01  # share of 16-bit gradient elements that may be off by one unit in the last place

SHAPES = [(1, 1000), (1, 151_936), (2, 32_003), (2, 262_144), (3, 50_257), (7, 128_256), (33, 4_099), (129, 1_023)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 10.0]
ALPHAS = [0.0, 0.3, 1.0]
LOGITS = ["flat", "peaked", "heavy-tailed"]
ROWS = ["all", "ignored", "weighted"]
FORWARD_KL = ForwardKL()
# Divergences other than forward KL have a moderate set of cases, of sizes that take little time.
OTHERS = [ReverseKL(), MixedKL(0.3), JSD(), JSD(0.1), SkewKL(), SkewReverseKL(), TotalVariation()]
SHAPES_OF_OTHERS = [(2, 32_003), (33, 4_099), (129, 1_023)]
# A case is repeated until it has so many rows and elements.  The error of a few numbers may be small by luck, and then the
# ratio of two errors says nothing.
SAMPLE_ROWS = 16
SAMPLE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Case:
    """A configuration of `kd_loss` to check."""

    rows: int
    vocabulary: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    temperature: float
    alpha: float
    logits: str  # one of LOGITS
    counted: str  # one of ROWS: the rows that count
    reduction: str
    seed: int
    launch: str = TWO  # ONE: the gradient comes with the loss, and backward multiplies it by the upstream gradient
    divergence: Divergence = FORWARD_KL

    def __str__(self) -> str:
        of = "" if self.divergence == FORWARD_KL else f"{self.divergence}, "
        return (
            f"{of}[{self.rows}, {self.vocabulary}] {self.dtypes}, T={self.temperature}, alpha={self.alpha}, {self.logits} "
            f"logits, rows {self.counted}, {self.reduction}, {self.launch}"
        )

    @property
    def options(self) -> tuple[float | str, ...]:
        return self.temperature, self.alpha, self.logits, self.counted, self.reduction, self.launch

    @property
    def has_right_values(self) -> bool:
        """Return whether each element of the gradient has one right value: the exact one, rounded to 16 bits.

        In one launch the gradient for an upstream gradient of 1 is rounded, then multiplied, and rounded again.
        """
        return self.student_dtype.itemsize == 2

    @property
    def dtypes(self) -> str:
        return " / ".join(dtype_name(dtype) for dtype in (self.student_dtype, self.teacher_dtype))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]
    labels: Tensor  # [N]
    token_weights: Tensor | None  # [N]
    upstream: Tensor  # [N]; its sum is the upstream gradient of a scalar loss


@dataclass(frozen=True)
class Errors:
    """Norm-relative errors against the float64 oracle: ours, and eager PyTorch's in float32 on the same inputs."""

    loss: float
    loss_eager: float
    gradient: float
    gradient_eager: float
    misrounded: (
        float  # share of 16-bit gradient elements that differ from the oracle's, rounded as often; 0 for float32
    )
    nan: bool  # whether there is a NaN where the oracle has none
    off: bool  # whether an element of a 16-bit gradient is further off than `_rounding` allows

    def shares(self, has_right_values: bool) -> dict[str, float]:
        """Return the errors of "loss" and "gradient" as shares of their bounds; infinity for one that is NaN."""
        gradient = self.gradient / _bound(self.gradient_eager)
        if has_right_values:
            gradient = self.misrounded / MISROUNDED_BOUND
        shares = {"loss": self.loss / _bound(self.loss_eager), "gradient": gradient}
        return {name: math.inf if math.isnan(share) else share for name, share in shares.items()}

    def failures(self, has_right_values: bool) -> list[str]:
        """Return a message for each bound that is exceeded."""
        found = []
        if self.nan:
            found.append("NaN where the oracle has none")
        if not self.loss <= _bound(self.loss_eager):
            found.append(f"loss error {self.loss:.1e}, eager's {self.loss_eager:.1e}")
        if has_right_values:
            if not self.misrounded <= MISROUNDED_BOUND:
                found.append(f"{self.misrounded:.1%} of the gradient is not the oracle's, rounded")
            if self.off:
                found.append("a gradient element is off by more than a unit in its last place")
        elif not self.gradient <= _bound(self.gradient_eager):
            found.append(f"gradient error {self.gradient:.1e}, eager's {self.gradient_eager:.1e}")
        return found


def cases(quick: bool = False) -> list[Case]:
    """Return the cases: all combinations of shape, dtypes, temperature and logits, with the other options in turns."""
    alphas, counted = itertools.cycle(ALPHAS), itertools.cycle(ROWS)
    reductions = itertools.cycle(["mean", "none", "sum", "mean", "none"])  # a cycle of 5, out of step with those of 3
    launches = itertools.cycle([TWO, ONE])
    result: list[Case] = []
    for (rows, vocabulary), dtypes, logits, temperature in itertools.product(SHAPES, DTYPES, LOGITS, TEMPERATURES):
        everything = rows * vocabulary < 200_000 and dtypes[0] == dtypes[1]
        for _ in range(len(ALPHAS) if everything else 1):
            if len(result) % 9 == 0:
                next(counted)  # this makes every pair of alpha and rows come up
            alpha, rows_counted, reduction = next(alphas), next(counted), next(reductions)
            has_choice = reduction != "none" and dtypes[0] != torch.float16
            result.append(
                Case(
                    rows,
                    vocabulary,
                    *dtypes,
                    temperature,
                    alpha,
                    logits,
                    rows_counted,
                    reduction,
                    seed=len(result),
                    launch=next(launches) if has_choice else TWO,
                )
            )
    others = cases_of_others(DTYPES[:3], SHAPES_OF_OTHERS, TEMPERATURES, quick)
    return (result[::17] if quick else result) + others


def cases_of_others(
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    shapes: Sequence[tuple[int, int]],
    temperatures: Sequence[float],
    quick: bool,
    kind: type[Case] = Case,
) -> list[Any]:
    """Return the cases of the divergences other than forward KL: shapes, dtypes and logits, with the rest in turns."""
    result: list[Case] = []
    turns = zip(
        itertools.cycle(temperatures),
        itertools.cycle([0.3, 0.7, 0.7, 0.3]),  # where models have no token in common the others' own gradients are 0
        itertools.cycle(ROWS),
        itertools.cycle(["mean", "sum", "none", "mean"]),
        itertools.cycle([TWO, ONE]),
        strict=False,
    )
    for divergence in OTHERS:
        of = [
            kind(
                rows,
                vocabulary,
                *pair,
                temperature,
                alpha,
                logits,
                counted,
                reduction,
                seed=5000 + 100 * len(result) + i,
                launch=launch if reduction != "none" and pair[0] != torch.float16 else TWO,
                divergence=divergence,
            )
            for i, (((rows, vocabulary), pair, logits), (temperature, alpha, counted, reduction, launch)) in enumerate(
                zip(itertools.product(shapes, dtypes, LOGITS), turns, strict=False)
            )
        ]
        result += of[len(result) % 7 :: 13] if quick else of
    return result


def inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Return random tensors for a case."""
    generator = torch.Generator().manual_seed(seed)
    N, V = case.rows, case.vocabulary

    def logits() -> Tensor:
        z = torch.randn(N, V, generator=generator)
        if case.logits == "flat":
            return 0.1 * z
        if case.logits == "peaked":
            return (2 * z).scatter_add_(1, torch.randint(V, (N, 1), generator=generator), torch.full((N, 1), 20.0))
        return 2 * z / torch.rand(N, V, generator=generator).clamp_min(1e-3).sqrt()  # nearly Student's t

    student, teacher = logits().to(case.student_dtype), logits().to(case.teacher_dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[0], labels[-1] = 0, V - 1
    token_weights = None
    if case.counted == "ignored" and N > 1:
        ignored = torch.arange(N) % 3 == 1
        labels[ignored] = -100
        student[ignored] = torch.nan
    if case.counted == "weighted":
        token_weights = torch.rand(N, generator=generator).to(device)
    upstream = torch.rand(N, generator=generator) + 0.5
    return Inputs(student.to(device), teacher.to(device), labels.to(device), token_weights, upstream.to(device))


def row_losses_and_gradient(
    function: Callable[..., Any], case: Case, given: Inputs, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return row losses `[N]` and the gradient of the reduced loss `[N, V]`, with the inputs cast to dtype if given."""
    student = (given.student if dtype is None else given.student.to(dtype)).detach().requires_grad_()
    teacher = given.teacher if dtype is None else given.teacher.to(dtype)
    options = {
        "alpha": case.alpha, "temperature": case.temperature, "token_weights": given.token_weights,
        "divergence": case.divergence,
    }  # fmt: skip
    with torch.no_grad():
        rows = function(student, teacher, given.labels, reduction="none", **options)
    loss = function(student, teacher, given.labels, reduction=case.reduction, **options)
    torch.autograd.backward(loss, (given.upstream if case.reduction == "none" else given.upstream.sum()).to(loss.dtype))
    assert student.grad is not None
    return rows, student.grad


def fused(case: Case, given: Inputs) -> list[Tensor]:
    """Return row losses and the gradient of the fused loss."""
    with launching(case.launch):
        return list(row_losses_and_gradient(kd_loss, case, given, None))


def measure(case: Case, device: torch.device, loss: Callable[..., Any] = kd_loss) -> Errors:
    """Return the errors of a loss in a case, over enough repeats for a sample."""
    functions: dict[str, tuple[Callable[..., Any], torch.dtype | None]] = {
        "ours": (loss, None),
        "eager": (reference.kd_loss, torch.float32),
        "oracle": (reference.kd_loss, torch.float64),
    }
    found: dict[str, list[Tensor]] = {name: [] for name in functions}
    gradients: dict[str, list[Tensor]] = {name: [] for name in found}
    scales, factors = [], []
    for repeat in range(max(1, SAMPLE_ROWS // case.rows, SAMPLE_ELEMENTS // (case.rows * case.vocabulary))):
        given = inputs(case, device, seed=1000 * case.seed + repeat)
        scales.append(_term_scale(case, given))
        factors.append(
            given.upstream.sum().expand(case.rows) if case.launch == ONE else torch.ones_like(given.upstream)
        )
        for name, (function, dtype) in functions.items():
            with launching(case.launch):
                rows, gradient = row_losses_and_gradient(function, case, given, dtype)
            found[name].append(rows)
            gradients[name].append(gradient)
    losses = {name: torch.cat(parts) for name, parts in found.items()}
    ours, eager, oracle = (torch.cat(gradients[name]) for name in found)
    misrounded, off = 0.0, False
    if ours.dtype != torch.float32:
        misrounded, off = _rounding(ours, oracle, (eager - oracle).abs(), torch.cat(scales), torch.cat(factors))
        if case.divergence != FORWARD_KL:
            misrounded = 0.0  # not judged: a slope and its mean cancel in many elements, in eager PyTorch too
    return Errors(
        loss=relative_error(losses["ours"], losses["oracle"]),
        loss_eager=relative_error(losses["eager"], losses["oracle"]),
        gradient=relative_error(ours, oracle),
        gradient_eager=relative_error(eager, oracle),
        misrounded=misrounded,
        nan=any(_has_new_nan(a, b) for a, b in ((losses["ours"], losses["oracle"]), (ours, oracle))),
        off=off,
    )


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Return |value - oracle| / |oracle|, with Euclidean norms in float64."""
    return float((value.detach().double() - oracle).norm() / oracle.norm())


def _term_scale(case: Case, given: Inputs) -> Tensor:
    """Return the factor of the probabilities in each row's gradient, `[N]`: the largest size of its cancelling terms."""
    weight = torch.ones_like(given.upstream) if given.token_weights is None else given.token_weights
    scale = weight * (given.upstream if case.reduction == "none" else given.upstream.sum())
    if case.reduction == "mean":
        scale = scale / weight.where(given.labels >= 0, 0.0).sum()
    slope = torch.ones_like(scale)
    if case.divergence != FORWARD_KL:  # the slope may grow with the difference of the logits
        z, y = (x.double() - x.double().amax(1, keepdim=True) for x in (given.student, given.teacher))
        slope = 1 + ((z - y).abs().amax(1) / case.temperature).clamp(max=case.divergence.largest_slope)
    return scale * (slope * case.alpha * case.temperature).clamp_min(1 - case.alpha)


def _rounding(
    ours: Tensor,  # [N, V]
    oracle: Tensor,  # [N, V]
    eager_error: Tensor,  # [N, V]
    term_scale: Tensor,  # [N]
    factor: Tensor,  # [N], the factor of each row's gradient after it was rounded
) -> tuple[float, bool]:
    """Return the share of misrounded elements, and whether an element is further off than rounding explains.

    An element may be off by one unit in its last place, plus the error of float32 before rounding: twice eager's largest
    error in the row, or twice one float32 epsilon of the terms that cancel.  If it was multiplied after rounding, the
    product may be off by one more unit.
    """
    factor = factor[:, None]
    first = oracle / factor
    rounded = (first.float().to(ours.dtype).float() * factor).to(ours.dtype)
    float32_error = torch.maximum(eager_error.amax(1), EPSILON * term_scale)[:, None]
    allowed = unit_in_last_place(first, ours.dtype) * factor + RATIO_BOUND * float32_error
    allowed += torch.where(factor == 1, 0.0, unit_in_last_place(oracle, ours.dtype))
    return float((ours != rounded).double().mean()), bool(((ours.double() - oracle).abs() > allowed).any())


def unit_in_last_place(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of that dtype at each value."""
    info = torch.finfo(dtype)
    return torch.exp2(value.abs().clamp_min(info.tiny).log2().floor()) * info.eps


def _has_new_nan(value: Tensor, oracle: Tensor) -> bool:
    return bool((value.isnan() & ~oracle.isnan()).any())


def _bound(eager: float) -> float:
    """Return the bound of an error where eager PyTorch's is `eager`."""
    return max(RATIO_BOUND * eager, EPSILON)


def by_group(measured: list[tuple[Case, Errors]]) -> Iterator[tuple[tuple[int, int, str], list[tuple[Case, Errors]]]]:
    """Group the cases of a divergence by shape and dtype pair."""
    yield from (
        (key, list(group))
        for key, group in itertools.groupby(
            measured, key=lambda pair: (pair[0].rows, pair[0].vocabulary, pair[0].dtypes)
        )
    )


def checking(cases: Sequence[Case], by: Callable[..., Errors] = measure) -> AbstractContextManager[None]:
    """Let `fused-kd check` run these cases of `kd_loss` with this function, while the context lasts."""
    return replaced_in(__name__, cases=lambda quick: list(cases), measure=by)
