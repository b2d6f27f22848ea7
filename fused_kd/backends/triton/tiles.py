"""Rows in memory: NamedTuples of kernel values, addresses, layouts of a tile, loads of logits, stores.

Letters: N rows, V vocabulary, S splits of a row, K columns per thread.  z and y are the logits of student and teacher,
m_s and m_t their maxima, u = z - m_s, v = y - m_t.  Arithmetic is float32.  Exponentials are taken in base 2, as the
hardware computes them; `exp2_scale` is log2(e) / T.

Values that travel together are one NamedTuple.  A kernel must never put a constexpr into one: it would become a run-time
value.  With the kind of a map in a NamedTuple, the loop of the statistics takes three times the instructions.  So
constexprs stay parameters, in upper case.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...rows import CE, DIVERGENCE, NEGLIGIBLE, ROW

LOG2_E = tl.constexpr(1.4426950408889634)
# The integers in a cache line of 128 bytes.  Each counter has a line of its own: programs that wait for one row poll its
# line, and all programs of a single pass add to the counter of tickets (docs/performance.md).
LINE = tl.constexpr(32)
# `fused_kd.rows` defines these: the rows of the weights, `[3, N]`, and the size below which a weight adds nothing.
OF_ROW, OF_CE, OF_DIVERGENCE = (tl.constexpr(index) for index in (ROW, CE, DIVERGENCE))
NOTHING = tl.constexpr(NEGLIGIBLE)

# The constexpr DIVERGENCE.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
MIXED_KL = tl.constexpr(2)
OF_RATIO = tl.constexpr(3)  # a sum over columns of a function of both probabilities, which takes a sweep of its own


class Stream(NamedTuple):
    """One row of one model: the head's outputs in memory, and the map from them to logits; see `logits_of`."""

    row: tl.tensor  # pointer to the first column
    stride: tl.tensor  # from column to column
    factor: tl.tensor
    cap: tl.tensor


class Output(NamedTuple):
    """One row of memory that is written."""

    row: tl.tensor  # pointer to the first column
    stride: tl.tensor  # from column to column


class Numbers(NamedTuple):
    """The numbers of one row in memory: its label, its weights and its statistics."""

    label: tl.tensor  # pointer to the label
    weights: tl.tensor  # pointer to the first of three weights, float64; `fused_kd.rows` has their order
    weights_stride: tl.tensor  # from weight to weight
    statistics: tl.tensor  # pointer to the first of nine numbers, float32; `fused_kd.statistics` has their order
    statistics_stride: tl.tensor  # from number to number


class Weights(NamedTuple):
    """The weights of one row in the loss, or in its gradient.  A row counts if one of them is not 0."""

    ce: tl.tensor
    divergence: tl.tensor


class Statistics(NamedTuple):
    """The numbers of `fused_kd.statistics` but the label's, of one row, or of the part that a thread or a program has.

    A number that the divergence does not need, or h if no entropy is asked for, is not used and may be any other.
    """

    m_s: tl.tensor
    d_1: tl.tensor
    d_T: tl.tensor  # noqa: N815
    m_t: tl.tensor
    e: tl.tensor
    c: tl.tensor
    second: tl.tensor
    h: tl.tensor


class Coefficients(NamedTuple):
    """The numbers of one row that its gradients need; `fused_kd.divergences` defines them, in this order.

    Mixed KL alone uses `reverse`, and divergences of two sweeps alone the last two.
    """

    m_s: tl.tensor
    m_t: tl.tensor
    A: tl.tensor  # coefficient of e^u
    B: tl.tensor  # coefficient of e^{u/T}
    C: tl.tensor  # coefficient of e^{v/T}
    W: tl.tensor  # subtracted at the label
    R: tl.tensor  # mean log-ratio
    S: tl.tensor  # mean log-ratio under the student's distribution
    reverse: tl.tensor  # the share r of reverse KL
    of_q: tl.tensor  # d_T / e
    log: tl.tensor  # log(e / d_T)


