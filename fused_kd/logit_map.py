"""The map from a head's output to the logits: a scale (Cohere, Granite) and a softcap (Gemma 2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LogitMap(NamedTuple):
    """The map from a head's output x to the logits z = softcap tanh(scale x / softcap); z = scale x without a softcap."""

    scale: float = 1.0
    softcap: float = math.inf

    @property
    def is_identity(self) -> bool:
        return self == IDENTITY_MAP

    @property
    def is_capped(self) -> bool:
        return self.softcap < math.inf

    def of(self, x: Tensor) -> Tensor:
        """Return the logits of the head's output x, of any shape."""
        z = x * self.scale
        # `is_capped` is not used here: PyTorch 2.9 cannot trace a property of a NamedTuple if sizes are dynamic.
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap < math.inf else z


IDENTITY_MAP = LogitMap()
