"""Row statistics: one sweep over the logits gives the six numbers a row that the loss and its gradient need.

For a set of columns, with z and y the logits of student and teacher:

    m_s = max z    d_1 = sum e^{z - m_s}    d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}    c = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT

Every thread keeps a tuple of its own for the columns that it loads and moves it to the new maxima once a tile, so the
loop has neither a barrier nor a shuffle; the threads' tuples merge once, after the loop.  A row may be split over
several programs, whose tuples `statistics.merge` joins in a fixed order.

The loop counts differences of logits in 1, everything after it in UNIT, in which all of them are finite.  Where T is not
1, 2, 3 or 4, so where it may be below 1 and the loss finite all the same, a row whose c overflows in the loop is swept
once more, for c alone, in UNIT.  That takes 72 registers instead of 64 in programs that share a row on sm_80 and in one
program a row on sm_100, and 48 instead of 40 in the statistics alone; T = 1 to 4 are spared it.

Traffic, bf16: 4 bytes a (student, teacher) pair, the floor.  Special-function work a pair: 3 exponentials, 2 where T is
1, 2, 3 or 4, plus one K-th of that for the move to new maxima.
"""

import torch
import triton
import triton.language as tl

from ...logit_map import IDENTITY_MAP, LogitMap
from .launch import Launch, default_launch, is_wide, map_arguments, temperature_arguments
from .tiles import (
    IN_UNITS,
    INTERPRETED,
    OF_UNITS,
    by_lane,
    exponentials,
    for_every_column,
    load_pair,
    max_of_lane,
    row_offset,
    sum_of_lane,
    tile_columns,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of no columns; finite, so that LOWEST - LOWEST is 0


@triton.jit
def scaled(value, factor):
    """value * factor, and 0 where the factor has underflowed, whatever the value.

    An infinite c (teacher mass where the student has none) must not meet a factor of 0.  And a choice, unlike a product,
    is not fused into the addition that follows: in the sum over threads two partners would each fuse their own product,
    round differently, and store different bits to the same place.
    """
    return tl.where(factor == 0, 0.0, value * factor)


@triton.jit
def factors_to(M_s, M_t, m_s, m_t, exp2_scale, POWER: tl.constexpr, COUNTED_IN: tl.constexpr = 1.0):
    """Of d_1, of d_T, and of e and c, to count from the maxima (M_s, M_t) instead of (m_s, m_t)."""
    a_1, a_T = exponentials(m_s - M_s, exp2_scale, POWER, COUNTED_IN)
    return a_1, a_T, tl.exp2((m_t - M_t) * exp2_scale)


@triton.jit
def shifted(m_s, m_t, e, c, M_s, M_t):
    """c with its differences from the new maxima, its exponentials still from the old ones.

    No teacher mass adds nothing, also where the maxima are so far apart that their difference is infinite.
    """
    return c + e * tl.where(e == 0, 0.0, (m_t - M_t) - (m_s - M_s))


@triton.jit
def rescale(m_s, d_1, d_T, m_t, e, c, M_s, M_t, exp2_scale, POWER: tl.constexpr):
    """The sums of a tuple against the maxima (M_s, M_t) instead of (m_s, m_t); on common maxima, tuples merge by `+`."""
    a_1, a_T, b = factors_to(M_s, M_t, m_s, m_t, exp2_scale, POWER, OF_UNITS)
    c = shifted(m_s, m_t, e, c, M_s, M_t)
    return scaled(d_1, a_1), scaled(d_T, a_T), scaled(e, b), scaled(c, b)


@triton.jit
def larger(m_s, m_t, other_m_s, other_m_t):
    return tl.maximum(m_s, other_m_s), tl.maximum(m_t, other_m_t)


@triton.jit
def added(d_1, d_T, e, c, other_d_1, other_d_T, other_e, other_c):
    return d_1 + other_d_1, d_T + other_d_T, e + other_e, c + other_c


@triton.jit
def merged(m_s, d_1, d_T, m_t, e, c, exp2_scale, POWER: tl.constexpr):  # [parts] each
    """The tuple of the union of several parts, threads or programs; scalars.

    Two reductions, not six: each waits for all threads of the program.  The interpreter, which waits for nobody, adds one
    part after another in a reduction of its own, and by halves in a sum.
    """
    m_s *= IN_UNITS
    m_t *= IN_UNITS
    exp2_scale *= OF_UNITS
    if INTERPRETED:
        M_s, M_t = tl.max(m_s, 0), tl.max(m_t, 0)
        d_1, d_T, e, c = rescale(m_s, d_1, d_T, m_t, e, c, M_s, M_t, exp2_scale, POWER)
        d_1, d_T, e, c = tl.sum(d_1, 0), tl.sum(d_T, 0), tl.sum(e, 0), tl.sum(c, 0)
    else:
        M_s, M_t = tl.reduce((m_s, m_t), 0, larger)
        d_1, d_T, e, c = rescale(m_s, d_1, d_T, m_t, e, c, M_s, M_t, exp2_scale, POWER)
        d_1, d_T, e, c = tl.reduce((d_1, d_T, e, c), 0, added)
    return M_s * OF_UNITS, d_1, d_T, M_t * OF_UNITS, e, c


@triton.jit
def add_tile(
    m_s, d_1, d_T, m_t, e, c,  # [LANES] each: a tuple a thread
    z, y,  # tiles
    exp2_scale,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tuples with the columns of one tile added; c is counted in 1.

    No choice as in `scaled` but for c: the other sums are finite, and are no partner's in another thread.
    """
    M_s = tl.maximum(m_s, max_of_lane(z, WIDE))
    M_t = m_t
    if NEED_KL:
        M_t = tl.maximum(m_t, max_of_lane(y, WIDE))
    a_1, a_T, b = factors_to(M_s, M_t, m_s, m_t, exp2_scale, POWER)
    u = z - for_every_column(M_s, WIDE)
    at_1, at_T = exponentials(u, exp2_scale, POWER)
    if NEED_CE:
        d_1 = d_1 * a_1 + sum_of_lane(at_1, WIDE)
    if NEED_KL:
        v = y - for_every_column(M_t, WIDE)
        q = tl.exp2(v * exp2_scale)
        c = scaled(shifted(m_s, m_t, e, c, M_s, M_t), b)
        d_T = d_T * a_T + sum_of_lane(at_T, WIDE)
        e = e * b + sum_of_lane(q, WIDE)
        # No teacher mass adds nothing, also where v - u is infinite or inf - inf (masked tokens).
        c += sum_of_lane(q * tl.where(q > 0, v - u, 0.0), WIDE)
    return M_s, d_1, d_T, M_t, e, c


@triton.jit
def sweep_statistics(
    student_row, teacher_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column,
    low, high,  # the columns to sweep
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """The tuple (m_s, d_1, d_T, m_t, e, c) of columns low to high of one row; scalars."""
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    m_s = tl.full([LANES], LOWEST, tl.float32)
    d_1 = tl.zeros([LANES], tl.float32)
    d_T = tl.zeros([LANES], tl.float32)
    m_t = tl.full([LANES], LOWEST, tl.float32)
    e = tl.zeros([LANES], tl.float32)
    c = tl.zeros([LANES], tl.float32)
    whole = low + (high - low) // TILE * TILE
    # Two stages: the next tile is loaded while this one is used.  Of two loads a thread ptxas puts the teacher's behind the
    # student's arithmetic, so that a tile waits for memory twice.  1.25 instructions a pair.
    for start in tl.range(low, whole, TILE, num_stages=2 if WIDE > 1 else 1):
        z, y = load_pair(
            student_row, teacher_row, start + column, high, student_stride_column, student_factor, student_cap,
            teacher_stride_column, teacher_factor, teacher_cap, NEED_KL, STUDENT_MAP, TEACHER_MAP, False, WIDE > 1,
        )  # fmt: skip
        m_s, d_1, d_T, m_t, e, c = add_tile(
            m_s, d_1, d_T, m_t, e, c, by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE), exp2_scale,
            NEED_CE, NEED_KL, POWER, WIDE,
        )  # fmt: skip
    if whole < high:
        z, y = load_pair(
            student_row, teacher_row, whole + column, high, student_stride_column, student_factor, student_cap,
            teacher_stride_column, teacher_factor, teacher_cap, NEED_KL, STUDENT_MAP, TEACHER_MAP, True, WIDE > 1,
        )  # fmt: skip
        m_s, d_1, d_T, m_t, e, c = add_tile(
            m_s, d_1, d_T, m_t, e, c, by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE), exp2_scale,
            NEED_CE, NEED_KL, POWER, WIDE,
        )  # fmt: skip
    return merged(m_s, d_1, d_T, m_t, e, c * IN_UNITS, exp2_scale, POWER)


@triton.jit
def store_statistics(out, stride, m_s, d_1, d_T, m_t, e, c):
    """The six numbers of a tuple, `stride` elements apart."""
    tl.store(out, m_s)
    tl.store(out + 1 * stride, d_1)
    tl.store(out + 2 * stride, d_T)
    tl.store(out + 3 * stride, m_t)
    tl.store(out + 4 * stride, e)
    tl.store(out + 5 * stride, c)


@triton.jit
def store_far_differences(
    c_ptr,  # to c of the tuple
    student_row, teacher_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column,
    low, high, m_s, m_t,
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Stores c of columns low to high of one row where the differences, or their sum, have overflown; or infinity again.

    One column a thread, and a barrier against unrolling, for the registers: this is rare.
    """
    column = tl.arange(0, LANES)
    c = tl.zeros([LANES], tl.float32)
    for start in range(low, high, LANES):
        z, y = load_pair(
            student_row, teacher_row, start + column, high, student_stride_column, student_factor, student_cap,
            teacher_stride_column, teacher_factor, teacher_cap, True, STUDENT_MAP, TEACHER_MAP, True, False,
        )  # fmt: skip
        u = z * IN_UNITS - m_s * IN_UNITS
        v = y * IN_UNITS - m_t * IN_UNITS
        q = tl.exp2(v * (exp2_scale * OF_UNITS))
        c += q * tl.where(q > 0, v - u, 0.0)
        tl.debug_barrier()
    tl.store(c_ptr, tl.sum(c, 0))


@triton.jit(do_not_specialize=["student_rows_inner", "teacher_rows_inner", "N"])
def row_statistics_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    ce_weight_ptr, kl_weight_ptr,  # [N]; a row with both 0 is not read
    statistics_ptr,  # [S, 6, N]
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    N, V, columns_per_split,
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    if (tl.load(ce_weight_ptr + row) == 0) & (tl.load(kl_weight_ptr + row) == 0):
        high = low
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    m_s, d_1, d_T, m_t, e, c = sweep_statistics(
        student_row, teacher_row, student_stride_column, teacher_stride_column, low, high, exp2_scale,
        student_factor, student_cap, teacher_factor, teacher_cap,
        NEED_CE, NEED_KL, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    out = statistics_ptr + split.to(tl.int64) * 6 * N + row
    store_statistics(out, N, m_s, d_1, d_T, m_t, e, c)
    if NEED_KL and POWER == 0:  # noqa: SIM102
        if c == float("inf"):
            store_far_differences(
                out + 5 * N, student_row, teacher_row, student_stride_column, teacher_stride_column, low, high, m_s, m_t,
                exp2_scale, student_factor, student_cap, teacher_factor, teacher_cap, LANES, STUDENT_MAP, TEACHER_MAP,
            )  # fmt: skip


def row_statistics(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    ce_weight: torch.Tensor,  # [N], float32
    kl_weight: torch.Tensor,  # [N], float32
    temperature: float,
    need_ce: bool,
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
    launch: Launch | None = None,
) -> torch.Tensor:  # [S, 6, N], float32
    """Launches the kernel; the tuples of a row's S splits are left for `statistics.merge`."""
    second = student if teacher is None else teacher
    launch = launch or default_launch(student, min(student.element_size(), second.element_size()))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t = temperature_arguments(temperature), map_arguments(student_map), map_arguments(teacher_map)
    statistics = torch.empty(launch.splits, 6, N, dtype=torch.float32, device=student.device)
    row_statistics_kernel[(N, launch.splits)](
        student, second, ce_weight, kl_weight, statistics,
        student.shape[1], *student.stride(), second.shape[1], *second.stride(),
        N, V, launch.columns_per_split, T.exp2_scale, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=need_ce, NEED_KL=teacher is not None, POWER=T.power, LANES=launch.lanes, K=launch.columns,
        WIDE=is_wide(student, second), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind, **launch.options,
    )  # fmt: skip
    return statistics
