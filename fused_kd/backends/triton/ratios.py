"""The divergences that take two sweeps of statistics, as pairs of functions of the probabilities of one column.

Let p and q be the probabilities of student and teacher, and D = sum f(p, q).  A divergence is a pair of functions, both
homogeneous of degree one (twice the probabilities, twice the value), as those of every f-divergence are:

    value    f(p, q)
    slope    G = df / dlog p

and, if it is not f - G or would lose digits by that subtraction, a third: the teacher's slope K = df / dlog q.

A kernel takes them as constexprs, and calls them with an `Elements`.  They must return 0 for a column without mass in
either model, and finite numbers where D is finite, although the log-ratio may be infinite or NaN there.

Let b be the teacher's share in the mixture m = (1 - b) p + b q, and t = log(q / p).  With L = log(m / p) and M = log(q / m)

    JSD                 f = b q M - (1 - b) p L           G = -(1 - b) p L
    skew KL             f = q M - (1 - b) (q - p)         G = -(1 - b) p q / m                  b is the skew
    skew reverse KL     f = b (q - p) - p L               G = b p q / m - p L                   b is 1 - skew
    total variation     f = |p - q| / 2                   G = p sign(p - q) / 2

The multiples of q - p, which sum to 0, make f >= 0 in every column.  The slopes of the skewed KLs are those of q M and
-p L, without it: it would make them nearly constant where the student says what the teacher would not, and their mean would
cancel them.

Precision: where the models are close f is of second order in t.  There its summands cancel, so f is p times a polynomial in
t.  The slope is of first order, and exact to some 1e-7 of b p, as the gradient p - q of forward KL is.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2_E

# Beyond this log-ratio the smaller of p and q adds nothing to a sum, and its logarithm need only be finite.
FAR = tl.constexpr(80.0)
TINY = tl.constexpr(1e-36)
# Below this log-ratio f is a polynomial.  Its first term left out is then 4e-6 of it, or less.
NEAR = tl.constexpr(0.125)


class Elements(NamedTuple):
    """Columns of one row.  A common factor of all p and q is left to the caller."""

    p: tl.tensor  # the student's probabilities
    q: tl.tensor  # the teacher's
    log_ratio: tl.tensor  # log(q / p); infinite or NaN if p or q is 0
    parameter: tl.tensor  # a scalar: the parameter of the divergence


@triton.jit
def elements_of(
    x,  # Pair
    of_q, log,  # d_T / e and log(e / d_T) of the row
    scalars,  # Scalars
):  # fmt: skip
    """Return the `Elements` of columns, with the factor d_T."""
    log_ratio = tl.fma(x.v - x.u, scalars.inverse_T, -log)
    return Elements(x.p, x.q * of_q, log_ratio, scalars.parameter)


@triton.jit
def log1p_of(x):
    """Return log(1 + x) for x in [0, 1] as two factors, to a relative 2e-7: a minimax fit that is exact at 1."""
    polynomial = -0.008363117464 * x + 0.043513290584
    polynomial = polynomial * x - 0.106944762170
    polynomial = polynomial * x + 0.176988169551
    polynomial = polynomial * x - 0.244805648923
    polynomial = polynomial * x + 0.332732230425
    polynomial = polynomial * x - 0.499972790480
    polynomial = polynomial * x + 0.999999821186
    return x, polynomial


class Mixture(NamedTuple):
    """The mixture m = (1 - b) p + b q of the columns of one row, relative to p and q."""

    L: tl.tensor  # log(m / p)
    M: tl.tensor  # log(q / m)


@triton.jit
def shares(parameter):
    """Return (b, 1 - b).  A negative parameter is -(1 - b): float32 would lose the digits of a small 1 - b."""
    b = tl.where(parameter > 0, parameter, 1.0 + parameter)
    return b, tl.where(parameter > 0, 1.0 - parameter, -parameter)


@triton.jit
def mixture(log_ratio, b, a):
    """Return the `Mixture` with the shares b and a = 1 - b, and the log-ratio t limited to +-FAR.

    With theta = log(a / b), where both summands of m are equal, and e = exp(-|t - theta|)

        L = max(t, theta) + log(1 + e) - (the same at t = 0)

    so no exponential overflows, and both logarithms are exact relative to the smaller share.
    """
    theta = tl.log(a / b)
    start = theta * LOG2_E
    x, polynomial = log1p_of(tl.exp2(-tl.abs(start)))
    at_0 = x * polynomial
    upper = tl.maximum(theta, 0.0) + at_0
    lower = tl.minimum(theta, 0.0) - at_0
    t = tl.where(log_ratio < FAR, log_ratio, FAR)  # FAR for NaN
    e, polynomial = log1p_of(tl.exp2(-tl.abs(tl.fma(t, LOG2_E, -start))))
    L = tl.fma(e, polynomial, tl.maximum(t - upper, lower))
    M = -tl.fma(e, polynomial, tl.maximum(lower - tl.maximum(t, -FAR), -upper))
    return Mixture(L, M)


@triton.jit
def product_over_mixture(x, b, a):
    """Return p q / m; 0 where m is so small that it adds nothing."""
    root = tl.rsqrt(tl.maximum(tl.fma(b, x.q, a * x.p), TINY))  # two factors of it take less than a division
    return (x.p * root) * (x.q * root)


@triton.jit
def near_or_far(x, near, far):
    """Return p t^2 times the polynomial `near` where the log-ratio t is small, otherwise `far`."""
    t = x.log_ratio
    return tl.where(tl.abs(t) < NEAR, x.p * (t * t) * near, far)


@triton.jit
def jsd_value(x):
    b, a = shares(x.parameter)
    far = tl.fma(b * mixture(x.log_ratio, b, a).M, x.q, jsd_slope(x))
    h = b * a
    t = x.log_ratio
    near = t * (h * (4.0 - 3.0 * b) * (1.0 - 2.0 * h) / 120.0) + h * (2.0 * b * b - 4.0 * b + 3.0) / 24.0
    near = near * t + h * (2.0 - b) / 6.0
    near = near * t + h / 2.0
    return near_or_far(x, near, far)


@triton.jit
def jsd_slope(x):
    b, a = shares(x.parameter)
    return mixture(x.log_ratio, b, a).L * -a * x.p


@triton.jit
def jsd_teacher_slope(x):
    b, a = shares(x.parameter)
    return mixture(x.log_ratio, b, a).M * b * x.q


@triton.jit
def skew_kl_value(x):
    b, a = shares(x.parameter)
    far = tl.fma(mixture(x.log_ratio, b, a).M, x.q, a * (x.p - x.q))
    t = x.log_ratio
    near = t * (a * a * a * (12.0 * b * b - 9.0 * b + 2.0) / 60.0) + a * a * (6.0 * b * b - 8.0 * b + 3.0) / 24.0
    near = near * t + a * a * a / 3.0
    near = near * t + a * a / 2.0
    return near_or_far(x, near, far)


@triton.jit
def skew_kl_slope(x):
    b, a = shares(x.parameter)
    return -a * product_over_mixture(x, b, a)


@triton.jit
def skew_kl_teacher_slope(x):
    b, a = shares(x.parameter)
    return tl.fma(mixture(x.log_ratio, b, a).M, x.q, -skew_kl_slope(x))


@triton.jit
def skew_reverse_kl_value(x):
    a, b = shares(x.parameter)
    far = tl.fma(-mixture(x.log_ratio, b, a).L, x.p, b * (x.q - x.p))
    h = b * b
    t = x.log_ratio
    near = t * (h * (15.0 - 50.0 * b + 60.0 * h - 24.0 * b * h) / 120.0) + h * (6.0 * h - 12.0 * b + 7.0) / 24.0
    near = near * t + h * (3.0 - 2.0 * b) / 6.0
    near = near * t + h / 2.0
    return near_or_far(x, near, far)


@triton.jit
def skew_reverse_kl_slope(x):
    a, b = shares(x.parameter)
    return tl.fma(-mixture(x.log_ratio, b, a).L, x.p, b * product_over_mixture(x, b, a))


@triton.jit
def skew_reverse_kl_teacher_slope(x):
    a, b = shares(x.parameter)
    return -b * product_over_mixture(x, b, a)


@triton.jit
def tvd_value(x):
    return tl.abs(x.p - x.q) * 0.5


@triton.jit
def tvd_slope(x):
    return tl.where(x.p == x.q, 0.0, tl.where(x.p > x.q, 0.5, -0.5)) * x.p
