"""The sweep: weights of the rows in, losses out, and the gradient.

    statistics of some columns -> merge -> values and coefficients -> gradient, tile by tile

Whole logits and chunks of hidden states both go through it.  The functions here run inside the operators of `operators.py`,
and choose the backend.  CUDA (and ROCm) tensors go to the Triton kernels, CPU tensors to `backends/cpu.py`.  With
TRITON_INTERPRET=1 CPU tensors go to the kernels too, which Triton then runs in Python.  Triton is imported when the first
kernel is needed.

A backend merges the statistics of the parts of a row that threads and programs have swept.  It computes the coefficients of
each row where it takes the row's gradient.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import divergences, launching
from . import statistics as stats
from .backends import cpu
from .divergences import Objective, divergence_of
from .launch import SinglePass
from .rows import are_read


class KDOptions(NamedTuple):
    """The options of a loss that its sweeps depend on."""

    vocab_size: int  # the number of leading columns that are real
    ce_in_loss: bool  # False: CE is computed for the caller's log only
    divergence_in_loss: bool  # False: the divergence is computed for the caller's log only
    dtype: torch.dtype  # dtype of the statistics and of the loss: float32, or float64 for float64 logits
    reduce: bool = True  # whether the losses of the rows are summed
    parts: bool = False  # whether CE, divergence and entropy are returned beside the loss
    objective: Objective = Objective()


class Logits(NamedTuple):
    """The student's logits of N rows, and the teacher's logits and the labels that they are compared with."""

    student: Tensor  # [outer, inner, V'], V' >= vocab_size
    teacher: Tensor | None  # [outer', inner', vocab_size]; None leaves out the divergence
    labels: Tensor | None  # [N]; None leaves out CE


class Buffers(NamedTuple):
    """The memory that the gradients of the logits are written to.  It may be that of the logits themselves."""

    student: Tensor  # [outer, inner, V']
    teacher: Tensor | None = None  # [outer', inner', vocab_size]


class Losses(NamedTuple):
    """The losses of N rows: summed, or one value per row."""

    loss: Tensor  # a scalar, or [N]
    ce: Tensor  # the same, of CE; without parts, or without labels, an empty tensor
    divergence: Tensor  # the same, of the divergence; without parts, or without a teacher, an empty tensor
    entropy: Tensor  # the same, of the student's entropy; without parts an empty tensor
    statistics: Tensor  # [9, N], merged


def losses(
    logits: Logits,
    weights: Tensor,  # [3, N], float64
    options: KDOptions,
    gradients: Buffers | None = None,
    launch: SinglePass | None = None,
) -> Losses:
    """Return the losses of the rows, and write the gradients of their sum if there is memory for them."""
    student, teacher, labels = logits
    N = weights.shape[1]
    statistics, counters = new_statistics(weights, options), new_counters(student, lines_of(N, 1, options) + 1)
    sweep(logits, weights, options, statistics, counters, gradients, launch)
    return row_losses(statistics, weights, counters, options, labels is not None, teacher is not None)


def sweep(
    logits: Logits,
    weights: Tensor,  # [3, N]
    options: KDOptions,
    statistics: Tensor,  # [9, N], written
    counters: Tensor | None,  # [lines_of(N, 1), LINE] zeros; more may follow
    gradients: Buffers | None,  # receives the gradients of sum_i (w_ce CE + w_d D); None: only statistics are taken
    launch: SinglePass | None = None,  # takes statistics and gradient in one launch; None: two passes
) -> None:
    """Write the statistics of the rows, and their gradients."""
    student, teacher, labels = logits
    real, backend = student[..., : options.vocab_size], backend_of(student, options.dtype)
    with device_of(student):
        if gradients is None or launch is None:
            backend.row_statistics(
                real, teacher, labels, weights, statistics, counters, options.objective, options.parts
            )
        else:
            written = gradients.student[..., : options.vocab_size]
            backend.statistics_and_gradient(
                real, teacher, labels, weights, statistics, written, counters, launch, options.objective, options.parts
            )
            _zero_padding(gradients.student, options)
    if gradients is not None and launch is None:
        write_gradients(gradients, logits, statistics, weights, None, options)


def write_gradients(
    gradients: Buffers,
    logits: Logits,
    statistics: Tensor,  # [9, N]
    weights: Tensor,  # [3, N]
    upstream: Tensor | None,  # the upstream gradient of the loss: a scalar, or [N]; None: 1
    options: KDOptions,
) -> None:
    """Write the gradients of the logits.  A term that is only logged adds nothing to them."""
    student, teacher, labels = logits
    with device_of(student):
        backend_of(student, options.dtype).logit_gradient(
            student[..., : options.vocab_size],
            teacher if options.divergence_in_loss else None,
            labels if options.ce_in_loss else None,
            statistics, weights, upstream,
            gradients.student[..., : options.vocab_size], gradients.teacher, options.objective,
        )  # fmt: skip
    _zero_padding(gradients.student, options)


def _zero_padding(gradient: Tensor, options: KDOptions) -> None:
    if gradient.shape[-1] != options.vocab_size:
        gradient[..., options.vocab_size :] = 0


def row_losses(
    statistics: Tensor,  # [9, N]
    weights: Tensor,  # [3, N]
    counters: Tensor | None,  # [n, LINE]; the last line is zeros
    options: KDOptions,
    has_ce: bool,
    has_divergence: bool,
) -> Losses:
    """Return the losses from the statistics and the weights of the rows."""
    with device_of(weights):
        found = backend_of(weights, options.dtype).row_losses(
            statistics, weights, None if counters is None else counters[-1:], has_ce, has_divergence,
            options.reduce, options.parts, options.dtype, options.objective,
        )  # fmt: skip
    loss, ce, divergence, entropy = found
    return Losses(loss, ce, divergence, entropy, statistics)


def new_statistics(weights: Tensor, options: KDOptions) -> Tensor:
    """Return memory for the statistics of all rows, `[9, N]`.

    Kernels write 0 to the numbers that a loss does not need, and CPU operators do not write them.
    """
    new = weights.new_empty if runs_kernels(weights) else weights.new_zeros
    return new(stats.COUNT, weights.shape[1], dtype=options.dtype)


def lines_of(rows: int, sweeps: int, options: KDOptions) -> int:
    """Return the lines of counters that sweeps over so many rows, all in all, need."""
    return divergence_of(options.objective).sweeps * (sweeps + rows)


def new_counters(like: Tensor, lines: int) -> Tensor | None:
    """Return counters for programs that work on the same rows, zeros; None on the CPU."""
    return _kernels().new_counters(like, lines) if runs_kernels(like) else None


def weight_gradients(
    statistics: Tensor,  # [9, N]
    weights: Tensor,  # [3, N]
    upstream: Tensor,  # [N], or a scalar
    options: KDOptions,
) -> Tensor:  # [3, N]
    """Return the gradients of the losses with respect to the weights.  They are 0 for a row that does not count."""
    *values, _ = divergences.values(
        statistics, options.objective, need_ce=options.ce_in_loss, need_divergence=options.divergence_in_loss
    )
    for_ce, for_divergence = (torch.where(are_read(weights), upstream * value, 0.0) for value in values)
    return torch.stack([torch.zeros_like(for_ce), for_ce, for_divergence])


def scale(
    source: Tensor,
    factors: Sequence[Tensor],  # one or two scalars
    target: Tensor,  # in the shape of the source, which it may be
) -> None:
    """Write the product of a tensor and scalars, rounded once.

    On a GPU the kernel is always launched, since the host does not know the factors.  If their product is 1 and the target
    is the source, only the factors are read.
    """
    with device_of(source):
        backend_of(source, torch.promote_types(source.dtype, torch.float32)).scale_(source, factors, target)


ON_CPU = SinglePass(1, 1, 1, 1, 0, 0, 1)  # stands for a single pass where nothing is launched


def chosen_launch(
    logits: Logits,
    options: KDOptions,
    *,
    in_place: bool,  # the gradient overwrites the student
    always: bool = False,  # a single pass even where it is slower: whether forward overwrites must not depend on the device
) -> SinglePass | None:
    """Return the launch of a single pass over the logits, or None where two passes are faster, needed or asked for.

    A CPU takes a single pass, unless two passes are asked for.

    A single pass gives the gradient of every term that it computes.  So it cannot be taken if a term is only logged.
    Its statistics are float64 only if these logits are.  So it cannot be taken if `options.dtype` is float64 because of a
    teacher that is left out here.
    """
    student, teacher, labels = logits
    same_terms = (labels is None or options.ce_in_loss) and (teacher is None or options.divergence_in_loss)
    if not same_terms or options.dtype != stats.statistics_dtype(student, teacher):
        return None
    if not runs_kernels(student) and launching.device_of(student.device) is None:
        return None if launching.requested() == launching.TWO else ON_CPU
    # Triton 3.8 and 3.9 cannot compile a cluster's kernel with both terms and a softcap: `PlanCTAPass` fails.
    is_capped = options.objective.student_map.is_capped or options.objective.teacher_map.is_capped
    sweeps = 1 if teacher is None else divergence_of(options.objective).sweeps
    return launching.single_pass(
        student, teacher, options.vocab_size,
        in_place=in_place, clusters=not is_capped, sweeps=sweeps, always=always,
    )  # fmt: skip


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether the tensor goes to the Triton kernels."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def backend_of(tensor: Tensor, dtype: torch.dtype) -> Any:
    """Return the module of the backend that computes in that dtype.  The kernels have only float32."""
    return _kernels() if runs_kernels(tensor) and dtype == torch.float32 else cpu


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one, since Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _kernels() -> ModuleType:
    try:
        from .backends import triton as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "fused_kd runs CUDA tensors with Triton kernels, and the package triton is not installed: "
            "`pip install triton` (Linux), or move the tensors to the CPU",
            name="triton",
        ) from error
    return kernels
