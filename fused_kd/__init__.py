"""Fused knowledge-distillation loss for language models with large vocabularies."""

from .functional import kd_loss
from .heads.chunks import plan_chunks
from .linear import linear_kd_loss
from .modules import KDLoss, LinearKDLoss
from .options import KDLossOutput
from .version import __version__

__all__ = ["KDLoss", "KDLossOutput", "LinearKDLoss", "__version__", "kd_loss", "linear_kd_loss", "plan_chunks"]
