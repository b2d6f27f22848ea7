"""What a row counts for: labels, alpha, T^2, token weights and the divisor of the mean, in two weights a row."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import readable

# Stands for a token weight of 0 that learns: its row is read, for the weight's gradient, and adds nothing.
LEARNED_ZERO = 1e-280
NEGLIGIBLE = 1e-240  # above the product of LEARNED_ZERO and any alpha T^2; float32 holds nothing near it


class RowWeights(NamedTuple):
    """`[N]`, float64, each: the loss of a row is ce CE + kl KL, with ce = row (1 - alpha) and kl = row alpha T^2."""

    row: Tensor
    ce: Tensor
    kl: Tensor

    def reduce(self, values: Tensor, reduction: str, shape: torch.Size) -> Tensor:
        """For the log: the weighted values of the rows that count, as `reduction` has it; of "none", in the given shape."""
        weighted = weighted_values(self.row.detach(), values.detach())
        return weighted.reshape(shape) if reduction == "none" else weighted.sum()


def weighted_values(weight: Tensor, values: Tensor) -> Tensor:  # [N] each, float64
    """weight * values; a row of weight 0 adds nothing, whatever its value."""
    # NEGLIGIBLE: a float of the module would be an input of the compiled graph, and PyTorch 2.13 loses it between two
    # functions of autograd.
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
    """Values that could only be checked with a synchronisation make their row NaN: never a silent number."""
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
        if isinstance(divisor, Tensor):  # 0 where no row counts; a row that does would be divided by it
            row = torch.where((divisor == 0) & (row != 0), torch.nan, row)
            divisor = torch.where(divisor == 0, math.inf, divisor)  # loss and gradients are 0
        row = row / divisor
    if token_weights is not None and token_weights.requires_grad and torch.is_grad_enabled():
        learned_zero = given == 0 if labels is None else (given == 0) & ~ignored
        row = torch.where(learned_zero, _of_learned_zero(given, divisor), row)
    if labels is not None:
        names_a_class = (labels >= 0) & (labels < vocabulary)
        row = torch.where(names_a_class | ignored, row, torch.nan)
    if isinstance(alpha, Tensor):
        alpha = torch.where((alpha >= 0) & (alpha <= 1), alpha.double(), torch.nan)
    return RowWeights(row, _product(row, 1 - alpha), _product(row, alpha * temperature**2))


def _of_learned_zero(
    row: Tensor,  # [N], zeros where it matters
    divisor: float | Tensor | None,
) -> Tensor:
    """Weights of 0 as rows that are read.  Nothing of their gradient goes to the divisor: 0 times an infinite loss is 0."""
    if divisor is None:
        return row + LEARNED_ZERO
    return row / (divisor.detach() if isinstance(divisor, Tensor) else divisor) + LEARNED_ZERO


def _product(row: Tensor, factor: float | Tensor) -> Tensor:
    """row * factor; where the factor is 0 the term is not there, and neither is its gradient to `row`, were it infinite."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, row.detach(), row) * factor
    return (row if factor else row.detach()) * factor


def counted_rows(weights: RowWeights) -> Tensor | None:
    """The indices of the rows that count, where that leaves out any and the values may be looked at: on the CPU.

    On a GPU their number is the host's to know only by waiting for the device, and without it nothing is saved: a product
    has to be launched for every row that may count.
    """
    counted = weights.row != 0
    if not readable(counted) or bool(counted.all()):
        return None
    return counted.nonzero().flatten()


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., V]` as `[outer, inner, V]`: a view wherever two strides can say where a row is, as in `logits[:, :-1]`."""
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
