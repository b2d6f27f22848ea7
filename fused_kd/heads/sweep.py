"""The loss from hidden states: chunks of tokens whose logits exist one chunk at a time.

With F = 2 N V H flops, the student's F_s and the teacher's F_t, a step takes F_s + F_t for the logits, F_s for the
gradient of the hidden states and F_s for that of the weight: the gradient of a chunk's logits is taken while they are
there, over them, so nothing is projected twice.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import operators as ops
from ..rows import NEGLIGIBLE
from ..sweep import KDOptions, fits_one_launch, gradient_arguments, row_values, row_values_and_gradient
from .chunks import Plan, plan, row_stride
from .products import accumulate, project

__all__ = ["Gradients", "Head", "LinearOptions", "Plan", "gradient_unit", "plan", "planned_chunk", "sweep"]


class Head(NamedTuple):
    """The last hidden states of a model and its output head: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']

    def cast(self, dtype: torch.dtype, vocab_size: int) -> "Head":
        """The real columns, in the dtype of the products; views where that is the dtype they have."""
        bias = None if self.bias is None else self.bias[:vocab_size].to(dtype)
        return Head(self.hidden, self.weight[:vocab_size].to(dtype), bias)

    def logits_buffer(self, rows: int, dtype: torch.dtype | None) -> Tensor:  # [C, V]
        """In the dtype of the products, if not in another one."""
        V = self.weight.shape[0]
        buffer = self.weight.new_empty(rows, row_stride(V), dtype=dtype or self.weight.dtype)
        if not buffer.is_cuda:
            buffer[:, V:].zero_()  # oneDNN multiplies what follows a row of bfloat16 by 0, and 0 times NaN is NaN
        return buffer[:, :V]

    def logits(self, rows: slice, out: Tensor) -> Tensor:  # [1, C, V]
        """Of some rows, written over `out`."""
        hidden = self.hidden[rows].to(self.weight.dtype)
        project(hidden, self.weight, self.bias, out[: hidden.shape[0]])
        return out[None, : hidden.shape[0]]


class Gradients:
    """Accumulates the requested gradients of one head; weight and bias in float32.

    The bias's is a sum of the logits' gradients as they were written.  Beside 16-bit logits these are rounded, as those of
    eager heads are, and so is each term of the sum; float32 logits spare it that.
    """

    def __init__(self, head: Head, needed: Sequence[bool], dtype: torch.dtype, vocab_size: int) -> None:
        hidden, self._need_weight, bias = needed
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None  # [N, H]
        self.weight: Tensor | None = None  # [V', H]; not before it is needed
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if bias else None  # [V']
        if self._need_weight and not head.hidden.shape[0]:
            self.weight = torch.zeros_like(head.weight, dtype=dtype)
        self._like, self._dtype, self._vocab_size = head.weight, dtype, vocab_size

    def add(
        self,
        rows: slice,
        logit_gradient: Tensor,  # [C, V], in the dtype of the logits
        head: Head,  # in the dtype of the products
        counted: Tensor,  # [C]
    ) -> None:
        V = self._vocab_size
        if self.bias is not None:
            self.bias[:V] += logit_gradient.sum(0, dtype=self.bias.dtype)
        logit_gradient = logit_gradient.to(head.weight.dtype)
        if self.hidden is not None:
            out = self.hidden[rows]
            if out.dtype == logit_gradient.dtype:
                torch.mm(logit_gradient, head.weight, out=out)
            else:
                out.copy_(torch.mm(logit_gradient, head.weight))
        if self._need_weight:
            first = self.weight is None
            if self.weight is None:
                self.weight = torch.empty(self._like.shape, dtype=self._dtype, device=self._like.device)
                self.weight[V:].zero_()
            # A row that does not count may hold anything, and 0 times NaN is NaN.
            hidden = head.hidden[rows].to(logit_gradient.dtype).masked_fill(~counted[:, None], 0.0)
            accumulate(self.weight[:V], logit_gradient, hidden, first=first)

    def __iter__(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None)


class LinearOptions(NamedTuple):
    kd: KDOptions
    needed: tuple[bool, ...]  # gradients of hidden states, weight and bias of the student, then of the teacher
    dtype: torch.dtype  # of the student's products
    teacher_dtype: torch.dtype  # of the teacher's
    logits_dtype: torch.dtype | None  # None: the dtype of the products
    workspace_bytes: int | None  # None: what `plan` chooses


