"""The objective of a loss, the values of its terms and the coefficients of its gradients, from merged statistics."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_map import IDENTITY_MAP, LogitMap
from ..statistics import D_1, D_T, LABEL, M_S, E, H
from .base import Divergence, Temperature, of
from .kullback_leibler import ForwardKL


class Objective(NamedTuple):
    """The options that define the loss of a row."""

    student_map: LogitMap = IDENTITY_MAP
    teacher_map: LogitMap = IDENTITY_MAP
    # A tensor outside the operators if it changes from call to call of a compiled graph; see `operators.TRACED`.
    temperature: float = 1.0
    divergence: str = "forward_kl"  # the name of a class
    parameters: tuple[float, ...] = ()  # its parameters; (): the defaults


class Coefficients(NamedTuple):
    """The coefficients of the gradients of some rows, in the shape of their statistics; see the module's docstring."""

    A: Tensor  # w_ce / d_1
    B: Tensor  # w / (T d_T)
    C: Tensor  # w / (T e)
    W: Tensor  # w_ce
    R: Tensor  # the mean difference of the logits over T, or the mean slope of the student
    S: Tensor  # a second mean difference, or the mean slope of the teacher


def divergence_of(objective: Objective) -> Divergence:
    """Return the divergence of an objective."""
    return of(objective.divergence, objective.parameters)


def values(
    statistics: Tensor,  # [9, N], merged
    objective: Objective,
    *,
    need_ce: bool,  # False: no CE
    need_divergence: bool,  # False: no divergence
    need_entropy: bool = False,  # False: no entropy
) -> tuple[Tensor, Tensor, Tensor]:  # [N] each, float64
    """Return CE, divergence and the student's entropy of each row, in nats; zeros for one that is left out."""
    temperature = objective.temperature
    return (
        cross_entropy(statistics) if need_ce else _zeros(statistics),
        divergence_of(objective).value(statistics, temperature) if need_divergence else _zeros(statistics),
        entropy(statistics, temperature) if need_entropy else _zeros(statistics),
    )


def _zeros(statistics: Tensor) -> Tensor:  # [N], float64
    return torch.zeros_like(statistics[0], dtype=torch.float64)


def cross_entropy(statistics: Tensor) -> Tensor:  # of [9, N]; [N], float64
    """Return -log softmax(z)[label] at temperature 1, in nats."""
    return statistics[D_1].double().log() - (statistics[LABEL].double() - statistics[M_S].double())


def entropy(statistics: Tensor, temperature: Temperature) -> Tensor:  # of [9, N]; [N], float64
    """Return the entropy of the student's distribution at the temperature, -sum p log p, in nats."""
    d_T = statistics[D_T].double()
    return d_T.log() - statistics[H].double() / d_T / temperature


def coefficients(
    statistics: Sequence[Tensor],  # nine of any shape, merged
    ce_weight: Tensor | None,  # weight of each row's CE times the upstream gradient; None: no CE in the loss
    divergence_weight: Tensor | None,  # the same for the divergence, T^2 included; None: no divergence in the loss
    objective: Objective,
    *,
    teacher_grad: bool = True,  # False: R may be left out, where the student's gradient has none
) -> Coefficients:
    """Return the coefficients of rows that count.  One that is left out is not used, and may be any number."""
    divergence, temperature = divergence_of(objective), objective.temperature
    A = B = C = W = R = S = statistics[M_S]
    if ce_weight is not None:
        A, W = ce_weight / statistics[D_1], ce_weight
    if divergence_weight is not None:
        w = divergence_weight * (1 / temperature)
        B, C = w / statistics[D_T], w / statistics[E]
        if teacher_grad or divergence.name != ForwardKL.name:
            R, S = divergence.means(statistics, temperature)
    return Coefficients(A, B, C, W, R, S)
