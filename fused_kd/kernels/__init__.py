"""The operators of `ops.py` in Triton: one kernel a file, each with its derivation and its traffic."""

from .logit_gradient import logit_gradient
from .row_statistics import row_statistics

__all__ = ["logit_gradient", "row_statistics"]
