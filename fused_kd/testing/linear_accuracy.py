"""The configurations of `fused-kd check` for `linear_kd_loss`, and its errors in each of them."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import linear_kd_loss, reference
from ..launching import ONE, TWO, launching
from .accuracy import ALPHAS, LOGITS, ROWS, SAMPLE_ROWS, SHAPES_OF_OTHERS, Case, Errors, cases_of_others

H_S, H_T = 48, 80
SHAPES = [(1, 1000), (2, 32_003), (2, 262_144), (7, 128_256), (33, 4_099), (129, 1_023)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [1.0, 2.0, 10.0]
CHUNKS = 3  # the number of chunks in the larger cases
IGNORED = -100


@dataclass(frozen=True)
class LinearCase(Case):
    """A case with heads of widths 48 and 80, the student's with a bias, in the dtype of student and teacher."""

    def __str__(self) -> str:
        return f"from hidden states {super().__str__()}"

    @property
    def has_right_values(self) -> bool:
        return False  # 16-bit heads round their logits too

    @property
    def dtypes(self) -> str:
        return f"{super().dtypes.split(' / ')[0]} heads"


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    bias: Tensor
    token_weights: Tensor | None
    upstream: Tensor  # [N]; its sum is the upstream gradient of a scalar loss


def cases(quick: bool = False) -> list[LinearCase]:
    alphas, counted = itertools.cycle(ALPHAS), itertools.cycle(ROWS)
    reductions = itertools.cycle(["mean", "none", "sum", "mean", "none"])
    launches = itertools.cycle([TWO, ONE])
    result: list[LinearCase] = []
    for (rows, vocabulary), dtype, logits, temperature in itertools.product(SHAPES, DTYPES, LOGITS, TEMPERATURES):
        if len(result) % 3 == 0:
            next(alphas)  # this makes every pair of alpha, temperature and rows come up
        if len(result) % 9 == 0:
            next(counted)
        options = temperature, next(alphas), logits, next(counted), next(reductions)
        result.append(LinearCase(rows, vocabulary, dtype, dtype, *options, seed=len(result), launch=next(launches)))
    others = cases_of_others([(d, d) for d in DTYPES], SHAPES_OF_OTHERS[1:], TEMPERATURES, quick, LinearCase)
    return (result[::17] if quick else result) + others


