"""The divergences that take two sweeps of statistics: Jensen-Shannon, skewed Kullback-Leibler, total variation."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Divergence, Ratio, Slopes, check_share

SMALL = 0.15  # a share below which the logarithms of a mixture are taken in another way; measured: the better one
LIMIT = 60.0  # of a log-ratio in an exponential: e^60 times the smallest share is far above 1, and far from infinite


@dataclass(frozen=True)
class MixtureDivergence(Divergence):
    """A divergence of p or q, or of both, from a mixture m = (1 - share) p + share q of them.

    Let e = expm1(-|log(q / p)|), which cannot overflow, and c = 1 - share where q > p, c = share elsewhere.  Then m is
    max(p, q) (1 + c e), and one logarithm, l = log1p(c e), gives log(m / p) = max(log(q / p), 0) + l and
    log(q / m) = min(log(q / p), 0) - l.  Neither cancels, unless a share is small.

    Let b be a small share, and t the log-ratio of its distribution to the other one.  Then m is the other one times
    1 + b expm1(t), and r = log1p(b expm1(t)) keeps its digits.  The other logarithm is t - r, which cancels for shares that
    are not small.
    """

    @property
    def share(self) -> float:
        """Return the teacher's share of the mixture."""
        raise NotImplementedError

    @property
    def kernel_parameter(self) -> float:
        """Return the parameter, or minus its complement if that is smaller: see `backends.triton.ratios.shares`."""
        parameter = self.parameters[0]
        return parameter if parameter <= 0.5 else parameter - 1.0

    @property
    def small_share(self) -> float | None:
        """Return the smaller of both shares if it is small."""
        share = min(self.share, 1.0 - self.share)
        return share if share < SMALL else None

    def parts(self, x: Ratio) -> tuple[Tensor, Tensor]:
        """Return e and c e of a block, in the two free buffers."""
        e, ce = x.free
        x.apply("expm1_", torch.abs(x.log_ratio, out=e).neg_())
        # From the smaller of both values of c, so that it is exact.
        smaller, takes_larger = min(self.share, 1.0 - self.share), torch.gt if self.share < 0.5 else torch.le
        return e, takes_larger(x.log_ratio, 0, out=ce).mul_(1.0 - 2.0 * smaller).add_(smaller).mul_(e)

    def parts_of_small_share(self, x: Ratio, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return b expm1(t), log(m / p) and log(q / m) of a block, in the free buffers and that of the log-ratio."""
        (scaled, r), of_teacher = x.free, self.share < 0.5
        t = (x.log_ratio if of_teacher else x.log_ratio.neg_()).clamp_(max=LIMIT)
        x.apply("expm1_", scaled.copy_(t)).mul_(share)
        x.apply("log1p_", r.copy_(scaled))
        if of_teacher:
            return scaled, r, t.sub_(r)
        return scaled, torch.sub(r, t, out=t), r.neg_()


@dataclass(frozen=True)
class JSD(MixtureDivergence):
    """The generalised Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649; as in TRL and Liger-Kernel,
    which take forward KL for beta = 0 and reverse KL for beta = 1.

    Args:
        beta: the share of the teacher, above 0 and below 1.

    Raises:
        ValueError: beta is 0 or 1, which `ForwardKL` and `ReverseKL` are for, or outside.
    """

    name: ClassVar[str] = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_share(self, "beta", "ForwardKL()", "ReverseKL()")
        super().__post_init__()

    @property
    def share(self) -> float:
        """Return beta."""
        return self.beta

    @property
    def largest_slope(self) -> float:
        """Return 1: |G| is at most 1/e in every column, and so is its sum."""
        return 1.0

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f of each pair."""
        return _in_mixture(log_p, log_q, self.beta, self.beta, 1.0 - self.beta)

    def slopes(self, x: Ratio) -> Slopes:
        """Return G = -(1 - beta) p log(m / p) and K = beta q log(q / m)."""
        if self.small_share is not None:
            _, student, teacher = self.parts_of_small_share(x, self.small_share)
            return Slopes(student.mul_(x.p), teacher.mul_(x.q), self.beta - 1.0, self.beta)
        student, log = x.free
        sign = 1.0
        if self.beta == 0.5:  # l = -log1p(tanh(|log(q / p)| / 2)), and PyTorch's tanh takes a quarter of expm1's time
            x.apply("tanh_", torch.abs(x.log_ratio, out=log).mul_(0.5))
            sign = -1.0
        else:
            self.parts(x)
        x.apply("log1p_", log)
        torch.clamp(x.log_ratio, min=0, out=student).add_(log, alpha=sign).mul_(x.p)
        teacher = x.log_ratio.clamp_(max=0).sub_(log, alpha=sign).mul_(x.q)
        return Slopes(student, teacher, self.beta - 1.0, self.beta)

    def kernels(self) -> tuple[Any, ...]:
        """Return the Triton functions."""
        from ..backends.triton import ratios

        return ratios.jsd_value, ratios.jsd_slope, ratios.jsd_teacher_slope


@dataclass(frozen=True)
class SkewedDivergence(MixtureDivergence):
    """A Kullback-Leibler divergence from a mixture that holds a share, the skew, of its first distribution."""

    without_skew: ClassVar[str]  # the class that is meant by a skew of 0
    skew: float = 0.1

    def __post_init__(self) -> None:
        check_share(self, "skew", f"{self.without_skew}()", None)
        super().__post_init__()


@dataclass(frozen=True)
class SkewKL(SkewedDivergence):
    """The skewed forward KL, KL(q || skew q + (1 - skew) p).

    Source: Ko et al., "DistiLLM", arXiv:2402.03898, with skew = 0.1.

    Args:
        skew: the share of the teacher in the mixture, above 0 and below 1.

    Raises:
        ValueError: the skew is 0, which `ForwardKL` is for, or outside.
    """

    name: ClassVar[str] = "skew_kl"
    without_skew: ClassVar[str] = "ForwardKL"

    @property
    def share(self) -> float:
        """Return the skew."""
        return self.skew

    @property
    def largest_slope(self) -> float:
        """Return 1: (1 - skew) p q / m is at most q."""
        return 1.0

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f of each pair."""
        return _in_mixture(log_p, log_q, self.skew, 1.0, 0.0) + (1.0 - self.skew) * (log_p.exp() - log_q.exp())

    def slopes(self, x: Ratio) -> Slopes:
        """Return G = -(1 - skew) p q / m and K = q log(q / m) - G.

        The multiple of p - q in f is left out of the slopes, and only added to the value.  With it the slopes would be
        nearly constant where the student says what the teacher would not, and their mean would cancel them.
        """
        p, q = x.p / x.d_T, x.q / x.e
        if self.small_share is not None:
            return self._slopes_of_small_share(x, p, q, self.small_share)
        e, log = self.parts(x)
        more, less = torch.maximum(p, q), torch.minimum(p, q)
        difference = torch.sign(x.log_ratio).mul_(e).mul_(more).masked_fill_(more == 0, 0.0)  # p - q
        student = torch.div(less, 1.0 + log, out=e)
        x.apply("log1p_", log)
        teacher = x.log_ratio.clamp_(max=0).sub_(log).mul_(q).masked_fill_(q == 0, 0.0)
        value = torch.add(teacher, difference, alpha=1.0 - self.skew).sum(1, True)
        teacher.add_(student, alpha=1.0 - self.skew)
        return Slopes(student, teacher, x.d_T * (self.skew - 1.0), x.e, value)

    def _slopes_of_small_share(self, x: Ratio, p: Tensor, q: Tensor, share: float) -> Slopes:
        scaled, _, teacher = self.parts_of_small_share(x, share)
        other, sign = (p, 1.0) if self.skew < 0.5 else (q, -1.0)
        difference = torch.where(scaled < 0.5 * share, other * scaled * (sign / share), q - p)
        student = torch.where(p > 0, (q if self.skew < 0.5 else p) / (1.0 + scaled), 0.0)
        teacher.mul_(q).masked_fill_(q == 0, 0.0)
        value = torch.sub(teacher, difference, alpha=1.0 - self.skew).sum(1, True)
        teacher.add_(student, alpha=1.0 - self.skew)
        return Slopes(student, teacher, x.d_T * (self.skew - 1.0), x.e, value)

    def kernels(self) -> tuple[Any, ...]:
        """Return the Triton functions."""
        from ..backends.triton import ratios

        return ratios.skew_kl_value, ratios.skew_kl_slope, ratios.skew_kl_teacher_slope


@dataclass(frozen=True)
class SkewReverseKL(SkewedDivergence):
    """The skewed reverse KL, KL(p || skew p + (1 - skew) q).

    Source: Ko et al., "DistiLLM", arXiv:2402.03898, with skew = 0.1.

    Args:
        skew: the share of the student in the mixture, above 0 and below 1.

    Raises:
        ValueError: the skew is 0, which `ReverseKL` is for, or outside.
    """

    name: ClassVar[str] = "skew_reverse_kl"
    without_skew: ClassVar[str] = "ReverseKL"

    @property
    def share(self) -> float:
        """Return the share of the teacher, 1 - skew."""
        return 1.0 - self.skew

    @property
    def largest_slope(self) -> float:
        """Return the bound: p log(p / m) is at most p log(1 / skew) and at least -1/e, and the rest of G is at most 1."""
        return 2.0 - math.log(self.skew)

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f of each pair."""
        return _in_mixture(log_p, log_q, self.share, 0.0, 1.0) + self.share * (log_q.exp() - log_p.exp())

    def slopes(self, x: Ratio) -> Slopes:
        """Return the slopes of `SkewKL` with the roles of teacher and student exchanged."""
        exchanged = x._replace(p=x.q, q=x.p, log_ratio=x.log_ratio.neg_(), d_T=x.e, e=x.d_T)
        K, G, b, a, value = SkewKL(self.skew).slopes(exchanged)
        return Slopes(G, K, a, b, value)

    def kernels(self) -> tuple[Any, ...]:
        """Return the Triton functions."""
        from ..backends.triton import ratios

        return ratios.skew_reverse_kl_value, ratios.skew_reverse_kl_slope, ratios.skew_reverse_kl_teacher_slope


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """The total variation distance, sum |p - q| / 2, at most 1 (f-DISTILL: Wen et al., arXiv:2307.15190)."""

    name: ClassVar[str] = "tvd"

    @property
    def largest_slope(self) -> float:
        """Return 1."""
        return 1.0

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f of each pair."""
        return (log_p.exp() - log_q.exp()).abs() / 2

    def slopes(self, x: Ratio) -> Slopes:
        """Return G = p sign(p - q) / 2 and K = q sign(q - p) / 2."""
        # The sign; `sign_` would make 0 of NaN.
        sign, (student, teacher) = x.log_ratio.mul_(torch.finfo(x.p.dtype).max).clamp_(-1.0, 1.0), x.free
        return Slopes(torch.mul(sign, x.p, out=student), torch.mul(sign, x.q, out=teacher), -0.5, 0.5)

    def kernels(self) -> tuple[Any, ...]:
        """Return the Triton functions."""
        from ..backends.triton import ratios

        return ratios.tvd_value, ratios.tvd_slope


def _in_mixture(log_p: Tensor, log_q: Tensor, share: float, of_q: float, of_p: float) -> Tensor:
    """Return of_q q log(q / m) + of_p p log(p / m) with m = (1 - share) p + share q and 0 log 0 = 0."""
    log_m = torch.logaddexp(log_p + math.log1p(-share), log_q + math.log(share))
    result = torch.zeros_like(log_p)
    for factor, log_mass in ((of_q, log_q), (of_p, log_p)):
        if factor:
            massless = log_mass == -math.inf
            result = result + factor * log_mass.exp() * (log_mass - log_m).masked_fill(massless, 0.0)
    return result
