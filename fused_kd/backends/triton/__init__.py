"""The operators of `operators.py` in Triton.  Each kernel's file gives its derivation and its traffic."""

from .counted import copy_counted
from .gradient import logit_gradient
from .losses import row_losses
from .merging import add_sums_, merge_
from .scale import scale_
from .single_pass import statistics_and_gradient
from .statistics import new_counters, row_statistics
from .unit import unit_weights
from .weights import row_weights

__all__ = [
    "add_sums_",
    "copy_counted",
    "logit_gradient",
    "merge_",
    "new_counters",
    "row_losses",
    "row_statistics",
    "row_weights",
    "scale_",
    "statistics_and_gradient",
    "unit_weights",
]
