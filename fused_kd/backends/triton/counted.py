"""The hidden states of the rows that count, and zeros for the others, which may hold anything and are not read.

In the product that makes the gradient of a head's weight, the logit gradient of a row that does not count is 0, and 0
times NaN would be NaN.  The copy also casts to the dtype of the products.  It reads each hidden state once and writes it
once.
"""

import torch
import triton
import triton.language as tl

from ...launch import NUM_WARPS
from .gradient import roundable
from .tiles import NOTHING, OF_CE, OF_DIVERGENCE, Output, store_tile

LANES, COLUMNS = 128, 8


@triton.jit(do_not_specialize=["weights_stride"])
def copy_counted_kernel(
    hidden_ptr,  # [N, H]
    weights_ptr,  # [3, N], float64; neighbouring rows lie side by side
    target_ptr,  # [N, H]
    weights_stride,  # from one weight of a row to the next
    stride, stride_column, target_stride, target_stride_column,
    H,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    weights = weights_ptr + row
    w_ce = tl.load(weights + OF_CE * weights_stride.to(tl.int64))
    w_d = tl.load(weights + OF_DIVERGENCE * weights_stride.to(tl.int64))
    high = tl.where(tl.abs(w_ce) + tl.abs(w_d) > NOTHING, H, 0)  # of the columns that are read
    hidden = hidden_ptr + row.to(tl.int64) * stride
    output = Output(target_ptr + row.to(tl.int64) * target_stride, target_stride_column)
    column = tl.arange(0, TILE)
    for start in range(0, H, TILE):
        columns = start + column
        pointers = hidden + columns.to(tl.int64) * stride_column
        store_tile(output, columns, H, tl.load(pointers, mask=columns < high, other=0.0), True)


def copy_counted(
    hidden: torch.Tensor,  # [N, H], any strides and floating dtype
    weights: torch.Tensor,  # [3, N], float64; unit column stride
    target: torch.Tensor,  # [N, H], written; any strides and floating dtype
) -> None:
    """Write the hidden states of the rows that count to the target, and zeros for the others."""
    N, H = hidden.shape
    if hidden.numel() == 0:
        return
    written = roundable(target)
    copy_counted_kernel[(N,)](
        hidden, weights, written, weights.stride(0), *hidden.stride(), *written.stride(), H,
        TILE=LANES * COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    if written is not target:
        target.copy_(written)
