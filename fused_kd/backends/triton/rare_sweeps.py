"""Rare sweeps over a row whose statistics have overflowed, or have lost the digits that the loss needs.

The loop of `statistics.py` takes differences of logits without a unit.  If T is below 1, the loss may be finite although c
has overflowed there.  So a row whose c has overflowed is swept once more, for c alone, in UNIT.  The kernels for T = 1, 2,
3 and 4 leave this sweep out, since it costs registers.

Reverse KL is c / d_T in nats plus log(1 + second / d_T).  Where teacher and student are close, both are of first order in
the difference of the models, and their sum is of second order: the rounding of e and d_T would be larger than it.  So a
row whose divergence is below CLOSE is swept once more, after its parts have merged, for `second` alone; see `near_second`.
(Forward KL is left as it is: its kernels stay as fast as they are.)

Both sweeps save registers instead of time: each thread has one column, and a barrier keeps the loop from being unrolled.
"""

import triton
import triton.language as tl

from ... import statistics as stats
from .elements import IN_UNITS, OF_UNITS, pair_of, term
from .tiles import LOG2_E, load_pair

CLOSE = tl.constexpr(stats.CLOSE)


@triton.jit
def far_differences(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    s,  # their Statistics
    exp2_scale,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return c of columns low to high of one row, computed in UNIT, after it has overflowed; it may be infinite again."""
    column = tl.arange(0, LANES)
    m_s, m_t = s.m_s * IN_UNITS, s.m_t * IN_UNITS
    c = tl.zeros([LANES], tl.float32)
    for start in range(low, high, LANES):
        z, y = load_pair(student, teacher, start + column, high, True, STUDENT_MAP, TEACHER_MAP, True, False)
        x = pair_of(z * IN_UNITS, y * IN_UNITS, m_s, m_t, exp2_scale * OF_UNITS, True, 0, OF_UNITS)
        c += term(x, DIVERGENCE)
        tl.debug_barrier()
    return tl.sum(c, 0)


@triton.jit
def near_second(
    student, teacher,  # Streams
    V,
    s,  # Statistics of the whole row
    exp2_scale,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return e - d_T of reverse KL, to the precision of a divergence of second order in the difference of the models.

    Let x = ((z - m_s) - (y - m_t)) / T.  Then e is the sum of p e^{-x}, and c the sum of p x, so that

        e - d_T = sum p (e^{-x} - 1 + x) - c

    No summand is negative, and the differences of first order are in c alone: its rounding, and that of x, add nothing to
    c / d_T + log(1 + second / d_T) in the first order.  For small x a summand is a polynomial, and z - y is exact.
    """
    column = tl.arange(0, LANES)
    m_s, m_t = s.m_s * IN_UNITS, s.m_t * IN_UNITS
    in_nats = exp2_scale * (OF_UNITS / LOG2_E)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, V, LANES):
        z, y = load_pair(student, teacher, start + column, V, True, STUDENT_MAP, TEACHER_MAP, True, False)
        z, y = z * IN_UNITS, y * IN_UNITS
        x = ((z - y) - (m_s - m_t)) * in_nats
        p = tl.exp2((z - m_s) * (exp2_scale * OF_UNITS))
        q = tl.exp2((y - m_t) * (exp2_scale * OF_UNITS))
        near = x * x * (0.5 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720)))))
        # Where both are minus infinity, x is NaN and the summand 0.
        total += tl.where(tl.abs(x) < 0.5, p * near, (q - p) + tl.where(p > 0, p * x, 0.0))
        tl.debug_barrier()
    # In float64: the difference of c in nats here and in the loss would be of first order.
    c = s.c.to(tl.float64) * exp2_scale * (OF_UNITS / LOG2_E)
    return (tl.sum(total, 0) - c).to(tl.float32)


@triton.jit
def is_close(s, exp2_scale):
    """Return whether the reverse KL of a row is below CLOSE; not for a row without columns, whose sums are 0."""
    bits = tl.fma(s.c * OF_UNITS, exp2_scale, s.d_T * (tl.log2(s.e) - tl.log2(s.d_T)))
    return bits < s.d_T * (CLOSE * LOG2_E)
