"""Statistics, merge and gradient of a row in one launch: each logit is read from memory once, and once from L2.

A row is swept twice, first for its six statistics (`row_statistics.py`), then for its gradient (`logit_gradient.py`); the
second sweep hits the L2 cache if few enough rows are in flight.  `one_launch_plan.py` says how many are.  Two forms:

Whole: one program a row, or one that spans the blocks of a thread-block cluster (Triton's num_ctas; sm_90 and later).  Its
threads' tuples merge through shared memory, the cluster's.  Nobody waits for another program.

Shared: S programs a row, on any GPU, that merge through global memory.  A program takes a ticket t from an atomic counter
and with it slice s = t % S of row r = t // S.  It stores the tuple of that slice and counts it as published; who publishes
last merges the row's S tuples, in the order of the slices, stores the row's statistics, and counts once more.  Then it
waits until row r - 1 is merged and writes slice s of the gradient of row r - 1.  The last S tickets belong to no row: they
only write the last row's gradient.  (Were every program to merge its row, that would be 0.7 instructions a pair more on a
B200, of 39, and the tuples would be read S times.)

It always progresses, however few programs are resident, even one.  Tickets are handed out in order to programs that run
already; a program publishes, and merges if it is the last, before it waits; and it waits for tickets below its own alone.
So the lowest ticket that has not finished waits for nothing: all tickets below it have published and merged.  Waiting for
its own row would need S resident programs.

What it sees is right under the PTX memory model.  Tuples are stored by some thread of the program; a block-wide barrier
and then a release, by one thread and at the scope of the GPU, order them before the count.  Whoever publishes last
acquires with the same operation: it reads a count that the other releases add up to (a chain of read-modify-writes is one
release sequence), and a barrier orders the other threads' loads after it.  The statistics reach the waiting programs in
the same way.  Loads go past L1 (.cg), though the acquire has to suffice.

The gradient may take the student's place.  Every slice of row r - 1 has been read, by whoever published it, before any
program passes the wait for that row; after it a slice is read and overwritten by one program, each element by one thread.

Traffic, bf16: 6 bytes a pair (the floor, 3 passes) as long as L2 holds the rows in flight, 10 where it does not hold them;
and the tuples, 24 S bytes a row.  Special-function work: that of both sweeps.
"""

import torch
import triton
import triton.language as tl

