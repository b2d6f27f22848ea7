"""Row statistics: one sweep over the logits gives the numbers per row that the loss and its gradient need.

Let z and y be the logits of student and teacher.  For a set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}    d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}

    forward KL     c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT
    reverse KL     c   = sum e^{(z - m_s)/T} ((z - m_s) - (y - m_t)) / UNIT          second = e - d_T
    mixed KL       c   as for forward KL                                             second = c as for reverse KL
    entropy        h   = sum e^{(z - m_s)/T} (z - m_s)

Every thread keeps a tuple of its own for the columns that it loads, and rescales it to the new maxima once per tile.  So
the loop has neither a barrier nor a shuffle.  The threads' tuples merge once, after the loop.  A row may be split over
several programs.  Each of them stores its tuple and counts it as published, and the program that publishes last merges the
row's tuples, in the order of the slices.  (`single_pass.py` has the order of these accesses to memory.)

Number 6 is the student's logit of the label.  The program whose columns hold the label stores it.

The loop takes differences of logits without a unit, so they may overflow.  Everything after the loop is in UNIT, in which
every difference is finite.  `rare_sweeps.py` has the sweeps over a row whose c has overflowed or lost its digits.

Traffic in bf16: 4 bytes per (student, teacher) pair, the floor, and twice that for a row that is swept once more.
Special-function work per pair: 3 exponentials, or 2 if T is 1, 2, 3 or 4, plus one K-th of that for the move to new maxima.
"""

import torch
import triton
import triton.language as tl

