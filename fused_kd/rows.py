"""The weights of the rows: three numbers per row hold labels, alpha, T^2, token weights and the divisor of the mean."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# The rows of a tensor of weights, `[3, N]`, float64.  The loss of each row is w_ce CE + w_divergence D, where
# w_ce = w_row (1 - alpha) and w_divergence = w_row alpha T^2.  A row that does not count has weights of 0.
ROW, CE, DIVERGENCE = range(3)

# The stand-in for a token weight of 0 that requires grad.  Its row is read, for the gradient of the weight, and adds
# nothing to the loss.
LEARNED_ZERO = 1e-280
NEGLIGIBLE = 1e-240  # larger than LEARNED_ZERO times any alpha T^2, and smaller than any positive float32

# The largest gradient of a logit in float16, in units.  Its sum over a vocabulary against weights up to 127 still fits.
LARGEST_GRADIENT = 2**8


class RowOptions(NamedTuple):
    """The options that the weights of the rows depend on."""

    rows: int  # N
    sequence: int  # L: each row takes the label, weight and alpha of the next row of its sequence of L rows; 0: its own
    vocabulary: int
    ignore_index: int
    mean: bool  # divide by num_items, or by the sum of the row weights
    alpha: float  # used if there is no tensor of alphas
    num_items: float | None  # used if there is no tensor with the number
    temperature: float


def row_weights(
    labels: Tensor | None,  # [N], int32 or int64
    token_weights: Tensor | None,  # [N]
    alpha: Tensor | None,  # [N], or a scalar
    num_items: Tensor | None,  # one element
    like: Tensor,  # a tensor on the device
    options: RowOptions,
) -> tuple[Tensor, Tensor | None]:  # [3, N], float64; the label of each row, [N], moved if there are sequences
    """Return the weights of the rows, differentiable in token weights, alpha and num_items.

    A wrong label, alpha or num_items whose check would synchronise with the host makes the weights of its rows NaN.
    """
    N, L, vocabulary, ignore_index, mean, alpha_number, number, temperature = options
    if L and labels is not None:
        labels = moved(labels, L, ignore_index)
        token_weights = None if token_weights is None else moved(token_weights, L, 0)
        alpha = moved(alpha, L, 0) if alpha is not None and alpha.dim() else alpha
    if token_weights is None and alpha is None and num_items is None and readable(like if labels is None else labels):
        return _plain_weights(labels, like, options), labels
    row = (
        token_weights.double() if token_weights is not None else torch.ones(N, dtype=torch.float64, device=like.device)
    )
    if labels is not None:
        ignored = labels == ignore_index
        row = torch.where(ignored, 0.0, row)
    given, divisor = row, None
    if mean:
        divisor = row.sum() if number is None else number
        if num_items is not None:
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
    share: float | Tensor = alpha_number
    if alpha is not None:
        share = torch.where((alpha >= 0) & (alpha <= 1), alpha.double(), torch.nan)
    return torch.stack([row, _product(row, 1 - share), _product(row, share * temperature**2)]), labels


def _plain_weights(
    labels: Tensor | None,  # [N]; their values have been checked
    like: Tensor,
    options: RowOptions,
) -> Tensor:  # [3, N]; expanded if all rows count
    """Return the weights if they follow from labels and numbers.  At few rows calls of PyTorch are what takes time."""
    counted = None if labels is None else labels != options.ignore_index
    count = options.rows if counted is None else int(counted.count_nonzero())
    divisor = 1.0
    if options.mean:
        divisor = max(1, count) if options.num_items is None else options.num_items
    factors = 1.0, 1 - options.alpha, options.alpha * options.temperature**2
    one_row = torch.tensor([1 / divisor * factor for factor in factors], dtype=torch.float64, device=like.device)
    if counted is None or count == options.rows:
        return one_row[:, None].expand(len(factors), options.rows)
    return one_row[:, None] * counted


def moved(
    per_token: Tensor,  # [N], N tokens of sequences of L
    L: int,
    last: float,
) -> Tensor:  # [N]
    """Return the value of the next token of the sequence at each position, and `last` at the last position."""
    tokens = per_token.view(-1, L)
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=last).view(-1)


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


def weighted_values(weight: Tensor, values: Tensor) -> Tensor:  # float64, of one shape
    """Return weight * values; 0 where the weight is negligible, even if the value is infinite or NaN."""
    return torch.where(weight.abs() < NEGLIGIBLE, 0.0, weight * values)


def are_read(weights: Tensor) -> Tensor:  # of [3, N]; [N], bool
    """Return which rows are read: those in which a term has a weight."""
    return torch.logical_or(weights[CE], weights[DIVERGENCE])


def add_something(weights: Tensor) -> Tensor:  # of [3, N]; [N], bool
    """Return which rows add something to loss and gradients: those that are read, without those of a learned weight 0."""
    return weights[CE:].abs().sum(0) > NEGLIGIBLE


def gathered_rows(
    weights: Tensor,  # [3, N]
    bound: int,  # below N, at least the number of rows that count
) -> tuple[Tensor, Tensor, Tensor]:  # [K]; [3, K]; a scalar, bool
    """Return the indices of the rows that count, in order, and of others up to the bound; their weights; if they are more.

    If more rows count, the weights are NaN.  There is at least one row, to be NaN then.
    """
    not_counted = (weights[ROW] == 0).to(torch.uint8)
    rows = torch.argsort(not_counted, stable=True)[: max(1, bound)]
    too_many = not_counted.sum() < not_counted.shape[0] - bound
    return rows, weights.index_select(1, rows).masked_fill(too_many, torch.nan), too_many


def readable(tensor: Tensor) -> bool:
    """Return whether values may be looked at: on the CPU in eager mode, where no device has to be waited for."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


def as_rows(tensor: Tensor) -> Tensor:
    """Return `[..., V]` as `[outer, inner, V]`; a view if two strides locate every row, as for `logits[:, :-1]`."""
    if tensor.dim() == 2:
        return tensor[None]
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
