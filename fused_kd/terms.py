"""The terms of a loss: row weights, labels and options of the sweep from the arguments that both losses share."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import GIVEN, Objective
from .heads.products import RELEASE
from .logit_map import LogitMap
from .options import KDLossOutput, Options
from .rows import RowWeights, row_weights
from .statistics import statistics_dtype
from .sweep import KDOptions


class Terms(NamedTuple):
    """The two terms of a loss: the weights of each row in them, and whether each term is computed."""

    labels: Tensor | None  # [N]; None: CE is not needed
    weights: RowWeights
    options: KDOptions
    need_divergence: bool
    reduction: str
    shape: torch.Size  # the leading dimensions of the student
    return_parts: bool

    def output(
        self,
        loss: Tensor,  # reduced; [N] for reduction "none"
        ce: Tensor,  # [N]
        divergence: Tensor,  # [N]
    ) -> Tensor | KDLossOutput:
        """Return the loss as the caller gets it: a tensor, or a `KDLossOutput` if parts are asked for."""
        dtype = self.options.dtype
        loss = (loss.reshape(self.shape) if self.reduction == "none" else loss).to(dtype)
        if not self.return_parts:
            return loss
        return KDLossOutput(
            loss,
            self.weights.reduce(ce, self.reduction, self.shape).to(dtype) if self.labels is not None else None,
            self.weights.reduce(divergence, self.reduction, self.shape).to(dtype) if self.need_divergence else None,
        )


def make_terms(
    student: Tensor,  # [..., any], logits or hidden states
    teacher: Tensor | None,
    labels: Tensor | None,  # [...]
    token_weights: Tensor | None,  # [...]
    num_items: int | float | Tensor | None,
    options: Options,
    vocabulary: int,
    maps: tuple[LogitMap, LogitMap],
) -> Terms:
    """Return the terms of a loss.  The arguments must have been checked."""
    alpha, N = options.alpha, math.prod(student.shape[:-1])  # Size.numel would make a traced size a constant
    if options.shift and labels is not None:
        labels = moved(labels, options.ignore_index)
        token_weights = None if token_weights is None else moved(token_weights, 0)
        alpha = moved(alpha, 0) if isinstance(alpha, Tensor) and alpha.dim() else alpha
    labels = None if labels is None else labels.reshape(N).contiguous()
    weights = row_weights(
        labels,
        None if token_weights is None else token_weights.reshape(N),
        alpha.reshape(N) if isinstance(alpha, Tensor) and alpha.dim() else alpha,
        rows=N,
        device=student.device,
        temperature=options.temperature,
        vocabulary=vocabulary,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        num_items=num_items,
    )
    ce_in_loss = isinstance(alpha, Tensor) or alpha < 1
    divergence_in_loss = isinstance(alpha, Tensor) or alpha > 0
    dtype = statistics_dtype(student, teacher)
    temperature, *others = [getattr(options, name) for name in GIVEN]
    objective = Objective(*maps, _constant_or_tensor(temperature), *others)  # type: ignore[arg-type]
    return Terms(
        labels if ce_in_loss or options.return_parts else None,
        weights,
        KDOptions(vocabulary, ce_in_loss, divergence_in_loss, dtype, objective),
        teacher is not None and (divergence_in_loss or options.return_parts),
        options.reduction,
        student.shape[:-1],
        options.return_parts,
    )


def moved(
    per_token: Tensor,  # [..., L]
    last: float,
) -> Tensor:  # [..., L]
    """Return a tensor that has the value of the next token at each position, and `last` at the last position."""
    return torch.cat([per_token[..., 1:], torch.full_like(per_token[..., :1], last)], -1)


def constant_teacher(
    tensors: tuple[Tensor | None, ...],  # logits; or hidden states, weight and bias
    learns: bool,  # the option teacher_grad
    options: KDOptions,
    name: str,  # the name of the first tensor, for the warning
) -> tuple[Tensor | None, ...]:
    """Return the teacher's tensors, detached unless the teacher learns."""
    if learns and options.divergence_in_loss:
        return tensors
    if not learns and tensors[0] is not None and tensors[0].requires_grad and torch.is_grad_enabled():
        warnings.warn(
            f"{name} requires grad, and the loss takes the teacher as a constant; compute it under torch.no_grad(), which "
            f"saves its graph, or pass teacher_grad=True if the teacher learns too",
            stacklevel=3,
        )
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


UNUSUAL = 1234.5  # no graph is guarded on this value: only of a constant is it known to be smaller or larger


def _constant_or_tensor(temperature: float) -> float | Tensor:
    """Return the temperature; as a tensor if it is a variable of a compiled graph."""
    temperature = float(temperature)
    if not torch.compiler.is_compiling() or RELEASE < (2, 9):
        return temperature
    is_known = torch.fx.experimental.symbolic_shapes.statically_known_true
    if is_known(temperature < UNUSUAL) or is_known(temperature >= UNUSUAL):
        return temperature
    return torch.ones((), dtype=torch.float64) * temperature  # torch.full would make it a constant
