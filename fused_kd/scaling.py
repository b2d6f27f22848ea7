"""The product of finished gradients and the upstream gradient, which is known only in backward."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**23  # elements of a float32 temporary: 32 MB


def is_batched(tensor: Tensor) -> bool:
    """Return whether the tensor may be a batch, under `torch.vmap` or `is_grads_batched` of `torch.autograd.grad`.

    A product with a batched tensor does not fit into the memory of a single one.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def scaled(
    gradients: Sequence[Tensor],
    factor: Tensor,  # a scalar
    dtypes: Sequence[torch.dtype],
    *,
    in_place: bool,  # whether a gradient may be overwritten; it is if its dtype is the right one already
) -> list[Tensor]:
    """Return factor * gradient for each gradient, in the given dtypes: those of the tensors that they are gradients of."""
    return [_scaled(gradient, factor, dtype, in_place) for gradient, dtype in zip(gradients, dtypes, strict=True)]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Return factor * gradient, computed in blocks of rows and rounded once."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    factor = factor.to(wide)  # the product of a 16-bit tensor and a scalar would round the scalar first
    if torch.compiler.is_compiling() or is_batched(factor):  # a compiler fuses this into one loop
        return (gradient.to(wide) * factor).to(dtype)
    if gradient.dtype == dtype == wide:
        return gradient.mul_(factor) if in_place else gradient * factor
    result = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    _multiply(gradient, factor, result)
    return result


def _multiply(source: Tensor, factor: Tensor, target: Tensor) -> None:
    if source.dim() > 2:
        for part, result in zip(source, target, strict=True):
            _multiply(part, factor, result)
        return
    block = max(1, BLOCK_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for part, result in zip(source.split(block), target.split(block), strict=True):
        result.copy_(part.to(factor.dtype) * factor)
