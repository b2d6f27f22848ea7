"""The device functions of one element and of one row: exponentials, statistics, merge, coefficients and gradients.

`fused_kd/divergences.py` has the definitions, and the same functions in PyTorch.  The constexpr `DIVERGENCE` says which
divergence is computed.  Forward KL averages the log-ratio over the teacher's distribution, whose unnormalised
probabilities are q = e^{v/T}.  Reverse KL averages it over the student's, with p = e^{u/T}.  Mixed KL has both averages, so
two sums: c of forward KL, and as `second` c of reverse KL.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...statistics import UNIT
from .tiles import (
    FORWARD_KL,
    INTERPRETED,
    LOG2_E,
    MIXED_KL,
    OF_RATIO,
    REVERSE_KL,
    Coefficients,
    Statistics,
)

DIVERGENCES = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "mixed_kl": MIXED_KL}  # all others: OF_RATIO

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


# The statistics of a divergence and of the entropy


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
    if DIVERGENCE == REVERSE_KL:
        return x.p * tl.where(x.p > 0, x.u - x.v, 0.0)
    else:
        return x.q * tl.where(x.q > 0, x.v - x.u, 0.0)


@triton.jit
def shifted(c, s, M_s, M_t, DIVERGENCE: tl.constexpr):
    """Return c with its differences relative to the maxima (M_s, M_t).  Its exponentials stay relative to the tuple's own.

    Without mass nothing is added, even if the difference of the maxima is infinite.  The sum is written as `tl.fma` since c
    may be a product, by IN_UNITS: see `student_gradient`.
    """
    if DIVERGENCE == REVERSE_KL:
        return tl.fma(s.d_T, tl.where(s.d_T == 0, 0.0, (s.m_s - M_s) - (s.m_t - M_t)), c)
    else:
        return tl.fma(s.e, tl.where(s.e == 0, 0.0, (s.m_t - M_t) - (s.m_s - M_s)), c)


@triton.jit
def factors_to(M_s, M_t, s, exp2_scale, POWER: tl.constexpr, COUNTED_IN: tl.constexpr = 1.0):
    """Return the factors of d_1, d_T and e that make them relative to the maxima (M_s, M_t)."""
    a_1, a_T = exponentials(s.m_s - M_s, exp2_scale, POWER, COUNTED_IN)
    return a_1, a_T, tl.exp2((s.m_t - M_t) * exp2_scale)


@triton.jit
def rescaled_c(c, s, M_s, M_t, a_T, b, DIVERGENCE: tl.constexpr):
    """Return c relative to the maxima (M_s, M_t), given the factors a_T of d_T and b of e."""
    c = shifted(c, s, M_s, M_t, DIVERGENCE)
    return scaled(c, a_T if DIVERGENCE == REVERSE_KL else b)


@triton.jit
def rescaled_h(s, M_s, a_T, COUNTED_IN: tl.constexpr = 1.0):
    """Return h relative to the maximum M_s, given the factor a_T of d_T.  If the difference is infinite, a_T is 0."""
    return scaled(tl.fma(s.d_T, (s.m_s - M_s) * COUNTED_IN, s.h), a_T)


@triton.jit
def rescaled(s, M_s, M_t, exp2_scale, DIVERGENCE: tl.constexpr, POWER: tl.constexpr, NEED_ENTROPY: tl.constexpr):
    """Return the tuple relative to the maxima (M_s, M_t).  Tuples with common maxima merge by `+`.

    All maxima, c, and the second c of mixed KL are in UNIT.
    """
    a_1, a_T, b = factors_to(M_s, M_t, s, exp2_scale, POWER, OF_UNITS)
    c, second, h = s.c, s.second, s.h
    if DIVERGENCE != OF_RATIO:
        c = rescaled_c(c, s, M_s, M_t, a_T, b, DIVERGENCE)
    if DIVERGENCE == MIXED_KL:
        second = rescaled_c(second, s, M_s, M_t, a_T, b, REVERSE_KL)
    if NEED_ENTROPY:
        h = rescaled_h(s, M_s, a_T, OF_UNITS)
    return Statistics(M_s, scaled(s.d_1, a_1), scaled(s.d_T, a_T), M_t, scaled(s.e, b), c, second, h)


@triton.jit
def larger(m_s, m_t, other_m_s, other_m_t):
    return tl.maximum(m_s, other_m_s), tl.maximum(m_t, other_m_t)


@triton.jit
def added(d_1, d_T, e, c, other_d_1, other_d_T, other_e, other_c):
    return d_1 + other_d_1, d_T + other_d_T, e + other_e, c + other_c


@triton.jit
def added_pair(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def merged(s, exp2_scale, DIVERGENCE: tl.constexpr, POWER: tl.constexpr, NEED_ENTROPY: tl.constexpr):  # [parts] each
    """Return the statistics of the union of several parts, which are threads' or programs'; scalars.

    Each reduction waits for all threads of the program, so there are two of them instead of six; the second c of mixed KL
    and h of the entropy have one each.  The interpreter has no threads to wait for.  Its `tl.reduce` adds one part after
    another, so `tl.sum`, which adds by halves, takes its place.
    """
    m_s, m_t = s.m_s * IN_UNITS, s.m_t * IN_UNITS
    exp2_scale *= OF_UNITS
    s = Statistics(m_s, s.d_1, s.d_T, m_t, s.e, s.c, s.second, s.h)
    if INTERPRETED:
        M_s, M_t = tl.max(m_s, 0), tl.max(m_t, 0)
        r = rescaled(s, M_s, M_t, exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)
        d_1, d_T, e, c = tl.sum(r.d_1, 0), tl.sum(r.d_T, 0), tl.sum(r.e, 0), tl.sum(r.c, 0)
    else:
        M_s, M_t = tl.reduce((m_s, m_t), 0, larger)
        r = rescaled(s, M_s, M_t, exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)
        d_1, d_T, e, c = tl.reduce((r.d_1, r.d_T, r.e, r.c), 0, added)
    second = c
    if DIVERGENCE == MIXED_KL:
        second = tl.sum(r.second, 0)
    h = c
    if NEED_ENTROPY:
        h = tl.sum(r.h, 0)
    return Statistics(M_s * OF_UNITS, d_1, d_T, M_t * OF_UNITS, e, c, second, h)


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
    scalars,  # Scalars
    DIVERGENCE: tl.constexpr, TEACHER_GRAD: tl.constexpr = 0,
):  # fmt: skip
    """Return the `Coefficients` of a row, as `fused_kd.divergences.coefficients` does, to the bit.

    If TEACHER_GRAD is 2, `second` is the sum of the teacher's slopes.
    """
    w *= scalars.inverse_T
    of_c = scalars.inverse_T * OF_UNITS
    if DIVERGENCE == OF_RATIO:
        R = tl.where(s.e > 0, s.c, s.e)  # NaN of the teacher, which limited log-ratios would hide
        S = s.second if TEACHER_GRAD == 2 else s.second - s.c
        of_q, log = scale_of(s)
    else:
        R = quotient(s.c, s.d_T if DIVERGENCE == REVERSE_KL else s.e) * of_c
        S = R
        of_q, log = R, R
    if DIVERGENCE == MIXED_KL:
        S = quotient(s.second, s.d_T) * of_c
    A, B, C = quotient(w_ce, s.d_1), quotient(w, s.d_T), quotient(w, s.e)
    return Coefficients(s.m_s, s.m_t, A, B, C, w_ce, R, S, scalars.parameter, of_q, log)


@triton.jit
def scale_of(s):
    """Return d_T / e and log(e / d_T) of a row from its Statistics; any numbers for a row that does not count."""
    d_T, e = tl.where(s.d_T == 0, 1.0, s.d_T), tl.where(s.e == 0, 1.0, s.e)
    return quotient(d_T, e), tl.log(quotient(e, d_T))


@triton.jit
def mean_free_log_ratio(mass, difference, R, inverse_T):
    """Return the log-ratio of an element minus its mean; 0 without mass, even if the log-ratio is infinite or NaN."""
    return tl.where(mass > 0, difference * inverse_T - R, 0.0)


@triton.jit
def student_gradient(
    x,  # Pair
    G,  # a tile: the slopes of a divergence of two sweeps, times d_T; not used by others
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
    slope, of_teacher, q = k.B, k.C, x.q  # the gradient is slope p - of_teacher q
    if NEED_KL and DIVERGENCE == OF_RATIO:
        slope, of_teacher, q = -(k.B * k.R), -k.B, G
    if NEED_KL and DIVERGENCE == REVERSE_KL:
        slope = k.B * mean_free_log_ratio(x.p, x.u - x.v, k.R, inverse_T)
    if NEED_KL and DIVERGENCE == MIXED_KL:
        forward = 1.0 - k.reverse
        log_ratio = mean_free_log_ratio(x.p, x.u - x.v, k.S, inverse_T)
        slope = tl.fma(k.B * k.reverse, log_ratio, k.B * forward)
        of_teacher = k.C * forward
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
        if DIVERGENCE != REVERSE_KL:
            gradient = tl.fma(total, x.p, -(of_teacher * q))
    else:
        if NEED_KL:
            gradient = slope * x.p
            if DIVERGENCE != REVERSE_KL:
                gradient = tl.fma(slope, x.p, -(of_teacher * q))  # the teacher's gradient has this product too
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
    if DIVERGENCE == REVERSE_KL:
        gradient = tl.fma(-k.B, x.p, k.C * x.q)
    else:
        log_ratio = mean_free_log_ratio(x.q, x.v - x.u, k.R, inverse_T)
        gradient = k.C * x.q * log_ratio
        if DIVERGENCE == MIXED_KL:
            slope = tl.fma(k.C * (1.0 - k.reverse), log_ratio, k.C * k.reverse)
            gradient = tl.fma(slope, x.q, -(k.B * k.reverse * x.p))
    return gradient
