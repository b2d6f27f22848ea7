"""The product of finished gradients and the upstream gradient, which is known only in backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import sweep


def is_batched(tensor: Tensor) -> bool:
    """Return whether the tensor may be a batch, under `torch.vmap` or `is_grads_batched` of `torch.autograd.grad`.

    A product with a batched tensor does not fit into the memory of a single one.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def scaled(
    gradients: Sequence[Tensor],
    factors: Sequence[Tensor],  # up to two scalars
    dtypes: Sequence[torch.dtype],
    *,
    in_place: bool,  # whether a gradient may be overwritten; it is if its dtype is the right one already
) -> list[Tensor]:
    """Return each gradient times the factors, in the given dtypes: those of the tensors that they are gradients of."""
    is_traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if not factors or is_traced or any(is_batched(factor) for factor in factors):
        return [_traced_product(gradient, factors, dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
    targets = [
        gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]
    for gradient, target in zip(gradients, targets, strict=True):
        sweep.scale(gradient, factors, target)
    return targets


def _traced_product(gradient: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the product by operations that autograd records, that a compiler fuses and that `torch.vmap` maps."""
    for factor in factors:
        wide = torch.promote_types(gradient.dtype, torch.float32)  # a 16-bit tensor would round the factor first
        gradient = gradient.to(wide) * factor.to(wide)
    return gradient.to(dtype)
