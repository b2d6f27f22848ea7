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
        return self.softcap * torch.tanh(z / self.softcap) if self.is_capped else z


IDENTITY_MAP = LogitMap()
