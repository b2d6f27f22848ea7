"""The divergences of teacher and student, and the coefficients of the gradients.

Let u = z - m_s and v = y - m_t be the student's and the teacher's logits relative to the maximum of their row.  Each row
has coefficients A, B, C, W and R.  For forward KL the gradients of the logits are

    dL/dz[j] = A e^u + B e^{u/T} - C e^{v/T} - W [j = label]         dL/dy[j] = C e^{v/T} ((v - u)/T - R)

and for reverse KL

    dL/dz[j] = A e^u + B e^{u/T} ((u - v)/T - R) - W [j = label]     dL/dy[j] = C e^{v/T} - B e^{u/T}

R is the mean of the difference of the logits, (v - u)/T or (u - v)/T, under the distribution that the divergence averages
over.  The normalisers cancel, so no logarithm is needed.  `coefficients` computes the numbers of each row from the merged
statistics, the weights of the row and the temperature.  `backends/triton/elements.py` has the same functions for kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .logit_map import IDENTITY_MAP, LogitMap
from .statistics import D_1, D_T, LABEL, M_S, UNIT, E
from .statistics import C as DIFFERENCE

Temperature = float | Tensor  # a scalar tensor only in a compiled graph whose temperature changes from call to call


class Objective(NamedTuple):
    """The options that define the loss of a row."""

    student_map: LogitMap = IDENTITY_MAP
    teacher_map: LogitMap = IDENTITY_MAP
    # From here on as the user gives them, under the same names.  The temperature is a tensor outside the operators if it
    # changes from call to call of a compiled graph; see `operators.TRACED`.
    temperature: float = 1.0
    divergence: str = "forward_kl"


GIVEN = Objective._fields[2:]


class Coefficients(NamedTuple):
    """The coefficients of the gradients of some rows, in the shape of their statistics; see the module's docstring."""

    A: Tensor  # w_ce / d_1
    B: Tensor  # w / (T d_T)
    C: Tensor  # w / (T e)
    W: Tensor  # w_ce
    R: Tensor  # the mean difference of the logits over T


