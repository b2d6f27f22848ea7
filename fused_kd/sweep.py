"""The sweep: statistics, values, coefficients, gradient.  Whole logits and chunks of hidden states both go through it.

The operator merges the statistics of the parts of a row that threads and programs have swept.  In a single pass the
kernel takes the same four steps for each row while L2 holds the row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import divergences, launching, operators
from .divergences import Objective
from .launch import SinglePass
from .rows import weighted_values
from .statistics import statistics_dtype


class KDOptions(NamedTuple):
    """The options of a loss that its sweeps depend on."""

    vocab_size: int  # the number of leading columns that are real
    ce_in_loss: bool  # False: CE is computed for the caller's log only
    divergence_in_loss: bool  # False: the divergence is computed for the caller's log only
    dtype: torch.dtype  # dtype of the statistics: float32, or float64 for float64 logits
    objective: Objective


KD_SCHEMA = (  # the fields as arguments of an operator
    "SymInt vocab_size, bool ce_in_loss, bool divergence_in_loss, ScalarType statistics_dtype, "
    + operators.OBJECTIVE_SCHEMA
)


class Logits(NamedTuple):
    """The student's logits of N rows, and the teacher's logits and the labels that they are compared with."""

    student: Tensor  # [outer, inner, V'], V' >= vocab_size
    teacher: Tensor | None  # [outer', inner', vocab_size]; None leaves out the divergence
    labels: Tensor | None  # [N]; None leaves out CE


class Weights(NamedTuple):
    """The weights of each row's two terms in the loss, `[N]`, float64.  A row with both weights 0 is not read."""

    ce: Tensor
    divergence: Tensor


class Values(NamedTuple):
    """The results of a sweep over N rows.  A term that is not computed is a tensor of zeros."""

    statistics: Tensor  # [6, N], merged
    ce: Tensor  # [N], float64
    divergence: Tensor  # [N], float64


class Buffers(NamedTuple):
    """The memory that the gradients of the logits are written to.  It may be that of the logits themselves."""

    student: Tensor  # [outer, inner, V']
    teacher: Tensor | None = None  # [outer', inner', vocab_size]


def sweep(
    logits: Logits,
    weights: Weights,
    options: KDOptions,
    gradients: Buffers | None,  # receives the gradients for an upstream gradient of 1; None: only values are computed
    launch: SinglePass | None = None,  # a single pass, which writes the gradient over the student; None: two passes
) -> Values:
    """Return the values of the rows, and write the gradients of sum_i (w_ce CE + w_d D)."""
    if gradients is not None and launch is not None:
        return single_pass(logits, weights, options, launch, in_place=True)[0]
    statistics = merged_statistics(logits, weights, options)
    found = values(statistics, label_logits(logits, options), logits, options)
    if gradients is not None:
        learns = gradients.teacher is not None
        row_coefficients = gradient_coefficients(statistics, weights, options, teacher_grad=learns)
        write_gradients(gradients, logits, row_coefficients, options)
    return found


def merged_statistics(logits: Logits, weights: Weights, options: KDOptions) -> Tensor:  # [6, N]
    """Return the statistics of all real columns."""
    student, teacher, labels = logits
    # Compared in float64: a weight of 1e-50 is 0 in float32, and its row still has a value.
    counted = torch.logical_or(weights.ce, weights.divergence)
    real, need_ce = student[..., : options.vocab_size], labels is not None
    statistics: Tensor = operators.row_statistics(
        real, teacher, counted, options.dtype, need_ce, *operators.packed(options.objective)
    )
    return statistics


def label_logits(logits: Logits, options: KDOptions) -> Tensor | None:  # [N]
    """Return the student's logit of each row's label."""
    student, _, labels = logits
    if labels is None:
        return None
    index = labels.clamp(0, options.vocab_size - 1).long().view(*student.shape[:2], 1)
    return options.objective.student_map.of(student.gather(2, index).flatten().to(options.dtype))


def values(
    statistics: Tensor,  # [6, N]
    label_logit: Tensor | None,  # [N]
    logits: Logits,
    options: KDOptions,
) -> Values:
    """Return CE and divergence of the rows."""
    has_teacher = logits.teacher is not None
    ce, divergence = divergences.values(statistics, label_logit, options.objective, need_divergence=has_teacher)
    return Values(statistics, ce, divergence)