class Scalars(NamedTuple):
    """The numbers of the objective that all rows share."""

    exp2_scale: tl.tensor  # log2(e) / T
    inverse_T: tl.tensor  # noqa: N815  # 1 / T
    parameter: tl.tensor  # of the divergence; 0 if it has none


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_inner):
    """Return the elements from the start of an [outer, inner, V] tensor to a row, in 64 bits, since N * V may pass 2^31."""
    outer = (row // rows_inner).to(tl.int64)
    inner = (row % rows_inner).to(tl.int64)
    return outer * stride_outer + inner * stride_inner


INTERPRETED = tl.constexpr(not isinstance(row_offset, triton.JITFunction))  # whether Triton's interpreter runs kernels


@triton.jit
def tile_columns(LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Return the column numbers of a tile in the shape in which it is loaded and stored; `by_lane` regroups it by thread.

    WIDE = 1: [LANES, K].  Each thread loads K neighbouring columns as 16 bytes.
    WIDE > 1: [WIDE * LANES, K / WIDE].  Each thread has WIDE loads of 16 bytes.
    WIDE = 0: [K * LANES], for rows that start at any address.  Neighbouring threads load neighbouring columns, so that
    narrow loads coalesce.  The hint keeps Triton from giving a thread neighbouring columns if only one tensor is aligned.

    Lanes and loads share a dimension.  As separate dimensions, [K, LANES] or [WIDE, LANES, K / WIDE], Triton before 3.7
    would order them differently: the columns of one lane would lie in several threads, and every sum over them would need
    shuffles.  Only WIDE = 1 works for a cluster, since Triton distributes the first dimension over its blocks.
    """
    if WIDE:
        return tl.arange(0, WIDE * LANES)[:, None] * (K // WIDE) + tl.arange(0, K // WIDE)[None, :]
    else:
        return tl.max_contiguous(tl.arange(0, K * LANES), [1])


@triton.jit
def by_lane(tile, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Return a loaded tile as [LANES, K], [WIDE, LANES, K / WIDE] or [K, LANES], so that sums per lane need no shuffle."""
    if WIDE > 1:
        return tl.reshape(tile, [WIDE, LANES, K // WIDE])
    elif WIDE:
        return tile
    else:
        return tl.reshape(tile, [K, LANES])


@triton.jit
def sum_of_lane(tile, WIDE: tl.constexpr):  # [LANES]
    """Return the sum of the K columns of each thread."""
    return tl.sum(tl.sum(tile, 0), 1) if WIDE > 1 else tl.sum(tile, 1 if WIDE else 0)


@triton.jit
def max_of_lane(tile, WIDE: tl.constexpr):  # [LANES]
    """Return the maximum of the K columns of each thread."""
    return tl.max(tl.max(tile, 0), 1) if WIDE > 1 else tl.max(tile, 1 if WIDE else 0)


@triton.jit
def for_every_column(lane_values, WIDE: tl.constexpr):  # [LANES]
    """Return one value per lane in a shape that broadcasts to a tile of `by_lane`."""
    if WIDE > 1:
        return lane_values[None, :, None]
    elif WIDE:
        return lane_values[:, None]
    else:
        return lane_values[None, :]


@triton.jit
def tanh(x):
    """Return tanh to 1.5 units in the last place, with operations that every target and the interpreter have.

    Near 0 it is an odd polynomial, the minimax fit of degree 11 on [0, 0.625] (relative error 4e-9).  The formula
    1 - 2 / (e^{2x} + 1) would cancel there and lose the digits of small logits.
    """
    size = tl.abs(x)
    square = x * x
    polynomial = -0.005717044511 * square + 0.020650586784
    polynomial = polynomial * square - 0.053743497916
    polynomial = polynomial * square + 0.133314912849
    polynomial = polynomial * square - 0.333332839252
    near = tl.fma(x * square, polynomial, x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2_E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


# The kinds of map from a head's output x to the logits z, as a constexpr; a Stream holds `factor` and `cap`.
IDENTITY = tl.constexpr(0)
SCALED = tl.constexpr(1)  # z = factor x
CAPPED = tl.constexpr(2)  # z = cap tanh(factor x)


@triton.jit
def logits_of(x, stream, MAP: tl.constexpr):
    """Return the logits of the head's output x."""
    if MAP == CAPPED:
        return stream.cap * tanh(stream.factor * x)
    elif MAP == SCALED:
        return stream.factor * x
    else:
        return x


@triton.jit
def slope_at(z, stream, MAP: tl.constexpr):
    """Return dz/dx, computed from z: for z = cap tanh(factor x) it is factor cap (1 - (z / cap)^2)."""
    if MAP == CAPPED:
        t = z * (1.0 / stream.cap)
        return stream.factor * stream.cap * (1.0 - t * t)
    else:
        return stream.factor


@triton.jit
def in_float32(x, BY_BITS: tl.constexpr):
    """Return x in float32.  With BY_BITS a bfloat16 is moved to the upper half of a float32, which is exact.

    With BY_BITS sm_100 subtracts maxima two at a time, which saves instructions in the statistics of
    `single_pass.shared_kernel`.  The gradient does not use it, since there sm_100 fuses the conversion into the subtraction
    of the maximum.  Statistics with one load per thread do not use it either: at T = 3 and 4 sm_100 would take more
    registers, and fewer threads would be resident.  `python -m benchmarks.static_profile` has the counts.
    """
    if BY_BITS and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_logits(stream, column, high, MAP: tl.constexpr, MASKED: tl.constexpr, BY_BITS: tl.constexpr):
    """Return the logits of the columns in float32.  Columns from `high` on are minus infinity: they add nothing to sums."""
    pointers = stream.row + column.to(tl.int64) * stream.stride
    if MASKED:
        inside = column < high
        x = in_float32(tl.load(pointers, mask=inside, other=0.0), BY_BITS)
        return tl.where(inside, logits_of(x, stream, MAP), float("-inf"))
    else:
        return logits_of(in_float32(tl.load(pointers), BY_BITS), stream, MAP)


@triton.jit
def load_pair(
    student, teacher,  # Streams
    column, high,
    NEED_KL: tl.constexpr, STUDENT_MAP: tl.constexpr, TEACHER_MAP: tl.constexpr, MASKED: tl.constexpr,
    BY_BITS: tl.constexpr,  # see `in_float32`
):  # fmt: skip
    """Return (z, y) of the columns.  Without a divergence the teacher is not read, and y is z."""
    z = load_logits(student, column, high, STUDENT_MAP, MASKED, BY_BITS)
    y = z
    if NEED_KL:
        y = load_logits(teacher, column, high, TEACHER_MAP, MASKED, BY_BITS)
    return z, y


@triton.jit
def store_tile(output, column, high, values, MASKED: tl.constexpr):
    """Write values to the columns below `high`, in the dtype of the output."""
    pointers = output.row + column.to(tl.int64) * output.stride
    values = values.to(output.row.dtype.element_ty)
    if MASKED:
        tl.store(pointers, values, mask=column < high)
    else:
        tl.store(pointers, values)


@triton.jit
def store_zeros(output, low, high, LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """Write zeros to columns low to high of one row."""
    column = tile_columns(LANES, K, WIDE)
    zeros = tl.zeros(column.shape, output.row.dtype.element_ty)
    for start in range(low, high, LANES * K):
        pointers = output.row + (start + column).to(tl.int64) * output.stride
        tl.store(pointers, zeros, mask=start + column < high)


@triton.jit
def load_weights(numbers):
    """Return the Weights of a row, float64."""
    stride = numbers.weights_stride
    return Weights(tl.load(numbers.weights + OF_CE * stride), tl.load(numbers.weights + OF_DIVERGENCE * stride))


@triton.jit
def load_statistics(pointer, stride, DIVERGENCE: tl.constexpr):
    """Return the numbers that the gradient needs, `stride` elements apart.

    Loads bypass L1, since other programs may have stored them.
    """
    m_s = tl.load(pointer, cache_modifier=".cg")
    d_1 = tl.load(pointer + 1 * stride, cache_modifier=".cg")
    d_T = tl.load(pointer + 2 * stride, cache_modifier=".cg")
    m_t = tl.load(pointer + 3 * stride, cache_modifier=".cg")
    e = tl.load(pointer + 4 * stride, cache_modifier=".cg")
    c = tl.load(pointer + 5 * stride, cache_modifier=".cg")
    second = c
    if DIVERGENCE == MIXED_KL or DIVERGENCE == OF_RATIO:  # noqa: SIM109
        second = tl.load(pointer + 7 * stride, cache_modifier=".cg")
    return Statistics(m_s, d_1, d_T, m_t, e, c, second, c)


@triton.jit
def store_statistics(pointer, stride, s, DIVERGENCE: tl.constexpr, NEED_ENTROPY: tl.constexpr):
    """Store the numbers that a sweep gives, `stride` elements apart.

    It gives neither c nor `second` of OF_RATIO.  `second` of reverse KL is of whole rows alone.
    """
    tl.store(pointer, s.m_s)
    tl.store(pointer + 1 * stride, s.d_1)
    tl.store(pointer + 2 * stride, s.d_T)
    tl.store(pointer + 3 * stride, s.m_t)
    tl.store(pointer + 4 * stride, s.e)
    if DIVERGENCE != OF_RATIO:
        tl.store(pointer + 5 * stride, s.c)
    if DIVERGENCE == MIXED_KL:
        tl.store(pointer + 7 * stride, s.second)
    if NEED_ENTROPY:
        tl.store(pointer + 8 * stride, s.h)
