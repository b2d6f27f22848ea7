"""The product of a finished gradient and scalars on the device, rounded once: in place, or into a tensor of another dtype.

The host does not wait for the factors, so every step launches the kernel.  The scalars are the upstream gradient and, for
float16 gradients, their unit.  If the gradient is scaled in place and the product of the scalars is 1, as it is if
`backward` starts from the loss itself, the kernel ends after its first loads.  Otherwise it reads the tensor once and
writes the target once.

A program takes one tile after another, each a part of a row.  Contiguous tensors are one long row.  Only the tiles at the
ends of rows have masks, so that the others load and store 16 bytes at a time whatever the length of a row.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...launch import NUM_WARPS
from .gradient import roundable
from .tiles import Output, row_offset, store_tile

LANES, COLUMNS = 128, 8
MOST_PROGRAMS = 4096  # enough to fill the largest device, and few enough to end at once if the factor is 1


@triton.jit(do_not_specialize=["rows_inner", "scaled_rows_inner", "N", "V"])
def scale_kernel(
    source_ptr,  # [outer, inner, V]
    scaled_ptr,  # [outer', inner', V], as many rows; may be the source
    factor_ptr, second_factor_ptr,  # scalars; the second is read if TWO
    rows_inner, stride_outer, stride_inner, stride_column,
    scaled_rows_inner, scaled_stride_outer, scaled_stride_inner, scaled_stride_column,
    N,
    V: tl.int64,  # contiguous tensors are one row, which may be long
    TWO: tl.constexpr, IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float64)
    if TWO:
        factor *= tl.load(second_factor_ptr).to(tl.float64)
    tiles_per_row = tl.cdiv(V, TILE)
    tiles = N * tiles_per_row
    if IN_PLACE:
        tiles = tl.where(factor == 1, 0, tiles)
    factor = factor.to(tl.float32)
    column = tl.arange(0, TILE)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // tiles_per_row
        start = tile % tiles_per_row * TILE
        source = source_ptr + row_offset(row, rows_inner, stride_outer, stride_inner)
        scaled_row = scaled_ptr + row_offset(row, scaled_rows_inner, scaled_stride_outer, scaled_stride_inner)
        output = Output(scaled_row, scaled_stride_column)
        columns = start + column
        if start + TILE <= V:
            value = tl.load(source + columns * stride_column).to(tl.float32)
            store_tile(output, columns, V, value * factor, False)
        else:
            value = tl.load(source + columns * stride_column, mask=columns < V, other=0.0).to(tl.float32)
            store_tile(output, columns, V, value * factor, True)


def scale_(
    source: torch.Tensor,  # at most 3 dimensions, any strides; float32 or 16 bits
    factors: Sequence[torch.Tensor],  # one or two scalars on the device, of any floating dtype
    target: torch.Tensor,  # written; the source, or a tensor of its shape, of any of these dtypes
) -> None:
    """Write source times the product of the factors to the target.  In place nothing happens if the product is 1."""
    if source.numel() == 0:
        return
    first, second = factors[0], factors[-1]
    scaled = roundable(target)
    if scaled is not target and target is source:
        scaled.copy_(source)
    rows, scaled_rows = (source, scaled)
    if source.is_contiguous() and scaled.is_contiguous():
        rows, scaled_rows = source.view(-1), scaled.view(-1)
    rows, scaled_rows = _as_rows(rows), _as_rows(scaled_rows)
    outer, inner, V = rows.shape
    N = outer * inner
    tile = LANES * COLUMNS
    scale_kernel[(min(N * triton.cdiv(V, tile), MOST_PROGRAMS),)](
        source, scaled, first, second, inner, *_strides(rows), inner, *_strides(scaled_rows), N, V,
        TWO=len(factors) > 1, IN_PLACE=target is source, TILE=tile, num_warps=NUM_WARPS,
    )  # fmt: skip
    if scaled is not target:
        target.copy_(scaled)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of one to three dimensions as `[outer, inner, V]`."""
    return tensor[(None,) * (3 - tensor.dim())]


def _strides(rows: torch.Tensor) -> list[int]:
    """Return the strides; 0 for a dimension of one element, whose stride says nothing."""
    return [0 if size == 1 else stride for size, stride in zip(rows.shape[:2], rows.stride(), strict=False)] + [
        rows.stride(2)
    ]