def inputs(case: LinearCase, device: torch.device, seed: int) -> Inputs:
    """Return heads whose logits are like those of `accuracy.inputs`: flat, peaked at a random class, or heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    N, V = case.rows, case.vocabulary
    heads = []
    for width in (H_S, H_T):
        hidden, weight = torch.randn(N, width, generator=generator), torch.randn(V, width, generator=generator)
        weight *= (0.1 if case.logits == "flat" else 2.0) / width**0.5
        if case.logits == "heavy-tailed":
            weight /= torch.rand(V, 1, generator=generator).clamp_min(1e-3).sqrt()
        if case.logits == "peaked":
            peak = weight[torch.randint(V, (N,), generator=generator)]
            hidden += 20 * peak / (peak**2).sum(1, keepdim=True)
        heads += [hidden.to(case.student_dtype), weight.to(case.student_dtype)]
    labels = torch.randint(V, (N,), generator=generator)
    labels[0], labels[-1] = 0, V - 1
    if case.counted == "ignored" and N > 1:
        ignored = torch.arange(N) % 3 == 1
        labels[ignored] = IGNORED
    token_weights = torch.rand(N, generator=generator).to(device) if case.counted == "weighted" else None
    bias = torch.randn(V, generator=generator).to(case.student_dtype)
    upstream = torch.rand(N, generator=generator) + 0.5
    hidden, weight, teacher_hidden, teacher_weight = (head.to(device) for head in heads)
    return Inputs(
        hidden, weight, teacher_hidden, teacher_weight, labels.to(device), bias.to(device), token_weights,
        upstream.to(device),
    )  # fmt: skip


def results(name: str, case: LinearCase, given: Inputs, ours: Callable[..., Any] = linear_kd_loss) -> list[Tensor]:
    """Return row losses and the gradients of hidden states, weight and bias.

    The name says by which loss: "ours", "eager" (in the same dtype) or "oracle".
    """
    dtype = torch.float64 if name == "oracle" else case.student_dtype
    loss = ours if name == "ours" else reference.linear_kd_loss
    hidden, weight, bias, *teacher = (
        tensor.detach().to(dtype, copy=True)
        for tensor in (given.hidden, given.weight, given.bias, given.teacher_hidden, given.teacher_weight)
    )
    if name == "ours":  # eager heads do not leave out ignored rows: a NaN would reach their weight gradient
        hidden[given.labels == IGNORED] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    arguments: list[Any] = [hidden, weight, *teacher, given.labels]
    options: dict[str, Any] = {
        "alpha": case.alpha, "temperature": case.temperature, "token_weights": given.token_weights, "student_bias": bias,
        "divergence": case.divergence,
    }  # fmt: skip
    if name == "ours":
        token_bytes = 2 * -(-case.vocabulary // 64) * 64 * dtype.itemsize
        options["workspace_bytes"] = token_bytes * max(16, -(-case.rows // CHUNKS))
    with torch.no_grad():
        rows = loss(*arguments, reduction="none", **options)
    value = loss(*arguments, reduction=case.reduction, **options)
    upstream = given.upstream if case.reduction == "none" else given.upstream.sum()
    return [rows, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def fused(case: LinearCase, given: Inputs) -> list[Tensor]:
    """Return row losses and gradients of the fused loss."""
    with launching(case.launch):
        return results("ours", case, given)


class Sums:
    """Sums, over samples, of the squares of errors and of exact values.  The samples are too large to be kept."""

    def __init__(self) -> None:
        self.squares: list[tuple[float, float]] = []  # (squared error, squared exact value) of each result
        self.nan = False  # whether there was a NaN where the oracle has none

    def add(self, values: list[Tensor], oracle: list[Tensor]) -> None:
        before = self.squares or [(0.0, 0.0)] * len(oracle)
        self.squares = []
        for (squared_error, squared_exact), value, exact in zip(before, values, oracle, strict=True):
            value = value.detach()
            error = float(torch.linalg.vector_norm(value.double() - exact))
            self.squares.append((squared_error + error * error, squared_exact + float(exact.square().sum())))
            # The error is NaN if the value or the exact value has a NaN.
            self.nan = self.nan or (math.isnan(error) and bool((value.isnan() & ~exact.isnan()).any()))

    def relative_errors(self) -> list[float]:
        """Return the norm of each result's errors, divided by the norm of its exact values."""
        return [math.sqrt(error) / math.sqrt(exact) if exact else math.nan for error, exact in self.squares]


def measure(case: LinearCase, device: torch.device, loss: Callable[..., Any] = linear_kd_loss) -> Errors:
    """Return the errors of a loss in a case, over enough repeats for a sample.

    The gradient's error is the root mean square of the errors of the three gradients.
    """
    ours, eager = Sums(), Sums()
    for repeat in range(max(1, SAMPLE_ROWS // case.rows)):
        given = inputs(case, device, seed=1000 * case.seed + repeat)
        with launching(case.launch):
            oracle = results("oracle", case, given)
            ours.add(results("ours", case, given, loss), oracle)
            eager.add(results("eager", case, given), oracle)
    losses, *gradients = zip(ours.relative_errors(), eager.relative_errors(), strict=True)
    # The three errors are one figure, since a bias gradient holds little more than one number per label.  Its own error
    # would depend on the luck of a few roundings.
    gradient, gradient_eager = (math.sqrt(sum(e**2 for e in of) / len(of)) for of in zip(*gradients, strict=True))
    return Errors(
        loss=losses[0],
        loss_eager=losses[1],
        gradient=gradient,
        gradient_eager=gradient_eager,
        misrounded=0.0,
        nan=ours.nan,
        off=False,
    )
