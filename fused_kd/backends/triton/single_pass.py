"""Statistics, merge and gradient of each row in one launch: each logit is read from memory once, and from L2 once.

A row is swept twice, first for its six statistics (`statistics.py`), then for its gradient (`gradient.py`).  The second
sweep hits the L2 cache if few enough rows are in flight; `fused_kd/launch.py` plans their number.  There are two forms.

Whole: one program per row, or one program that spans the blocks of a thread-block cluster (Triton's num_ctas; sm_90 and
later).  Its threads' tuples merge through shared memory, across the cluster.  No program waits for another.

Shared: S programs per row, on any GPU, merge through global memory.  A program takes a ticket t from an atomic
counter; the ticket gives it slice s = t % S of row r = t // S.  The program stores the tuple of that slice and counts
it as published.  The program that publishes last merges the row's S tuples, in the order of the slices, stores the
row's statistics, and counts once more.  Every program then waits until row r - 1 is merged, and writes slice s of the
gradient of row r - 1.  The last S tickets belong to no row: their programs only write the last row's gradient.  (One
program merges, not all: otherwise all S programs would read the row's tuples.)

Progress: the kernel finishes however few programs are resident, even if only one is.  Tickets are handed out in order,
to programs that are already running.  A program publishes, and merges if it is the last to do so, before it waits.  It
waits only for tickets below its own.  So the program with the lowest unfinished ticket waits for nothing: all tickets
below it have published and merged.  A program that waited for its own row would need S resident programs.

Memory order: every load returns the value that the protocol means it to see, under the PTX memory model.  Some thread of a
program stores its tuple.  A block-wide barrier, and then a release by one thread at the scope of the GPU, order that store
before the count.  The program that publishes last acquires by the same operation: it reads a count to which the other
releases have been added (a chain of read-modify-writes is one release sequence), and a barrier orders its other threads'
loads after that.  The statistics reach the waiting programs in the same way.  Loads bypass L1 (.cg), although the acquire
suffices.

Aliasing: the gradient may overwrite the student.  Every slice of row r - 1 has been read, by the program that published
it, before any program passes the wait for that row.  After the wait each slice is read and overwritten by one program, and
each element by one thread.

Traffic in bf16: 6 bytes per (student, teacher) pair (the floor, 3 passes) if L2 holds the rows in flight, and 10 if it does
not.  The shared form adds per row 24 S bytes for the tuples and 128 for the counter.  Special-function work: that of both
sweeps.

On an H200 the shared form moves 6.1 bytes per pair where two passes move 10, and yet takes longer: it is bound by
instructions and by L2.  docs/performance.md has the figures (`python -m benchmarks.gpu`).  So the shared form is taken only
if memory is slower relative to the multiprocessors (`devices.SHARING_BYTES`).
"""

import torch
import triton
import triton.language as tl

from ...divergences import Objective
from ...launch import SinglePass
from ...launching import is_wide
from .arguments import objective_arguments
from .elements import coefficients_of, merged
from .gradient import roundable, row_gradient
from .statistics import LOWEST, far_differences, sweep_statistics
from .tiles import Output, Statistics, Stream, Temperature, row_offset, store_statistics

