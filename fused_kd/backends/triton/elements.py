"""The device functions of one element and of one row: exponentials, statistics, merge, coefficients and gradients.

`fused_kd/divergences.py` has the definitions, and the same functions in PyTorch.  The constexpr `DIVERGENCE` says which
divergence is computed.  Forward KL averages the log-ratio over the teacher's distribution, whose unnormalised
probabilities are q = e^{v/T}.  Reverse KL averages it over the student's, with p = e^{u/T}.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...statistics import UNIT
from .tiles import INTERPRETED, LOG2_E, Coefficients, Statistics

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
DIVERGENCES = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL}

# A logit times IN_UNITS is in units of UNIT, in which no difference of two logits overflows.  OF_UNITS converts back.
IN_UNITS = tl.constexpr(1 / UNIT)
OF_UNITS = tl.constexpr(float(UNIT))


# Exponentials


class Pair(NamedTuple):
    """Tiles of the logits of student and teacher relative to their maxima, and of their exponentials."""

    u: tl.tensor
    v: tl.tensor
    at_1: tl.tensor  # e^u
    p: tl.tensor  # e^{u/T}
    q: tl.tensor  # e^{v/T}


@triton.jit
def exponentials(
    u,  # logits relative to a maximum, <= 0, any shape
    exp2_scale,
    POWER: tl.constexpr,  # T if it is 1, 2, 3 or 4, otherwise 0
    COUNTED_IN: tl.constexpr = 1.0,  # the unit of u, a factor that exp2_scale already has
):
    """Return (e^u, e^{u/T}).  If T is 1, 2, 3 or 4, e^u is a power of e^{u/T}, and only one exponential is computed."""
    at_T = tl.exp2(u * exp2_scale)
    if POWER == 0:
        at_1 = tl.exp2(u * (LOG2_E * COUNTED_IN))
    elif POWER == 1:
        at_1 = at_T
    else:
        square = at_T * at_T
        at_1 = square if POWER == 2 else square * (at_T if POWER == 3 else square)
    return at_1, at_T


@triton.jit
def pair_of(
    z, y, m_s, m_t,  # tiles, and their maxima
    exp2_scale,
    NEED_KL: tl.constexpr, POWER: tl.constexpr, COUNTED_IN: tl.constexpr = 1.0,
):  # fmt: skip
    """Return the `Pair`.  Without a divergence v and q are those of the student, and are not used."""
    u = z - m_s
    at_1, p = exponentials(u, exp2_scale, POWER, COUNTED_IN)
    v = u
    q = p
    if NEED_KL:
        v = y - m_t
        q = tl.exp2(v * exp2_scale)
    return Pair(u, v, at_1, p, q)


# The statistic c of a divergence


@triton.jit
def scaled(value, factor):
    """Return value * factor; 0 where the factor has underflowed to 0.

    There are two reasons for the choice.  c is infinite where one distribution has mass and the other has none, and
    infinity times 0 is NaN.  And a product alone would be fused into the addition that follows: in a reduction over threads
    each of two partners would fuse its own product, so that they round differently and store different bits to one address.
    """
    return tl.where(factor == 0, 0.0, value * factor)


@triton.jit
def term(x, DIVERGENCE: tl.constexpr):
    """Return what each column adds to c: 0 without mass, even if the difference is infinite or NaN (masked tokens)."""
    if DIVERGENCE == FORWARD_KL:
        return x.q * tl.where(x.q > 0, x.v - x.u, 0.0)
    else:
        return x.p * tl.where(x.p > 0, x.u - x.v, 0.0)


@triton.jit
def shifted(s, M_s, M_t, DIVERGENCE: tl.constexpr):
    """Return c with its differences relative to the maxima (M_s, M_t).  Its exponentials stay relative to the tuple's own.

    Without mass nothing is added, even if the difference of the maxima is infinite.  The sum is written as `tl.fma` since c
    may be a product, by IN_UNITS: see `student_gradient`.
    """
    if DIVERGENCE == FORWARD_KL:
        return tl.fma(s.e, tl.where(s.e == 0, 0.0, (s.m_t - M_t) - (s.m_s - M_s)), s.c)
    else:
        return tl.fma(s.d_T, tl.where(s.d_T == 0, 0.0, (s.m_s - M_s) - (s.m_t - M_t)), s.c)


@triton.jit
def factors_to(M_s, M_t, s, exp2_scale, POWER: tl.constexpr, COUNTED_IN: tl.constexpr = 1.0):
    """Return the factors of d_1, d_T and e that make them relative to the maxima (M_s, M_t)."""
    a_1, a_T = exponentials(s.m_s - M_s, exp2_scale, POWER, COUNTED_IN)
    return a_1, a_T, tl.exp2((s.m_t - M_t) * exp2_scale)


@triton.jit
def rescaled_c(s, M_s, M_t, a_T, b, DIVERGENCE: tl.constexpr):
    """Return c relative to the maxima (M_s, M_t), given the factors a_T of d_T and b of e."""
    c = shifted(s, M_s, M_t, DIVERGENCE)
    return scaled(c, b if DIVERGENCE == FORWARD_KL else a_T)


@triton.jit
def rescaled(s, M_s, M_t, exp2_scale, DIVERGENCE: tl.constexpr, POWER: tl.constexpr):
    """Return the tuple relative to the maxima (M_s, M_t).  Tuples with common maxima merge by `+`.

    All maxima, and c, are in UNIT.
    """
    a_1, a_T, b = factors_to(M_s, M_t, s, exp2_scale, POWER, OF_UNITS)
    c = rescaled_c(s, M_s, M_t, a_T, b, DIVERGENCE)
    return Statistics(M_s, scaled(s.d_1, a_1), scaled(s.d_T, a_T), M_t, scaled(s.e, b), c)


@triton.jit
def larger(m_s, m_t, other_m_s, other_m_t):
    return tl.maximum(m_s, other_m_s), tl.maximum(m_t, other_m_t)


@triton.jit
def added(d_1, d_T, e, c, other_d_1, other_d_T, other_e, other_c):
    return d_1 + other_d_1, d_T + other_d_T, e + other_e, c + other_c


@triton.jit
def merged(s, exp2_scale, DIVERGENCE: tl.constexpr, POWER: tl.constexpr):  # [parts] each
    """Return the statistics of the union of several parts, which are threads' or programs'; scalars.

    Each reduction waits for all threads of the program, so there are two of them instead of six.  The interpreter has no
    threads to wait for.  Its `tl.reduce` adds one part after another, so `tl.sum`, which adds by halves, takes its place.
    """
    m_s, m_t = s.m_s * IN_UNITS, s.m_t * IN_UNITS
    exp2_scale *= OF_UNITS
    if INTERPRETED:
        M_s, M_t = tl.max(m_s, 0), tl.max(m_t, 0)
        r = rescaled(Statistics(m_s, s.d_1, s.d_T, m_t, s.e, s.c), M_s, M_t, exp2_scale, DIVERGENCE, POWER)
        d_1, d_T, e, c = tl.sum(r.d_1, 0), tl.sum(r.d_T, 0), tl.sum(r.e, 0), tl.sum(r.c, 0)
    else:
        M_s, M_t = tl.reduce((m_s, m_t), 0, larger)
        r = rescaled(Statistics(m_s, s.d_1, s.d_T, m_t, s.e, s.c), M_s, M_t, exp2_scale, DIVERGENCE, POWER)
        d_1, d_T, e, c = tl.reduce((r.d_1, r.d_T, r.e, r.c), 0, added)
    return Statistics(M_s * OF_UNITS, d_1, d_T, M_t * OF_UNITS, e, c)


# The gradients of an element


@triton.jit
def quotient(a, b):
    """Return a / b, correctly rounded if b is normal and finite; `/` is not on a GPU, and `tl.div_rn` costs registers."""
    b = b.to(tl.float64)
    r = (1.0 / b.to(tl.float32)).to(tl.float64)
    r *= 2.0 - b * r
    r *= 2.0 - b * r
    return (a.to(tl.float64) * r).to(tl.float32)


@triton.jit
def coefficients_of(
    s,  # Statistics of a whole row
    w_ce, w,  # the row's weights of CE and of the divergence
    inverse_T,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Return the `Coefficients` of a row, as `fused_kd.divergences.coefficients` does, to the bit."""
    w *= inverse_T
    R = quotient(s.c, s.e if DIVERGENCE == FORWARD_KL else s.d_T) * (inverse_T * OF_UNITS)
    return Coefficients(s.m_s, s.m_t, quotient(w_ce, s.d_1), quotient(w, s.d_T), quotient(w, s.e), w_ce, R)


