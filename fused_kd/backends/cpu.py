"""The operators of `operators.py` for CPU tensors, in PyTorch.  `cpu_sweep.py` has the sweeps over logits."""

import math

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import Objective, values
from ..rows import CE, LARGEST_GRADIENT, NEGLIGIBLE, ROW, add_something, weighted_values
from .cpu_sweep import Sweep, with_one_outer_index

SCALED_ELEMENTS = 2**23  # elements that are scaled in float32 at a time: 32 MB


def row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    weights: Tensor,  # [3, N], float64; a row whose CE and divergence weights are 0 is not read
    statistics: Tensor,  # [9, N], written
    counters: object,  # not used, as in `statistics_and_gradient`
    objective: Objective,
    entropy: bool = False,
) -> None:
    """Write the statistics of each row; those of the student's entropy only if they are asked for."""
    Sweep(student, teacher, labels, weights.shape[1], statistics.dtype, objective, entropy).run(weights, statistics)


def statistics_and_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    weights: Tensor,  # [3, N], float64; a row whose CE and divergence weights are 0 is not read
    statistics: Tensor,  # [9, N], written
    gradient: Tensor,  # [outer, inner, V], written, of any dtype; may be the student
    counters: object,  # not used: memory with which the programs of a kernel wait for one another
    launch: object,  # not used: the launch of the kernel that does the same on a GPU
    objective: Objective,
    entropy: bool = False,
) -> None:
    """Write the statistics of each row and the gradient of the student's logits."""
    sweep = Sweep(student, teacher, labels, weights.shape[1], statistics.dtype, objective, entropy)
    sweep.run(weights, statistics, with_one_outer_index(gradient))


def logit_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence in the loss
    labels: Tensor | None,  # [N]; None: no CE in the loss
    statistics: Tensor,  # [9, N]
    weights: Tensor,  # [3, N], float64; a row whose weights are 0, times the upstream gradient, is not read
    upstream: Tensor | None,  # [N], or a scalar; None: 1
    gradient: Tensor,  # [outer, inner, V], written, of any dtype; may be the student
    teacher_gradient: Tensor | None,  # [outer', inner', V], written; may be the teacher
    objective: Objective,
    *,
    teacher_sums: Tensor | None = None,  # [N]: sums of the teacher's slopes, see `add_sums_`; None: of these columns
) -> None:
    """Write the gradients of both models' logits; the teacher's only if there is memory for it."""
    sweep = Sweep(student, teacher, labels, weights.shape[1], statistics.dtype, objective)
    sweep.write_gradients(
        weights if upstream is None else weights * upstream,
        statistics,
        with_one_outer_index(gradient),
        None if teacher_gradient is None else with_one_outer_index(teacher_gradient),
        teacher_sums,
    )


def merge_(
    total: Tensor,  # [9, N], float64; becomes the statistics of the union
    part: Tensor,  # [9, N], of other columns; the logit of a label that is not among them is 0
    labels: object,  # not used, as are the columns: the kernels' statistics have another column's logit there
    columns: object,
    objective: Objective,  # whose divergence takes one sweep
    entropy: bool,  # whether h is merged
) -> None:
    """Merge the statistics of some columns into those of the columns before."""
    total.copy_(stats.merge(torch.stack([total, part.double()]), objective.temperature, objective.divergence))


def add_sums_(
    sums: Tensor,  # [3, N], float64
    student: Tensor,  # [outer, inner, V]: some columns of the rows
    teacher: Tensor,  # [outer', inner', V]
    weights: Tensor,  # [3, N], float64; a row whose CE and divergence weights are 0 is not read
    statistics: Tensor,  # [9, N], of the whole rows: the maxima and normalisers are read
    objective: Objective,  # whose divergence takes two sweeps
    teacher_grad: bool,  # whether the sum of the teacher's slopes is needed
) -> None:
    """Add the sums of the student's slopes, of the value and of the teacher's slopes over some columns."""
    Sweep(student, teacher, None, weights.shape[1], statistics.dtype, objective).add_sums(weights, statistics, sums)


