"""A model of the time of a step of `linear_kd_loss` on a GPU, part by part.

The parts are added.  A product takes the time of its multiplications, longer the closer that comes to the time of reading
its weight.  What a product writes beyond a 16-bit result, and what a float32 sum is read and written, comes on top: nothing
hides it.  This fits the chunks of 256 to 4 096 tokens of a run on an H200 within 5% (`benchmarks/results/gpu.json`;
tests/test_chunk_plans.py compares them).

The sweep's time is that of a divergence of one sweep, such as forward KL.
"""

import math

from ..devices import Device
from ..launch import is_faster
from .step import Side, Step

COPIED = 0.9  # the share of the nominal bandwidth that copies reach: 0.89 measured on an H200
LAUNCH = 3e-6  # seconds from the end of an operation to the start of the next
OTHER_LAUNCHES = 6  # those of a step that are not a chunk's or a group's


def seconds(step: Step, device: Device, chunk_rows: int, gradient_rows: int) -> dict[str, float]:
    """Return the seconds of each part of a step in chunks, by its name."""
    N, V, bytes_per_second = step.rows, step.vocab_size, COPIED * device.bandwidth
    groups, chunks = -(-N // gradient_rows), -(-N // chunk_rows)
    parts = {
        f"{side.model} projection": _products(N, V, side.hidden_size, chunk_rows, side, device) for side in step.sides
    }
    parts["float32 results"] = _wide_bytes(step) / bytes_per_second
    parts["sweep"] = _swept_bytes(step, device) / bytes_per_second
    weights = sums = hidden = rounded = 0.0
    for side in step.sides:
        for _, width in side.weights:
            weights += _products(N, V, width, gradient_rows, side, device)
            is_wide = step.is_summed(side, groups) or side.weight_dtype.itemsize > side.products.itemsize
            sums += (4 * is_wide + 8 * (groups - 1)) * V * width
            rounded += 6 * V * width * step.is_summed(side, groups)
        if side.hidden_grad:
            hidden += _products(N, V, side.hidden_size, gradient_rows, side, device)
        if side.lora_rank:  # the low-rank hidden states: their logits are added to the base's, and they get a gradient
            parts[f"{side.model} projection"] += _products(N, V, side.lora_rank, chunk_rows, side, device)
            parts["float32 results"] += 2 * N * V * side.logits.itemsize / bytes_per_second
            hidden += _products(N, V, side.lora_rank, gradient_rows, side, device)
    parts["weight gradient"] = weights
    parts["float32 sum"] = sums / bytes_per_second
    parts["hidden gradient"] = hidden
    parts["rounding"] = rounded / bytes_per_second
    per_chunk = len(step.sides) + _passes(step, device) + sum(side.lora_rank > 0 for side in step.sides)
    per_group = sum(side.hidden_grad + 2 * (side.lora_rank > 0) + side.weight_grad for side in step.sides)
    parts["launches"] = LAUNCH * (OTHER_LAUNCHES + chunks * per_chunk + groups * per_group)
    return {name: time for name, time in parts.items() if time}


def lean_seconds(step: Step, device: Device, slab_columns: int) -> dict[str, float]:
    """Return the seconds of each part of a step that takes the vocabulary in slabs over all tokens."""
    N, V, bytes_per_second = step.rows, step.vocab_size, COPIED * device.bandwidth
    slabs, twice = -(-V // slab_columns), 2 if step.any_grad else 1
    parts = {}
    for side in step.sides:
        widths = side.hidden_size, side.lora_rank
        parts[f"{side.model} projection"] = twice * sum(
            _over_slabs(step, slab_columns, w, side, device) for w in widths
        )
    parts["float32 results"] = twice * _wide_bytes(step) / bytes_per_second
    read = sum(side.logits.itemsize for side in step.sides)
    written = sum(side.products.itemsize for side in step.sides if side.any_grad)
    parts["sweep"] = N * V * (twice * read + written) / bytes_per_second
    parts["weight gradient"] = sum(
        _over_slabs(step, slab_columns, width, side, device) for side in step.sides for _, width in side.weights
    )
    hidden = [side for side in step.sides if side.hidden_grad]
    parts["hidden gradient"] = sum(_over_slabs(step, slab_columns, side.hidden_size, side, device) for side in hidden)
    sums = sum(side.hidden_size for side in hidden if side.products.itemsize < 4)  # elements per row
    parts["float32 sum"] = N * sums * (8 * slabs - 4) / bytes_per_second
    parts["rounding"] = sum(6 * N * side.hidden_size for side in hidden if side.dtype.itemsize < 4) / bytes_per_second
    per_slab = twice * (len(step.sides) + 2) + sum(side.hidden_grad + side.weight_grad for side in step.sides)
    parts["launches"] = LAUNCH * (OTHER_LAUNCHES + slabs * per_slab)
    return {name: time for name, time in parts.items() if time}


def _products(rows: int, vocabulary: int, width: int, most: int, side: Side, device: Device) -> float:
    """Return the seconds of the products of all rows with a `[V, width]` matrix, at most `most` rows at a time."""
    whole, rest = divmod(rows, most)
    return whole * _product(most, vocabulary, width, side, device) + _product(rest, vocabulary, width, side, device)


def _over_slabs(step: Step, slab_columns: int, width: int, side: Side, device: Device) -> float:
    """Return the seconds of the products of all rows with a `[V, width]` matrix, a slab at a time."""
    return -(-step.vocab_size // slab_columns) * _product(step.rows, slab_columns, width, side, device)


def _product(rows: int, vocabulary: int, width: int, side: Side, device: Device) -> float:
    if not rows or not width:
        return 0.0
    itemsize, elements = side.products.itemsize, vocabulary * width
    multiplied = 2 * rows * elements / device.rate(itemsize)
    return math.hypot(multiplied, elements * itemsize / (COPIED * device.bandwidth))


def _wide_bytes(step: Step) -> int:
    """Return the bytes of the logits beyond those of 16-bit ones."""
    return step.rows * step.vocab_size * sum(side.logits.itemsize - side.products.itemsize for side in step.sides)


def _swept_bytes(step: Step, device: Device) -> int:
    """Return the bytes that the sweeps read and write."""
    read = sum(side.logits.itemsize for side in step.sides)
    written = sum(side.products.itemsize for side in step.sides if side.any_grad)
    return step.rows * step.vocab_size * (_passes(step, device) * read + written)


def _passes(step: Step, device: Device) -> int:
    """Return how often the sweep of a chunk reads its logits from memory: once without gradients and in one launch."""
    itemsizes = [side.logits.itemsize for side in step.sides]
    one_launch = not step.sides[-1].any_grad or len(step.sides) == 1
    return 1 if not step.any_grad or (one_launch and is_faster(device, step.vocab_size, itemsizes)) else 2
