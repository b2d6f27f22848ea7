"""The sweeps over logits for CPU tensors: blocks of rows that stay in cache, no [N, V] array but the gradient.

A block of rows goes through the whole formula before the next block is touched.  So memory is read once per sweep, as in
the kernels.  Exponentials are taken in base 2, which PyTorch computes to the same bits wherever they stand.

Both sweeps make the exponentials of a block by the same operations.  The single pass takes the gradient while they are
still in the buffers.  So its bits are those of two passes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import DIVERGENCES, Coefficients, Objective, coefficients
from ..rows import are_read, as_rows
from .cpu_blocks import (
    Buffers,
    block_rows,
    blocks_of_rows,
    length,
    load,
    multiply_by_slope,
    of_rows,
    view,
    write,
    zero,
)

LOG2_E = math.log2(math.e)

# The buffers of a block.  For T = 1, e^u is p.
U, P, V, Q, AT_1 = range(5)


class Exponentials(NamedTuple):
    """The exponentials of a block, `[rows, V]` each, in buffers.  One that is not needed may be any buffer."""

    at_1: Tensor  # e^u
    p: Tensor  # e^{u/T}
    q: Tensor  # e^{v/T}
    difference: Tensor  # of the logits, as in `Divergence.term`
    spare: Tensor  # a buffer that is free


class _Weights:
    """The weights of the rows in the gradient, in the dtype of the statistics, and which rows count."""

    def __init__(
        self,
        weights: Tensor,  # [3, N], float64
        dtype: torch.dtype,
        has_ce: bool,
        has_divergence: bool,
    ) -> None:
        given = weights.to(dtype)
        self.counted: Tensor | None = None  # [N], bool; None: every row counts
        # [N], bool; None: every row.  A weight below the smallest number of the dtype gives a row a value, but no gradient.
        self.has_gradient: Tensor | None = None
        if not given.all():
            counted = are_read(weights)
            self.counted = None if counted.all() else counted
            _, ce, divergence = (given != 0).unbind()
            has_gradient = ce if not has_divergence else divergence if not has_ce else ce | divergence
            self.has_gradient = None if has_gradient.all() else has_gradient
        _, self.ce, self.divergence = given.unsqueeze(2).unbind()  # [N, 1] each


class Sweep:
    """A pass over the logits, one block of rows after another."""

    def __init__(
        self,
        student: Tensor,  # [outer, inner, V]
        teacher: Tensor | None,  # [outer', inner', V]
        labels: Tensor | None,  # [N]
        rows: int,
        dtype: torch.dtype,
        objective: Objective,
    ) -> None:
        self.student, self.teacher = (
            with_one_outer_index(student),
            None if teacher is None else with_one_outer_index(teacher),
        )
        self.objective = objective
        self.student_map, self.teacher_map, self.temperature = objective[:3]
        self.kind = DIVERGENCES[objective.divergence]
        vocabulary = student.shape[2]
        # A label that names no column is clamped: the weights of its row are NaN.
        self.label = None if labels is None else labels.long().clamp(0, vocabulary - 1).unsqueeze(1)  # [N, 1]
        self.size = block_rows(rows, vocabulary)
        needs_at_1 = labels is not None and self.temperature != 1
        count = P + 1 if teacher is None else AT_1 + 1 if needs_at_1 else AT_1
        self.buffers = Buffers(count, vocabulary, dtype)

    def run(
        self,
        weights: Tensor,  # [3, N]
        statistics: Tensor,  # [7, N]
        gradient: Tensor | None = None,  # [outer, inner, V]; None: only statistics are computed
    ) -> None:
        """Write the statistics, and the student's gradient."""
        has_divergence = self.teacher is not None
        row = _Weights(weights, statistics.dtype, self.label is not None, has_divergence)
        if row.counted is not None or self.label is None or not has_divergence:
            statistics.copy_(stats.identity(statistics.shape[1], statistics.dtype))
        columns = statistics.unsqueeze(2)  # [7, N, 1]
        for rows in blocks_of_rows(row.counted, self.size, self.student, self.teacher, gradient):
            block = of_rows(columns, rows, dim=1)
            found = block.unbind()
            x = self._statistics(rows, found, need_difference=gradient is not None and self.kind.is_over_student)
            if not isinstance(rows, slice):
                statistics.index_copy_(1, rows, block.squeeze(2))
            if gradient is not None:
                self._write_gradient(rows, x, self._coefficients(rows, found, row), gradient)
        if gradient is not None:
            _zero_others(gradient, row.has_gradient)

    def write_gradients(
        self,
        weights: Tensor,  # [3, N]
        statistics: Tensor,  # [7, N]
        gradient: Tensor,  # [outer, inner, V]
        teacher_gradient: Tensor | None,  # [outer', inner', V]
    ) -> None:
        """Write the gradients, given the statistics."""
        learns = teacher_gradient is not None
        row = _Weights(weights, statistics.dtype, self.label is not None, self.teacher is not None)
        columns = statistics.unsqueeze(2)
        tensors = self.student, self.teacher, gradient, teacher_gradient
        for rows in blocks_of_rows(row.has_gradient, self.size, *tensors):
            found = of_rows(columns, rows, dim=1).unbind()
            x = self._reread(rows, found, need_difference=learns or self.kind.is_over_student)
            k = self._coefficients(rows, found, row, teacher_grad=learns)
            self._write_gradient(rows, x, k, gradient)
            if teacher_gradient is not None and self.teacher is not None:
                result = self.kind.teacher_gradient(x.p, x.q, x.difference, k.B, k.C, k.R, self.temperature)
                multiply_by_slope(result, self.teacher, rows, self.teacher_map, buffer=x.spare)
                write(teacher_gradient, rows, result)
        for written in (gradient, teacher_gradient):
            if written is not None:
                _zero_others(written, row.has_gradient)

    def _statistics(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # seven, [rows, 1] each, written
        need_difference: bool,
    ) -> Exponentials:
        """Write the statistics of a block, and return its exponentials."""
        m_s, d_1, d_T, m_t, e, c, label_logit = found
        buffers, kind = self.buffers.resize(length(rows)), self.kind
        z = load(self.student, rows, self.student_map, buffers[U])
        torch.amax(z, 1, True, out=m_s)
        if self.label is not None:
            torch.gather(z, 1, of_rows(self.label, rows), out=label_logit)
        u = torch.sub(z, m_s, out=buffers[U])
        at_1, p = self._of_student(u, buffers)
        if self.label is not None:
            _sum(at_1, d_1)
        if self.teacher is None:
            return Exponentials(at_1, p, p, p, u)
        if self.label is not None and self.temperature == 1:
            d_T.copy_(d_1)
        else:
            _sum(p, d_T)
        y = load(self.teacher, rows, self.teacher_map, buffers[V])
        torch.amax(y, 1, True, out=m_t)
        v = torch.sub(y, m_t, out=buffers[V])
        q = self._exponential(v, self.temperature, buffers, Q)
        _sum(q, e)
        mass, difference, spare = kind.term(u, v, p, q)
        _sum(torch.mul(mass, difference, out=spare), c)
        if math.isfinite(c.sum().item()):
            c.mul_(1 / stats.UNIT)
            return Exponentials(at_1, p, q, difference, spare)
        # Masked tokens: a column without mass adds nothing, even if its difference is infinite.
        _sum(torch.mul(mass, difference.masked_fill_(mass == 0, 0.0), out=spare), c)
        c.mul_(1 / stats.UNIT)
        if c.isinf().any():  # mass where the other distribution has none, or an overflow outside the unit
            in_unit = c.clone()
            u = load(self.student, rows, self.student_map, u).div(stats.UNIT) - m_s / stats.UNIT
            v = load(self.teacher, rows, self.teacher_map, v).div(stats.UNIT) - m_t / stats.UNIT
            mass, difference, _ = kind.term(u, v, p, q)
            _sum(difference.masked_fill_(mass == 0, 0.0).mul_(mass), in_unit)
            c.copy_(torch.where(c.isinf(), in_unit, c))
        return self._reread(rows, found, need_difference) if need_difference else Exponentials(at_1, p, q, v, u)

    def _reread(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # seven, [rows, 1] each
        need_difference: bool,
    ) -> Exponentials:
        """Return the exponentials of a block, given its statistics."""
        buffers = self.buffers.resize(length(rows))
        u = torch.sub(load(self.student, rows, self.student_map, buffers[U]), found[stats.M_S], out=buffers[U])
        at_1, p = self._of_student(u, buffers)
        if self.teacher is None:
            return Exponentials(at_1, p, p, p, u)
        v = torch.sub(load(self.teacher, rows, self.teacher_map, buffers[V]), found[stats.M_T], out=buffers[V])
        q = self._exponential(v, self.temperature, buffers, Q)
        if not need_difference:
            return Exponentials(at_1, p, q, v, u)
        _, difference, spare = self.kind.term(u, v, p, q)
        return Exponentials(at_1, p, q, difference, spare)

    def _of_student(self, u: Tensor, buffers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return e^u and e^{u/T}; for T = 1 they are the same tensor, for T = 2 one is the square of the other."""
        temperature = 1.0 if self.teacher is None else self.temperature
        p = self._exponential(u, temperature, buffers, P)
        if self.label is None or temperature == 1:
            return p, p
        if temperature == 2:
            return torch.mul(p, p, out=buffers[AT_1]), p
        return self._exponential(u, 1.0, buffers, AT_1), p

    def _exponential(self, u: Tensor, temperature: float, buffers: tuple[Tensor, ...], index: int) -> Tensor:
        """Return e^{u / T} in the buffer with that index."""
        torch.mul(u, LOG2_E / temperature, out=buffers[index])
        return self.buffers.exp2_(index)

    def _coefficients(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # seven, [rows, 1] each
        row: _Weights,
        teacher_grad: bool = False,
    ) -> Coefficients:  # [rows, 1] each
        ce = None if self.label is None else of_rows(row.ce, rows)
        divergence = None if self.teacher is None else of_rows(row.divergence, rows)
        return coefficients(found, ce, divergence, self.objective, teacher_grad=teacher_grad)

    def _write_gradient(self, rows: slice | Tensor, x: Exponentials, k: Coefficients, gradient: Tensor) -> None:
        """Write the gradient of a block of the student's logits.  It overwrites the spare buffer."""
        result = x.spare
        if isinstance(rows, slice) and gradient.dtype == result.dtype and self.student_map.is_identity:
            result = view(gradient, rows)
        if self.teacher is None:
            torch.mul(x.at_1, k.A, out=result)
        else:
            joins_ce = self.temperature == 1 and not self.kind.is_over_student  # both terms are multiples of e^u
            B = k.B + k.A if joins_ce and self.label is not None else k.B
            self.kind.student_gradient(x.p, x.q, x.difference, B, k.C, k.R, self.temperature, out=result)
            if self.label is not None and not joins_ce:
                result.addcmul_(x.at_1, k.A)
        if self.label is not None:
            result.scatter_add_(1, of_rows(self.label, rows), -k.W)
        if result is x.spare:
            # The teacher's gradient needs the difference for forward KL, and p for reverse KL.
            free = x.difference if self.kind.is_over_student else x.p
            multiply_by_slope(result, self.student, rows, self.student_map, buffer=free)
            write(gradient, rows, result)


def with_one_outer_index(tensor: Tensor) -> Tensor:
    """Return `[outer, inner, V]` with one outer index, if strides allow."""
    return tensor if tensor.shape[0] == 1 else as_rows(tensor)


def _zero_others(
    written: Tensor,  # [outer, inner, V]
    has_gradient: Tensor | None,  # [N], bool; None: every row has
) -> None:
    if has_gradient is not None:
        for rows in blocks_of_rows(~has_gradient, has_gradient.numel(), written):
            zero(written, rows)


def _sum(
    block: Tensor,  # [rows, V]
    out: Tensor,  # [rows, 1]
) -> None:
    """Write the sum of each row, taken by one thread.  PyTorch would share a single row among its threads."""
    if block.shape[0] > 1:
        torch.sum(block, 1, True, out=out)
    else:
        out.copy_(block.expand(2, -1).sum(1, True)[:1])
