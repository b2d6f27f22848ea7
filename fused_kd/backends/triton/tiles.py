"""What the kernels share: addresses of a row and of a tile, the map from a head's output to logits, exponentials.

Letters: N rows, V vocabulary, S splits of a row, K columns a thread; z, y student and teacher logits,
m_s, m_t their maxima, u = z - m_s, v = y - m_t.  Arithmetic is float32.  Exponentials are taken in base 2, which is what
the hardware computes: `exp2_scale` is log2(e) / T.
"""

import triton
import triton.language as tl

from ...statistics import UNIT

LOG2_E = tl.constexpr(1.4426950408889634)
IN_UNITS = tl.constexpr(1 / UNIT)  # times a logit: a difference of logits that float32 does not hold is finite then
OF_UNITS = tl.constexpr(float(UNIT))


@triton.jit
def exponentials(
    u,  # differences to a maximum, <= 0, any shape
    exp2_scale,
    POWER: tl.constexpr,  # T if it is 1, 2, 3 or 4, else 0
    COUNTED_IN: tl.constexpr = 1.0,  # the unit of u, which exp2_scale has as a factor
):
    """(e^u, e^{u/T}): one exponential where T is a small whole number, since e^u is then a power of the other."""
    at_T = tl.exp2(u * exp2_scale)
    if POWER == 0:
        at_1 = tl.exp2(u * (LOG2_E * COUNTED_IN))
    elif POWER == 1:
        at_1 = at_T
    else:
        square = at_T * at_T
        at_1 = square if POWER == 2 else square * (at_T if POWER == 3 else square)
    return at_1, at_T


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_inner):
    """Elements from the start of an [outer, inner, V] tensor to a row; 64-bit, since N * V passes 2^31."""
    outer = (row // rows_inner).to(tl.int64)
    inner = (row % rows_inner).to(tl.int64)
    return outer * stride_outer + inner * stride_inner


INTERPRETED = tl.constexpr(not isinstance(row_offset, triton.JITFunction))  # in Python, by Triton's interpreter


@triton.jit
def tile_columns(LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Column numbers of a tile as it is loaded and stored; `by_lane` gives each lane its K columns.

    WIDE = 1: [LANES, K]; a thread loads K neighbours as 16 bytes at once.  WIDE = 2 and more: [WIDE * LANES, K / WIDE]; a
    thread has so many such loads.  WIDE = 0, where rows start anywhere: [K * LANES]; neighbouring threads load neighbouring
    columns, so that narrow loads coalesce.  There the hint keeps Triton from giving a thread neighbours where one of two
    tensors is aligned.

    Lanes and loads are one dimension.  As two without contiguous elements, [K, LANES] and [WIDE, LANES, K / WIDE], they are
    ordered another way by Triton before 3.7: a thread's columns lie in several threads, and every sum over them shuffles.
    Only WIDE = 1 suits a cluster, to whose blocks Triton deals out the first dimension.
    """
    if WIDE:
        return tl.arange(0, WIDE * LANES)[:, None] * (K // WIDE) + tl.arange(0, K // WIDE)[None, :]
    else:
        return tl.max_contiguous(tl.arange(0, K * LANES), [1])


@triton.jit
def by_lane(tile, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """The loaded tile as [LANES, K], [WIDE, LANES, K / WIDE] or [K, LANES], where sums over a lane's K need no shuffle."""
    if WIDE > 1:
        return tl.reshape(tile, [WIDE, LANES, K // WIDE])
    elif WIDE:
        return tile
    else:
        return tl.reshape(tile, [K, LANES])


@triton.jit
def sum_of_lane(tile, WIDE: tl.constexpr):  # [LANES]
    """Over the K columns of every thread."""
    return tl.sum(tl.sum(tile, 0), 1) if WIDE > 1 else tl.sum(tile, 1 if WIDE else 0)


@triton.jit
def max_of_lane(tile, WIDE: tl.constexpr):  # [LANES]
    return tl.max(tl.max(tile, 0), 1) if WIDE > 1 else tl.max(tile, 1 if WIDE else 0)


@triton.jit
def for_every_column(of_lane, WIDE: tl.constexpr):
    """[LANES], to be broadcast to a tile."""
    if WIDE > 1:
        return of_lane[None, :, None]
    elif WIDE:
        return of_lane[:, None]
    else:
        return of_lane[None, :]


@triton.jit
def tanh(x):
    """To 1.5 units in the last place, from operations that every target and the interpreter have.

    Near 0 an odd polynomial, the minimax fit of degree 11 on [0, 0.625] (relative error 4e-9): 1 - 2 / (e^{2x} + 1) would
    cancel there, and small logits with it.
    """
    size = tl.abs(x)
    square = x * x
    polynomial = -0.005717044511 * square + 0.020650586784
    polynomial = polynomial * square - 0.053743497916
    polynomial = polynomial * square + 0.133314912849
    polynomial = polynomial * square - 0.333332839252
    near = x + x * square * polynomial
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


# What a model does to the output of its head, as a constexpr; `factor` and `cap` are its numbers.
IDENTITY = tl.constexpr(0)
SCALED = tl.constexpr(1)  # z = factor x
CAPPED = tl.constexpr(2)  # z = cap tanh(factor x)


@triton.jit
def logits_of(x, factor, cap, MAP: tl.constexpr):
    if MAP == CAPPED:
        return cap * tanh(factor * x)
    elif MAP == SCALED:
        return factor * x
    else:
        return x


@triton.jit
def slope_at(z, factor, cap, MAP: tl.constexpr):
    """dz/dx, from z: for z = cap tanh(factor x) it is factor cap (1 - (z / cap)^2)."""
    if MAP == CAPPED:
        t = z * (1.0 / cap)
        return factor * cap * (1.0 - t * t)
    else:
        return factor


@triton.jit
def in_float32(x, BY_BITS: tl.constexpr):
    """BY_BITS: a bfloat16 as the upper half of a float32, exactly; sm_100 then subtracts maxima two at a time.

    That is 18.5 instead of 20.3 instructions per pair in the statistics of the shared form.  Not in the gradient: sm_100
    fuses the conversion into the subtraction of the maximum there, which leaves none.  Nor in the statistics where a thread
    has one load: at T = 3 and 4 sm_100 then takes 50 registers, not 47, for a tenth of the threads that wait for memory.
    """
    if BY_BITS and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_tile(
    row_ptr, column, stride_column, high, factor, cap, MAP: tl.constexpr, MASKED: tl.constexpr, BY_BITS: tl.constexpr
):
    """Logits of the columns in float32; columns from `high` on are minus infinity, which adds nothing to any sum."""
    pointers = row_ptr + column.to(tl.int64) * stride_column
    if MASKED:
        inside = column < high
        x = in_float32(tl.load(pointers, mask=inside, other=0.0), BY_BITS)
        return tl.where(inside, logits_of(x, factor, cap, MAP), float("-inf"))
    else:
        return logits_of(in_float32(tl.load(pointers), BY_BITS), factor, cap, MAP)


@triton.jit
def load_pair(
    student_row, teacher_row,  # pointers to the rows' first columns
    column, high,
    student_stride_column, student_factor, student_cap,
    teacher_stride_column, teacher_factor, teacher_cap,
    NEED_KL: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr, MASKED: tl.constexpr,
    BY_BITS: tl.constexpr,  # see `in_float32`
):  # fmt: skip
    """(z, y) of the columns; without KL the teacher is not read."""
    z = load_tile(
        student_row, column, student_stride_column, high, student_factor, student_cap, STUDENT_MAP, MASKED, BY_BITS
    )
    y = z
    if NEED_KL:
        y = load_tile(
            teacher_row, column, teacher_stride_column, high, teacher_factor, teacher_cap, TEACHER_MAP, MASKED, BY_BITS
        )
    return z, y