class Divergence(NamedTuple):
    """A Kullback-Leibler divergence: an average over one distribution of its log-ratio to the other one.

    The statistic c is the sum of that distribution's exponentials times the differences of the logits.
    """

    name: str
    mass: int  # index, among the statistics, of the normaliser of the distribution that is averaged over
    other: int  # index of the other distribution's normaliser
    # Upper bound of |dD/dz| T.  Reverse KL has no bound: its slope grows with the difference of the logits, in nats.
    largest_slope: float

    @property
    def is_over_student(self) -> bool:
        """Return whether the divergence is an average over the student's distribution."""
        return self.mass == D_T

    def value(
        self,
        statistics: Tensor,  # [7, N]
        temperature: Temperature,
    ) -> Tensor:  # [N], float64, in nats
        """Return the divergence of each row.

        Both normalisers are relative to their maxima and lie in [1, V].  So the logarithm of their ratio is exact to
        rounding where teacher and student are close; a difference of two logarithms would cancel there.
        """
        statistics = statistics.double()
        mass, difference, scale = statistics[self.mass], statistics[DIFFERENCE], UNIT / temperature
        log_ratio = (statistics[self.other] / mass).log()
        if isinstance(scale, Tensor):
            return log_ratio + difference / mass * scale
        return torch.addcdiv(log_ratio, difference, mass, value=scale)

    def term(
        self,
        u: Tensor,  # [rows, V], as are all four
        v: Tensor,
        p: Tensor,  # e^{u/T}; forward KL does not use it, and it may hold anything
        q: Tensor,  # e^{v/T}
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mass of each column, its difference of logits, and a buffer that is free.

        The difference overwrites u or v, and the free buffer is the other of the two.  The sum of mass times difference
        is the statistic c.
        """
        return (p, u.sub_(v), v) if self.is_over_student else (q, v.sub_(u), u)

    def student_gradient(
        self,
        p: Tensor,  # [rows, V], as are q and the difference
        q: Tensor,
        difference: Tensor,  # as `term` returns it; forward KL does not use it, and reverse KL overwrites it
        B: Tensor,  # [rows, 1], as are C and R
        C: Tensor,
        R: Tensor,  # forward KL does not use it
        temperature: float,
        out: Tensor,  # [rows, V], none of the others
    ) -> None:
        """Write the gradient of the student's logits to `out`."""
        if not self.is_over_student:
            torch.mul(p, B, out=out).addcmul_(q, C, value=-1)
            return
        # A column without student mass adds nothing, even if its log-ratio is infinite or NaN (masked tokens).
        log_ratio = difference.div_(temperature).sub_(R).masked_fill_(p == 0, 0.0)
        torch.mul(log_ratio.mul_(p), B, out=out)

    def teacher_gradient(
        self,
        p: Tensor,  # [rows, V], as are q and the difference
        q: Tensor,
        difference: Tensor,  # as `term` returns it; reverse KL does not use it
        B: Tensor,  # [rows, 1], as are C and R
        C: Tensor,
        R: Tensor,  # reverse KL does not use it
        temperature: float,
    ) -> Tensor:
        """Return the gradient of the teacher's logits, written over q or over the difference."""
        if self.is_over_student:
            return q.mul_(C).addcmul_(p, B, value=-1)
        # A column without teacher mass adds nothing, even if its log-ratio is infinite or NaN (masked tokens).
        return difference.div_(temperature).sub_(R).masked_fill_(q == 0, 0.0).mul_(q).mul_(C)


FORWARD_KL = Divergence("forward_kl", mass=E, other=D_T, largest_slope=1.0)
REVERSE_KL = Divergence("reverse_kl", mass=D_T, other=E, largest_slope=2.0**6)
DIVERGENCES = {divergence.name: divergence for divergence in (FORWARD_KL, REVERSE_KL)}


def values(
    statistics: Tensor,  # [7, N], merged
    objective: Objective,
    *,
    need_ce: bool,  # False: no CE
    need_divergence: bool,  # False: no divergence
) -> tuple[Tensor, Tensor]:  # [N] each, float64
    """Return the cross-entropy and the divergence of each row, in nats; zeros for a term that is left out."""
    divergence = DIVERGENCES[objective.divergence]
    return (
        cross_entropy(statistics) if need_ce else _zeros(statistics),
        divergence.value(statistics, objective.temperature) if need_divergence else _zeros(statistics),
    )


def _zeros(statistics: Tensor) -> Tensor:  # [N], float64
    return torch.zeros_like(statistics[0], dtype=torch.float64)


def cross_entropy(statistics: Tensor) -> Tensor:  # of [7, N]; [N], float64
    """Return -log softmax(z)[label] at temperature 1, in nats."""
    return statistics[D_1].double().log() - (statistics[LABEL].double() - statistics[M_S].double())


def coefficients(
    statistics: Sequence[Tensor],  # seven of any shape, merged
    ce_weight: Tensor | None,  # weight of each row's CE times the upstream gradient; None: no CE in the loss
    divergence_weight: Tensor | None,  # the same for the divergence, T^2 included; None: no divergence in the loss
    objective: Objective,
    *,
    teacher_grad: bool = True,  # False: R may be left out, where the student's gradient has none
) -> Coefficients:
    """Return the coefficients of rows that count.  One that is left out is not used, and may be any number."""
    divergence, temperature = DIVERGENCES[objective.divergence], objective.temperature
    A = B = C = W = R = statistics[M_S]
    if ce_weight is not None:
        A, W = ce_weight / statistics[D_1], ce_weight
    if divergence_weight is not None:
        w = divergence_weight * (1 / temperature)
        B, C = w / statistics[D_T], w / statistics[E]
        if teacher_grad or divergence.is_over_student:
            R = statistics[DIFFERENCE] / statistics[divergence.mass] * (UNIT / temperature)
    return Coefficients(A, B, C, W, R)
