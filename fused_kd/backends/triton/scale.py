"""The product of a finished gradient and the upstream gradient, in place.

The factor is on the device and the host does not wait for it, so every step launches the kernel.  If `backward` starts
from the loss itself, the factor is 1 and the kernel ends after its first load.  Otherwise it reads the tensor once and
writes it once.
"""

import torch
import triton
import triton.language as tl

from ...launch import NUM_WARPS
from .gradient import roundable
from .tiles import Output, row_offset, store_tile

LANES, COLUMNS = 128, 8
MOST_PROGRAMS = 4096  # enough to fill the largest device, and few enough to end at once if the factor is 1


@triton.jit(do_not_specialize=["rows_inner", "N"])
def scale_kernel(
    tensor_ptr, scaled_ptr,  # [outer, inner, V]; the same tensor, except under the interpreter
    factor_ptr,  # a scalar
    rows_inner, stride_outer, stride_inner, stride_column,
    scaled_stride_outer, scaled_stride_inner, scaled_stride_column,
    N, V,
    TILE: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        column = tl.arange(0, TILE)
        for row in range(tl.program_id(0), N, tl.num_programs(0)):
            source = tensor_ptr + row_offset(row, rows_inner, stride_outer, stride_inner)
            scaled_row = scaled_ptr + row_offset(row, rows_inner, scaled_stride_outer, scaled_stride_inner)
            output = Output(scaled_row, scaled_stride_column)
            for start in range(0, V, TILE):
                columns = start + column
                value = tl.load(source + columns.to(tl.int64) * stride_column, mask=columns < V)
                store_tile(output, columns, V, value.to(tl.float32) * factor, True)


def scale_(
    tensor: torch.Tensor,  # [outer, inner, V], any strides; float32 or 16 bits
    factor: torch.Tensor,  # a scalar, of any floating dtype
) -> None:
    """Multiply in place."""
    outer, inner, V = tensor.shape
    N = outer * inner
    if N == 0:
        return
    scaled = roundable(tensor)
    if scaled is not tensor:
        scaled.copy_(tensor)
    scale_kernel[(min(N, MOST_PROGRAMS),)](
        tensor, scaled, factor, inner, *tensor.stride(), *scaled.stride(), N, V,
        TILE=LANES * COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    if scaled is not tensor:
        tensor.copy_(scaled)
