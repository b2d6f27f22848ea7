"""The operators of `operators.py` in Triton.  Each kernel's file gives its derivation and its traffic."""

from .counted import copy_counted
from .gradient import logit_gradient
from .losses import row_losses
from .scale import scale_
from .single_pass import statistics_and_gradient
from .statistics import new_counters, row_statistics
from .unit import unit_weights
from .weights import row_weights

__all__ = [
    "copy_counted",
    "logit_gradient",
    "new_counters",
    "row_losses",
    "row_statistics",
    "row_weights",
    "scale_",
    "statistics_and_gradient",
    "unit_weights",
]
