"""The statistics of rows whose columns are swept a slab at a time: each slab's are merged into those of the slabs before.

`fused_kd.statistics.merge` has the formulas.  The total is float64, so that its rounding does not grow with the number of
slabs.  In float64 no difference of float32 maxima overflows, and a sum of nearly equal terms keeps the digits of float32
terms: `second` of reverse KL needs no `expm1`.

The sums of a second sweep (`ratio_sums.py`) merge by addition.

Traffic: 180 bytes per row, which is nothing beside the slab itself.
"""

import torch
import triton
import triton.language as tl

from ... import statistics as stats
from ...divergences import Objective
from ...launching import default_launch
from .arguments import divergence_number, functions_of, teacher_grad_of
from .doubles import bits_of, double_of
from .ratio_sums import row_sums
from .tiles import MIXED_KL, REVERSE_KL

ROWS, NUM_WARPS = 128, 4  # per program; a row per thread
IN_UNITS = tl.constexpr(1 / stats.UNIT)


@triton.jit
def moved(total, factor, shift):
    """Return factor * (total + shift); 0 where the factor is 0, even if the total is infinite."""
    return tl.where(factor > 0, factor * (total + shift), 0.0)


@triton.jit
def load_double(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def larger_number(pointer, other, inside):
    return tl.maximum(load_double(pointer, inside), load_double(other, inside))


@triton.jit
def add_moved(
    row, inside, stride,  # of the statistics of some columns
    M_s, M_t,
    d_1, d_T, e, c, second, h,  # sums, relative to the maxima (M_s, M_t)
    inverse_T,
    DIVERGENCE: tl.constexpr, NEED_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Return the sums with those of some columns added."""
    ds = load_double(row, inside) - M_s
    part_d_1 = load_double(row + 1 * stride, inside)
    part_d_T = load_double(row + 2 * stride, inside)
    dt = load_double(row + 3 * stride, inside) - M_t
    part_e = load_double(row + 4 * stride, inside)
    part_c = load_double(row + 5 * stride, inside)
    a_T, b = tl.exp(ds * inverse_T), tl.exp(dt * inverse_T)
    difference = (ds - dt) * IN_UNITS
    if DIVERGENCE == REVERSE_KL:
        c += moved(part_c, a_T, part_d_T * difference)
        part_second = load_double(row + 7 * stride, inside)
        # e b - d_T a_T, without the rounding of e and d_T where both factors are nearly equal.
        near = part_second * a_T + part_e * (b - a_T)
        second += tl.where(tl.abs(dt - ds) * inverse_T < 1, near, part_e * b - part_d_T * a_T)
    else:
        c += moved(part_c, b, -part_e * difference)
    if DIVERGENCE == MIXED_KL:
        part_second = load_double(row + 7 * stride, inside)
        second += moved(part_second, a_T, part_d_T * difference)
    if NEED_ENTROPY:
        h += moved(load_double(row + 8 * stride, inside), a_T, part_d_T * ds)
    return d_1 + part_d_1 * tl.exp(ds), d_T + part_d_T * a_T, e + part_e * b, c, second, h


@triton.jit(do_not_specialize=["N", "columns", "inverse_T_bits"])
def merge_kernel(
    total_ptr,  # [9, N], float64, read and written
    part_ptr,  # [9, N], float32
    labels_ptr,  # [N], as columns of the part; read if HAS_LABELS
    N, columns,
    inverse_T_bits: tl.int64,
    DIVERGENCE: tl.constexpr, NEED_ENTROPY: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    inverse_T = double_of(inverse_T_bits)
    stride = N.to(tl.int64)
    total, part = total_ptr + row, part_ptr + row
    named = inside  # the statistics of a part have the logit of its nearest column for a label that it does not have
    if HAS_LABELS:
        column = tl.load(labels_ptr + row, mask=inside, other=-1)
        named = (column >= 0) & (column < columns)
    label = load_double(total + 6 * stride, inside) + load_double(part + 6 * stride, named)
    tl.store(total + 6 * stride, label, mask=inside)
    M_s = larger_number(total, part, inside)
    M_t = larger_number(total + 3 * stride, part + 3 * stride, inside)
    zeros = tl.zeros([BLOCK], tl.float64)
    d_1, d_T, e, c, second, h = add_moved(
        total, inside, stride, M_s, M_t, zeros, zeros, zeros, zeros, zeros, zeros, inverse_T,
        DIVERGENCE, NEED_ENTROPY,
    )  # fmt: skip
    d_1, d_T, e, c, second, h = add_moved(
        part, inside, stride, M_s, M_t, d_1, d_T, e, c, second, h, inverse_T, DIVERGENCE, NEED_ENTROPY
    )
    tl.store(total, M_s, mask=inside)
    tl.store(total + 1 * stride, d_1, mask=inside)
    tl.store(total + 2 * stride, d_T, mask=inside)
    tl.store(total + 3 * stride, M_t, mask=inside)
    tl.store(total + 4 * stride, e, mask=inside)
    tl.store(total + 5 * stride, c, mask=inside)
    tl.store(total + 7 * stride, second, mask=inside)
    tl.store(total + 8 * stride, h, mask=inside)


def merge_(
    total: torch.Tensor,  # [9, N], float64, contiguous; becomes the statistics of the union
    part: torch.Tensor,  # [9, N], float32, contiguous, of other columns
    labels: torch.Tensor | None,  # [N], as columns of the part; None: no CE
    columns: int,  # of the part
    objective: Objective,  # whose divergence takes one sweep
    entropy: bool,  # whether h is merged
) -> None:
    """Merge the statistics of some columns into those of the columns before, in one launch."""
    N = total.shape[1]
    merge_kernel[(triton.cdiv(N, ROWS),)](
        total, part, part if labels is None else labels, N, columns, bits_of(1 / objective.temperature),
        DIVERGENCE=divergence_number(objective.divergence), NEED_ENTROPY=entropy, HAS_LABELS=labels is not None,
        BLOCK=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


def add_sums_(
    sums: torch.Tensor,  # [3, N], float64
    student: torch.Tensor,  # [outer, inner, V]: some columns of the rows
    teacher: torch.Tensor,  # [outer', inner', V]
    weights: torch.Tensor,  # [3, N], float64; a row with weights 0 of both terms is not read
    statistics: torch.Tensor,  # [9, N], float32, of the whole rows: the maxima and normalisers are read
    objective: Objective,  # whose divergence takes two sweeps
    teacher_grad: bool,  # whether the sum of the teacher's slopes is needed
) -> None:
    """Add the sums of the student's slopes, of the value and of the teacher's slopes over some columns.

    The last is left out where the gradient does not need it: see `arguments.teacher_grad_of`.
    """
    launch = default_launch(student, min(student.element_size(), teacher.element_size()))
    launch = launch._replace(splits=1, columns_per_split=student.shape[2])
    own = statistics.clone()
    row_sums(student, teacher, weights, own, None, None, objective, launch)
    sums[:2] += own[stats.C :: stats.SECOND - stats.C][:2]
    if teacher_grad and teacher_grad_of(objective) == 2:
        row_sums(student, teacher, weights, own, None, None, objective, launch, functions_of(objective, 2))
        sums[2] += own[stats.SECOND]