@triton.jit
def mean_free_log_ratio(mass, difference, R, inverse_T):
    """Return the log-ratio of an element minus its mean; 0 without mass, even if the log-ratio is infinite or NaN."""
    return tl.where(mass > 0, difference * inverse_T - R, 0.0)


@triton.jit
def student_gradient(
    x,  # Pair
    is_label,  # a tile
    k,  # Coefficients
    inverse_T,
    NEED_CE: tl.constexpr, HAS_LABEL: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the student's logits.

    If both terms are needed and e^u is a power of e^{u/T}, then e^{u/T} is factored out, which saves one instruction per
    element.  The label's tile is computed without this: there p_1 - 1 and p_T - q each have to cancel by themselves.
    Otherwise, where p_1 is near 1, both would be lost in the rounding of the sum.

    A sum of two products is written as `tl.fma`.  Otherwise the compiler chooses which of them it fuses into the addition.
    It chooses another in another kernel, or for another column of a tile: one launch would not have the bits of two.
    """
    slope = k.B
    if NEED_KL and DIVERGENCE == REVERSE_KL:
        slope = k.B * mean_free_log_ratio(x.p, x.u - x.v, k.R, inverse_T)
    gradient = tl.zeros_like(x.u)
    # Nested pairs: Triton 3.3 does not compile a chain of `and`.
    if (NEED_CE and NEED_KL) and (POWER > 0 and not HAS_LABEL):
        total = k.A + slope
        if POWER > 1:
            factor = k.A
            for _ in tl.static_range(POWER - 2):
                factor = factor * x.p
            total = tl.fma(factor, x.p, slope)
        gradient = total * x.p
        if DIVERGENCE == FORWARD_KL:
            gradient = tl.fma(total, x.p, -(k.C * x.q))
    else:
        if NEED_KL:
            gradient = slope * x.p
            if DIVERGENCE == FORWARD_KL:
                gradient = tl.fma(slope, x.p, -(k.C * x.q))  # the teacher's gradient has this product too
        if NEED_CE:
            gradient = tl.fma(k.A, x.at_1, gradient)
    if HAS_LABEL:
        gradient -= tl.where(is_label, k.W, 0.0)
    return gradient


@triton.jit
def teacher_gradient(
    x,  # Pair
    k,  # Coefficients
    inverse_T,
    DIVERGENCE: tl.constexpr,
):
    """Return the gradient of the teacher's logits."""
    if DIVERGENCE == FORWARD_KL:
        return k.C * x.q * mean_free_log_ratio(x.q, x.v - x.u, k.R, inverse_T)
    else:
        return tl.fma(-k.B, x.p, k.C * x.q)
