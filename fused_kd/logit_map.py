"""What some models do to the output of their head before the softmax: a scale (Cohere, Granite), a softcap (Gemma 2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A user's options: one value for student and teacher, or one each.
Scale = float | tuple[float, float]
Softcap = float | tuple[float | None, float | None] | None


class LogitMap(NamedTuple):
    """z = softcap tanh(scale x / softcap), or scale x without a softcap: of the head's output x, the logits z."""

    scale: float = 1.0
    softcap: float = math.inf

    @property
    def is_identity(self) -> bool:
        return self == IDENTITY_MAP

    @property
    def is_capped(self) -> bool:
        return self.softcap < math.inf

    def of(self, x: Tensor) -> Tensor:
        z = x * self.scale
        # Not `is_capped`: PyTorch 2.9 does not trace a property of a named tuple where sizes are dynamic.
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap < math.inf else z


IDENTITY_MAP = LogitMap()