def row_losses(
    statistics: Tensor,  # [9, N], merged
    weights: Tensor,  # [3, N], float64
    counter: object,  # not used
    has_ce: bool,
    has_divergence: bool,
    reduce: bool,
    parts: bool,
    dtype: torch.dtype,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss, CE, divergence and entropy: scalars, or [N] without `reduce`
    """Return w_ce CE + w_d D of the rows and, if parts are asked for, w CE, w D and w H; sums of these with `reduce`.

    The part of a term that is not there is empty, as all are without `parts`.
    """
    found = values(statistics.double(), objective, need_ce=has_ce, need_divergence=has_divergence, need_entropy=parts)
    terms = torch.stack(found[:2])  # [2, N]

    def part(needed: bool, value: Tensor) -> Tensor:
        if not (needed and parts):
            return statistics.new_empty(0, dtype=dtype)
        return _weighted(weights[ROW], value[None], reduce, dtype)

    needed = has_ce, has_divergence, True
    return _weighted(weights[CE:], terms, reduce, dtype), *map(part, needed, found)  # type: ignore[return-value]


def scale_(
    source: Tensor,  # any shape
    factors: list[Tensor],  # one or two scalars
    target: Tensor,  # the shape of the source; may be the source
) -> None:
    """Write the source times the factors, rounded once.  Nothing happens in place if their product is 1."""
    factor = math.prod(factor.item() for factor in factors)
    in_place = target is source or (target.data_ptr() == source.data_ptr() and target.dtype == source.dtype)
    if in_place and factor == 1:
        return
    wide = torch.promote_types(source.dtype, torch.float32)
    if source.dtype == target.dtype == wide:
        torch.mul(source, factor, out=target)
    else:
        _multiply(source, torch.tensor(factor, dtype=wide), target)


def unit_weights(
    weights: Tensor,  # [3, N], float64
    upstream: Tensor | None,  # [N], or a scalar; None: 1
    ce_slope: float,
    divergence_slope: float,
) -> tuple[Tensor, Tensor]:  # [3, N]; a scalar, float64
    """Return the weights times the upstream gradient in the unit of the gradients, and that unit."""
    if upstream is not None:
        weights = weights * upstream
    _, ce, divergence = weights.abs().unbind()
    largest = ce_slope * ce + divergence_slope * divergence
    largest = torch.nn.functional.pad(largest.nan_to_num_(0.0, 0.0), (0, 1)).amax()  # 0 if there are no rows
    unit = torch.where(largest > NEGLIGIBLE, torch.exp2(largest.log2().floor()) / LARGEST_GRADIENT, 1.0)
    return weights / unit, unit


def copy_counted(
    hidden: Tensor,  # [N, H]
    weights: Tensor,  # [3, N], float64
    target: Tensor,  # [N, H], written, of any float dtype
) -> None:
    """Copy the rows that count, and write zeros for the others, which may hold anything."""
    counted = add_something(weights)
    target.copy_(hidden)
    if not counted.all():
        target.masked_fill_(~counted[:, None], 0.0)


def _weighted(
    weights: Tensor,  # [2, N], or [N], float64
    terms: Tensor,  # [2, N], or [1, N], float64
    reduce: bool,
    dtype: torch.dtype,  # that the results are rounded to
) -> Tensor:  # a scalar, or [N] without `reduce`
    """Return the sum of weight * term; a term adds 0 where its weight is negligible, even if it is infinite or NaN.

    `reduce` takes the sum of each term by one thread: PyTorch would share a single row among its threads.
    """

    def added(weighted: Tensor) -> Tensor:
        if reduce:
            weighted = weighted.sum(1) if weighted.shape[0] > 1 else weighted.expand(2, -1).sum(1)[:1]
        return weighted.sum(0)

    result = added(weights * terms)
    if dtype == torch.float32 and reduce and math.isfinite(result.item()):
        return result.to(dtype)  # a negligible weight times a finite value is 0 in float32
    return added(weighted_values(weights, terms)).to(dtype)


def _multiply(source: Tensor, factor: Tensor, target: Tensor) -> None:
    """Write factor * source, computed in blocks of rows in the factor's dtype and rounded once."""
    if source.dim() > 2:
        for part, result in zip(source, target, strict=True):
            _multiply(part, factor, result)
        return
    block = max(1, SCALED_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for part, result in zip(source.split(block), target.split(block), strict=True):
        result.copy_(part.to(factor.dtype) * factor)
