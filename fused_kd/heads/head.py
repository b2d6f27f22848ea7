"""A model's output head, and the gradients of its hidden states, weight and bias, added up over the tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import add_something, readable
from ..sweep import backend_of, device_of
from .chunks import row_stride
from .products import accumulate, project

Found = tuple[Tensor | None, Tensor | None, Tensor | None]  # the gradients of hidden states, weight and bias of a head
NONE: Found = None, None, None


class Head(NamedTuple):
    """The last hidden states of a model and its output head: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']

    def cast(self, dtype: torch.dtype, vocab_size: int) -> "Head":
        """Return the head for the real columns, with weight and bias in that dtype; views if they have it already."""
        bias = None if self.bias is None else self.bias[:vocab_size].to(dtype)
        return Head(self.hidden, self.weight[:vocab_size].to(dtype), bias)

    def logits_buffer(self, rows: int, dtype: torch.dtype) -> Tensor:  # [rows, V]
        """Return memory for logits, or for their gradient."""
        V = self.weight.shape[0]
        # If there is room between the rows, PyTorch adds a bias through cuBLAS's beta, and a product of few rows is rounded
        # both before and after the addition.
        stride = V if self.bias is not None and self.weight.is_cuda else row_stride(V)
        return new_rows(self.weight, rows, V, stride, dtype)

    def write_logits(
        self,
        rows: slice,
        out: Tensor,  # [C, V], written
        *,
        add: bool = False,  # True: they are added to what is there
    ) -> None:
        """Write the logits of a chunk's rows."""
        project(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias, out, add=add)


def new_rows(like: Tensor, rows: int, columns: int, stride: int, dtype: torch.dtype) -> Tensor:  # [rows, columns]
    """Return memory for rows of logits, with that many elements from one row to the next."""
    buffer = like.new_empty(rows, stride, dtype=dtype)
    if not buffer.is_cuda:
        buffer[:, columns:].zero_()  # oneDNN multiplies the padding of a bfloat16 row by 0, and 0 times NaN is NaN
    return buffer[:, :columns]


def new_gradient(weight: Tensor, dtype: torch.dtype, written: int) -> Tensor:  # [V', H]
    """Return memory for a weight's gradient, of which the first rows will be written and the others are 0."""
    new = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    new[written:].zero_()
    return new


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which forward returns a weight's gradient: the weight's, but float32 for float16.

    A float16 gradient is divided by a unit until backward; its sum over the tokens might overflow.
    """
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


class Gradients:
    """Accumulates the requested gradients of one head over groups of tokens.

    The gradient of the weight is rounded once.  A single group writes it by one product; the products of several are
    summed in float32.  So is the gradient of the bias, of the logits' gradients as they were written.  With 16-bit logits
    each term of that sum has been rounded to 16 bits, as in an eager head; with float32 logits it has not.
    """

    def __init__(
        self,
        head: Head,
        needed: Sequence[bool],  # gradients of hidden states, weight and bias
        dtype: torch.dtype,  # of the sums: float32 or float64
        vocab_size: int,
        weight_out: Tensor | None = None,  # [V', H], a sum of the caller's that the weight's gradient is added to
    ) -> None:
        hidden, self.need_weight, need_bias = needed
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None  # [N, H]
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if need_bias else None  # [V']
        self.weight = weight_out  # [V', H]; allocated by the products of the first group
        self._is_given = weight_out is not None
        self._like, self._dtype, self._vocab_size = head.weight, dtype, vocab_size
        self._counted = head.hidden  # [N, H], the operand of the weight's gradient

    def prepare(
        self,
        head: Head,  # in the dtype of the products
        weights: Tensor,  # [3, N]
    ) -> None:
        """Copy the hidden states, with zeros for the rows that do not count, for the gradient of the head's weight.

        Such a row may hold anything, and 0 times NaN would be NaN.  The copy lies in the memory of the hidden states'
        gradient, if that has the dtype of the products: a group's gradient is written after the last use of its copy.
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

    def add_bias(self, logit_gradient: Tensor) -> None:  # of [C, V]
        """Add the bias's gradient of one chunk."""
        if self.bias is not None:
            self.bias[: self._vocab_size] += logit_gradient.sum(0, dtype=self.bias.dtype)

    def add(
        self,
        rows: slice,
        logit_gradient: Tensor,  # [M, V], in the dtype of the products
        head: Head,  # in that dtype
        *,
        is_only: bool,  # whether there is no other group of rows
    ) -> None:
        """Add the gradients of the hidden states and of the weight of one group of rows."""
        V = self._vocab_size
        if self.need_weight:
            first = self.weight is None
            if self.weight is None:
                dtype = gradient_dtype(self._like)
                # A product of 16-bit operands has a result in their dtype or in float32.
                is_direct = is_only and dtype == logit_gradient.dtype
                self.weight = new_gradient(self._like, dtype if is_direct else self._dtype, V)
            accumulate(self.weight[:V], logit_gradient, self._counted[rows], first=first)
        if self.hidden is not None:
            out = self.hidden[rows]
            if out.dtype == logit_gradient.dtype:
                torch.mm(logit_gradient, head.weight, out=out)
            else:
                out.copy_(torch.mm(logit_gradient, head.weight))

    def results(self) -> Found:
        """Return the gradients; None for one that is not needed, or the caller's sum."""
        return self.hidden, self._finished_weight(), self.bias

    def _finished_weight(self) -> Tensor | None:
        if self._is_given or not self.need_weight:
            return None
        dtype = gradient_dtype(self._like)
        if self.weight is None:  # there are no rows
            return new_gradient(self._like, dtype, written=0)
        rounded, self.weight = self.weight.to(dtype), None
        return rounded
