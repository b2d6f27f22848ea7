"""The divergences of a block of rows on the CPU: the sums that their statistics need, and the gradients.

A Kullback-Leibler divergence takes its sums from the exponentials and the difference of the logits.  Every other divergence
takes them from the log-ratio of the probabilities, once the normalisers of the block are known.  The gradients are taken
from the same buffers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import Coefficients, Divergence, Ratio, Slopes

Tensors = tuple[Tensor, ...]


class Terms(NamedTuple):
    """The part of a block that the gradients of its divergence are taken from.  The tensors are buffers, `[rows, V]`."""

    difference: Tensor | None  # (y - m_t) - (z - m_s), of a Kullback-Leibler divergence
    slopes: Slopes | None  # of any other divergence
    spare: Tensor  # a buffer that is free
    careful: bool  # whether columns may lack mass while their difference is infinite or NaN
    mean: Tensor | None = None  # [rows, 1], the sum of the teacher's slopes


def sum_rows(
    block: Tensor,  # [rows, V]
    out: Tensor,  # [rows, 1]
) -> None:
    """Write the sum of each row, taken by one thread.  PyTorch would share a single row among its threads."""
    if block.shape[0] > 1:
        torch.sum(block, 1, True, out=out)
    else:
        out.copy_(block.expand(2, -1).sum(1, True)[:1])


def is_finite(numbers: Tensor) -> bool:
    return math.isfinite(numbers.sum().item())


class KLBlock:
    """A Kullback-Leibler divergence of a block."""

    def __init__(self, kind: Any, temperature: float, apply: Callable[[str, Tensor], Tensor]) -> None:
        (self.forward, self.reverse), self.temperature, self.apply = kind.weights, temperature, apply

    def sums(
        self,
        p: Tensor,  # e^{u/T}, [rows, V], as is q
        q: Tensor,
        difference: Tensor,  # (y - m_t) - (z - m_s), [rows, V]
        spare: Tensor,
        found: Tensors,  # nine, [rows, 1] each, written
        in_unit: Callable[[], Tensor],  # returns the difference in UNIT
    ) -> Terms:
        """Write the sums of the differences."""
        first, second = found[stats.C], found[stats.SECOND]
        careful = False
        if self.forward:
            careful |= self._sum(q, difference, spare, first, 1.0, in_unit)
            if self.reverse:
                careful |= self._sum(p, difference, spare, second, -1.0, in_unit)
        else:
            careful |= self._sum(p, difference, spare, first, -1.0, in_unit)
            self._excess(p, q, difference, spare, found)
        return Terms(difference, None, spare, careful)

    def _sum(
        self,
        mass: Tensor,
        difference: Tensor,
        spare: Tensor,
        out: Tensor,  # [rows, 1]
        sign: float,
        in_unit: Callable[[], Tensor],
    ) -> bool:
        """Write the sum of mass times difference, in UNIT.  Return whether it was not finite at first."""
        sum_rows(torch.mul(mass, difference, out=spare), out)
        careful = not is_finite(out)
        if careful:  # masked tokens: a column without mass adds nothing, even if its difference is infinite
            massless = mass == 0
            sum_rows(torch.mul(mass, difference, out=spare).masked_fill_(massless, 0.0), out)
        out.mul_(sign / stats.UNIT)
        if careful and out.isinf().any():  # mass where the other distribution has none, or an overflow outside the unit
            exact = out.clone()
            sum_rows(in_unit().mul_(mass).masked_fill_(massless, 0.0), exact)
            out.copy_(torch.where(out.isinf(), exact * sign, out))
        return careful

    def _excess(self, p: Tensor, q: Tensor, difference: Tensor, spare: Tensor, found: Tensors) -> None:
        """Write e - d_T; column by column where teacher and student are so close that the difference is noise."""
        d_T, e, excess = found[stats.D_T], found[stats.E], found[stats.SECOND]
        torch.sub(e, d_T, out=excess)
        close = found[stats.C] / d_T * (stats.UNIT / self.temperature) + (e / d_T).log() < stats.CLOSE
        if not close.any():
            return
        exact = self.apply("expm1_", torch.mul(difference, 1 / self.temperature, out=spare)).mul_(p)
        sums = torch.empty_like(excess)
        sum_rows(exact if is_finite(exact) else torch.where(p > 0, exact, q), sums)
        excess.copy_(torch.where(close, sums, excess))

    def student_gradient(
        self,
        x: Terms,
        p: Tensor,
        q: Tensor,
        k: Coefficients,  # [rows, 1] each
        A: Tensor | None,  # [rows, 1]: the coefficient of p that CE adds
        out: Tensor,  # [rows, V], none of the others
    ) -> None:
        """Write the gradient of the student's logits."""
        assert x.difference is not None
        B = k.B if A is None else k.B + A
        if not self.reverse:
            torch.mul(p, B, out=out).addcmul_(q, k.C, value=-1)
            return
        mean = k.S if self.forward else k.R
        constant = k.B * (self.forward - self.reverse * mean)
        constant = constant if A is None else constant + A
        torch.mul(x.difference, k.B * (-self.reverse / self.temperature), out=out).add_(constant).mul_(p)
        if x.careful:  # a column without student mass adds nothing, even if its log-ratio is infinite or NaN
            out.masked_fill_(p == 0, 0.0)
        if self.forward:
            out.addcmul_(q, k.C, value=-self.forward)

    def free(self, x: Terms, p: Tensor) -> Tensor:
        """Return memory that the teacher's gradient does not need."""
        if not self.reverse:
            return p
        return torch.empty_like(p) if self.forward or x.difference is None else x.difference

    def teacher_gradient(self, x: Terms, p: Tensor, q: Tensor, k: Coefficients) -> Tensor:  # [rows, V]
        """Return the gradient of the teacher's logits, written over q or over the difference."""
        assert x.difference is not None
        if not self.forward:
            return q.mul_(k.C).addcmul_(p, k.B, value=-1)
        result = x.difference
        result.mul_(k.C * (self.forward / self.temperature)).add_(k.C * (self.reverse - self.forward * k.R)).mul_(q)
        if x.careful:  # a column without teacher mass adds nothing, even if its log-ratio is infinite or NaN
            result.masked_fill_(q == 0, 0.0)
        return result.addcmul_(p, k.B, value=-self.reverse) if self.reverse else result


