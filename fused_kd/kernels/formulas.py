"""What the kernels share: addresses of a row and of a tile, and exponentials at two temperatures.

Letters: N rows, V vocabulary, S splits of a row, K columns a thread; z, y student and teacher logits,
m_s, m_t their maxima, u = z - m_s, v = y - m_t.  Arithmetic is float32.  Exponentials are taken in base 2, which is what
the hardware computes: `exp2_scale` is log2(e) / T.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponentials(
    u,  # differences to a maximum, <= 0, any shape
    exp2_scale,
    SQUARINGS: tl.constexpr,  # T = 2**SQUARINGS, or -1 for any other T
):
    """(e^u, e^{u/T}): one exponential where T is a small power of two, since e^u is then a repeated square."""
    at_T = tl.exp2(u * exp2_scale)
    if SQUARINGS < 0:
        at_1 = tl.exp2(u * LOG2_E)
    else:
        at_1 = at_T
        for _ in tl.static_range(SQUARINGS):
            at_1 = at_1 * at_1
    return at_1, at_T


@triton.jit
def row_offset(row, rows_inner, stride_outer, stride_inner):
    """Elements from the start of an [outer, inner, V] tensor to a row; 64-bit, since N * V passes 2^31."""
    outer = (row // rows_inner).to(tl.int64)
    inner = (row % rows_inner).to(tl.int64)
    return outer * stride_outer + inner * stride_inner


@triton.jit
def tile_columns(LANES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """[K, LANES] column numbers of a tile, K columns a thread in either layout, so that sums over K need no shuffle.

    WIDE: K neighbours a thread, loaded as 16 bytes at once.  Otherwise, where rows start anywhere, neighbouring threads
    take neighbouring columns, so that the threads' narrow loads coalesce; the hint keeps Triton from regrouping them.
    """
    if WIDE:
        return tl.arange(0, LANES)[None, :] * K + tl.arange(0, K)[:, None]
    else:
        return tl.max_contiguous(tl.arange(0, LANES)[None, :] + tl.arange(0, K)[:, None] * LANES, [1, 1])


@triton.jit
def load_tile(row_ptr, column, stride_column, high, MASKED: tl.constexpr):
    """Logits of the columns in float32; columns from `high` on are minus infinity, which adds nothing to any sum."""
    pointers = row_ptr + column.to(tl.int64) * stride_column
    if MASKED:
        return tl.load(pointers, mask=column < high, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)
