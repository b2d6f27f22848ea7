"""From logits to row losses and their gradient: statistics, merge, gradient, the three steps that every path takes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch as one_launch
from . import operators as ops
from . import statistics as stats
from .backends.cpu import statistics_dtype
from .logit_map import IDENTITY_MAP, LogitMap
from .rows import weighted_values


class KDOptions(NamedTuple):
    temperature: float | Tensor  # a tensor outside of the operators only, under a compiler; see `ops.TRACED`
    vocab_size: int  # how many leading columns of the student are real
    ce_in_loss: bool  # False: CE is computed for the caller's log only
    kl_in_loss: bool
    dtype: torch.dtype  # of the statistics: float32, or float64 for float64 logits
    student_map: LogitMap = IDENTITY_MAP
    teacher_map: LogitMap = IDENTITY_MAP


class RowValues(NamedTuple):
    """What a sweep over the logits of N rows gives; CE and KL are zeros where they were not computed."""

    statistics: Tensor  # [6, N]
    ce: Tensor  # [N], float64
    kl: Tensor  # [N], float64


def row_values(
    student: Tensor,  # [outer, inner, V'], V' >= vocab_size
    teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N], float64; a row with both weights 0 is not read
    options: KDOptions,
) -> RowValues:
    real, dtype = student[..., : options.vocab_size], options.dtype
    # Whether a row counts, not how much: a weight of 1e-50 is 0 in float32, but the row has a value all the same.
    counted = (ce_weight != 0).to(dtype), (kl_weight != 0).to(dtype)
    statistics = ops.row_statistics(
        real, teacher, *counted, options.temperature, labels is not None,
        options.student_map, options.teacher_map,
    )  # fmt: skip
    return _values(
        statistics, label_logits(student, labels, options), teacher is not None, ce_weight, options.temperature
    )


def label_logits(student: Tensor, labels: Tensor | None, options: KDOptions) -> Tensor | None:  # [N]
    if labels is None:
        return None
    index = labels.clamp(0, options.vocab_size - 1).long().view(*student.shape[:2], 1)
    return options.student_map.of(student.gather(2, index).flatten().to(options.dtype))


def _values(
    statistics: Tensor,  # [6, N]
    label_logit: Tensor | None,  # [N]
    has_teacher: bool,
    like: Tensor,  # [N], float64
    temperature: float | Tensor,
) -> RowValues:
    return RowValues(
        statistics,
        torch.zeros_like(like) if label_logit is None else stats.cross_entropy(statistics, label_logit),
        stats.kl_divergence(statistics, temperature) if has_teacher else torch.zeros_like(like),
    )


def fits_one_launch(
    student: Tensor,  # [..., V']
    teacher: Tensor | None,  # [outer', inner', vocab_size]
    labels: Tensor | None,  # [N]
    options: KDOptions,
    *,
    in_place: bool = False,
) -> bool:
    """For values and gradient of the same terms: one that is only logged has no gradient.

    In the dtype of the logits' own: not in float64 for the sake of a teacher that is left out.  In place on every device:
    when the logits are written over must not depend on it.
    """
    same_terms = (labels is None or options.ce_in_loss) and (teacher is None or options.kl_in_loss)
    same_dtype = options.dtype == statistics_dtype(student, teacher)
    if not (same_terms and same_dtype):
        return False
    if in_place:
        return one_launch.requested() != one_launch.TWO
    return one_launch.is_chosen(student, teacher, options.vocab_size)


def row_values_and_gradient(
    student: Tensor,  # [outer, inner, V'], V' >= vocab_size
    teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N], float64; a row with both weights 0 is not read
    options: KDOptions,
    *,
    in_place: bool,
) -> tuple[RowValues, Tensor]:  # and the gradient of sum_i w_ce CE + w_kl KL, like the student; or in its memory
    """`row_values`, and the gradient from the same launch."""
    label_logit = label_logits(student, labels, options)  # while they are there
    arguments = (
        student, teacher, labels, ce_weight, kl_weight, options.temperature, options.vocab_size,
        options.student_map, options.teacher_map,
    )  # fmt: skip
    if in_place:
        statistics, gradient = ops.loss_and_gradient_(*arguments), student
    else:
        statistics, gradient = ops.loss_and_gradient(*arguments)
    return _values(statistics, label_logit, teacher is not None, ce_weight, options.temperature), gradient


def weighted_sum(
    ce: Tensor,  # [N]
    kl: Tensor,  # [N]
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]
    options: KDOptions,
) -> Tensor:  # [N], float64: w_ce CE + w_kl KL
    """Without the terms that are only logged."""
    if not options.kl_in_loss:
        return weighted_values(ce_weight, ce)
    loss = weighted_values(kl_weight, kl)
    return loss + weighted_values(ce_weight, ce) if options.ce_in_loss else loss


def gradient_arguments(
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', vocab_size]
    statistics: Tensor,  # [6, N]
    labels: Tensor | None,  # [N]
    ce_weight: Tensor,  # [N], float64, with the upstream gradient multiplied in
    kl_weight: Tensor,  # [N]
    options: KDOptions,
) -> tuple[Any, ...]:
    """What the gradient's operators take from the student on; terms that are only logged have no gradient."""
    return (
        student, teacher if options.kl_in_loss else None, labels if options.ce_in_loss else None, statistics,
        ce_weight.to(options.dtype), kl_weight.to(options.dtype), options.temperature, options.vocab_size,
        options.student_map, options.teacher_map,
    )  # fmt: skip


def weight_gradients(
    needed: tuple[bool, bool],
    upstream: Tensor,  # [N], or a scalar
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]
    ce: Tensor,  # [N]
    kl: Tensor,  # [N]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the row losses with respect to the two weights of a row."""
    counted = (ce_weight != 0) | (kl_weight != 0)
    parts = zip(needed, (ce, kl), strict=True)
    ce_gradient, kl_gradient = (torch.where(counted, upstream * value, 0.0) if need else None for need, value in parts)
    return ce_gradient, kl_gradient
