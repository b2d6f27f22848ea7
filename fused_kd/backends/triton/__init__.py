"""The operators of `operators.py` in Triton.  Each kernel's file gives its derivation and its traffic."""

from .gradient import logit_gradient
from .scale import scale_
from .single_pass import statistics_and_gradient
from .statistics import row_statistics

__all__ = ["logit_gradient", "row_statistics", "scale_", "statistics_and_gradient"]
