"""The second sweep of statistics: the value of a divergence of two sweeps, and the sum of its slopes, per row.

    second = sum f(p, q)        c = sum G(p, q)        (`ratios.py` defines f and G)

Both need the normalisers of the row, which the first sweep has given, and both merge by addition.  Every thread adds up the
columns that it loads.  The threads' sums merge once, after the loop, and those of several programs in the order of the
slices, as in `statistics.py`.

Elements have the factor d_T: p is e^{u/T}, and q is e^{v/T} d_T / e.  As f and G are homogeneous, the sums are divided once
per program, instead of two probabilities per column.

Traffic in bf16: 4 bytes per (student, teacher) pair, the floor.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ...divergences import Objective
from ...launch import Launch
from ...launching import is_wide
from .arguments import functions_of, objective_arguments
from .elements import added_pair, pair_of, quotient, scale_of
from .ratios import elements_of
from .tiles import (
    INTERPRETED,
    LINE,
    Numbers,
    Scalars,
    Stream,
    by_lane,
    load_pair,
    load_statistics,
    load_weights,
    row_offset,
    sum_of_lane,
    tile_columns,
)


@triton.jit
def add_columns(
    value, slope,  # [LANES] each
    student, teacher,  # Streams
    column, high,  # column is a tile
    s,  # Statistics of the whole row
    of_q, log,  # d_T / e and log(e / d_T)
    scalars,  # Scalars
    VALUE: tl.constexpr, SLOPE: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the sums with f and G of the columns that each thread has of a tile added, times d_T."""
    z, y = load_pair(student, teacher, column, high, True, STUDENT_MAP, TEACHER_MAP, MASKED, WIDE > 1)
    x = pair_of(by_lane(z, LANES, K, WIDE), by_lane(y, LANES, K, WIDE), s.m_s, s.m_t, scalars.exp2_scale, True, 1)
    x = elements_of(x, of_q, log, scalars)
    return value + sum_of_lane(VALUE(x), WIDE), slope + sum_of_lane(SLOPE(x), WIDE)


