"""The options of the losses, each with its default and its meaning, and the output of `return_parts=True`.

The functions, the modules and the reference repeat these options in their signatures, for editors and type checkers.
`tests/test_signatures.py` compares their names, types and defaults with those here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence

# One value for both models, or a pair (student, teacher).
Scale = float | tuple[float, float]
Softcap = float | tuple[float | None, float | None] | None
Function = Callable[[Tensor], Tensor]  # an output head: from hidden states [C, H] to logits [C, V]
Lora = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r] and the scale of their product


@dataclass(frozen=True)
class Options:
    """All options that hold for a whole training run."""

    alpha: float | Tensor = 0.5  # the weight of the divergence, in [0, 1]; a tensor gives one per row
    temperature: float = 1.0  # T, applied to both distributions in the divergence
    divergence: str | Divergence = "forward_kl"  # D: a name, or an object of `fused_kd.divergences`
    ignore_index: int = -100  # the label of rows that do not count
    reduction: str = "mean"  # or "sum", or "none" for one value per row
    shift: bool = False  # score each position against the label of the next one
    vocab_size: int | None = None  # the number of leading columns that are real; None: all
    logit_softcap: Softcap = None  # c: the logits are c tanh(z / c), where z is the scaled input; None: no softcap
    logit_scale: Scale = 1.0  # multiplies the input, before the softcap
    teacher_grad: bool = False  # whether the teacher gets the gradient of the divergence
    inplace_backward: bool = False  # kd_loss: whether the gradient overwrites the student's logits
    logits_dtype: torch.dtype | None = None  # linear_kd_loss: dtype of a chunk's logits; None: float32
    workspace_bytes: int | None = None  # linear_kd_loss: bound of a chunk's buffers; None: as `plan_chunks` chooses
    memory: str = "default"  # linear_kd_loss: or "lean", for small cards
    compact: bool | None = None  # linear_kd_loss: whether rows that do not count are left out; None: where it pays
    return_parts: bool = False  # whether to return a KDLossOutput


class KDLossOutput(NamedTuple):
    """The loss, its two parts and the student's entropy, all reduced alike: loss = (1 - alpha) ce + alpha T^2 divergence.

    All but the loss are detached, for logging.

    Attributes:
        loss: the loss, as the function returns it without `return_parts`.
        ce: the cross-entropy; None without labels.
        divergence: the divergence, without alpha and T^2; None without a teacher.
        entropy: the entropy of the student's distribution at temperature T, in nats.
    """

    loss: Tensor
    ce: Tensor | None
    divergence: Tensor | None
    entropy: Tensor