from ...devices import OneLaunch
from ...launch import default_one_launch
from ...logit_map import IDENTITY_MAP, LogitMap
from .gradient import roundable, weighted_gradient
from .launch import is_wide, map_arguments, temperature_arguments
from .statistics import LOWEST, merged, store_far_differences, store_statistics, sweep_statistics
from .tiles import row_offset


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def whole_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read where NEED_CE
    ce_weight_ptr, kl_weight_ptr,  # [N], of any precision; a row with both 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [6, N]
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    N, V,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
    w_ce = tl.load(ce_weight_ptr + row)
    w_kl = tl.load(kl_weight_ptr + row)
    high = V
    if (w_ce == 0) & (w_kl == 0):
        high = 0
    m_s, d_1, d_T, m_t, e, c = sweep_statistics(
        student_row, teacher_row, student_stride_column, teacher_stride_column, 0, high, exp2_scale,
        student_factor, student_cap, teacher_factor, teacher_cap,
        NEED_CE, NEED_KL, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip
    store_statistics(statistics_ptr + row, N, m_s, d_1, d_T, m_t, e, c)
    if NEED_KL and POWER == 0:  # noqa: SIM102
        if c == float("inf"):
            store_far_differences(
                statistics_ptr + row + 5 * N, student_row, teacher_row, student_stride_column, teacher_stride_column,
                0, high, m_s, m_t, exp2_scale, student_factor, student_cap, teacher_factor, teacher_cap,
                LANES, STUDENT_MAP, TEACHER_MAP,
            )  # fmt: skip
    label = -1
    if NEED_CE:
        label = tl.load(labels_ptr + row).to(tl.int32)
    weighted_gradient(
        student_row, teacher_row, gradient_row, gradient_row,
        student_stride_column, teacher_stride_column, gradient_stride_column, gradient_stride_column,
        0, V, label, w_ce.to(tl.float32), w_kl.to(tl.float32), m_s, d_1, d_T, m_t, e, c, exp2_scale, inverse_T,
        student_factor, student_cap, teacher_factor, teacher_cap,
        NEED_CE, NEED_KL, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip


@triton.jit
def merged_parts(
    parts,  # pointer to the row's [6, S]
    exp2_scale,
    POWER: tl.constexpr, S: tl.constexpr, S_ROUNDED: tl.constexpr,
):  # fmt: skip
    """The tuple of a row from those of its slices."""
    part = tl.arange(0, S_ROUNDED)
    inside = part < S
    m_s = tl.load(parts + part, mask=inside, other=LOWEST, cache_modifier=".cg")
    d_1 = tl.load(parts + 1 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    d_T = tl.load(parts + 2 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    m_t = tl.load(parts + 3 * S + part, mask=inside, other=LOWEST, cache_modifier=".cg")
    e = tl.load(parts + 4 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    c = tl.load(parts + 5 * S + part, mask=inside, other=0.0, cache_modifier=".cg")
    return merged(m_s, d_1, d_T, m_t, e, c, exp2_scale, POWER)


@triton.jit
def acquired(count_ptr):
    """Of an addition of 0 Triton makes an acquiring load, which costs less than an operation that writes.

    A compare-and-swap is 0.3 of 50 instructions a pair at V = 151 936 on a simulated H100; 12 of 67 in programs of 8 warps.
    """
    return tl.atomic_add(count_ptr, 0, sem="acquire")


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner"],
)
def shared_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read where NEED_CE
    ce_weight_ptr, kl_weight_ptr,  # [N], of any precision; a row with both 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    statistics_ptr,  # [6, N]
    parts_ptr,  # [N, 6, S]
    progress_ptr,  # [1 + N], zeros: tickets taken, then of each row its parts that are published, and 1 once merged
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    N, V, columns_per_split,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
    S: tl.constexpr, S_ROUNDED: tl.constexpr,  # slices of a row; to a power of two
):  # fmt: skip
    ticket = tl.atomic_add(progress_ptr, 1, sem="relaxed")
    row = ticket // S
    split = ticket % S
    low = split * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    if row < N:
        end = high
        if (tl.load(ce_weight_ptr + row) == 0) & (tl.load(kl_weight_ptr + row) == 0):
            end = low
        m_s, d_1, d_T, m_t, e, c = sweep_statistics(
            student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner),
            teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner),
            student_stride_column, teacher_stride_column, low, end, exp2_scale,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, NEED_KL, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip
        parts = parts_ptr + row.to(tl.int64) * (6 * S)
        store_statistics(parts + split, S, m_s, d_1, d_T, m_t, e, c)
        tl.debug_barrier()  # the stores are one thread's, the release may be another's
        published = tl.atomic_add(progress_ptr + 1 + row, 1, sem="acq_rel")
        if published == S - 1:
            tl.debug_barrier()  # the acquire was one thread's, the loads are all threads'
            m_s, d_1, d_T, m_t, e, c = merged_parts(parts, exp2_scale, POWER, S, S_ROUNDED)
            store_statistics(statistics_ptr + row, N, m_s, d_1, d_T, m_t, e, c)
            if NEED_KL and POWER == 0:  # noqa: SIM102
                if c == float("inf"):
                    store_far_differences(
                        statistics_ptr + row + 5 * N,
                        student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner),
                        teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner),
                        student_stride_column, teacher_stride_column, 0, V, m_s, m_t, exp2_scale,
                        student_factor, student_cap, teacher_factor, teacher_cap, LANES, STUDENT_MAP, TEACHER_MAP,
                    )  # fmt: skip
            tl.debug_barrier()
            tl.atomic_add(progress_ptr + 1 + row, 1, sem="release")
    row -= 1
    if row >= 0:
        published = acquired(progress_ptr + 1 + row)
        while published <= S:
            published = acquired(progress_ptr + 1 + row)
        tl.debug_barrier()  # the acquire was one thread's, the loads are all threads'
        statistics = statistics_ptr + row
        m_s = tl.load(statistics, cache_modifier=".cg")
        d_1 = tl.load(statistics + 1 * N, cache_modifier=".cg")
        d_T = tl.load(statistics + 2 * N, cache_modifier=".cg")
        m_t = tl.load(statistics + 3 * N, cache_modifier=".cg")
        e = tl.load(statistics + 4 * N, cache_modifier=".cg")
        c = tl.load(statistics + 5 * N, cache_modifier=".cg")
        label = -1
        if NEED_CE:
            label = tl.load(labels_ptr + row).to(tl.int32)
        gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
        weighted_gradient(
            student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner),
            teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner),
            gradient_row, gradient_row,
            student_stride_column, teacher_stride_column, gradient_stride_column, gradient_stride_column,
            low, high, label,
            tl.load(ce_weight_ptr + row).to(tl.float32), tl.load(kl_weight_ptr + row).to(tl.float32),
            m_s, d_1, d_T, m_t, e, c, exp2_scale, inverse_T,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, NEED_KL, False, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


