"""The loss from hidden states: the logits exist for one chunk of tokens at a time.

Let F_s = 2 N V H_s and F_t = 2 N V H_t be the flops of projecting the student's and the teacher's hidden states.  A step
takes F_s + F_t for the logits, F_s for the gradient of the student's hidden states and F_s for that of its weight.  The
gradient of a chunk's logits overwrites them at once, so that no chunk is projected twice.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DIVERGENCES
from ..rows import NEGLIGIBLE
from ..sweep import Buffers, KDOptions, Logits, Weights, chosen_launch
from ..sweep import sweep as sweep_logits
from .chunks import plan_chunks, row_stride
from .products import accumulate, project

__all__ = ["Gradients", "Head", "LinearOptions", "gradient_unit", "planned_chunk", "sweep"]


class Head(NamedTuple):
    """The last hidden states of a model and its output head: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']

    def cast(self, dtype: torch.dtype, vocab_size: int) -> "Head":
        """Return the head for the real columns, with weight and bias in that dtype; views if they have it already."""
        bias = None if self.bias is None else self.bias[:vocab_size].to(dtype)
        return Head(self.hidden, self.weight[:vocab_size].to(dtype), bias)

    def logits_buffer(self, rows: int, dtype: torch.dtype | None) -> Tensor:  # [C, V]
        """Return memory for the logits of C rows; dtype None: in the dtype of the products."""
        V = self.weight.shape[0]
        # If there is room between the rows, PyTorch adds a bias through cuBLAS's beta, and a product of few rows is rounded
        # both before and after the addition.
        stride = V if self.bias is not None and self.weight.is_cuda else row_stride(V)
        buffer = self.weight.new_empty(rows, stride, dtype=dtype or self.weight.dtype)
        if not buffer.is_cuda:
            buffer[:, V:].zero_()  # oneDNN multiplies the padding of a bfloat16 row by 0, and 0 times NaN is NaN
        return buffer[:, :V]

    def logits(self, rows: slice, out: Tensor) -> Tensor:  # [1, C, V]
        """Write the logits of a chunk's rows to `out`, and return them."""
        hidden = self.hidden[rows].to(self.weight.dtype)
        project(hidden, self.weight, self.bias, out[: hidden.shape[0]])
        return out[None, : hidden.shape[0]]


class Gradients:
    """Accumulates the requested gradients of one head; weight and bias in float32.

    The gradient of the bias is the sum of the logits' gradients as they were written.  With 16-bit logits each term of that
    sum has been rounded to 16 bits, as in an eager head; with float32 logits it has not.
    """

    def __init__(self, head: Head, needed: Sequence[bool], dtype: torch.dtype, vocab_size: int) -> None:
        hidden, self._need_weight, bias = needed
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None  # [N, H]
        self.weight: Tensor | None = None  # [V', H]; allocated when the first chunk is added
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if bias else None  # [V']
        if self._need_weight and not head.hidden.shape[0]:
            self.weight = torch.zeros_like(head.weight, dtype=dtype)
        self._like, self._dtype, self._vocab_size = head.weight, dtype, vocab_size

    def add(
        self,
        rows: slice,
        logit_gradient: Tensor,  # [C, V], in the dtype of the logits
        head: Head,  # in the dtype of the products
        counted: Tensor,  # [C], bool: whether each row counts
    ) -> None:
        """Add the gradients of one chunk."""
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
    """The options of a loss from hidden states that its sweep depends on."""

    kd: KDOptions
    needed: tuple[bool, ...]  # gradients of hidden states, weight and bias: the student's, then the teacher's
    dtype: torch.dtype  # dtype of the student's products
    teacher_dtype: torch.dtype  # dtype of the teacher's products
    logits_dtype: torch.dtype | None  # None: the dtype of the products
    workspace_bytes: int | None  # None: as `plan_chunks` chooses


def sweep(
    student: Head,
    teacher: Head | None,  # None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    weights: Weights,  # a row with both weights 0 adds nothing, whatever it holds
    options: LinearOptions,
    gradients: Sequence[Gradients],  # accumulate those of sum_i (w_ce CE + w_d D): the student's, or both models'
) -> tuple[Tensor, Tensor]:  # CE and divergence, [N] float64
    """Return the values of all rows and add up the gradients, one chunk after another in the same buffers."""
    N, V = weights.ce.numel(), options.kd.vocab_size
    chunk_rows = planned_chunk(student, teacher, options)
    ce, divergence = torch.zeros_like(weights.ce), torch.zeros_like(weights.divergence)
    with torch.autocast(student.hidden.device.type, enabled=False):  # the options hold the dtypes of the products
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
            logits = Logits(z, y, None if labels is None else labels[rows])
            chunk_weights = Weights(weights.ce[rows], weights.divergence[rows])
            buffers = launch = None
            if gradients:  # they overwrite the logits
                buffers = Buffers(z, y if len(gradients) > 1 else None)
                launch = chosen_launch(logits, options.kd, in_place=True) if len(gradients) == 1 else None
            found = sweep_logits(logits, chunk_weights, options.kd, buffers, launch)
            ce[rows], divergence[rows] = found.ce, found.divergence
            if buffers is None:
                continue
            if rows.stop >= N and buffers.teacher is None:
                # In the last chunk: if it is the only one, the weight gradient is allocated next, and this makes room.
                y = logits = teacher_logits = None  # type: ignore[assignment]
            counted = torch.hypot(*chunk_weights) > NEGLIGIBLE
            for sums, gradient, head in zip(gradients, buffers, (student, teacher), strict=False):
                if gradient is not None and head is not None:
                    sums.add(rows, gradient[0], head, counted)
    return ce, divergence


def planned_chunk(student: Head, teacher: Head | None, options: LinearOptions) -> int:
    """Return the tokens per chunk.

    Raises:
        ValueError: workspace_bytes is too small for one token.
    """
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = options.needed
    return plan_chunks(
        student.hidden.shape[0], options.kd.vocab_size, student.hidden.shape[1],
        None if teacher is None else teacher.hidden.shape[1],
        dtype=options.dtype, teacher_dtype=options.teacher_dtype, logits_dtype=options.logits_dtype,
        hidden_grad=hidden, weight_grad=weight, bias_grad=bias, teacher_hidden_grad=teacher_hidden,
        teacher_weight_grad=teacher_weight, teacher_bias_grad=teacher_bias, workspace_bytes=options.workspace_bytes,
    ).chunk_rows  # fmt: skip


# The largest gradient of a logit, in units.  Its sum over a vocabulary against head weights up to 127 still fits float16.
LARGEST_GRADIENT = 2**8


def gradient_unit(weights: Weights, options: KDOptions) -> Tensor:
    """Return the unit of the gradients in the forward pass: a power of two, a scalar on the device.

    In this unit the largest possible gradient of a logit is from 2^8 to 2^9.  The forward pass takes the gradients of a
    mean over thousands of rows: about 1e-9 where a probability is 1e-6, which float16 cannot hold.  A loss scale comes with
    the upstream gradient, too late.  Division by a power of two is exact.
    """
    objective = options.objective
    scale = max(objective.student_map.scale, objective.teacher_map.scale)
    slope = DIVERGENCES[objective.divergence].largest_slope
    largest = scale * (weights.ce.abs() + slope * weights.divergence.abs() / objective.temperature)
    largest = torch.cat([largest.nan_to_num(0.0, 0.0), largest.new_zeros(1)]).amax()  # 0 if there are no rows
    return torch.where(largest > NEGLIGIBLE, torch.exp2(largest.log2().floor()) / LARGEST_GRADIENT, 1.0)