from ... import statistics as stats
from ...divergences import Objective
from ...launch import Launch
from ...launching import default_launch, is_wide
from .arguments import objective_arguments
from .elements import (
    IN_UNITS,
    Pair,
    exponentials,
    factors_to,
    merged,
    rescaled_c,
    rescaled_h,
    term,
)
from .rare_sweeps import far_differences, is_close, near_second
from .ratio_sums import row_sums
from .tiles import (
    FORWARD_KL,
    LINE,
    MIXED_KL,
    OF_RATIO,
    REVERSE_KL,
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
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the tuples with the columns of one tile added.  Here c and the second c of mixed KL have no unit.

    Only these and h are rescaled by `scaled`.  The other sums are finite, and no other thread computes the same sum.
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
    d_1, d_T, e, c, second, h = s.d_1, s.d_T, s.e, s.c, s.second, s.h
    if NEED_CE:
        d_1 = d_1 * a_1 + sum_of_lane(at_1, WIDE)
    if NEED_ENTROPY:
        h = rescaled_h(s, M_s, a_T) + sum_of_lane(p * tl.where(p > 0, u, 0.0), WIDE)
    if NEED_KL:
        v = y - for_every_column(M_t, WIDE)
        q = tl.exp2(v * exp2_scale)
        x = Pair(u, v, at_1, p, q)
        if DIVERGENCE != OF_RATIO:
            c = rescaled_c(c, s, M_s, M_t, a_T, b, DIVERGENCE)
        if DIVERGENCE == MIXED_KL:
            second = rescaled_c(second, s, M_s, M_t, a_T, b, REVERSE_KL)
        d_T = d_T * a_T + sum_of_lane(x.p, WIDE)
        if DIVERGENCE == MIXED_KL:
            second += sum_of_lane(term(x, REVERSE_KL), WIDE)
        e = e * b + sum_of_lane(x.q, WIDE)
        if DIVERGENCE != OF_RATIO:
            c += sum_of_lane(term(x, DIVERGENCE), WIDE)
    if NEED_ENTROPY and not NEED_KL:
        d_T = d_T * a_T + sum_of_lane(p, WIDE)
    return Statistics(M_s, d_1, d_T, M_t, e, c, second, h)


@triton.jit
def statistics_of_lanes(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    exp2_scale,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return the Statistics that each thread has of columns low to high of one row, [LANES]; `merged` merges them."""
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    lowest = tl.full([LANES], LOWEST, tl.float32)
    zeros = tl.zeros([LANES], tl.float32)
    s = Statistics(lowest, zeros, zeros, lowest, zeros, zeros, zeros, zeros)
    whole = low + (high - low) // TILE * TILE
    # With two stages the next tile is loaded while this one is used.  With one stage and two loads per thread, ptxas puts
    # the teacher's loads after the student's arithmetic, and each tile waits for memory twice.
    for start in tl.range(low, whole, TILE, num_stages=2 if WIDE > 1 else 1):
        z, y = load_pair(student, teacher, start + column, high, NEED_KL, STUDENT_MAP, TEACHER_MAP, False, WIDE > 1)
        z, y = by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE)
        s = add_tile(s, z, y, exp2_scale, NEED_CE, NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, WIDE)
    if whole < high:
        z, y = load_pair(student, teacher, whole + column, high, NEED_KL, STUDENT_MAP, TEACHER_MAP, True, WIDE > 1)
        z, y = by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE)
        s = add_tile(s, z, y, exp2_scale, NEED_CE, NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, WIDE)
    return Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, s.c * IN_UNITS, s.second * IN_UNITS, s.h)


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
    NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Store the statistics of a row and return them.  A c that has overflowed is computed anew, and a `second` of reverse
    KL where teacher and student are close.
    """
    store_statistics(numbers.statistics, numbers.statistics_stride, s, DIVERGENCE, NEED_ENTROPY)
    if not NEED_ENTROPY:
        tl.store(numbers.statistics + 8 * numbers.statistics_stride, 0.0)
    if not NEED_KL or DIVERGENCE == FORWARD_KL:
        tl.store(numbers.statistics + 7 * numbers.statistics_stride, 0.0)
    c, second = s.c, s.second
    if NEED_KL and (POWER == 0 and DIVERGENCE != OF_RATIO):  # noqa: SIM102
        if c == float("inf"):
            c = far_differences(student, teacher, 0, V, s, exp2_scale, DIVERGENCE, LANES, STUDENT_MAP, TEACHER_MAP)
            tl.store(numbers.statistics + 5 * numbers.statistics_stride, c)
    if NEED_KL and (POWER == 0 and DIVERGENCE == MIXED_KL):  # noqa: SIM102
        if second == float("inf"):
            second = far_differences(student, teacher, 0, V, s, exp2_scale, REVERSE_KL, LANES, STUDENT_MAP, TEACHER_MAP)
            tl.store(numbers.statistics + 7 * numbers.statistics_stride, second)
    if NEED_KL and DIVERGENCE == REVERSE_KL:
        difference = s.e - s.d_T
        if is_close(s, exp2_scale):
            difference = near_second(student, teacher, V, s, exp2_scale, LANES, STUDENT_MAP, TEACHER_MAP)
        tl.store(numbers.statistics + 7 * numbers.statistics_stride, difference)
    return Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, c, second, s.h)


@triton.jit
def parts_of_row(parts_ptr, row, S, DIVERGENCE: tl.constexpr, NEED_ENTROPY: tl.constexpr):
    """Return the pointer to the numbers of a row's slices; see `numbers_of_a_slice`."""
    if NEED_ENTROPY:
        return parts_ptr + row.to(tl.int64) * (9 * S)
    elif (DIVERGENCE == MIXED_KL) | (DIVERGENCE == OF_RATIO):
        return parts_ptr + row.to(tl.int64) * (8 * S)
    else:
        return parts_ptr + row.to(tl.int64) * (6 * S)


def numbers_of_a_slice(divergence: int, entropy: bool) -> int:
    """Return how many numbers each slice of a row stores, in the order of the statistics."""
    has_second = divergence in (MIXED_KL.value, OF_RATIO.value)
    return stats.H + 1 if entropy else stats.SECOND + 1 if has_second else stats.C + 1


@triton.jit
def merged_parts(
    parts,  # pointer to the row's [`numbers_of_a_slice`, S]
    S,
    exp2_scale,
    NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr, S_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Return the statistics of a row from those of its slices, which other programs have stored."""
    part = tl.arange(0, S_ROUNDED)
    inside = part < S
    m_s = tl.load(parts + part, mask=inside, other=LOWEST, cache_modifier=".cg")
    d_1 = tl.load(parts + 1 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    d_T = tl.load(parts + 2 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    m_t = tl.load(parts + 3 * S + part, mask=inside, other=LOWEST, cache_modifier=".cg")
    e = tl.load(parts + 4 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    c = tl.zeros_like(e)
    if DIVERGENCE != OF_RATIO:
        c = tl.load(parts + 5 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    second = c
    if DIVERGENCE == MIXED_KL:
        second = tl.load(parts + 7 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    h = c
    if NEED_ENTROPY:
        h = tl.load(parts + 8 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    return merged(Statistics(m_s, d_1, d_T, m_t, e, c, second, h), exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)


@triton.jit
def publish(
    student, teacher,  # Streams
    numbers,
    s,  # Statistics of the slice
    parts,  # pointer to the row's [`numbers_of_a_slice`, S]
    split, S,  # the slice, and their number
    count,  # pointer to the number of slices published
    V, exp2_scale,
    NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S_ROUNDED: tl.constexpr,  # S rounded up to a power of two
):  # fmt: skip
    """Publish the statistics of a slice; if it is the row's last, store those of the row.  Return whether it is the last.

    The module's docstring of `single_pass.py` says why the order of the accesses suffices.
    """
    store_statistics(parts + split, S, s, DIVERGENCE, NEED_ENTROPY)
    tl.debug_barrier()  # one thread stores, and another may release
    is_last = tl.atomic_add(count, 1, sem="acq_rel") == S - 1
    if is_last:
        tl.debug_barrier()  # one thread acquires, and all threads load
        whole = merged_parts(parts, S, exp2_scale, NEED_ENTROPY, DIVERGENCE, POWER, S_ROUNDED)
        store_whole(
            student, teacher, numbers, whole, V, exp2_scale,
            NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip
    return is_last


@triton.jit(
    do_not_specialize=["student_rows_inner", "teacher_rows_inner", "weights_stride", "statistics_stride", "S"]
)  # fmt: skip
def row_statistics_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics_ptr,  # [9, N]
    parts_ptr,  # [N, `numbers_of_a_slice`, S]; used if a row has several programs, as are the counters
    counters_ptr,  # [1 + N, LINE], zeros: in all lines but the first the parts published
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    weights_stride, statistics_stride,
    V, columns_per_split, S,
    exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr,
    POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr,
    TEACHER_MAP: tl.constexpr,
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
        NEED_CE, NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    s = merged(lanes, exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)
    if S_ROUNDED == 1:
        store_whole(
            student, teacher, numbers, s, V, exp2_scale,
            NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip
    else:
        publish(
            student, teacher, numbers, s, parts_of_row(parts_ptr, row, S, DIVERGENCE, NEED_ENTROPY), split, S,
            counters_ptr + (1 + row) * LINE, V, exp2_scale,
            NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP, S_ROUNDED,
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
    statistics: torch.Tensor,  # [9, N], float32, written
    counters: torch.Tensor | None,  # [1 + N, LINE] per sweep, int32, zeros; None: made here if they are needed
    objective: Objective,
    entropy: bool,  # whether h is written
    launch: Launch | None = None,
) -> None:
    """Write the statistics of each row, in one launch per sweep."""
    second = student if teacher is None else teacher
    launch = launch or default_launch(student, min(student.element_size(), second.element_size()))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t, divergence, _ = objective_arguments(objective)
    parts = first_counters = second_counters = statistics  # not used by one program per row
    if launch.splits > 1:
        parts, first_counters = shared_memory(launch.splits, statistics, counters, divergence, entropy)
        second_counters = first_counters[2 + N :]
    row_statistics_kernel[(N, launch.splits)](
        student, second, weights if labels is None else labels, weights, statistics, parts, first_counters,
        inner, *student.stride(), second.shape[1], *second.stride(), weights.stride(0), statistics.stride(0),
        V, launch.columns_per_split, launch.splits, T.exp2_scale, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=labels is not None, NEED_KL=teacher is not None, NEED_ENTROPY=entropy,
        DIVERGENCE=divergence, POWER=T.power, LANES=launch.lanes, K=launch.columns,
        WIDE=is_wide(student, second), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind,
        S_ROUNDED=triton.next_power_of_2(launch.splits), **launch.options,
    )  # fmt: skip
    if teacher is not None and divergence == OF_RATIO.value:
        row_sums(student, teacher, weights, statistics, parts, second_counters, objective, launch)


def shared_memory(
    splits: int,  # S
    statistics: torch.Tensor,  # [9, N]
    counters: torch.Tensor | None,  # [1 + N, LINE], int32, zeros
    divergence: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the tuples of a row's programs, and the counters, which are made if there are none."""
    N = statistics.shape[1]
    parts = torch.empty(
        N, numbers_of_a_slice(divergence, entropy), splits, dtype=torch.float32, device=statistics.device
    )
    lines = (1 + N) * (2 if divergence == OF_RATIO.value else 1)  # per sweep of statistics
    return parts, new_counters(statistics, lines) if counters is None else counters


def new_counters(like: torch.Tensor, lines: int) -> torch.Tensor:
    """Return zeros for programs that work on the same rows, `[lines, LINE]`."""
    return torch.zeros(lines, LINE.value, dtype=torch.int32, device=like.device)