# The integers in a cache line of 128 bytes.  Each counter has a line of its own, since all programs add to the counter of
# tickets.  If the rows' counters shared its line, all waiting programs would poll that line too (docs/performance.md).
LINE = tl.constexpr(32)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def whole_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    ce_weight_ptr, divergence_weight_ptr,  # [N], float32 or float64; a row with both weights 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [6, N]
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    N, V,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
    student = Stream(student_row, student_stride_column, student_factor, student_cap)
    teacher = Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap)
    gradient = Output(gradient_row, gradient_stride_column)
    w_ce = tl.load(ce_weight_ptr + row)
    w = tl.load(divergence_weight_ptr + row)
    high = V
    if (w_ce == 0) & (w == 0):
        high = 0
    s = sweep_statistics(
        student, teacher, 0, high, exp2_scale,
        NEED_CE, NEED_KL, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    store_statistics(statistics_ptr + row, N, s)
    c = s.c
    if NEED_KL and POWER == 0:  # noqa: SIM102
        if c == float("inf"):
            c = far_differences(student, teacher, 0, high, s, exp2_scale, DIVERGENCE, LANES, STUDENT_MAP, TEACHER_MAP)
            tl.store(statistics_ptr + row + 5 * N, c)
    s = Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, c)
    label = -1
    if NEED_CE:
        label = tl.load(labels_ptr + row).to(tl.int32)
    w_ce = w_ce.to(tl.float32)
    w = w.to(tl.float32)
    row_gradient(
        student, teacher, gradient, gradient, 0, V, label, (w_ce == 0) & (w == 0),
        coefficients_of(s, w_ce, w, inverse_T, DIVERGENCE), Temperature(exp2_scale, inverse_T),
        NEED_CE, NEED_KL, DIVERGENCE, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip


@triton.jit
def load_statistics(pointer, stride):
    """Return the six numbers that other programs have stored, `stride` elements apart."""
    return Statistics(
        tl.load(pointer, cache_modifier=".cg"),
        tl.load(pointer + 1 * stride, cache_modifier=".cg"),
        tl.load(pointer + 2 * stride, cache_modifier=".cg"),
        tl.load(pointer + 3 * stride, cache_modifier=".cg"),
        tl.load(pointer + 4 * stride, cache_modifier=".cg"),
        tl.load(pointer + 5 * stride, cache_modifier=".cg"),
    )


@triton.jit
def merged_parts(
    parts,  # pointer to the row's [6, S]
    exp2_scale,
    DIVERGENCE: tl.constexpr, POWER: tl.constexpr, S: tl.constexpr, S_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Return the statistics of a row from those of its slices."""
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
def acquired(count_ptr):
    """Return the count, with acquire semantics.

    Triton compiles an atomic addition of 0 to an acquiring load, which takes fewer instructions than a compare-and-swap.
    """
    return tl.atomic_add(count_ptr, 0, sem="acquire")


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def shared_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    ce_weight_ptr, divergence_weight_ptr,  # [N], float32 or float64; a row with both weights 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [6, N]
    parts_ptr,  # [N, 6, S]
    progress_ptr,  # [1 + N, LINE], zeros: the tickets taken; then per row the parts published, plus 1 once it is merged
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    N, V, columns_per_split,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S: tl.constexpr, S_ROUNDED: tl.constexpr,  # slices per row; S rounded up to a power of two
):  # fmt: skip
    ticket = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    row = ticket // S
    split = ticket % S
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    if row < N:
        end = high
        if (tl.load(ce_weight_ptr + row) == 0) & (tl.load(divergence_weight_ptr + row) == 0):
            end = low
        student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
        teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
        student = Stream(student_row, student_stride_column, student_factor, student_cap)
        teacher = Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap)
        slice_statistics = sweep_statistics(
            student, teacher, low, end, exp2_scale,
            NEED_CE, NEED_KL, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip
        parts = parts_ptr + row.to(tl.int64) * (6 * S)
        store_statistics(parts + split, S, slice_statistics)
        tl.debug_barrier()  # one thread stores, and another may release
        published = tl.atomic_add(progress_ptr + (1 + row) * LINE, 1, sem="acq_rel")
        if published == S - 1:
            tl.debug_barrier()  # one thread acquires, and all threads load
            whole = merged_parts(parts, exp2_scale, DIVERGENCE, POWER, S, S_ROUNDED)
            store_statistics(statistics_ptr + row, N, whole)
            if NEED_KL and POWER == 0:  # noqa: SIM102
                if whole.c == float("inf"):
                    c = far_differences(
                        student, teacher, 0, V, whole, exp2_scale, DIVERGENCE, LANES, STUDENT_MAP, TEACHER_MAP
                    )
                    tl.store(statistics_ptr + row + 5 * N, c)
            tl.debug_barrier()
            tl.atomic_add(progress_ptr + (1 + row) * LINE, 1, sem="release")
    row -= 1
    if row >= 0:
        count = progress_ptr + (1 + row) * LINE
        published = acquired(count)
        while published <= S:
            published = acquired(count)
        tl.debug_barrier()  # one thread acquires, and all threads load
        s = load_statistics(statistics_ptr + row, N)
        label = -1
        if NEED_CE:
            label = tl.load(labels_ptr + row).to(tl.int32)
        w_ce = tl.load(ce_weight_ptr + row).to(tl.float32)
        w = tl.load(divergence_weight_ptr + row).to(tl.float32)
        student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
        teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
        gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
        gradient = Output(gradient_row, gradient_stride_column)
        row_gradient(
            Stream(student_row, student_stride_column, student_factor, student_cap),
            Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap),
            gradient, gradient, low, high, label, (w_ce == 0) & (w == 0),
            coefficients_of(s, w_ce, w, inverse_T, DIVERGENCE), Temperature(exp2_scale, inverse_T),
            NEED_CE, NEED_KL, DIVERGENCE, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


def statistics_and_gradient(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    labels: torch.Tensor | None,  # [N], contiguous; None: no CE
    ce_weight: torch.Tensor,  # [N], float32 or float64; a row whose weight is 0 only in float32 counts, with gradient 0
    divergence_weight: torch.Tensor,  # [N], likewise; a row with both weights 0 is not read and has gradient 0
    gradient: torch.Tensor,  # [outer, inner, V], written; may be the student
    launch: SinglePass,
    objective: Objective,
) -> torch.Tensor:  # [6, N], float32: the merged statistics
    """Write the gradient and return the statistics of each row."""
    outer, inner, V = student.shape
    N = outer * inner
    statistics = torch.empty(6, N, dtype=torch.float32, device=student.device)
    if N == 0:
        return statistics
    second = student if teacher is None else teacher
    written = roundable(gradient)
    wide = is_wide(student, second, written)
    T, s, t, divergence = objective_arguments(objective)
    tensors = (
        student,
        second,
        ce_weight if labels is None else labels,
        ce_weight,
        divergence_weight,
        written,
        statistics,
    )
    strides = *_row_strides(student), *_row_strides(second), *_row_strides(written)
    numbers = T.exp2_scale, T.inverse, s.factor, s.cap, t.factor, t.cap
    options = {
        "NEED_CE": labels is not None, "NEED_KL": teacher is not None, "DIVERGENCE": divergence,
        "POWER": T.power, "LANES": launch.lanes, "K": launch.columns, "WIDE": launch.accesses if wide else 0,
        "STUDENT_MAP": s.kind, "TEACHER_MAP": t.kind, **launch.options,
    }  # fmt: skip
    if launch.splits == 0:
        whole_kernel[(N,)](*tensors, *strides, N, V, *numbers, **options)
    else:
        S = launch.splits
        parts = torch.empty(N, 6, S, dtype=torch.float32, device=student.device)
        progress = torch.zeros(1 + N, LINE.value, dtype=torch.int32, device=student.device)
        shared_kernel[((N + 1) * S,)](
            *tensors, parts, progress, *strides, N, V, launch.columns_per_split, *numbers,
            S=S, S_ROUNDED=triton.next_power_of_2(S), **options,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return statistics


def _row_strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Return (rows_inner, stride_outer, stride_inner, stride_column).

    Rows with a single stride are passed as N outer indices with one row each.  Triton specialises on a rows_inner of 1,
    which saves the division of the row number.
    """
    if tensor.shape[0] == 1:
        return 1, tensor.stride(1), tensor.stride(1), tensor.stride(2)
    stride_outer, stride_inner, stride_column = tensor.stride()
    return tensor.shape[1], stride_outer, stride_inner, stride_column