def loss_and_gradient(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    labels: torch.Tensor | None,  # [N], contiguous; None leaves out the cross-entropy
    ce_weight: torch.Tensor,  # [N], float32 or float64: one that is 0 in float32 alone counts, with a gradient of 0
    kl_weight: torch.Tensor,  # [N]
    temperature: float,
    gradient: torch.Tensor,  # [outer, inner, V], written; may be the student
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
    launch: OneLaunch | None = None,
) -> torch.Tensor:  # [6, N], float32: the merged statistics
    """Launches one of the kernels."""
    outer, inner, V = student.shape
    N = outer * inner
    second = student if teacher is None else teacher
    written = roundable(gradient)
    wide = is_wide(student, second, written)
    # Triton 3.8 and 3.9 do not compile both terms behind a softcap for a cluster (`PlanCTAPass` fails).
    is_capped = student_map.is_capped or teacher_map.is_capped
    launch = launch or default_one_launch(student, teacher, written, wide, clusters=not is_capped)
    statistics = torch.empty(6, N, dtype=torch.float32, device=student.device)
    if N == 0:
        return statistics
    T, s, t = temperature_arguments(temperature), map_arguments(student_map), map_arguments(teacher_map)
    tensors = student, second, ce_weight if labels is None else labels, ce_weight, kl_weight, written, statistics
    strides = *_row_strides(student), *_row_strides(second), *_row_strides(written)
    numbers = T.exp2_scale, T.inverse, s.factor, s.cap, t.factor, t.cap
    options = {
        "NEED_CE": labels is not None, "NEED_KL": teacher is not None, "POWER": T.power, "LANES": launch.lanes,
        "K": launch.columns, "WIDE": launch.accesses if wide else 0, "STUDENT_MAP": s.kind, "TEACHER_MAP": t.kind,
        **launch.options,
    }  # fmt: skip
    if launch.splits == 0:
        whole_kernel[(N,)](*tensors, *strides, N, V, *numbers, **options)
    else:
        S = launch.splits
        parts = torch.empty(N, 6, S, dtype=torch.float32, device=student.device)
        progress = torch.zeros(1 + N, dtype=torch.int32, device=student.device)
        shared_kernel[((N + 1) * S,)](
            *tensors, parts, progress, *strides, N, V, launch.columns_per_split, *numbers,
            S=S, S_ROUNDED=triton.next_power_of_2(S), **options,
        )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
    return statistics


def _row_strides(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """(rows_inner, stride_outer, stride_inner, stride_column); rows one stride apart need no division, as N x 1 of them.

    Triton compiles a 1 in: the division of every row's number is 3 of 61 instructions a pair at V = 128 256.
    """
    if tensor.shape[0] == 1:
        return 1, tensor.stride(1), tensor.stride(1), tensor.stride(2)
    stride_outer, stride_inner, stride_column = tensor.stride()
    return tensor.shape[1], stride_outer, stride_inner, stride_column
