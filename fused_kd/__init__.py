"""Fused knowledge-distillation loss for language models with large vocabularies."""

from .functional import kd_loss
from .modules import KDLoss
from .output import KDLossOutput
from .version import __version__

__all__ = ["KDLoss", "KDLossOutput", "__version__", "kd_loss"]
