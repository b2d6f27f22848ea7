"""Statistics, merge and gradient of each row in one launch: each logit is read from memory once, and from L2 once.

A row is swept twice, first for its statistics (`statistics.py`), then for its gradient (`gradient.py`).  The second
sweep hits the L2 cache if few enough rows are in flight; `fused_kd/launch.py` plans their number.  There are two forms.

Whole: one program per row, or one program that spans the blocks of a thread-block cluster (Triton's num_ctas; sm_90 and
later).  Its threads' tuples merge through shared memory, across the cluster.  No program waits for another.

Shared: S programs per row, on any GPU, merge through global memory.  A program takes a ticket t from an atomic
counter; the ticket gives it slice s = t % S of row r = t // S.  The program stores the tuple of that slice and counts
it as published.  The program that publishes last merges the row's S tuples, in the order of the slices, stores the
row's statistics, and counts once more.  Every program then waits until row r - 1 is merged, and writes slice s of the
gradient of row r - 1.  The last S tickets belong to no row: their programs only write the last row's gradient.  (One
program merges, not all: otherwise all S programs would read the row's tuples.)

A divergence of two sweeps of statistics (`ratio_sums.py`) makes three sweeps of a row.  The whole form takes one after
the other.  The shared form is one stage deeper: a program publishes the statistics of its slice of row r, waits until row
r - 1 is merged, publishes the sums over its slice of row r - 1, waits until the sums of row r - 2 are merged, and writes
its slice of the gradient of row r - 2.  The last 2 S tickets belong to no row.  What follows holds for each stage.

Progress: the kernel finishes however few programs are resident, even if only one is.  Tickets are handed out in order,
to programs that are already running.  A program publishes, and merges if it is the last to do so, before it waits.  It
waits only for tickets below its own.  So the program with the lowest unfinished ticket waits for nothing: all tickets
below it have published and merged.  A program that waited for its own row would need S resident programs.  (The sums of
row r - 2 are published by the tickets of row r - 1, between their two waits.)

Memory order: every load returns the value that the protocol means it to see, under the PTX memory model.  Some thread of a
program stores its tuple.  A block-wide barrier, and then a release by one thread at the scope of the GPU, order that store
before the count.  The program that publishes last acquires by the same operation: it reads a count to which the other
releases have been added (a chain of read-modify-writes is one release sequence), and a barrier orders its other threads'
loads after that.  The statistics reach the waiting programs in the same way.  With a second sweep a program waits for the
sums alone, and loads the statistics too: the program that has merged the sums has acquired from all that published them,
and these from the one that has stored the statistics.  Loads bypass L1 (.cg), although the acquire suffices.

Aliasing: the gradient may overwrite the student.  In the shared form every slice of row r - 1 has been read, its label's
logit included, by the program that published it, before any program passes the wait for that row; with a second sweep,
every slice of row r - 2 by the program that published its sums, which read it last.  After the wait each
slice is read and overwritten by one program, and each element by one thread.  In the whole form the label's logit is read
before the threads' tuples merge, since all threads, of all blocks, wait for one another there.

Traffic in bf16: 6 bytes per (student, teacher) pair (the floor, 3 passes) if L2 holds the rows in flight, and 10 if it does
not (14 with a second sweep of statistics).  The shared form adds per row 24 S bytes for the tuples and 128 for the counter,
or 32 S and 256 with a second sweep.  Special-function work: that of all sweeps.

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
from .arguments import functions_of, objective_arguments
from .elements import merged
from .gradient import roundable, row_gradient
from .ratio_sums import publish_sums, ratio_sums, store_sums
from .statistics import (
    parts_of_row,
    publish,
    shared_memory,
    statistics_of_lanes,
    store_label_logit,
    store_whole,
)
from .tiles import (
    LINE,
    OF_RATIO,
    Numbers,
    Output,
    Scalars,
    Statistics,
    Stream,
    load_statistics,
    load_weights,
    row_offset,
)


@triton.jit(
    do_not_specialize=["weights_stride", "statistics_stride"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def whole_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [9, N]
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    weights_stride, statistics_stride,
    V,
    exp2_scale, inverse_T, parameter,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, VERSION: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
    student = Stream(student_row, student_stride_column, student_factor, student_cap)
    teacher = Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap)
    gradient = Output(gradient_row, gradient_stride_column)
    numbers = Numbers(labels_ptr + row, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride)
    w = load_weights(numbers)
    end = V
    if (w.ce == 0) & (w.divergence == 0):
        end = 0
    lanes = statistics_of_lanes(
        student, teacher, 0, end, exp2_scale,
        NEED_CE, NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    store_label_logit(student, numbers, 0, V, end, V, NEED_CE, STUDENT_MAP)  # before the merge: see Aliasing
    s = merged(lanes, exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)
    s = store_whole(
        student, teacher, numbers, s, V, exp2_scale,
        NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    scalars = Scalars(exp2_scale, inverse_T, parameter)
    if NEED_KL and DIVERGENCE == OF_RATIO:
        value, slope = ratio_sums(
            student, teacher, 0, end, s, scalars, VALUE, SLOPE, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP
        )
        store_sums(numbers.statistics, statistics_stride, value, slope)
        s = Statistics(s.m_s, s.d_1, s.d_T, s.m_t, s.e, slope, value, s.h)
    label = -1
    if NEED_CE:
        label = tl.load(labels_ptr + row).to(tl.int32)
    row_gradient(
        student, teacher, gradient, gradient, 0, V, label, s, w, scalars,
        NEED_CE, NEED_KL, DIVERGENCE, VALUE, SLOPE, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip


@triton.jit
def acquired(count_ptr):
    """Return the count, with acquire semantics.

    Triton compiles an atomic addition of 0 to an acquiring load, which takes fewer instructions than a compare-and-swap.
    """
    return tl.atomic_add(count_ptr, 0, sem="acquire")


@triton.jit
def wait_until_merged(count_ptr, S):
    """Wait until the S parts of a row are merged; what the merging program has stored can be loaded afterwards."""
    published = acquired(count_ptr)
    while published <= S:
        published = acquired(count_ptr)
    tl.debug_barrier()  # one thread acquires, and all threads load


@triton.jit(
    do_not_specialize=["N", "weights_stride", "statistics_stride"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def shared_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [9, N]
    parts_ptr,  # [N, `numbers_of_a_slice`, S]
    # [1 + N, LINE], zeros: the tickets taken; then per row the parts published, plus 1 once they are merged.  With two
    # sweeps of statistics [2 + 2 N, LINE]: then an unused line, and the same per row of the second sweep.
    counters_ptr,
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    weights_stride, statistics_stride,
    N, V, columns_per_split,
    exp2_scale, inverse_T, parameter,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, NEED_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, VERSION: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S: tl.constexpr, S_ROUNDED: tl.constexpr,  # slices per row; S rounded up to a power of two
):  # fmt: skip
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    row = ticket // S
    split = ticket % S
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    if row < N:
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
        store_label_logit(student, numbers, low, high, end, V, NEED_CE, STUDENT_MAP)
        s = merged(lanes, exp2_scale, DIVERGENCE, POWER, NEED_ENTROPY)
        count = counters_ptr + (1 + row) * LINE
        parts = parts_of_row(parts_ptr, row, S, DIVERGENCE, NEED_ENTROPY)
        is_last = publish(
            student, teacher, numbers, s, parts, split, S, count, V, exp2_scale,
            NEED_KL, NEED_ENTROPY, DIVERGENCE, POWER, LANES, STUDENT_MAP, TEACHER_MAP, S_ROUNDED,
        )  # fmt: skip
        if is_last:
            tl.debug_barrier()
            tl.atomic_add(count, 1, sem="release")
    counts = counters_ptr + LINE  # of the sweep that the gradient waits for
    if NEED_KL and DIVERGENCE == OF_RATIO:
        row -= 1
        counts += (1 + N) * LINE
        if (row >= 0) & (row < N):
            wait_until_merged(counters_ptr + (1 + row) * LINE, S)
            numbers = Numbers(
                labels_ptr + row, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride
            )
            w = load_weights(numbers)
            end = high
            if (w.ce == 0) & (w.divergence == 0):
                end = low
            student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
            teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
            value, slope = ratio_sums(
                Stream(student_row, student_stride_column, student_factor, student_cap),
                Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap),
                low, end, load_statistics(statistics_ptr + row, statistics_stride, DIVERGENCE),
                Scalars(exp2_scale, inverse_T, parameter),
                VALUE, SLOPE, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
            )  # fmt: skip
            parts = parts_of_row(parts_ptr, row, S, DIVERGENCE, NEED_ENTROPY)
            is_last = publish_sums(numbers, value, slope, parts, split, S, counts + row * LINE, S_ROUNDED)
            if is_last:
                tl.debug_barrier()
                tl.atomic_add(counts + row * LINE, 1, sem="release")
    row -= 1
    if row >= 0:
        wait_until_merged(counts + row * LINE, S)
        numbers = Numbers(labels_ptr + row, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride)
        w = load_weights(numbers)
        label = -1
        if NEED_CE:
            label = tl.load(labels_ptr + row).to(tl.int32)
        student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
        teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
        gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
        gradient = Output(gradient_row, gradient_stride_column)
        row_gradient(
            Stream(student_row, student_stride_column, student_factor, student_cap),
            Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap),
            gradient, gradient, low, high, label, load_statistics(statistics_ptr + row, statistics_stride, DIVERGENCE), w,
            Scalars(exp2_scale, inverse_T, parameter),
            NEED_CE, NEED_KL, DIVERGENCE, VALUE, SLOPE, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


def statistics_and_gradient(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    labels: torch.Tensor | None,  # [N], contiguous; None: no CE
    weights: torch.Tensor,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics: torch.Tensor,  # [9, N], float32, written
    gradient: torch.Tensor,  # [outer, inner, V], written, in any dtype; may be the student
    counters: torch.Tensor | None,  # [1 + N, LINE] per sweep, int32, zeros; None: made here if they are needed
    launch: SinglePass,
    objective: Objective,
    entropy: bool,
) -> None:
    """Write the statistics of each row and the gradient.

    A row whose weights are 0 only in float32 has statistics, and gradient 0.
    """
    outer, inner, V = student.shape
    N = outer * inner
    if N == 0:
        return
    second = student if teacher is None else teacher
    written = roundable(gradient)
    wide = is_wide(student, second, written)
    T, s, t, divergence, parameter = objective_arguments(objective)
    tensors = student, second, weights if labels is None else labels, weights, written, statistics
    strides = (
        *_row_strides(student), *_row_strides(second), *_row_strides(written), weights.stride(0), statistics.stride(0)
    )  # fmt: skip
    numbers = T.exp2_scale, T.inverse, parameter, s.factor, s.cap, t.factor, t.cap
    options = {
        "NEED_CE": labels is not None, "NEED_KL": teacher is not None, "NEED_ENTROPY": entropy,
        "DIVERGENCE": divergence, **functions_of(objective), "POWER": T.power, "LANES": launch.lanes, "K": launch.columns,
        "WIDE": launch.accesses if wide else 0, "STUDENT_MAP": s.kind, "TEACHER_MAP": t.kind, **launch.options,
    }  # fmt: skip
    S = launch.splits
    if S == 0:
        whole_kernel[(N,)](*tensors, *strides, V, *numbers, **options)
    else:
        sweeps = 2 if teacher is not None and divergence == OF_RATIO.value else 1
        shared_kernel[((N + sweeps) * S,)](
            *tensors, *shared_memory(S, statistics, counters, divergence, entropy), *strides, N, V,
            launch.columns_per_split, *numbers, S=S, S_ROUNDED=triton.next_power_of_2(S), **options,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)


def _row_strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Return (rows_inner, stride_outer, stride_inner, stride_column).

    Rows with a single stride are passed as N outer indices with one row each.  Triton specialises on a rows_inner of 1,
    which saves the division of the row number.
    """
    if tensor.shape[0] == 1:
        return 1, tensor.stride(1), tensor.stride(1), tensor.stride(2)
    stride_outer, stride_inner, stride_column = tensor.stride()
    return tensor.shape[1], stride_outer, stride_inner, stride_column
