"""The gradient of the loss with respect to the logits, from the statistics and the weights of each row, in one sweep.

Let u = z - m_s and v = y - m_t be the logits of student and teacher relative to the maxima of their row.  Then dL/dz[j] is

    forward KL     A e^u + B e^{u/T} - C e^{v/T} - W [j = label]
    reverse KL     A e^u + B e^{u/T} ((u - v)/T - R) - W [j = label]
    two sweeps     A e^u + B (G - e^{u/T} R) - W [j = label]                G is times d_T, see `ratios.py`

If z = f(x) is a map of the head's output x (a scale, a softcap), this is multiplied by f'(x).  Each program computes the
coefficients of its row from the statistics, the weights and the upstream gradient (`elements.coefficients_of`).

The normalisers are folded into the coefficients, so an element costs its exponentials and one multiply-add for each of
them.  Each element is read before it is written, by the same thread, so the gradient may overwrite the student.

If the teacher learns too (TEACHER_GRAD), its gradient comes from the same loads and the same exponentials:

    forward KL     C e^{v/T} ((v - u)/T - R)
    reverse KL     C e^{v/T} - B e^{u/T}
    two sweeps     B (K - e^{v/T} (d_T / e) S)                              K is f - G, or a function of its own

R is the mean of the first summand, so the normalisers cancel in the difference, and no logarithm is needed.  S is the sum
of K.  If K is a function of its own, a sweep before this one takes that sum (`ratio_sums.py`).

Traffic in bf16: 6 bytes per (student, teacher) pair, the floor; 8 with the teacher's gradient.  Special-function work
per pair: 3 exponentials, or 2 if T is 1, 2, 3 or 4; one less for reverse KL without the teacher's gradient.
"""

import torch
import triton
import triton.language as tl

from ... import statistics as stats
from ...divergences import Objective
from ...launch import Launch
from ...launching import default_launch, is_wide
from .arguments import functions_of, objective_arguments, teacher_grad_of
from .elements import coefficients_of, pair_of, student_gradient, teacher_gradient
from .ratio_sums import row_sums
from .ratios import elements_of
from .tiles import (
    IDENTITY,
    INTERPRETED,
    OF_RATIO,
    Numbers,
    Output,
    Scalars,
    Stream,
    Weights,
    load_pair,
    load_statistics,
    load_weights,
    row_offset,
    slope_at,
    store_tile,
    store_zeros,
    tile_columns,
)


