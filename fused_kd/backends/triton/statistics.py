"""Row statistics: one sweep over the logits gives the seven numbers per row that the loss and its gradient need.

Let z and y be the logits of student and teacher.  For a set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}    d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}

    forward KL     c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT
    reverse KL     c   = sum e^{(z - m_s)/T} ((z - m_s) - (y - m_t)) / UNIT

Every thread keeps a tuple of its own for the columns that it loads, and rescales it to the new maxima once per tile.  So
the loop has neither a barrier nor a shuffle.  The threads' tuples merge once, after the loop.  A row may be split over
several programs.  Each of them stores its tuple and counts it as published, and the program that publishes last merges the
row's tuples, in the order of the slices.  (`single_pass.py` has the order of these accesses to memory.)

The seventh number is the student's logit of the label.  The program whose columns hold the label stores it.

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
    LINE,
    Numbers,
    Statistics,
    Stream,
    by_lane,
    for_every_column,
    load_logits,
    load_pair,
    load_weights,
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
def statistics_of_lanes(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    exp2_scale,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return the Statistics that each thread has of columns low to high of one row, [LANES]; `merged` merges them."""
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
    return Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, s.c * IN_UNITS)


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


@triton.jit
def store_label_logit(
    student, numbers,
    low, high,  # the columns of this program
    end,  # high, or low if the row does not count
    V,
    NEED_CE: tl.constexpr, STUDENT_MAP: tl.constexpr,
):  # fmt: skip
    """Store the student's logit of the label if it is in these columns; 0 if the row does not count, or without labels.

    A label outside the vocabulary is moved into it.  (The weights of its row are NaN.)
    """
    label = 0
    if NEED_CE:
        label = tl.minimum(tl.maximum(tl.load(numbers.label).to(tl.int32), 0), V - 1)
    if (low <= label) & (label < high):
        logit = 0.0
        if NEED_CE:  # noqa: SIM102
            if label < end:
                logit = load_logits(student, label, V, STUDENT_MAP, False, False)
        tl.store(numbers.statistics + 6 * numbers.statistics_stride, logit)


