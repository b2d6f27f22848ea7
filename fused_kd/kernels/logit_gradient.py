"""The gradient of the loss with respect to the student's logits, from the row statistics, in one sweep.

With a row's weights w_ce and w_kl (so that its loss is w_ce CE + w_kl KL) and its statistics,

    dL/dz[j] = w_ce (e^{z_j - m_s} / d_1 - [j = label])  +  w_kl / T (e^{(z_j - m_s)/T} / d_T - e^{(y_j - m_t)/T} / e)

and, where z = f(x) is a map of the head's output x (a scale, a softcap), that times f'(x).

The three normalisers are folded into one factor each, so an element costs its exponentials and one multiply-add for
each of them.  An element is read before it is written, by the same thread: the gradient may take the student's place.

Traffic, bf16: 6 bytes a pair, the floor.  Special-function work: 3 exponentials a pair, 2 where T is 1, 2 or 4.
"""

import torch
import triton
import triton.language as tl

from ..logit_map import IDENTITY_MAP, LogitMap
from .formulas import IDENTITY, exponentials, load_pair, row_offset, slope_at, tile_columns
from .launch import Launch, default_launch, is_wide, map_arguments, temperature_arguments


@triton.jit
def tile_gradient(
    z, y,  # [K, LANES]
    is_label,  # [K, LANES]
    m_s, m_t,
    w_ce, p_1_scale, p_T_scale, q_scale,  # w_ce; w_ce / d_1, w_kl / (T d_T), w_kl / (T e)
    exp2_scale,
    student_factor, student_cap,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, SQUARINGS: tl.constexpr, STUDENT_MAP: tl.constexpr,
):  # fmt: skip
    at_1, at_T = exponentials(z - m_s, exp2_scale, SQUARINGS)
    gradient = tl.zeros_like(z)
    if NEED_KL:
        gradient = p_T_scale * at_T - q_scale * tl.exp2((y - m_t) * exp2_scale)
    if NEED_CE:
        gradient += p_1_scale * at_1 - tl.where(is_label, w_ce, 0.0)
    if STUDENT_MAP != IDENTITY:
        gradient *= slope_at(z, student_factor, student_cap, STUDENT_MAP)
    return gradient


@triton.jit
def sweep_gradient(
    student_row, teacher_row, gradient_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column, gradient_stride_column,
    low, high, label,
    m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, exp2_scale,
    student_factor, student_cap, teacher_factor, teacher_cap,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, SQUARINGS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of columns low to high of one row."""
    TILE: tl.constexpr = LANES * K
    dtype = gradient_row.dtype.element_ty
    column = tile_columns(LANES, K, WIDE)
    whole = low + (high - low) // TILE * TILE
    for start in range(low, whole, TILE):
        z, y = load_pair(
            student_row, teacher_row, start + column, high, student_stride_column, student_factor, student_cap,
            teacher_stride_column, teacher_factor, teacher_cap, NEED_KL, STUDENT_MAP, TEACHER_MAP, False,
        )  # fmt: skip
        gradient = tile_gradient(
            z, y, column == label - start, m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, exp2_scale,
            student_factor, student_cap, NEED_CE, NEED_KL, SQUARINGS, STUDENT_MAP,
        )  # fmt: skip
        tl.store(gradient_row + (start + column).to(tl.int64) * gradient_stride_column, gradient.to(dtype))
    if whole < high:
        z, y = load_pair(
            student_row, teacher_row, whole + column, high, student_stride_column, student_factor, student_cap,
            teacher_stride_column, teacher_factor, teacher_cap, NEED_KL, STUDENT_MAP, TEACHER_MAP, True,
        )  # fmt: skip
        gradient = tile_gradient(
            z, y, column == label - whole, m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, exp2_scale,
            student_factor, student_cap, NEED_CE, NEED_KL, SQUARINGS, STUDENT_MAP,
        )  # fmt: skip
        pointers = gradient_row + (whole + column).to(tl.int64) * gradient_stride_column
        tl.store(pointers, gradient.to(dtype), mask=whole + column < high)


@triton.jit
def sweep_zeros(
    gradient_row, gradient_stride_column, low, high, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr
):
    """Writes zeros to columns low to high of one row."""
    column = tile_columns(LANES, K, WIDE)
    zeros = tl.zeros([K, LANES], gradient_row.dtype.element_ty)
    for start in range(low, high, LANES * K):
        pointers = gradient_row + (start + column).to(tl.int64) * gradient_stride_column
        tl.store(pointers, zeros, mask=start + column < high)


@triton.jit(do_not_specialize=["student_rows_inner", "teacher_rows_inner", "gradient_rows_inner", "N"])
def logit_gradient_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read where NEED_CE
    statistics_ptr,  # [6, N]
    ce_weight_ptr, kl_weight_ptr,  # [N]; a row with both 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    N, V, columns_per_split,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, SQUARINGS: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    low = tl.program_id(1) * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
    w_ce = tl.load(ce_weight_ptr + row)
    w_kl = tl.load(kl_weight_ptr + row) * inverse_T
    if (w_ce == 0) & (w_kl == 0):
        sweep_zeros(gradient_row, gradient_stride_column, low, high, LANES, K, WIDE)
    else:
        label = -1
        if NEED_CE:
            label = tl.load(labels_ptr + row).to(tl.int32)
        m_s = tl.load(statistics_ptr + row)
        d_1 = tl.load(statistics_ptr + 1 * N + row)
        d_T = tl.load(statistics_ptr + 2 * N + row)
        m_t = tl.load(statistics_ptr + 3 * N + row)
        e = tl.load(statistics_ptr + 4 * N + row)
        sweep_gradient(
            student_row, teacher_row, gradient_row,
            student_stride_column, teacher_stride_column, gradient_stride_column,
            low, high, label, m_s, m_t, w_ce, w_ce / d_1, w_kl / d_T, w_kl / e, exp2_scale,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, NEED_KL, SQUARINGS, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


def logit_gradient(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows
    labels: torch.Tensor | None,  # [N], contiguous; None leaves out the cross-entropy
    statistics: torch.Tensor,  # [6, N], float32
    ce_weight: torch.Tensor,  # [N], float32
    kl_weight: torch.Tensor,  # [N], float32
    temperature: float,
    gradient: torch.Tensor,  # [outer, inner, V], written; may be the student
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
    launch: Launch | None = None,
) -> None:
    """Launches the kernel."""
    # K by what is written: a float32 gradient stored 8 columns a thread would be regrouped through shared memory.
    launch = launch or default_launch(student, student.element_size())
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t = temperature_arguments(temperature), map_arguments(student_map), map_arguments(teacher_map)
    second = student if teacher is None else teacher
    written = gradient
    if not isinstance(logit_gradient_kernel, triton.JITFunction) and gradient.dtype == torch.bfloat16:
        written = torch.empty(gradient.shape)  # Triton's interpreter truncates to bfloat16 where GPUs round to nearest
    logit_gradient_kernel[(N, launch.splits)](
        student, second, ce_weight if labels is None else labels, statistics, ce_weight, kl_weight, written,
        inner, *student.stride(), second.shape[1], *second.stride(), written.shape[1], *written.stride(),
        N, V, launch.columns_per_split, T.exp2_scale, T.inverse, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=labels is not None, NEED_KL=teacher is not None, SQUARINGS=T.squarings, LANES=launch.lanes,
        K=launch.columns, WIDE=is_wide(student, second, written), STUDENT_MAP=s.kind, TEACHER_MAP=t.kind,
        **launch.options,
    )  # fmt: skip
    if written is not gradient:
        gradient.copy_(written)
