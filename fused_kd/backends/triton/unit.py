"""The unit of float16 gradients that are taken before the upstream gradient is known, and the weights of the rows in it.

The largest gradient that a logit of a row can have is ce_slope w_ce + divergence_slope w_d.  The unit is a power of two in
which the largest of all rows is from 2^8 to 2^9; `heads/sweep.py` says why.  A row whose bound is not finite does not
count.  Division by a power of two is exact.

Each program takes the maximum of all rows by itself, and then writes the weights of its own rows.
"""

import torch
import triton
import triton.language as tl

from ...rows import LARGEST_GRADIENT
from .doubles import bits_of, double_of
from .tiles import NOTHING, OF_CE, OF_DIVERGENCE

NUM_WARPS = 16
BLOCK = 1024  # rows per iteration
MOST_PROGRAMS = 16
LARGEST = tl.constexpr(LARGEST_GRADIENT)


@triton.jit
def upstream_of(upstream_ptr, stride, row, inside, HAS_UPSTREAM: tl.constexpr):
    """Return the upstream gradient of the rows."""
    if HAS_UPSTREAM:
        return tl.load(upstream_ptr + row * stride, mask=inside, other=0.0).to(tl.float64)
    else:
        return 1.0


@triton.jit(do_not_specialize=["stride", "upstream_stride", "N", "ce_slope_bits", "divergence_slope_bits"])
def unit_weights_kernel(
    weights_ptr,  # [3, N], float64; neighbouring rows lie side by side
    upstream_ptr,  # a scalar, or [N]; read if HAS_UPSTREAM
    scaled_ptr,  # [3, N], float64
    unit_ptr,  # a scalar, float64
    stride,  # from one weight of a row to the next
    upstream_stride,  # from row to row; 0 for a scalar
    N,
    ce_slope_bits: tl.int64, divergence_slope_bits: tl.int64,
    HAS_UPSTREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.max_contiguous(tl.arange(0, BLOCK), [1])
    ce_slope = double_of(ce_slope_bits)
    divergence_slope = double_of(divergence_slope_bits)
    of_weight = stride.to(tl.int64)
    of_scaled = N.to(tl.int64)
    bounds = tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, BLOCK):
        row = start + block
        inside = row < N
        factor = upstream_of(upstream_ptr, upstream_stride, row, inside, HAS_UPSTREAM)
        w_ce = tl.load(weights_ptr + OF_CE * of_weight + row, mask=inside, other=0.0) * factor
        w_d = tl.load(weights_ptr + OF_DIVERGENCE * of_weight + row, mask=inside, other=0.0) * factor
        bound = ce_slope * tl.abs(w_ce) + divergence_slope * tl.abs(w_d)
        bound = tl.where(bound < float("inf"), bound, 0.0)  # NaN is not less either
        bounds = tl.maximum(bounds, bound)
    largest = tl.max(bounds)
    # The largest power of two that is at most the number: its exponent without its mantissa.
    power = (largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    unit = tl.where(largest > NOTHING, power / LARGEST, 1.0)
    if tl.program_id(0) == 0:
        tl.store(unit_ptr, unit)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        row = start + block
        inside = row < N
        factor = upstream_of(upstream_ptr, upstream_stride, row, inside, HAS_UPSTREAM)
        for index in tl.static_range(3):
            weight = tl.load(weights_ptr + index * of_weight + row, mask=inside, other=0.0)
            tl.store(scaled_ptr + index * of_scaled + row, weight * factor / unit, mask=inside)


def unit_weights(
    weights: torch.Tensor,  # [3, N], float64; unit column stride
    upstream: torch.Tensor | None,  # a scalar, or [N] of any stride; float32 or float64; None: 1
    ce_slope: float,
    divergence_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [3, N] and a scalar, float64
    """Return the weights times the upstream gradient in the unit of the gradients, and the unit."""
    N = weights.shape[1]
    scaled, unit = weights.new_empty(3, N), weights.new_empty(())
    unit_weights_kernel[(max(1, min(triton.cdiv(N, BLOCK), MOST_PROGRAMS)),)](
        weights, weights if upstream is None else upstream, scaled, unit,
        weights.stride(0), upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        N, bits_of(ce_slope), bits_of(divergence_slope),
        HAS_UPSTREAM=upstream is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return scaled, unit