@triton.jit
def store_whole(
    student, teacher,  # Streams
    numbers,
    s,  # Statistics of the whole row
    V, exp2_scale,
    NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Store the statistics of a row, and return its c, which is computed anew if it has overflowed."""
    store_statistics(numbers.statistics, numbers.statistics_stride, s)
    c = s.c
    if NEED_KL and POWER == 0:  # noqa: SIM102
        if c == float("inf"):
            c = far_differences(student, teacher, 0, V, s, exp2_scale, DIVERGENCE, LANES, STUDENT_MAP, TEACHER_MAP)
            tl.store(numbers.statistics + 5 * numbers.statistics_stride, c)
    return c


@triton.jit
def merged_parts(
    parts,  # pointer to the row's [6, S]
    S,
    exp2_scale,
    DIVERGENCE: tl.constexpr, POWER: tl.constexpr, S_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Return the statistics of a row from those of its slices, which other programs have stored."""
    part = tl.arange(0, S_ROUNDED)
    inside = part < S
    slices = Statistics(
        tl.load(parts + part, mask=inside, other=LOWEST, cache_modifier=".cg"),
        tl.load(parts + 1 * S + part, mask=inside, other=0.0, cache_modifier=".cg"),
        tl.load(parts + 2 * S + part, mask=inside, other=0.0, cache_modifier=".cg"),
        tl.load(parts + 3 * S + part, mask=inside, other=LOWEST, cache_modifier=".cg"),
        tl.load(parts + 4 * S + part, mask=inside, other=0.0, cache_modifier=".cg"),
        tl.load(parts + 5 * S + part, mask=inside, other=0.0, cache_modifier=".cg"),
    )
    return merged(slices, exp2_scale, DIVERGENCE, POWER)


@triton.jit
def publish(
    student, teacher,  # Streams
    numbers,
    s,  # Statistics of the slice
    parts,  # pointer to the row's [6, S]
    split, S,  # the slice, and their number
    count,  # pointer to the number of slices published
    V, exp2_scale,
    NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S_ROUNDED: tl.constexpr,  # S rounded up to a power of two
):  # fmt: skip
    """Publish the statistics of a slice; if it is the row's last, store those of the row.  Return whether it is the last.

    The module's docstring of `single_pass.py` says why the order of the accesses suffices.
    """
    store_statistics(parts + split, S, s)
    tl.debug_barrier()  # one thread stores, and another may release
    is_last = tl.atomic_add(count, 1, sem="acq_rel") == S - 1
    if is_last:
        tl.debug_barrier()  # one thread acquires, and all threads load
        whole = merged_parts(parts, S, exp2_scale, DIVERGENCE, POWER, S_ROUNDED)
        store_whole(
            student, teacher, numbers, whole, V, exp2_scale, NEED_KL, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP
        )
    return is_last


@triton.jit(
    do_not_specialize=["student_rows_inner", "teacher_rows_inner", "weights_stride", "statistics_stride", "S"]
)  # fmt: skip
def row_statistics_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics_ptr,  # [7, N]
    parts_ptr,  # [N, 6, S]; used if a row has several programs, as are the counters
    counters_ptr,  # [1 + N, LINE], zeros: in all lines but the first the parts published
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    weights_stride, statistics_stride,
    V, columns_per_split, S,
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S_ROUNDED: tl.constexpr,  # S rounded up to a power of two; 1: one program per row
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    numbers = Numbers(labels_ptr + row, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride)
    w = load_weights(numbers)
    end = high
    if (w.ce == 0) & (w.divergence == 0):
        end = low
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    student = Stream(student_row, student_stride_column, student_factor, student_cap)
    teacher = Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap)
    lanes = statistics_of_lanes(
        student, teacher, low, end, exp2_scale,
        NEED_CE, NEED_KL, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    s = merged(lanes, exp2_scale, DIVERGENCE, POWER)
    if S_ROUNDED == 1:
        store_whole(
            student, teacher, numbers, s, V, exp2_scale, NEED_KL, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP
        )
    else:
        publish(
            student, teacher, numbers, s, parts_ptr + row.to(tl.int64) * (6 * S), split, S,
            counters_ptr + (1 + row) * LINE, V, exp2_scale,
            NEED_KL, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP, S_ROUNDED,
        )  # fmt: skip
    end = high
    w = load_weights(numbers)  # again, so that no register holds `end` in the loop
    if (w.ce == 0) & (w.divergence == 0):
        end = low
    store_label_logit(student, numbers, low, high, end, V, NEED_CE, STUDENT_MAP)


def row_statistics(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    labels: torch.Tensor | None,  # [N], contiguous; None: no CE
    weights: torch.Tensor,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics: torch.Tensor,  # [7, N], float32, written
    counters: torch.Tensor | None,  # [1 + N, LINE], int32, zeros; None: made here if they are needed
    objective: Objective,
    launch: Launch | None = None,
) -> None:
    """Write the statistics of each row."""
    second = student if teacher is None else teacher
    launch = launch or default_launch(student, min(student.element_size(), second.element_size()))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t, divergence = objective_arguments(objective)
    parts, counters = shared_memory(launch.splits, statistics, counters) if launch.splits > 1 else (statistics,) * 2
    row_statistics_kernel[(N, launch.splits)](
        student, second, weights if labels is None else labels, weights, statistics, parts, counters,
        inner, *student.stride(), second.shape[1], *second.stride(), weights.stride(0), statistics.stride(0),
        V, launch.columns_per_split, launch.splits, T.exp2_scale, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=labels is not None, NEED_KL=teacher is not None, DIVERGENCE=divergence,
        POWER=T.power, LANES=launch.lanes, K=launch.columns,
        WIDE=is_wide(student, second), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind,
        S_ROUNDED=triton.next_power_of_2(launch.splits), **launch.options,
    )  # fmt: skip


def shared_memory(
    splits: int,  # S
    statistics: torch.Tensor,  # [7, N]
    counters: torch.Tensor | None,  # [1 + N, LINE], int32, zeros
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the tuples of a row's programs, [N, 6, S], and the counters, which are made if there are none."""
    N = statistics.shape[1]
    parts = torch.empty(N, 6, splits, dtype=torch.float32, device=statistics.device)
    return parts, new_counters(statistics, 1 + N) if counters is None else counters


def new_counters(like: torch.Tensor, lines: int) -> torch.Tensor:
    """Return zeros for programs that work on the same rows, `[lines, LINE]`."""
    return torch.zeros(lines, LINE.value, dtype=torch.int32, device=like.device)
