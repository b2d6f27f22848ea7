"""The operators of `ops.py` in Triton: one kernel a file, each with its derivation and its traffic."""

from .logit_gradient import logit_gradient
from .loss_and_gradient import loss_and_gradient
from .row_statistics import row_statistics
from .scale import scale_

__all__ = ["logit_gradient", "loss_and_gradient", "row_statistics", "scale_"]
