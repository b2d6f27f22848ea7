"""The same of `linear_kd_loss`: its configurations for `fused-kd check`, and its errors on one of them."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import linear_kd_loss, reference
from ..launch import ONE, TWO
from .accuracy import ALPHAS, LOGITS, ROWS, SAMPLE_ROWS, Case, Errors, planned, relative_error

H_S, H_T = 48, 80
SHAPES = [(1, 1000), (2, 32_003), (2, 262_144), (7, 128_256), (33, 4_099), (129, 1_023)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURES = [1.0, 2.0, 10.0]
CHUNKS = 3  # of the larger cases
IGNORED = -100


@dataclass(frozen=True)
class LinearCase(Case):
    """With heads of widths 48 and 80, the student's with a bias, in the dtype of student and teacher."""

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
    plans = itertools.cycle([TWO, ONE])
    result: list[LinearCase] = []
    for (rows, vocabulary), dtype, logits, temperature in itertools.product(SHAPES, DTYPES, LOGITS, TEMPERATURES):
        if len(result) % 3 == 0:
            next(alphas)  # so that every pair of alpha, temperature and rows comes up
        if len(result) % 9 == 0:
            next(counted)
        options = temperature, next(alphas), logits, next(counted), next(reductions)
        result.append(LinearCase(rows, vocabulary, dtype, dtype, *options, seed=len(result), plan=next(plans)))
    return result[::17] if quick else result


def inputs(case: LinearCase, device: torch.device, seed: int) -> Inputs:
    """Heads whose logits are those of `accuracy.inputs`: flat, peaked at a random class, or heavy-tailed."""
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


def results(name: str, case: LinearCase, given: Inputs) -> list[Tensor]:
    """Row losses, and the gradients of hidden states, weight and bias; "ours", "eager" (in the same dtype), "oracle"."""
    dtype = torch.float64 if name == "oracle" else case.student_dtype
    loss = linear_kd_loss if name == "ours" else reference.linear_kd_loss
    hidden, weight, bias, *teacher = (
        tensor.detach().to(dtype, copy=True)
        for tensor in (given.hidden, given.weight, given.bias, given.teacher_hidden, given.teacher_weight)
    )
    if name == "ours":  # eager heads cannot leave out a row: its NaN reaches their weight gradient
        hidden[given.labels == IGNORED] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    arguments = (hidden, weight, *teacher, given.labels)
    options = {
        "alpha": case.alpha, "temperature": case.temperature, "token_weights": given.token_weights, "student_bias": bias
    }  # fmt: skip
    if name == "ours":
        a_token = 2 * -(-case.vocabulary // 64) * 64 * dtype.itemsize
        options["workspace_bytes"] = a_token * max(16, -(-case.rows // CHUNKS))
    with torch.no_grad():
        rows = loss(*arguments, reduction="none", **options)  # type: ignore[arg-type]
    value = loss(*arguments, reduction=case.reduction, **options)  # type: ignore[arg-type]
    assert isinstance(rows, Tensor)
    assert isinstance(value, Tensor)
    upstream = given.upstream if case.reduction == "none" else given.upstream.sum()
    return [rows, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def fused(case: LinearCase, given: Inputs) -> list[Tensor]:
    """Row losses and gradients of the fused loss."""
    with planned(case.plan):
        return results("ours", case, given)


def measure(case: LinearCase, device: torch.device) -> Errors:
    """Runs a case, as often as it takes for a sample; of the three gradients' errors the root mean square."""
    names = ("ours", "eager", "oracle")
    samples: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for repeat in range(max(1, SAMPLE_ROWS // case.rows)):
        given = inputs(case, device, seed=1000 * case.seed + repeat)
        for name in names:
            with planned(case.plan):
                samples[name].append([result.flatten() for result in results(name, case, given)])
    ours, eager, oracle = ([torch.cat(parts) for parts in zip(*samples[name], strict=True)] for name in names)
    loss, *gradients = zip(
        *(
            [relative_error(value, exact) for value, exact in zip(values, oracle, strict=True)]
            for values in (ours, eager)
        ),
        strict=True,
    )
    # One figure for the three, since a bias gradient is little more than one number for each label, and the ratio of two
    # roundings (that of the forward pass, that of the upstream gradient) to one is luck.
    gradient, gradient_eager = (math.sqrt(sum(e**2 for e in of) / len(of)) for of in zip(*gradients, strict=True))
    return Errors(
        loss=loss[0],
        loss_eager=loss[1],
        gradient=gradient,
        gradient_eager=gradient_eager,
        misrounded=0.0,
        nan=any(bool((a.isnan() & ~exact.isnan()).any()) for a, exact in zip(ours, oracle, strict=True)),
        off=False,
    )
