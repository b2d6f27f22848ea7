"""The gradient of the loss with respect to the student's logits, from the row statistics, in one sweep.

With a row's weights w_ce and w_kl (so that its loss is w_ce CE + w_kl KL) and its statistics,

    dL/dz[j] = w_ce (e^{z_j - m_s} / d_1 - [j = label])  +  w_kl / T (e^{(z_j - m_s)/T} / d_T - e^{(y_j - m_t)/T} / e)

and, where z = f(x) is a map of the head's output x (a scale, a softcap), that times f'(x).

The three normalisers are folded into one factor each, so an element costs its exponentials and one multiply-add for
each of them.  An element is read before it is written, by the same thread: the gradient may take the student's place.

Where the teacher learns too (TEACHER_GRAD), its gradient comes from the same loads and the same exponential.  The
log-ratio of an element less KL, which is their q-weighted mean, needs no logarithm, since KL = UNIT / T c / e +
log(d_T / e):

    dL/dy[j] = w_kl / T  e^{(y_j - m_t)/T} / e  (((y_j - m_t) - (z_j - m_s)) / T - UNIT / T c / e)

Traffic, bf16: 6 bytes a pair, the floor; 8 with the teacher's gradient.  Special-function work: 3 exponentials a pair, 2
where T is 1, 2, 3 or 4.
"""

import torch
import triton
import triton.language as tl

from ...logit_map import IDENTITY_MAP, LogitMap
from .launch import Launch, default_launch, is_wide, map_arguments, temperature_arguments
from .tiles import IDENTITY, INTERPRETED, OF_UNITS, exponentials, load_pair, row_offset, slope_at, tile_columns


