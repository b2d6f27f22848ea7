"""Row statistics: one sweep over the logits gives the six numbers per row that the loss and its gradient need.

Let z and y be the logits of student and teacher.  For a set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}    d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}

    forward KL     c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT
    reverse KL     c   = sum e^{(z - m_s)/T} ((z - m_s) - (y - m_t)) / UNIT

Every thread keeps a tuple of its own for the columns that it loads, and rescales it to the new maxima once per tile.  So
the loop has neither a barrier nor a shuffle.  The threads' tuples merge once, after the loop.  A row may be split over
several programs, whose tuples `fused_kd.statistics.merge` merges in a fixed order.

The loop takes differences of logits without a unit, so they may overflow.  Everything after the loop is in UNIT, in which
every difference is finite.  If T is below 1, the loss may be finite although c has overflowed in the loop.  So a row whose
c has overflowed is swept once more, for c alone, in UNIT.  The kernels for T = 1, 2, 3 and 4 leave this sweep out, since
it costs registers.

Traffic in bf16: 4 bytes per (student, teacher) pair, the floor.  Special-function work per pair: 3 exponentials, or 2 if
T is 1, 2, 3 or 4, plus one K-th of that for the move to new maxima.
"""

import torch
import triton
import triton.language as tl

from ...divergences import Objective
from ...launch import Launch
from ...launching import default_launch, is_wide
from .arguments import objective_arguments
from .elements import (
    IN_UNITS,
    OF_UNITS,
    Pair,
    exponentials,
    factors_to,
    merged,
    pair_of,
    rescaled_c,
    term,
)
from .tiles import (
    Statistics,
    Stream,
    by_lane,
    for_every_column,
    load_pair,
    max_of_lane,
    row_offset,
    store_statistics,
    sum_of_lane,
    tile_columns,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of no columns: finite, so that LOWEST - LOWEST is 0


@triton.jit
def add_tile(
    s,  # Statistics, [LANES] each: one tuple per thread
    z, y,  # tiles
    exp2_scale,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the tuples with the columns of one tile added.  Here c has no unit.

    Only c is rescaled by `scaled`.  The other sums are finite, and no other thread computes the same sum.
    """
    M_s = tl.maximum(s.m_s, max_of_lane(z, WIDE))
    M_t = s.m_t
    if NEED_KL:
        M_t = tl.maximum(s.m_t, max_of_lane(y, WIDE))
    a_1, a_T, b = factors_to(M_s, M_t, s, exp2_scale, POWER)
    # The order matters: if the sum of e^u came after the teacher's exponentials, as with `pair_of`,
    # `single_pass.shared_kernel` would take 72 registers on sm_80 instead of 64 (`python -m benchmarks.static_profile`).
    u = z - for_every_column(M_s, WIDE)
    at_1, p = exponentials(u, exp2_scale, POWER)
    d_1, d_T, e, c = s.d_1, s.d_T, s.e, s.c
    if NEED_CE:
        d_1 = d_1 * a_1 + sum_of_lane(at_1, WIDE)
    if NEED_KL:
        v = y - for_every_column(M_t, WIDE)
        q = tl.exp2(v * exp2_scale)
        x = Pair(u, v, at_1, p, q)
        c = rescaled_c(s, M_s, M_t, a_T, b, DIVERGENCE)
        d_T = d_T * a_T + sum_of_lane(x.p, WIDE)
        e = e * b + sum_of_lane(x.q, WIDE)
        c += sum_of_lane(term(x, DIVERGENCE), WIDE)
    return Statistics(M_s, d_1, d_T, M_t, e, c)


@triton.jit
def sweep_statistics(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    exp2_scale,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return the Statistics of columns low to high of one row; scalars."""
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    lowest = tl.full([LANES], LOWEST, tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    s = Statistics(lowest, zeros, zeros, lowest, zeros, zeros)
    whole = low + (high - low) // TILE * TILE
    # With two stages the next tile is loaded while this one is used.  With one stage and two loads per thread, ptxas puts
    # the teacher's loads after the student's arithmetic, and each tile waits for memory twice.
    for start in tl.range(low, whole, TILE, num_stages=2 if WIDE > 1 else 1):
        z, y = load_pair(student, teacher, start + column, high, NEED_KL, STUDENT_MAP, TEACHER_MAP, False, WIDE > 1)
        z, y = by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE)
        s = add_tile(s, z, y, exp2_scale, NEED_CE, NEED_KL, DIVERGENCE, POWER, WIDE)
    if whole < high:
        z, y = load_pair(student, teacher, whole + column, high, NEED_KL, STUDENT_MAP, TEACHER_MAP, True, WIDE > 1)
        z, y = by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE)
        s = add_tile(s, z, y, exp2_scale, NEED_CE, NEED_KL, DIVERGENCE, POWER, WIDE)
    in_units = Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, s.c * IN_UNITS)
    return merged(in_units, exp2_scale, DIVERGENCE, POWER)


