"""The operators of `ops.py` in Triton: one kernel a file, each with its derivation and its traffic."""

from .gradient import logit_gradient
from .scale import scale_
from .single_pass import loss_and_gradient
from .statistics import row_statistics

__all__ = ["logit_gradient", "loss_and_gradient", "row_statistics", "scale_"]
