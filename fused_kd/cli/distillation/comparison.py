"""Comparison of two trainings from the same start, on the same batches, with two losses that should be equal."""

import math
from dataclasses import dataclass

import torch

from .training import History

# At the first step the weights are the same, and what the losses differ by is their own rounding: 4e-7 with the command's
# defaults, 2e-4 for the gradient of a small model in bfloat16.
FIRST_STEP_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
# Every step amplifies it, AdamW most where a gradient is little more than rounding: 5e-6 after the 120 steps of the
# defaults, 2e-3 in bfloat16.  The rest is room for longer trainings.
CURVE_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Comparison:
    what: str
    difference: float  # relative, the largest over the steps
    bound: float

    @property
    def within(self) -> bool:
        return self.difference <= self.bound


def compare(ours: History, other: History, dtype: torch.dtype) -> list[Comparison]:
    """Compare two trainings; also by the gradient's norm, since AdamW hides a gradient of the wrong scale from the loss."""
    first = FIRST_STEP_BOUNDS[dtype]
    return [
        Comparison("first loss", relative_difference(ours.loss[:1], other.loss[:1]), first),
        Comparison("first gradient norm", relative_difference(ours.gradient_norm[:1], other.gradient_norm[:1]), first),
        Comparison("loss curve", relative_difference(ours.loss, other.loss), CURVE_BOUNDS[dtype]),
    ]


def relative_difference(ours: list[float], other: list[float]) -> float:
    """Return the largest |a - b| / |b| of any step; infinite if a value is not finite."""
    differences = [abs(a - b) / abs(b) if b else math.inf for a, b in zip(ours, other, strict=True)]
    return max(difference if math.isfinite(difference) else math.inf for difference in differences)