@triton.jit
def ratio_sums(
    student, teacher,  # Streams
    low, high,  # the columns to sweep
    s,  # Statistics of the whole row
    scalars,  # Scalars
    VALUE: tl.constexpr, SLOPE: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Return the sums of f and G over columns low to high of one row; scalars."""
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    of_q, log = scale_of(s)
    value = tl.zeros([LANES], tl.float32)
    slope = tl.zeros([LANES], tl.float32)
    whole = low + (high - low) // TILE * TILE
    for start in tl.range(low, whole, TILE, num_stages=2 if WIDE > 1 else 1):
        value, slope = add_columns(
            value, slope, student, teacher, start + column, high, s, of_q, log, scalars,
            VALUE, SLOPE, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP, False,
        )  # fmt: skip
    if whole < high:
        value, slope = add_columns(
            value, slope, student, teacher, whole + column, high, s, of_q, log, scalars,
            VALUE, SLOPE, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP, True,
        )  # fmt: skip
    value, slope = summed(value, slope)
    mass = tl.where(s.d_T > 0, s.d_T, 1.0)  # 0 if the row does not count
    return quotient(value, mass), quotient(slope, mass)


@triton.jit
def summed(value, slope):
    """Return both sums over all threads; see `elements.merged`."""
    if INTERPRETED:
        return tl.sum(value, 0), tl.sum(slope, 0)
    else:
        return tl.reduce((value, slope), 0, added_pair)


@triton.jit
def store_sums(statistics, stride, value, slope):
    """Store the sums among the statistics of a row."""
    tl.store(statistics + 5 * stride, slope)
    tl.store(statistics + 7 * stride, value)


@triton.jit
def publish_sums(
    numbers,
    value, slope,  # the sums over the slice
    parts,  # pointer to the row's [`statistics.numbers_of_a_slice`, S]
    split, S,  # the slice, and their number
    count,  # pointer to the number of slices published
    S_ROUNDED: tl.constexpr,  # S rounded up to a power of two
):  # fmt: skip
    """Publish the sums over a slice; if it is the row's last, store those of the row.  Return whether it is the last.

    The order of the accesses is that of `statistics.publish`.
    """
    store_sums(parts + split, S, value, slope)
    tl.debug_barrier()  # one thread stores, and another may release
    is_last = tl.atomic_add(count, 1, sem="acq_rel") == S - 1
    if is_last:
        tl.debug_barrier()  # one thread acquires, and all threads load
        part = tl.arange(0, S_ROUNDED)
        value = tl.load(parts + 7 * S + part, mask=part < S, other=0.0, cache_modifier=".cg")
        slope = tl.load(parts + 5 * S + part, mask=part < S, other=0.0, cache_modifier=".cg")
        value, slope = summed(value, slope)
        store_sums(numbers.statistics, numbers.statistics_stride, value, slope)
    return is_last


@triton.jit(
    do_not_specialize=["student_rows_inner", "teacher_rows_inner", "weights_stride", "statistics_stride", "S"]
)  # fmt: skip
def ratio_sums_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics_ptr,  # [9, N]; `c` and `second` are written
    parts_ptr,  # [N, NUMBERS, S]; used if a row has several programs, as are the counters
    counters_ptr,  # [N, LINE], zeros: the parts published
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    weights_stride, statistics_stride,
    V, columns_per_split, S,
    exp2_scale, inverse_T, parameter,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    DIVERGENCE: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr, VERSION: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    NUMBERS: tl.constexpr,  # of a slice, see `statistics.numbers_of_a_slice`
    S_ROUNDED: tl.constexpr,  # S rounded up to a power of two; 1: one program per row
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    low = split * columns_per_split
    end = tl.minimum(low + columns_per_split, V)
    numbers = Numbers(weights_ptr, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride)
    w = load_weights(numbers)
    if (w.ce == 0) & (w.divergence == 0):
        end = low
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    value, slope = ratio_sums(
        Stream(student_row, student_stride_column, student_factor, student_cap),
        Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap),
        low, end, load_statistics(numbers.statistics, statistics_stride, DIVERGENCE),
        Scalars(exp2_scale, inverse_T, parameter),
        VALUE, SLOPE, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    if S_ROUNDED == 1:
        store_sums(numbers.statistics, statistics_stride, value, slope)
    else:
        parts = parts_ptr + row.to(tl.int64) * (NUMBERS * S)
        publish_sums(numbers, value, slope, parts, split, S, counters_ptr + row * LINE, S_ROUNDED)


def row_sums(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor,  # [outer', inner', V], as many rows
    weights: torch.Tensor,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics: torch.Tensor,  # [9, N], float32, of the first sweep; those of the second are written
    parts: torch.Tensor | None,  # [N, numbers, S]; None: one program per row, as is without counters
    counters: torch.Tensor | None,  # [N, LINE], int32, zeros
    objective: Objective,
    launch: Launch,
    functions: dict[str, Any] | None = None,  # to be summed; None: value and student's slope
) -> None:
    """Write the statistics of each row that the second sweep takes."""
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t, divergence, parameter = objective_arguments(objective)
    summed_functions = functions or functions_of(objective)
    ratio_sums_kernel[(N, launch.splits)](
        student, teacher, weights, statistics,
        statistics if parts is None else parts, statistics if counters is None else counters,
        inner, *student.stride(), teacher.shape[1], *teacher.stride(), weights.stride(0), statistics.stride(0),
        V, launch.columns_per_split, launch.splits, T.exp2_scale, T.inverse, parameter,
        s.factor, s.cap, t.factor, t.cap,
        DIVERGENCE=divergence, **summed_functions,
        LANES=launch.lanes, K=launch.columns, WIDE=is_wide(student, teacher), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind,
        NUMBERS=parts.shape[1] if parts is not None and launch.splits > 1 else 0,
        S_ROUNDED=triton.next_power_of_2(launch.splits), **launch.options,
    )  # fmt: skip