class RatioBlock:
    """A divergence of two sweeps, of a block."""

    def __init__(self, kind: Divergence, temperature: float, apply: Callable[[str, Tensor], Tensor]) -> None:
        self.kind, self.temperature, self.apply = kind, temperature, apply

    def slopes(
        self,
        p: Tensor,  # e^{u/T}, [rows, V], as is q
        q: Tensor,
        difference: Tensor,  # y - z, [rows, V]; overwritten
        free: tuple[Tensor, Tensor],  # overwritten
        found: Tensors,  # nine, [rows, 1] each: maxima and normalisers; the sums are written
    ) -> Terms:
        """Return the slopes of the divergence, and write their sums."""
        d_T, e, first, second = found[stats.D_T], found[stats.E], found[stats.C], found[stats.SECOND]
        # The difference of two large maxima overflows only in a unit of 1.
        maxima = (found[stats.M_S] / stats.UNIT - found[stats.M_T] / stats.UNIT) * (stats.UNIT / self.temperature)
        log_ratio = torch.add(maxima - (e / d_T).log(), difference, alpha=1 / self.temperature, out=difference)
        x = self.kind.slopes(Ratio(p, q, log_ratio, d_T, e, free, self.apply))
        sum_rows(x.student, first)
        sum_rows(x.teacher, second)
        if not (is_finite(first) and is_finite(second)):  # masked tokens: 0 times an infinite or undefined log-ratio
            sum_rows(x.student.masked_fill_(p == 0, 0.0), first)
            sum_rows(x.teacher.masked_fill_(q == 0, 0.0), second)
        first.mul_(x.a / d_T)
        mean = second * (x.b / e)
        torch.add(first, mean, out=second) if x.value is None else second.copy_(x.value)
        spare = next(buffer for buffer in (difference, *free) if buffer is not x.student and buffer is not x.teacher)
        return Terms(None, x, spare, False, mean)

    def student_gradient(self, x: Terms, p: Tensor, q: Tensor, k: Coefficients, A: Tensor | None, out: Tensor) -> None:
        """Write the gradient of the student's logits; see `KLBlock.student_gradient`."""
        assert x.slopes is not None
        mean = k.B * k.R
        torch.mul(x.slopes.student, k.B * x.slopes.a, out=out).addcmul_(p, -mean if A is None else A - mean)

    def free(self, x: Terms, p: Tensor) -> Tensor:
        """Return memory that the teacher's gradient does not need."""
        return p

    def teacher_gradient(self, x: Terms, p: Tensor, q: Tensor, k: Coefficients) -> Tensor:  # [rows, V]
        """Return the gradient of the teacher's logits, written over its slopes."""
        assert x.slopes is not None
        assert x.mean is not None
        return x.slopes.teacher.mul_(k.C * x.slopes.b).addcmul_(q, k.C * x.mean, value=-1)  # S would have cancelled