def sweep(
    student: Head,
    teacher: Head | None,  # None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
    options: LinearOptions,
    gradients: Sequence[Gradients],  # those of sum_i w_ce CE + w_kl KL, added to: of the student, or of both
) -> tuple[Tensor, Tensor]:  # CE and KL, [N] float64
    """Every chunk's logits, values and gradients, one chunk after another in the same buffers."""
    N, V = ce_weight.numel(), options.kd.vocab_size
    chunk_rows = planned_chunk(student, teacher, options)
    ce, kl = torch.zeros_like(ce_weight), torch.zeros_like(kl_weight)
    with torch.autocast(student.hidden.device.type, enabled=False):  # the dtypes are chosen already
        student = student.cast(options.dtype, V)
        student_logits = student.logits_buffer(chunk_rows, options.logits_dtype)
        teacher_logits = None
        if teacher is not None:
            teacher = teacher.cast(options.teacher_dtype, V)
            teacher_logits = teacher.logits_buffer(chunk_rows, options.logits_dtype)
        for first in range(0, N, chunk_rows):
            rows = slice(first, first + chunk_rows)
            z = student.logits(rows, student_logits)
            y = None if teacher is None or teacher_logits is None else teacher.logits(rows, teacher_logits)
            of_chunk = None if labels is None else labels[rows]
            arguments = of_chunk, ce_weight[rows], kl_weight[rows], options.kd
            of_logits = (z, y) if len(gradients) > 1 else (z, None)  # written over the logits
            if len(gradients) == 1 and fits_one_launch(z, y, of_chunk, options.kd):
                values, _ = row_values_and_gradient(z, y, *arguments, in_place=True)
            else:
                values = row_values(z, y, *arguments)
                if gradients:
                    ops.write_gradient(*of_logits, *gradient_arguments(z, y, values.statistics, *arguments))
            ce[rows], kl[rows] = values.ce, values.kl
            if not gradients:
                continue
            if rows.stop >= N and of_logits[1] is None:  # make room for the weight gradient, if this is the only chunk
                y = teacher_logits = None
            counted = torch.hypot(ce_weight[rows], kl_weight[rows]) > NEGLIGIBLE
            for sums, gradient, head in zip(gradients, of_logits, (student, teacher), strict=False):
                if gradient is not None and head is not None:
                    sums.add(rows, gradient[0], head, counted)
    return ce, kl


def planned_chunk(student: Head, teacher: Head | None, options: LinearOptions) -> int:
    """Tokens of a chunk.  Raises ValueError where workspace_bytes is too small for one."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = options.needed
    return plan(
        student.hidden.shape[0], options.kd.vocab_size, student.hidden.shape[1],
        None if teacher is None else teacher.hidden.shape[1],
        dtype=options.dtype, teacher_dtype=options.teacher_dtype, logits_dtype=options.logits_dtype,
        hidden_grad=hidden, weight_grad=weight, bias_grad=bias, teacher_hidden_grad=teacher_hidden,
        teacher_weight_grad=teacher_weight, teacher_bias_grad=teacher_bias, workspace_bytes=options.workspace_bytes,
    ).chunk_rows  # fmt: skip


LARGEST_GRADIENT = 2**8  # of a logit; summed over a vocabulary against weights up to 127 it is still a float16


def gradient_unit(ce_weight: Tensor, kl_weight: Tensor, options: KDOptions) -> Tensor:
    """A scalar on the device, 2^k, in which no gradient of a logit is above 2^8 and the largest possible one near it.

    The forward pass takes the gradients of a mean over thousands of rows, 1e-9 where a probability is 1e-6, and a loss
    scale, which comes with the upstream gradient, comes too late: float16 would lose them.  A power of two, so that
    counting in it rounds nothing.
    """
    scale = max(options.student_map.scale, options.teacher_map.scale)
    largest = scale * (ce_weight.abs() + kl_weight.abs() / options.temperature)
    largest = torch.cat([largest.nan_to_num(0.0, 0.0), largest.new_zeros(1)]).amax()  # 0 of no rows
    return torch.where(largest > NEGLIGIBLE, torch.exp2(largest.log2().floor()) / LARGEST_GRADIENT, 1.0)
