"""The loss from hidden states: the logits exist for one chunk of tokens at a time.

Let F_s = 2 N V H_s and F_t = 2 N V H_t be the flops of projecting the student's and the teacher's hidden states.  A step
takes F_s + F_t for the logits, F_s for the gradient of the student's hidden states and F_s for that of its weight.  The
gradient of a chunk's logits overwrites them at once, so that no chunk is projected twice.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import divergence_of
from ..rows import add_something, readable
from ..sweep import Buffers, KDOptions, Logits, backend_of, chosen_launch, device_of, lines_of
from ..sweep import sweep as sweep_logits
from .chunks import plan_chunks, row_stride
from .products import accumulate, project

__all__ = ["Gradients", "Head", "LinearOptions", "has_unit", "planned_chunk", "sweep", "unit_weights"]


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
        hidden, self.need_weight, self.need_bias = needed
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None  # [N, H]
        self.weight: Tensor | None = None  # [V', H]; allocated when the first chunk is added
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if self.need_bias else None  # [V']
        if self.need_weight and not head.hidden.shape[0]:
            self.weight = torch.zeros_like(head.weight, dtype=dtype)
        self._like, self._dtype, self._vocab_size = head.weight, dtype, vocab_size
        self._counted = head.hidden  # [N, H], the operand of the weight's gradient

    def prepare(
        self,
        head: Head,  # in the dtype of the products
        weights: Tensor,  # [3, N]
    ) -> None:
        """Copy the hidden states, with zeros for the rows that do not count, for the gradient of the head's weight.

        Such a row may hold anything, and 0 times NaN would be NaN.  The copy lies in the memory of the hidden states'
        gradient, if that has the dtype of the products: a chunk's gradient is written after the last use of its copy.
        """
        if not self.need_weight:
            return
        if head.hidden.dtype == head.weight.dtype and readable(weights) and bool(add_something(weights).all()):
            return
        if self.hidden is not None and self.hidden.dtype == head.weight.dtype:
            self._counted = self.hidden
        else:
            self._counted = torch.empty_like(head.hidden, dtype=head.weight.dtype)
        with device_of(weights):
            backend_of(weights, torch.float32).copy_counted(head.hidden, weights, self._counted)

    def add(
        self,
        rows: slice,
        logit_gradient: Tensor,  # [C, V], in the dtype of the logits or of the products
        head: Head,  # in the dtype of the products
    ) -> None:
        """Add the gradients of one chunk."""
        V = self._vocab_size
        if self.bias is not None:
            self.bias[:V] += logit_gradient.sum(0, dtype=self.bias.dtype)
        logit_gradient = logit_gradient.to(head.weight.dtype)
        if self.need_weight:
            first = self.weight is None
            if self.weight is None:
                self.weight = torch.empty(self._like.shape, dtype=self._dtype, device=self._like.device)
                if self._like.shape[0] > V:
                    self.weight[V:].zero_()
            accumulate(self.weight[:V], logit_gradient, self._counted[rows], first=first)
        if self.hidden is not None:
            out = self.hidden[rows]
            if out.dtype == logit_gradient.dtype:
                torch.mm(logit_gradient, head.weight, out=out)
            else:
                out.copy_(torch.mm(logit_gradient, head.weight))

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
    weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 adds nothing, whatever it holds
    options: LinearOptions,
    gradients: Sequence[Gradients],  # accumulate those of sum_i (w_ce CE + w_d D): the student's, or both models'
    statistics: Tensor,  # [9, N], written
    counters: Tensor | None,  # zeros, as `lines_of` counts them
    chunk_rows: int,
) -> None:
    """Write the statistics of all rows and add up the gradients, one chunk after another in the same buffers."""
    N, V = weights.shape[1], options.kd.vocab_size
    with torch.autocast(student.hidden.device.type, enabled=False):  # the options hold the dtypes of the products
        heads = [student.cast(options.dtype, V)]
        if teacher is not None:
            heads.append(teacher.cast(options.teacher_dtype, V))
        for sums, head in zip(gradients, heads, strict=False):
            sums.prepare(head, weights)
        memory: list[Tensor | None] = [head.logits_buffer(chunk_rows, options.logits_dtype) for head in heads]
        rounded = [_rounded(*pair, chunk_rows, options.logits_dtype) for pair in zip(heads, gradients, strict=False)]
        for chunk, first in enumerate(range(0, N, chunk_rows)):
            rows = slice(first, first + chunk_rows)
            found = [head.logits(rows, out) for head, out in zip(heads, memory, strict=True)]  # type: ignore[arg-type]
            z, y = found if len(found) > 1 else (found[0], None)
            logits = Logits(z, y, None if labels is None else labels[rows])
            buffers = launch = None
            if gradients:
                # They overwrite the logits, unless these are float32 and the products are not.
                own = [x if out is None else out[None, : x.shape[1]] for x, out in zip(found, rounded, strict=False)]
                buffers = Buffers(*own)
                launch = chosen_launch(logits, options.kd, in_place=own[0] is z) if len(own) == 1 else None
            own_counters = None if counters is None else counters[lines_of(first, chunk, options.kd) :]
            sweep_logits(logits, weights[:, rows], options.kd, statistics[:, rows], own_counters, buffers, launch)
            if buffers is None:
                continue
            if rows.stop >= N and len(gradients) == 1:
                # In the last chunk: if it is the only one, the weight gradient is allocated next, and this makes room.
                y = logits = None  # type: ignore[assignment]
                del found[1:], memory[1:]
            for sums, gradient, head in zip(gradients, own, heads, strict=False):
                sums.add(rows, gradient[0], head)


def _rounded(head: Head, gradients: Gradients, rows: int, logits_dtype: torch.dtype | None) -> Tensor | None:  # [C, V]
    """Return memory for the gradient of float32 logits, which the sweep rounds to the dtype of the products.

    It is None if the gradient overwrites the logits.  A bias adds up gradients that are not rounded.
    """
    if logits_dtype in (None, head.weight.dtype) or gradients.need_bias:
        return None
    return head.logits_buffer(rows, None)


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


def has_unit(options: LinearOptions) -> bool:
    """Return whether the gradients in the forward pass are divided by a unit: in float16 only."""
    return any(options.needed) and torch.float16 in (options.dtype, options.teacher_dtype)


def unit_weights(
    weights: Tensor,  # [3, N]
    upstream: Tensor | None,  # [N]; None: 1
    options: LinearOptions,
) -> tuple[Tensor, Tensor]:
    """Return the weights times the upstream gradients over the unit, and the unit: a scalar, or an empty tensor for 1.

    The unit is a power of two.  In this unit the largest possible gradient of a logit is from 2^8 to 2^9.  The forward pass
    takes the gradients of a mean over thousands of rows: about 1e-9 where a probability is 1e-6, which float16 cannot hold.
    A loss scale comes with the upstream gradient, too late.  Division by a power of two is exact.
    """
    if not has_unit(options):
        return weights if upstream is None else weights * upstream, weights.new_empty(0)
    objective = options.kd.objective
    scale = max(objective.student_map.scale, objective.teacher_map.scale)
    slope = divergence_of(objective).largest_slope / objective.temperature
    with device_of(weights):
        scaled, unit = backend_of(weights, options.kd.dtype).unit_weights(weights, upstream, scale, scale * slope)
    return scaled, unit