@triton.jit
def write_tile(
    student, teacher,  # Streams
    output, teacher_output,
    column, high, label,  # column is a tile, the others are scalars
    k,  # Coefficients
    scalars,  # Scalars
    NEED_CE: tl.constexpr, HAS_LABEL: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read the logits of a tile and write their gradients.

    VALUE is used for the teacher's gradient alone, and is its slope if TEACHER_GRAD is 2.
    """
    z, y = load_pair(student, teacher, column, high, NEED_KL, STUDENT_MAP, TEACHER_MAP, MASKED, False)
    x = pair_of(z, y, k.m_s, k.m_t, scalars.exp2_scale, NEED_KL, POWER)
    ratio, G = x, x.p
    if NEED_KL and DIVERGENCE == OF_RATIO:
        ratio = elements_of(x, k.of_q, k.log, scalars)
        G = SLOPE(ratio)
    gradient = student_gradient(
        x, G, column == label, k, scalars.inverse_T, NEED_CE, HAS_LABEL, NEED_KL, DIVERGENCE, POWER
    )
    if STUDENT_MAP != IDENTITY:
        gradient *= slope_at(z, student, STUDENT_MAP)
    store_tile(output, column, high, gradient, MASKED)
    if TEACHER_GRAD:
        if DIVERGENCE == OF_RATIO:
            K = VALUE(ratio) if TEACHER_GRAD == 2 else VALUE(ratio) - G
            gradient = k.B * tl.fma(-k.S, ratio.q, K)
        else:
            gradient = teacher_gradient(x, k, scalars.inverse_T, DIVERGENCE)
        if TEACHER_MAP != IDENTITY:
            gradient *= slope_at(y, teacher, TEACHER_MAP)
        store_tile(teacher_output, column, high, gradient, MASKED)


@triton.jit
def sweep_gradient(
    student, teacher,  # Streams
    output, teacher_output,
    low, high, label,
    k,  # Coefficients
    scalars,  # Scalars
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr,
    TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of columns low to high of one row.

    The label's tile is swept by itself, so that the other tiles need no comparison per element, which would take 3 of 17
    instructions per pair.
    """
    TILE: tl.constexpr = LANES * K
    column = tile_columns(LANES, K, WIDE)
    whole = low + (high - low) // TILE * TILE
    with_label = whole
    # Two ifs, since only the first condition is known when the kernel is compiled.
    if NEED_CE:  # noqa: SIM102
        if (label >= low) & (label < whole):
            with_label = low + (label - low) // TILE * TILE
    for start in range(low, with_label, TILE):
        write_tile(
            student, teacher, output, teacher_output, start + column, high, label, k, scalars,
            NEED_CE, False, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
        )  # fmt: skip
    if NEED_CE:
        if with_label < whole:
            write_tile(
                student, teacher, output, teacher_output, with_label + column, high, label, k, scalars,
                NEED_CE, True, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
            )  # fmt: skip
        for start in range(with_label + TILE, whole, TILE):
            write_tile(
                student, teacher, output, teacher_output, start + column, high, label, k, scalars,
                NEED_CE, False, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, False,
            )  # fmt: skip
    if whole < high:
        write_tile(
            student, teacher, output, teacher_output, whole + column, high, label, k, scalars,
            NEED_CE, NEED_CE, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, STUDENT_MAP, TEACHER_MAP, True,
        )  # fmt: skip


@triton.jit
def row_gradient(
    student, teacher,  # Streams
    output, teacher_output,
    low, high, label,
    s,  # Statistics of the whole row
    weights,  # Weights, float64
    scalars,  # Scalars
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr,
    TEACHER_GRAD: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of columns low to high of one row; zeros, without reading it, if its weights are 0 in float32.

    The weight of a term that is not in the loss is not used.
    """
    w_ce = weights.ce.to(tl.float32)
    w = weights.divergence.to(tl.float32)
    is_zero = (w_ce == 0) & (w == 0) if NEED_CE and NEED_KL else (w_ce if NEED_CE else w) == 0
    if is_zero:
        store_zeros(output, low, high, LANES, K, WIDE)
        if TEACHER_GRAD:
            store_zeros(teacher_output, low, high, LANES, K, WIDE)
    else:
        k = coefficients_of(s, w_ce, w, scalars, DIVERGENCE, TEACHER_GRAD)
        sweep_gradient(
            student, teacher, output, teacher_output, low, high, label, k, scalars,
            NEED_CE, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "student_rows_inner", "teacher_rows_inner", "gradient_rows_inner", "teacher_gradient_rows_inner",
        "weights_stride", "statistics_stride", "upstream_stride",
    ]
)  # fmt: skip
def logit_gradient_kernel(
    student_ptr, teacher_ptr,  # [outer, inner, V]
    labels_ptr,  # [N]; read if NEED_CE
    weights_ptr,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics_ptr,  # [9, N], merged
    upstream_ptr,  # a scalar or [N]; read if HAS_UPSTREAM
    gradient_ptr,  # [outer, inner, V]; may be the student
    teacher_gradient_ptr,  # [outer, inner, V], written if TEACHER_GRAD; may be the teacher
    student_rows_inner, student_stride_outer, student_stride_inner, student_stride_column,
    teacher_rows_inner, teacher_stride_outer, teacher_stride_inner, teacher_stride_column,
    gradient_rows_inner, gradient_stride_outer, gradient_stride_inner, gradient_stride_column,
    teacher_gradient_rows_inner, teacher_gradient_stride_outer, teacher_gradient_stride_inner,
    teacher_gradient_stride_column,
    weights_stride, statistics_stride, upstream_stride,
    V, columns_per_split,
    exp2_scale, inverse_T, parameter,
    student_factor, student_cap, teacher_factor, teacher_cap,  # see `logits_of`
    NEED_CE: tl.constexpr, NEED_KL: tl.constexpr, DIVERGENCE: tl.constexpr,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, VERSION: tl.constexpr, TEACHER_GRAD: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr, POWER: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr,
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
    numbers = Numbers(labels_ptr + row, weights_ptr + row, weights_stride, statistics_ptr + row, statistics_stride)
    w = load_weights(numbers)
    if HAS_UPSTREAM:
        upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float64)
        w = Weights(w.ce * upstream, w.divergence * upstream)
    row_gradient(
        Stream(student_row, student_stride_column, student_factor, student_cap),
        Stream(teacher_row, teacher_stride_column, teacher_factor, teacher_cap),
        Output(gradient_row, gradient_stride_column), Output(teacher_gradient_row, teacher_gradient_stride_column),
        low, high, label, load_statistics(numbers.statistics, statistics_stride, DIVERGENCE), w,
        Scalars(exp2_scale, inverse_T, parameter),
        NEED_CE, NEED_KL, DIVERGENCE, VALUE, SLOPE, TEACHER_GRAD, POWER, LANES, K, WIDE, STUDENT_MAP, TEACHER_MAP,
    )  # fmt: skip


def logit_gradient(
    student: torch.Tensor,  # [outer, inner, V]
    teacher: torch.Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: torch.Tensor | None,  # [N], contiguous; None: no CE
    statistics: torch.Tensor,  # [9, N], float32
    weights: torch.Tensor,  # [3, N], float64
    upstream: torch.Tensor | None,  # a scalar or [N], float32 or float64; None: 1
    gradient: torch.Tensor,  # [outer, inner, V], written; may be the student
    teacher_gradient: torch.Tensor | None,  # [outer', inner', V], written; may be the teacher
    objective: Objective,
    launch: Launch | None = None,
    *,
    teacher_sums: torch.Tensor | None = None,  # [N]: sums of the teacher's slopes; None: of these columns
) -> None:
    """Write the student's gradient, and the teacher's if there is memory for it.

    A row whose weights times the upstream gradient are 0 in float32 is not read and has gradient 0.
    """
    gradients = [gradient] if teacher_gradient is None else [gradient, teacher_gradient]
    # K follows from the tensors that are written: with 8 columns per thread a float32 gradient would be regrouped through
    # shared memory.
    launch = launch or default_launch(student, max(tensor.element_size() for tensor in gradients))
    outer, inner, V = student.shape
    N = outer * inner
    T, s, t, divergence, parameter = objective_arguments(objective)
    second = student if teacher is None else teacher
    written = [roundable(tensor) for tensor in gradients]
    first, last = written[0], written[-1]  # without a teacher's gradient both are the student's
    of_teacher = 0 if teacher_gradient is None else teacher_grad_of(objective)
    functions = functions_of(objective, of_teacher)
    if of_teacher == 2:  # the value less the sum of the student's slopes may have lost the sum of the teacher's
        statistics = statistics.clone()
        if teacher_sums is not None:
            statistics[stats.SECOND] = teacher_sums
        else:
            whole = launch._replace(splits=1, columns_per_split=V)
            row_sums(student, second, weights, statistics, None, None, objective, whole, functions)
    logit_gradient_kernel[(N, launch.splits)](
        student, second, weights if labels is None else labels, weights, statistics,
        weights if upstream is None else upstream, first, last,
        inner, *student.stride(), second.shape[1], *second.stride(),
        first.shape[1], *first.stride(), last.shape[1], *last.stride(),
        weights.stride(0), statistics.stride(0), upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        V, launch.columns_per_split, T.exp2_scale, T.inverse, parameter, s.factor, s.cap, t.factor, t.cap,
        NEED_CE=labels is not None, NEED_KL=teacher is not None, DIVERGENCE=divergence,
        **functions, TEACHER_GRAD=of_teacher, HAS_UPSTREAM=upstream is not None, POWER=T.power,
        LANES=launch.lanes, K=launch.columns, WIDE=is_wide(student, second, *written),
        STUDENT_MAP=s.kind, TEACHER_MAP=t.kind, **launch.options,
    )  # fmt: skip
    for target, source in zip(gradients, written, strict=True):
        if source is not target:
            target.copy_(source)


def roundable(gradient: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the kernel writes: the gradient itself, or under the interpreter float32 for bfloat16.

    Triton's interpreter truncates to bfloat16, where GPUs round to nearest.  PyTorch rounds the float32 copy.
    """
    if not INTERPRETED.value or gradient.dtype != torch.bfloat16:
        return gradient
    return torch.empty(gradient.shape)
