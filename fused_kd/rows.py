"""The weights of the rows: two numbers per row hold labels, alpha, T^2, token weights and the divisor of the mean."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# The stand-in for a token weight of 0 that requires grad.  Its row is read, for the gradient of the weight, and adds
# nothing to the loss.
LEARNED_ZERO = 1e-280
NEGLIGIBLE = 1e-240  # larger than LEARNED_ZERO times any alpha T^2, and smaller than any positive float32


class RowWeights(NamedTuple):
    """The weights of the rows, `[N]`, float64: the loss of each row is ce CE + divergence D.

    ce = row (1 - alpha), divergence = row alpha T^2.
    """

    row: Tensor
    ce: Tensor
    divergence: Tensor

    def reduce(self, values: Tensor, reduction: str, shape: torch.Size) -> Tensor:
        """Return the detached sum of the weighted values; for reduction "none" the values, in the given shape."""
        weighted = weighted_values(self.row.detach(), values.detach())
        return weighted.reshape(shape) if reduction == "none" else weighted.sum()


def weighted_values(weight: Tensor, values: Tensor) -> Tensor:  # [N] each, float64
    """Return weight * values; 0 where the weight is 0, even if the value is infinite or NaN."""
    # The number is NEGLIGIBLE.  A global float would become an input of the compiled graph, and PyTorch 2.13 loses that
    # input between two autograd functions.
    return torch.where(weight.abs() < 1e-240, 0.0, weight * values)


def row_weights(
    labels: Tensor | None,  # [N]
    token_weights: Tensor | None,  # [N]
    alpha: float | Tensor,  # [N], or a scalar
    *,
    rows: int,
    device: torch.device,
    temperature: float,
    vocabulary: int,
    ignore_index: int,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> RowWeights:
    """Return the weights of the rows.

    A wrong label, alpha or num_items whose check would synchronise with the host makes the weights of its rows NaN.
    """
    row = token_weights.double() if token_weights is not None else torch.ones(rows, dtype=torch.float64, device=device)
    if labels is not None:
        ignored = labels == ignore_index
        row = torch.where(ignored, 0.0, row)
    given, divisor = row, None
    if reduction == "mean":
        divisor = row.sum() if num_items is None else num_items
        if isinstance(num_items, Tensor):
            divisor = num_items.reshape(()).double()
            divisor = torch.where((divisor >= 0) & (divisor < math.inf), divisor, torch.nan)
        if isinstance(divisor, Tensor):  # a divisor of 0 is right only if no row counts; loss and gradients are 0 then
            row = torch.where((divisor == 0) & (row != 0), torch.nan, row)
            divisor = torch.where(divisor == 0, math.inf, divisor)
        row = row / divisor
    if token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled():
        learned_zero = given == 0 if labels is None else (given == 0) & ~ignored
        row = torch.where(learned_zero, _learned_zeros(given, divisor), row)
    if labels is not None:
        names_a_class = (labels >= 0) & (labels < vocabulary)
        row = torch.where(names_a_class | ignored, row, torch.nan)
    if isinstance(alpha, Tensor):
        alpha = torch.where((alpha >= 0) & (alpha <= 1), alpha.double(), torch.nan)
    return RowWeights(row, _product(row, 1 - alpha), _product(row, alpha * temperature**2))


def _learned_zeros(
    row: Tensor,  # [N]; used only where it is 0
    divisor: float | Tensor | None,
) -> Tensor:
    """Return LEARNED_ZERO for each row, with the gradient that a weight of 0 has.

    The divisor is detached: the loss of the row may be infinite, and 0 times infinity would make its gradient NaN.
    """
    if divisor is None:
        return row + LEARNED_ZERO
    return row / (divisor.detach() if isinstance(divisor, Tensor) else divisor) + LEARNED_ZERO


def _product(row: Tensor, factor: float | Tensor) -> Tensor:
    """Return row * factor.  Where the factor is 0 `row` gets no gradient, since the value of that term may be infinite."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, row.detach(), row) * factor
    return (row if factor else row.detach()) * factor


def counted_rows(weights: RowWeights) -> Tensor | None:
    """Return the indices of the rows that count; None if all do, or if values may not be looked at.

    On a GPU the host would have to wait for the number of these rows.  So there the products are launched for all rows.
    """
    counted = weights.row != 0
    if not readable(counted) or bool(counted.all()):
        return None
    return counted.nonzero().flatten()


def readable(tensor: Tensor) -> bool:
    """Return whether values may be looked at: on the CPU in eager mode, where no device has to be waited for."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


def as_rows(tensor: Tensor) -> Tensor:
    """Return `[..., V]` as `[outer, inner, V]`; a view if two strides locate every row, as for `logits[:, :-1]`."""
    *leading, V = tensor.shape
    strides = tensor.stride()[:-1]

    def collapses(first: int, last: int) -> bool:
        dims = [
            (size, stride) for size, stride in zip(leading[first:last], strides[first:last], strict=True) if size != 1
        ]
        return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))

    for split in range(len(leading) + 1):
        if collapses(0, split) and collapses(split, len(leading)):
            return tensor.view(math.prod(leading[:split]), math.prod(leading[split:]), V)
    return tensor.reshape(1, math.prod(leading), V)
