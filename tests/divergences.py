"""The divergences that the tests go over, and their definitions, of probabilities."""

import pytest
import torch
from torch import Tensor

from fused_kd import reference
from fused_kd.divergences import (
    JSD,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)

NAMES = list(reference.DIVERGENCES)  # without those that a test defines
OBJECTS = [
    ForwardKL(), ReverseKL(), MixedKL(0.3), MixedKL(0.9), JSD(), JSD(0.1), JSD(0.3), JSD(0.9), SkewKL(), SkewKL(0.7),
    SkewReverseKL(), SkewReverseKL(0.3), TotalVariation(),
]  # fmt: skip
each_name = pytest.mark.parametrize("divergence", NAMES)
each_object = pytest.mark.parametrize("divergence", OBJECTS, ids=str)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), with 0 log 0 = 0."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def definition(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """The divergence of the student's probabilities p and the teacher's q, as its paper writes it."""
    match divergence:
        case ForwardKL():
            return kl(q, p)
        case ReverseKL():
            return kl(p, q)
        case MixedKL(reverse=r):
            return (1 - r) * kl(q, p) + r * kl(p, q)
        case JSD(beta=beta):
            m = beta * q + (1 - beta) * p
            return beta * kl(q, m) + (1 - beta) * kl(p, m)
        case SkewKL(skew=s):
            return kl(q, s * q + (1 - s) * p)
        case SkewReverseKL(skew=s):
            return kl(p, s * p + (1 - s) * q)
        case TotalVariation():
            return (p - q).abs().sum(-1) / 2
    raise NotImplementedError(divergence)
