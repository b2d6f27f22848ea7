"""A divergence of one's own, as docs/adding-a-divergence.md describes it: in PyTorch, and for the kernels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from fused_kd.divergences import Divergence

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def geometric_mean(x):
    """Return p^order q^(1 - order), by the larger of both: the other's logarithm may be infinite, and p or q 0."""
    larger = tl.maximum(x.p, x.q)
    # The exponent is at most 0.  Where the log-ratio is NaN both are 0.
    exponent = tl.where(x.log_ratio > 0, -x.parameter, 1.0 - x.parameter) * x.log_ratio
    return tl.where(larger > 0, larger * tl.exp2(exponent * LOG2_E), 0.0)


@triton.jit
def alpha_value(x):
    a = x.parameter
    return (geometric_mean(x) - a * x.p - (1.0 - a) * x.q) / (a * (a - 1.0))


@triton.jit
def alpha_slope(x):
    return (geometric_mean(x) - x.p) / (x.parameter - 1.0)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """Amari's alpha-divergence, (sum p^a q^(1-a) - 1) / (a (a - 1)) with 0 < a < 1: the Hellinger distance for a = 1/2."""

    name: ClassVar[str] = "alpha"
    order: float = 0.3

    def elements(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Return f of each pair; its multiples of p and q make f and its slopes 0 where p = q."""
        a = self.order
        mean = (a * log_p + (1 - a) * log_q).exp()
        return (mean - a * log_p.exp() - (1 - a) * log_q.exp()) / (a * (a - 1))

    def kernels(self):
        """Return f and p df/dp."""
        return alpha_value, alpha_slope


@dataclass(frozen=True)
class TriangularDiscrimination(Divergence):
    """sum (p - q)^2 / (p + q) / 2, the triangular discrimination: without kernels, and without parameters."""

    name: ClassVar[str] = "triangular"

    def elements(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """Return f of each pair."""
        p, q = log_p.exp(), log_q.exp()
        total = p + q
        return ((p - q).square() / total.masked_fill(total == 0, 1.0)) / 2