@triton.jit
def student_gradient(
    u, q,  # tiles: z - m_s; e^{(y - m_t)/T}, 0 without a teacher
    is_label,  # a tile
    w_ce, p_1_scale, p_T_scale, q_scale,  # w_ce; w_ce / d_1, w_kl / (T d_T), w_kl / (T e)
    exp2_scale,
    NEED_CE: tl.constexpr, HAS_LABEL: tl.constexpr, NEED_KL: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Of both terms with e^u a power of e^{u/T}, that is factored out: a multiplication less, one of 11 instructions.

    Not in the label's tile, where p_1 - 1 and p_T - q have to cancel each by itself: near 1 both are a rounding of the sum.
    """
    at_1, at_T = exponentials(u, exp2_scale, POWER)
    gradient = tl.zeros_like(u)
    # In pairs: Triton 3.3 takes no chain of `and`.
    if (NEED_CE and NEED_KL) and (POWER > 0 and not HAS_LABEL):
        factor = p_1_scale
        for _ in tl.static_range(POWER - 1):
            factor = factor * at_T
        gradient = (factor + p_T_scale) * at_T - q_scale * q
    else:
        if NEED_KL:
            gradient = p_T_scale * at_T - q_scale * q
        if NEED_CE:
            gradient += p_1_scale * at_1
    if HAS_LABEL:
        gradient -= tl.where(is_label, w_ce, 0.0)
    return gradient


@triton.jit
def teacher_gradient(
    u, v, q,  # tiles: z - m_s, y - m_t, e^{v/T}
    q_scale,  # w_kl / (T e)
    inverse_T,
    mean_log_ratio,  # UNIT / T c / e, as the log-ratios less log(d_T / e)
):  # fmt: skip
    """Without teacher mass it is 0, also where v - u is infinite or inf - inf (masked tokens)."""
    return q_scale * q * tl.where(q > 0, (v - u) * inverse_T - mean_log_ratio, 0.0)


@triton.jit
def write_tile(
    student_row, teacher_row, gradient_row, teacher_gradient_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
    column, high, label,  # column: a tile
    m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,
    NEED_CE: tl.constexpr, HAS_LABEL: tl.constexpr, NEED_KL: tl.constexpr, TEACHER_GRAD: tl.constexpr,
    POWER: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Reads the logits of a tile and writes their gradients."""
    z, y = load_pair(
        student_row, teacher_row, column, high, student_stride_column, student_factor, student_cap,
        teacher_stride_column, teacher_factor, teacher_cap, NEED_KL, STUDENT_MAP, TEACHER_MAP, MASKED, False,
    )  # fmt: skip
    u = z - m_s
    v = y - m_t
    q = tl.zeros_like(v)
    if NEED_KL:
        q = tl.exp2(v * exp2_scale)
    gradient = student_gradient(
        u, q, column == label, w_ce, p_1_scale, p_T_scale, q_scale, exp2_scale, NEED_CE, HAS_LABEL, NEED_KL, POWER
    )
    if STUDENT_MAP != IDENTITY:
        gradient *= slope_at(z, student_factor, student_cap, STUDENT_MAP)
    store_tile(gradient_row, column, gradient_stride_column, high, gradient, MASKED)
    if TEACHER_GRAD:
        gradient = teacher_gradient(u, v, q, q_scale, inverse_T, mean_log_ratio)
        if TEACHER_MAP != IDENTITY:
            gradient *= slope_at(y, teacher_factor, teacher_cap, TEACHER_MAP)
        store_tile(teacher_gradient_row, column, teacher_gradient_stride_column, high, gradient, MASKED)


@triton.jit
def store_tile(row_ptr, column, stride_column, high, values, MASKED: tl.constexpr):
    pointers = row_ptr + column.to(tl.int64) * stride_column
    values = values.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(pointers, values, mask=column < high)
    else:
        tl.store(pointers, values)


@triton.jit
def sweep_gradient(
    student_row, teacher_row, gradient_row, teacher_gradient_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
    low, high, label,
    m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of columns low to high of one row.

    The label's tile by itself, so that the others need no compare an element: 3 of 17 instructions a pair.
    """
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    whole = low + (high - low) // TILE * TILE
    with_label = whole
    # Two ifs: the first condition is known to the compiler, the second is not
    if NEED_CE:  # noqa: SIM102
        if (label >= low) & (label < whole):
            with_label = low + (label - low) // TILE * TILE
    for start in range(low, with_label, TILE):
        write_tile(
            student_row, teacher_row, gradient_row, teacher_gradient_row,
            student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
            start + column, high, label,
            m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, False, NEED_KL, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
        )  # fmt: skip
    if NEED_CE:
        if with_label < whole:
            write_tile(
                student_row, teacher_row, gradient_row, teacher_gradient_row,
                student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
                with_label + column, high, label,
                m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
                student_factor, student_cap, teacher_factor, teacher_cap,
                NEED_CE, True, NEED_KL, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
            )  # fmt: skip
        for start in range(with_label + TILE, whole, TILE):
            write_tile(
                student_row, teacher_row, gradient_row, teacher_gradient_row,
                student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
                start + column, high, label,
                m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
                student_factor, student_cap, teacher_factor, teacher_cap,
                NEED_CE, False, NEED_KL, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
            )  # fmt: skip
    if whole < high:
        write_tile(
            student_row, teacher_row, gradient_row, teacher_gradient_row,
            student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
            whole + column, high, label,
            m_s, m_t, w_ce, p_1_scale, p_T_scale, q_scale, mean_log_ratio, exp2_scale, inverse_T,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, NEED_CE, NEED_KL, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, True,
        )  # fmt: skip


@triton.jit
def sweep_zeros(
    gradient_row, gradient_stride_column, low, high, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr
):
    """Writes zeros to columns low to high of one row."""
    column = tile_columns(LANES, K, WIDE)
    zeros = tl.zeros(column.shape, gradient_row.dtype.element_ty)
    for start in range(low, high, LANES * K):
        pointers = gradient_row + (start + column).to(tl.int64) * gradient_stride_column
        tl.store(pointers, zeros, mask=start + column < high)


@triton.jit
def weighted_gradient(
    student_row, teacher_row, gradient_row, teacher_gradient_row,  # pointers to the rows' first columns
    student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
    low, high, label, w_ce, w_kl,
    m_s, d_1, d_T, m_t, e, c,  # the statistics of the whole row; c is used where TEACHER_GRAD
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of columns low to high of one row from its weights and statistics."""
    w_kl *= inverse_T
    if (w_ce == 0) & (w_kl == 0):
        sweep_zeros(gradient_row, gradient_stride_column, low, high, LANES, K, WIDE)
        if TEACHER_GRAD:
            sweep_zeros(teacher_gradient_row, teacher_gradient_stride_column, low, high, LANES, K, WIDE)
    else:
        mean_log_ratio = 0.0
        if TEACHER_GRAD:
            mean_log_ratio = c / e * (inverse_T * OF_UNITS)
        sweep_gradient(
            student_row, teacher_row, gradient_row, teacher_gradient_row,
            student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
            low, high, label,
            m_s, m_t, w_ce, w_ce / d_1, w_kl / d_T, w_kl / e, mean_log_ratio, exp2_scale, inverse_T,
            student_factor, student_cap, teacher_factor, teacher_cap,
            NEED_CE, NEED_KL, TEACHER_GRAD, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "student_rows_inner", "teacher_rows_inner", "gradient_rows_inner", "teacher_gradient_rows_inner", "N",
    ]
)  # fmt: skip
def logit_gradient_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read where NEED_CE
    statistics_ptr,  # [6, N]
    ce_weight_ptr, kl_weight_ptr,  # [N]; a row with both 0 is not read
    gradient_ptr,  # [outer, inner, V]; may be the student
    teacher_gradient_ptr,  # [outer, inner, V], written where TEACHER_GRAD; may be the teacher
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    teacher_gradient_rows_inner, teacher_gradient_stride_outer, teacher_gradient_stride_inner,
    teacher_gradient_stride_column,
    N, V, columns_per_split,
    exp2_scale, inverse_T,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    low = tl.program_id(1) * columns_per_split
    high = tl.minimum(low + columns_per_split, V)
    student_row = student_ptr + row_offset(row, student_rows_inner, student_stride_outer, student_stride_inner)
    teacher_row = teacher_ptr + row_offset(row, teacher_rows_inner, teacher_stride_outer, teacher_stride_inner)
    gradient_row = gradient_ptr + row_offset(row, gradient_rows_inner, gradient_stride_outer, gradient_stride_inner)
    teacher_gradient_row = teacher_gradient_ptr
    if TEACHER_GRAD:
        teacher_gradient_row += row_offset(
            row, teacher_gradient_rows_inner, teacher_gradient_stride_outer, teacher_gradient_stride_inner
        )
    label = -1
    if NEED_CE:
        label = tl.load(labels_ptr + row).to(tl.int32)
    m_s = tl.load(statistics_ptr + row)
    d_1 = tl.load(statistics_ptr + 1 * N + row)
    d_T = tl.load(statistics_ptr + 2 * N + row)
    m_t = tl.load(statistics_ptr + 3 * N + row)
    e = tl.load(statistics_ptr + 4 * N + row)
    c = 0.0
    if TEACHER_GRAD:
        c = tl.load(statistics_ptr + 5 * N + row)
    weighted_gradient(
        student_row, teacher_row, gradient_row, teacher_gradient_row,
        student_stride_column, teacher_stride_column, gradient_stride_column, teacher_gradient_stride_column,
        low, high, label, tl.load(ce_weight_ptr + row), tl.load(kl_weight_ptr + row),
        m_s, d_1, d_T, m_t, e, c, exp2_scale, inverse_T,
        student_factor, student_cap, teacher_factor, teacher_cap,
        NEED_CE, NEED_KL, TEACHER_GRAD, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
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
    teacher_gradient: torch.Tensor | None = None,  # [outer', inner', V], written; may be the teacher
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
    launch: Launch | None = None,
) -> None:
    """Launches the kernel."""
    gradients = [gradient] if teacher_gradient is None else [gradient, teacher_gradient]
    # K by what is written: a float32 gradient stored 8 columns a thread would be regrouped through shared memory.
    launch = launch or default_launch(student, max(tensor.element_size() for tensor in gradients))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t = temperature_arguments(temperature), map_arguments(student_map), map_arguments(teacher_map)
    second = student if teacher is None else teacher
    written = [roundable(tensor) for tensor in gradients]
    of_student, of_teacher = written[0], written[-1]
    logit_gradient_kernel[(N, launch.splits)](
        student, second, ce_weight if labels is None else labels, statistics, ce_weight, kl_weight,
        of_student, of_teacher,
        inner, *student.stride(), second.shape[1], *second.stride(),
        of_student.shape[1], *of_student.stride(), of_teacher.shape[1], *of_teacher.stride(),
        N, V, launch.columns_per_split, T.exp2_scale, T.inverse, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=labels is not None, NEED_KL=teacher is not None, TEACHER_GRAD=teacher_gradient is not None,
        POWER=T.power, LANES=launch.lanes, K=launch.columns, WIDE=is_wide(student, second, *written),
        STUDENT_MAP=s.kind, TEACHER_MAP=t.kind, **launch.options,
    )  # fmt: skip
    for target, source in zip(gradients, written, strict=True):
        if source is not target:
            target.copy_(source)


def roundable(gradient: torch.Tensor) -> torch.Tensor:
    """What the kernel writes: Triton's interpreter truncates to bfloat16 where GPUs round to nearest."""
    if not INTERPRETED.value or gradient.dtype != torch.bfloat16:
        return gradient
    return torch.empty(gradient.shape)
