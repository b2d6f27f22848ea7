"""A finished gradient times the upstream gradient, in place; nothing is touched where that is 1.

The factor is on the device and the host does not wait for it, so every step launches the kernel, and one whose loss is what
`backward` starts from ends it at its first load.  Otherwise 2 passes over the tensor.
"""

import torch
import triton
import triton.language as tl

from .gradient import roundable
from .launch import NUM_WARPS
from .tiles import row_offset

LANES, COLUMNS = 128, 8
MOST_PROGRAMS = 4096  # enough to fill the largest device, few enough to be gone at once


@triton.jit(do_not_specialize=["rows_inner", "N"])
def scale_kernel(
    tensor_ptr, scaled_ptr,  # [outer, inner, V], one place but under the interpreter
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
            target = scaled_ptr + row_offset(row, rows_inner, scaled_stride_outer, scaled_stride_inner)
            for start in range(0, V, TILE):
                columns = (start + column).to(tl.int64)
                value = tl.load(source + columns * stride_column, mask=columns < V)
                value = value.to(tl.float32) * factor
                tl.store(
                    target + columns * scaled_stride_column, value.to(scaled_ptr.dtype.element_ty), mask=columns < V
                )


def scale_(
    tensor: torch.Tensor,  # [outer, inner, V], any strides; float32 or 16 bits
    factor: torch.Tensor,  # a scalar, of any floating dtype
) -> None:
    """Launches the kernel."""
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
