"""The sweeps over logits for CPU tensors: blocks of rows that stay in cache, no [N, V] array but the gradient.

A block of rows goes through the whole formula before the next block is touched.  So memory is read once per sweep, as in
the kernels.  Exponentials are taken in base 2, which PyTorch computes to the same bits wherever they stand.

Both sweeps make the exponentials of a block by the same operations.  The single pass takes the gradient while they are
still in the buffers.  So its bits are those of two passes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import Coefficients, Objective, coefficients, divergence_of
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
from .cpu_divergences import KLBlock, RatioBlock, Terms, is_finite, sum_rows

LOG2_E = math.log2(math.e)

# The buffers of a block.  e^u follows where it is not p, and y - z comes last for a divergence of two sweeps.
U, P, V, Q, AT_1 = range(5)


class Exponentials(NamedTuple):
    """The exponentials of a block, `[rows, V]` each, in buffers, and what its gradients need of the divergence."""

    at_1: Tensor  # e^u
    p: Tensor  # e^{u/T}; without a divergence any buffer, as is q
    q: Tensor  # e^{v/T}
    terms: Terms


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
        entropy: bool = False,  # whether the statistics include those of the student's entropy
    ) -> None:
        self.student, self.teacher = (
            with_one_outer_index(student),
            None if teacher is None else with_one_outer_index(teacher),
        )
        self.objective, self.entropy = objective, entropy
        self.student_map, self.teacher_map, self.temperature = objective[:3]
        vocabulary = student.shape[2]
        self.label: Tensor | None = None  # [N, 1]
        # [N, 1], bool: whether the label names none of these columns; None: those of all rows do.
        self.elsewhere: Tensor | None = None
        if labels is not None:
            labels = labels.long()
            named = labels.clamp(0, vocabulary - 1)
            self.label = named.unsqueeze(1)
            if not torch.equal(named, labels):
                self.elsewhere = (named != labels).unsqueeze(1)
        self.size = block_rows(rows, vocabulary)
        self.needs_at_T = teacher is not None or entropy
        kind = divergence_of(objective)
        self.two_sweeps = teacher is not None and kind.sweeps == 2
        needs_at_1 = labels is not None and self.temperature != 1 and self.needs_at_T
        count = (V if teacher is None else AT_1) + needs_at_1 + self.two_sweeps
        self.at_1 = (V if teacher is None else AT_1) if needs_at_1 else P
        self.buffers = Buffers(count, vocabulary, dtype)
        self.block: KLBlock | RatioBlock
        if kind.sweeps == 1:  # not `isinstance`, which a module that has been reloaded would not pass
            self.block = KLBlock(kind, self.temperature, self.buffers.apply)
        else:
            self.block = RatioBlock(kind, self.temperature, self.buffers.apply)

    def run(
        self,
        weights: Tensor,  # [3, N]
        statistics: Tensor,  # [9, N]
        gradient: Tensor | None = None,  # [outer, inner, V]; None: only statistics are computed
    ) -> None:
        """Write the statistics, and the student's gradient."""
        has_divergence = self.teacher is not None
        row = _Weights(weights, statistics.dtype, self.label is not None, has_divergence)
        if row.counted is not None or self.label is None or not has_divergence:
            statistics.copy_(stats.identity(statistics.shape[1], statistics.dtype))
        columns = statistics.unsqueeze(2)  # [9, N, 1]
        for rows in blocks_of_rows(row.counted, self.size, self.student, self.teacher, gradient):
            block = of_rows(columns, rows, dim=1)
            found = block.unbind()
            x = self._statistics(rows, found)
            if not isinstance(rows, slice):
                statistics.index_copy_(1, rows, block.squeeze(2))
            if gradient is not None:
                self._write_gradient(rows, x, self._coefficients(rows, found, row), gradient)
        if gradient is not None:
            _zero_others(gradient, row.has_gradient)

    def write_gradients(
        self,
        weights: Tensor,  # [3, N]
        statistics: Tensor,  # [9, N]
        gradient: Tensor,  # [outer, inner, V]
        teacher_gradient: Tensor | None,  # [outer', inner', V]
        teacher_sums: Tensor | None = None,  # [N], see `logit_gradient`
    ) -> None:
        """Write the gradients, given the statistics."""
        learns = teacher_gradient is not None
        row = _Weights(weights, statistics.dtype, self.label is not None, self.teacher is not None)
        columns = statistics.unsqueeze(2)
        tensors = self.student, self.teacher, gradient, teacher_gradient
        for rows in blocks_of_rows(row.has_gradient, self.size, *tensors):
            found = of_rows(columns, rows, dim=1).unbind()
            x = self._reread(rows, _with_scratch(found))
            k = self._coefficients(rows, found, row, teacher_grad=learns)
            self._write_gradient(rows, x, k, gradient)
            if teacher_gradient is not None and self.teacher is not None:
                terms = x.terms
                if teacher_sums is not None:
                    terms = terms._replace(mean=of_rows(teacher_sums, rows)[:, None].to(statistics.dtype))
                result = self.block.teacher_gradient(terms, x.p, x.q, k)
                multiply_by_slope(result, self.teacher, rows, self.teacher_map, buffer=x.terms.spare)
                write(teacher_gradient, rows, result)
        for written in (gradient, teacher_gradient):
            if written is not None:
                _zero_others(written, row.has_gradient)

    def add_sums(
        self,
        weights: Tensor,  # [3, N]
        statistics: Tensor,  # [9, N]
        sums: Tensor,  # [3, N], float64, added to
    ) -> None:
        """Add the sums of a divergence of two sweeps: of the student's slopes, of the value, of the teacher's slopes."""
        row = _Weights(weights, statistics.dtype, self.label is not None, self.teacher is not None)
        columns = statistics.unsqueeze(2)
        for rows in blocks_of_rows(row.counted, self.size, self.student, self.teacher):
            found = _with_scratch(of_rows(columns, rows, dim=1))
            mean = self._reread(rows, found).terms.mean
            assert mean is not None
            added = torch.cat([found[stats.C], found[stats.SECOND], mean], 1).T.double()
            if isinstance(rows, slice):
                sums[:, rows] += added
            else:
                sums.index_add_(1, rows, added)

    def _statistics(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # nine, [rows, 1] each, written
    ) -> Exponentials:
        """Write the statistics of a block, and return its exponentials."""
        m_s, d_1, d_T, m_t, e, _, label_logit, _, _ = found
        buffers = self.buffers.resize(length(rows))
        z = load(self.student, rows, self.student_map, buffers[U])
        lowest = torch.finfo(z.dtype).min  # the maximum of columns that are all masked
        torch.amax(z, 1, True, out=m_s).clamp_(min=lowest)
        if self.label is not None:
            torch.gather(z, 1, of_rows(self.label, rows), out=label_logit)
            if self.elsewhere is not None:
                label_logit.masked_fill_(of_rows(self.elsewhere, rows), 0.0)
        if self.teacher is not None:
            y = load(self.teacher, rows, self.teacher_map, buffers[V])
            torch.amax(y, 1, True, out=m_t).clamp_(min=lowest)
            x = self._of_pair(z, y, found, buffers)
        else:
            x = self._of_student(torch.sub(z, m_s, out=buffers[U]), buffers)
        if self.label is not None:
            sum_rows(x.at_1, d_1)
        if self.needs_at_T:
            if self.label is not None and x.at_1 is x.p:
                d_T.copy_(d_1)
            else:
                sum_rows(x.p, d_T)
        if self.entropy:
            self._sum_entropy(rows, found, x.p, buffers)
        if self.teacher is None:
            return x
        sum_rows(x.q, e)
        if isinstance(self.block, KLBlock):
            terms = self.block.sums(
                x.p, x.q, buffers[V], buffers[U], found, lambda: self._difference_in_unit(rows, found, buffers[U])
            )
            return x._replace(terms=terms)
        return self._with_slopes(x, found, buffers)

    def _reread(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # nine, [rows, 1] each; the sums of a divergence of two sweeps are written
    ) -> Exponentials:
        """Return the exponentials of a block, given its statistics."""
        buffers = self.buffers.resize(length(rows))
        z = load(self.student, rows, self.student_map, buffers[U])
        if self.teacher is None:
            return self._of_student(torch.sub(z, found[stats.M_S], out=buffers[U]), buffers)
        y = load(self.teacher, rows, self.teacher_map, buffers[V])
        x = self._of_pair(z, y, found, buffers)
        if isinstance(self.block, KLBlock):
            return x._replace(terms=Terms(buffers[V], None, buffers[U], careful=not is_finite(buffers[V])))
        return self._with_slopes(x, found, buffers)

    def _of_pair(self, z: Tensor, y: Tensor, found: tuple[Tensor, ...], buffers: tuple[Tensor, ...]) -> Exponentials:
        """Return the exponentials.  The buffer V gets the difference of the logits relative to their maxima."""
        if self.two_sweeps:
            torch.sub(y, z, out=buffers[-1])
        u = torch.sub(z, found[stats.M_S], out=buffers[U])
        v = torch.sub(y, found[stats.M_T], out=buffers[V])
        x = self._of_student(u, buffers)
        q = self._exponential(v, self.temperature, buffers, Q)
        if not self.two_sweeps:
            v.sub_(u)
        return x._replace(q=q)

    def _of_student(self, u: Tensor, buffers: tuple[Tensor, ...]) -> Exponentials:
        """Return e^u and e^{u/T}; for T = 1 they are the same tensor, for T = 2 one is the square of the other."""
        temperature = self.temperature if self.needs_at_T else 1.0
        at_1 = p = self._exponential(u, temperature, buffers, P)
        if self.at_1 != P:
            at_1 = (
                torch.mul(p, p, out=buffers[self.at_1])
                if temperature == 2 and self.teacher is not None  # the gradient of CE alone knows of no temperature
                else self._exponential(u, 1.0, buffers, self.at_1)
            )
        return Exponentials(at_1, p, p, Terms(None, None, u, careful=False))

    def _with_slopes(self, x: Exponentials, found: tuple[Tensor, ...], buffers: tuple[Tensor, ...]) -> Exponentials:
        """Return the exponentials with the slopes of a divergence of two sweeps, whose sums are written."""
        assert isinstance(self.block, RatioBlock)
        return x._replace(terms=self.block.slopes(x.p, x.q, buffers[-1], (buffers[U], buffers[V]), found))

    def _difference_in_unit(self, rows: slice | Tensor, found: tuple[Tensor, ...], buffer: Tensor) -> Tensor:
        """Return the difference of the logits relative to their maxima, in UNIT."""
        assert self.teacher is not None
        u = load(self.student, rows, self.student_map, buffer).div(stats.UNIT).sub_(found[stats.M_S] / stats.UNIT)
        v = load(self.teacher, rows, self.teacher_map, buffer).div(stats.UNIT).sub_(found[stats.M_T] / stats.UNIT)
        return v.sub_(u)

    def _sum_entropy(
        self, rows: slice | Tensor, found: tuple[Tensor, ...], p: Tensor, buffers: tuple[Tensor, ...]
    ) -> None:
        """Write the sum h.  It overwrites the buffer U, which no term of the loss needs any more."""
        sum_rows(buffers[U].mul_(p), found[stats.H])
        if is_finite(found[stats.H]):
            return
        u = torch.sub(load(self.student, rows, self.student_map, buffers[U]), found[stats.M_S], out=buffers[U])
        sum_rows(u.mul_(p).masked_fill_(p == 0, 0.0), found[stats.H])  # masked tokens

    def _exponential(self, u: Tensor, temperature: float, buffers: tuple[Tensor, ...], index: int) -> Tensor:
        """Return e^{u / T} in the buffer with that index."""
        torch.mul(u, LOG2_E / temperature, out=buffers[index])
        return self.buffers.apply("exp2_", buffers[index])

    def _coefficients(
        self,
        rows: slice | Tensor,
        found: tuple[Tensor, ...],  # nine, [rows, 1] each
        row: _Weights,
        teacher_grad: bool = False,
    ) -> Coefficients:  # [rows, 1] each
        ce = None if self.label is None else of_rows(row.ce, rows)
        divergence = None if self.teacher is None else of_rows(row.divergence, rows)
        return coefficients(found, ce, divergence, self.objective, teacher_grad=teacher_grad)

    def _write_gradient(self, rows: slice | Tensor, x: Exponentials, k: Coefficients, gradient: Tensor) -> None:
        """Write the gradient of a block of the student's logits.  It overwrites the spare buffer."""
        result = x.terms.spare
        if isinstance(rows, slice) and gradient.dtype == result.dtype and self.student_map.is_identity:
            result = view(gradient, rows)
        joins_ce = self.label is not None and x.at_1 is x.p  # both terms are multiples of e^u
        if self.teacher is None:
            torch.mul(x.at_1, k.A, out=result)
        else:
            self.block.student_gradient(x.terms, x.p, x.q, k, k.A if joins_ce else None, out=result)
            if self.label is not None and not joins_ce:
                result.addcmul_(x.at_1, k.A)
        if self.label is not None:
            W = k.W if self.elsewhere is None else k.W.masked_fill(of_rows(self.elsewhere, rows), 0.0)
            result.scatter_add_(1, of_rows(self.label, rows), -W)
        if result is x.terms.spare:
            free = x.at_1 if self.teacher is None or x.at_1 is not x.p else self.block.free(x.terms, x.p)
            multiply_by_slope(result, self.student, rows, self.student_map, buffer=free)
            write(gradient, rows, result)


def with_one_outer_index(tensor: Tensor) -> Tensor:
    """Return `[outer, inner, V]` with one outer index, if strides allow."""
    return tensor if tensor.shape[0] == 1 else as_rows(tensor)


def _with_scratch(
    found: Sequence[Tensor] | Tensor,  # nine, [rows, 1] each
) -> tuple[Tensor, ...]:
    """Return the statistics with copies of those that a second sweep writes."""
    return tuple(number.clone() if i in (stats.C, stats.SECOND) else number for i, number in enumerate(found))


def _zero_others(
    written: Tensor,  # [outer, inner, V]
    has_gradient: Tensor | None,  # [N], bool; None: every row has
) -> None:
    if has_gradient is not None:
        for rows in blocks_of_rows(~has_gradient, has_gradient.numel(), written):
            zero(written, rows)