def gradient_coefficients(
    statistics: Tensor,  # [6, N]
    weights: Weights,  # times the upstream gradient
    options: KDOptions,
    *,
    teacher_grad: bool,
) -> Tensor:  # [7, N]
    """Return the coefficients of each row's gradient.  A term that is only logged adds nothing to them."""
    return divergences.coefficients(
        statistics,
        weights.ce if options.ce_in_loss else None,
        weights.divergence if options.divergence_in_loss else None,
        options.objective,
        teacher_grad=teacher_grad,
    )


def write_gradients(
    gradients: Buffers,
    logits: Logits,
    row_coefficients: Tensor,  # [7, N]
    options: KDOptions,
) -> None:
    """Write the gradients of the logits."""
    student, teacher, labels = _in_loss(logits, options)
    V, objective = options.vocab_size, options.objective
    operators.write_gradient(*gradients, student, teacher, labels, row_coefficients, V, objective)


def gradient_arguments(
    logits: Logits,
    row_coefficients: Tensor,  # [7, N]
    options: KDOptions,
    teacher_grad: bool,
) -> tuple[Any, ...]:
    """Return the arguments of the operators that return gradients."""
    return (
        *_in_loss(logits, options),
        row_coefficients,
        options.vocab_size,
        teacher_grad,
        *operators.packed(options.objective),
    )


def _in_loss(logits: Logits, options: KDOptions) -> Logits:
    """Return the logits without the teacher, or without the labels, if their term is only logged."""
    student, teacher, labels = logits
    return Logits(student, teacher if options.divergence_in_loss else None, labels if options.ce_in_loss else None)


def single_pass(
    logits: Logits, weights: Weights, options: KDOptions, launch: SinglePass, *, in_place: bool
) -> tuple[Values, Tensor]:
    """Return the values and the student's gradient from one launch.

    The gradient is a new tensor; with `in_place` it overwrites the student.
    """
    label_logit = label_logits(logits, options)  # read now, since the launch may overwrite the logits
    operator = operators.statistics_and_gradient_ if in_place else operators.statistics_and_gradient
    found = operator(
        *logits, *weights, options.vocab_size, options.dtype, list(launch), *operators.packed(options.objective)
    )
    statistics, gradient = (found, logits.student) if in_place else found
    return values(statistics, label_logit, logits, options), gradient


def chosen_launch(
    logits: Logits,
    options: KDOptions,
    *,
    in_place: bool,  # the gradient overwrites the student
    always: bool = False,  # a single pass even where it is slower: whether forward overwrites must not depend on the device
) -> SinglePass | None:
    """Return the launch of a single pass over the logits, or None where two passes are faster, needed or asked for.

    A single pass gives the gradient of every term that it computes.  So it cannot be taken if a term is only logged.
    Its statistics are float64 only if these logits are.  So it cannot be taken if `options.dtype` is float64 because of a
    teacher that is left out here.
    """
    student, teacher, labels = logits
    same_terms = (labels is None or options.ce_in_loss) and (teacher is None or options.divergence_in_loss)
    if not same_terms or options.dtype != statistics_dtype(student, teacher):
        return None
    # Triton 3.8 and 3.9 cannot compile a cluster's kernel with both terms and a softcap: `PlanCTAPass` fails.
    is_capped = options.objective.student_map.is_capped or options.objective.teacher_map.is_capped
    return launching.single_pass(
        student, teacher, options.vocab_size, in_place=in_place, clusters=not is_capped, always=always
    )


def weighted_sum(ce: Tensor, divergence: Tensor, weights: Weights, options: KDOptions) -> Tensor:  # [N] each, float64
    """Return w_ce CE + w_d D of each row.  A term that is only logged is left out."""
    if not options.divergence_in_loss:
        return weighted_values(weights.ce, ce)
    loss = weighted_values(weights.divergence, divergence)
    return loss + weighted_values(weights.ce, ce) if options.ce_in_loss else loss


def weight_gradients(
    needed: tuple[bool, bool],  # whether the CE weight, and the divergence weight, requires grad
    upstream: Tensor,  # [N], or a scalar
    weights: Weights,
    ce: Tensor,  # [N]
    divergence: Tensor,  # [N]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the row losses with respect to the two weights of each row."""
    counted = torch.logical_or(weights.ce, weights.divergence)
    parts = zip(needed, (ce, divergence), strict=True)
    for_ce, for_divergence = (torch.where(counted, upstream * value, 0.0) if need else None for need, value in parts)
    return for_ce, for_divergence