@triton.jit
def far_differences(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    s,  # their Statistics
    exp2_scale,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return c of columns low to high of one row, computed in UNIT, after it has overflowed; it may be infinite again.

    This is rare, so it saves registers instead of time: each thread has one column, and a barrier keeps the loop from being
    unrolled.
    """
    column = tl.arange(0, LANES)
    m_s, m_t = s.m_s * IN_UNITS, s.m_t * IN_UNITS
    c = tl.zeros([LANES], tl.float32)
    for start in range(low, high, LANES):
        z, y = load_pair(student, teacher, start + column, high, True, STUDENT_MAP, TEACHER_MAP, True, False)
        x = pair_of(z * IN_UNITS, y * IN_UNITS, m_s, m_t, exp2_scale * OF_UNITS, True, 0, OF_UNITS)
        c += term(x, DIVERGENCE)
        tl.debug_barrier()
    return tl.sum(c, 0)


@triton.jit(do_not_specialize=["student_rows_inner", "teacher_rows_inner", "N"])
def row_statistics_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    counted_ptr,  # [N], bool; a row that is not counted is not read
    statistics_ptr,  # [S, 6, N]
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    N, V, columns_per_split,
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    if tl.load(counted_ptr + row) == 0:
        high = low
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    student = Stream(student_row, student_stride_column, student_factor, student_cap)
    teacher = Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap)
    s = sweep_statistics(
        student, teacher, low, high, exp2_scale,
        NEED_CE, NEED_KL, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    statistics = statistics_ptr + split.to(tl.int64) * 6 * N + row
    store_statistics(statistics, N, s)
    if NEED_KL and POWER == 0:  # noqa: SIM102
        if s.c == float("inf"):
            c = far_differences(student, teacher, low, high, s, exp2_scale, DIVERGENCE, LANES, STUDENT_MAP, TEACHER_MAP)
            tl.store(statistics + 5 * N, c)


def row_statistics(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    counted: torch.Tensor,  # [N], bool; a row that is not counted is not read
    dtype: torch.dtype,  # dtype of the statistics; the kernel has only float32
    need_ce: bool,
    objective: Objective,
    launch: Launch | None = None,
) -> torch.Tensor:  # [S, 6, N], float32
    """Return the statistics of each row's S splits, which `fused_kd.statistics.merge` merges."""
    second = student if teacher is None else teacher
    launch = launch or default_launch(student, min(student.element_size(), second.element_size()))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t, divergence = objective_arguments(objective)
    statistics = torch.empty(launch.splits, 6, N, dtype=dtype, device=student.device)
    row_statistics_kernel[(N, launch.splits)](
        student, second, counted, statistics,
        inner, *student.stride(), second.shape[1], *second.stride(),
        N, V, launch.columns_per_split, T.exp2_scale, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=need_ce, NEED_KL=teacher is not None, DIVERGENCE=divergence,
        POWER=T.power, LANES=launch.lanes, K=launch.columns,
        WIDE=is_wide(student, second), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind, **launch.options,
    )  # fmt: skip
    return statistics
