"""The Kullback-Leibler divergences: forward, reverse, and a mixture of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..statistics import D_T, SECOND, UNIT, E
from ..statistics import C as FIRST
from .base import NO_BOUND, Divergence, Temperature, check_share


@dataclass(frozen=True)
class KullbackLeibler(Divergence):
    """A weighted sum of forward and reverse KL, of which one sweep of statistics takes the value."""

    sweeps: ClassVar[int] = 1

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights of forward and of reverse KL."""
        raise NotImplementedError

    @property
    def largest_slope(self) -> float:
        """Return the bound: 1 for forward KL, and `NO_BOUND` for reverse KL."""
        forward, reverse = self.weights
        return forward + reverse * NO_BOUND

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f of each pair."""
        forward, reverse = self.weights
        p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
        return forward * (q * log_ratio + p - q) + reverse * (q - p - p * log_ratio)

    def value(self, statistics: Tensor, temperature: Temperature) -> Tensor:
        """Return the divergence of each row.

        Both normalisers are relative to their maxima and lie in [1, V].  So the logarithm of their ratio is exact to
        rounding where teacher and student are close; a difference of two logarithms would cancel there.
        """
        statistics, scale = statistics.double(), UNIT / temperature
        (forward, reverse), d_T, e = self.weights, statistics[D_T], statistics[E]
        if not forward:
            excess = statistics[SECOND] / d_T
            log_ratio = torch.where(excess.abs() < 0.5, excess.log1p(), (e / d_T).log())
            return _kl(log_ratio, statistics[FIRST], d_T, scale)
        value = _kl((d_T / e).log(), statistics[FIRST], e, scale)
        return (
            value if not reverse else forward * value + reverse * _kl((e / d_T).log(), statistics[SECOND], d_T, scale)
        )

    def means(self, statistics: Sequence[Tensor], temperature: Temperature) -> tuple[Tensor, Tensor]:
        """Return the coefficients R and S."""
        (forward, reverse), scale = self.weights, UNIT / temperature
        R = statistics[FIRST] / statistics[E if forward else D_T] * scale
        return R, statistics[SECOND] / statistics[D_T] * scale if forward and reverse else R


def _kl(log_ratio: Tensor, difference: Tensor, mass: Tensor, scale: Temperature) -> Tensor:
    if isinstance(scale, Tensor):
        return log_ratio + difference / mass * scale
    return torch.addcdiv(log_ratio, difference, mass, value=scale)


@dataclass(frozen=True)
class ForwardKL(KullbackLeibler):
    """KL(q || p) = sum q log(q / p) (Hinton et al., arXiv:1503.02531).  The student covers all that the teacher says."""

    name: ClassVar[str] = "forward_kl"
    weights: ClassVar[tuple[float, float]] = (1.0, 0.0)  # type: ignore[misc]


@dataclass(frozen=True)
class ReverseKL(KullbackLeibler):
    """KL(p || q) = sum p log(p / q) (Gu et al., "MiniLLM", arXiv:2306.08543).

    The student leaves out what the teacher would not say.
    """

    name: ClassVar[str] = "reverse_kl"
    weights: ClassVar[tuple[float, float]] = (0.0, 1.0)  # type: ignore[misc]


@dataclass(frozen=True)
class MixedKL(KullbackLeibler):
    """(1 - reverse) KL(q || p) + reverse KL(p || q).

    Args:
        reverse: the weight of reverse KL, above 0 and below 1.

    Raises:
        ValueError: the weight is 0 or 1, which `ForwardKL` and `ReverseKL` are for, or outside.
    """

    name: ClassVar[str] = "mixed_kl"
    reverse: float = 0.5

    def __post_init__(self) -> None:
        check_share(self, "reverse", "ForwardKL()", "ReverseKL()")
        super().__post_init__()

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights of forward and of reverse KL."""
        return 1.0 - self.reverse, self.reverse
