"""The terms of a loss: row weights, labels and options of the sweep from the arguments that both losses share."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators, rows, sweep
from .divergences import Objective, named
from .heads.products import RELEASE
from .logit_map import LogitMap
from .options import KDLossOutput, Options
from .rows import RowOptions
from .statistics import statistics_dtype
from .sweep import KDOptions


class Terms(NamedTuple):
    """The two terms of a loss: the weights of each row in them, and whether each term is computed."""

    labels: Tensor | None  # [N]; None: CE is not needed
    weights: Tensor  # [3, N]
    options: KDOptions
    need_divergence: bool
    shape: torch.Size  # the leading dimensions of the student

    def output(
        self,
        loss: Tensor,  # reduced; [N] for reduction "none"
        ce: Tensor,  # the same
        divergence: Tensor,  # the same
        entropy: Tensor,  # the same
    ) -> Tensor | KDLossOutput:
        """Return the loss as the caller gets it: a tensor, or a `KDLossOutput` if parts are asked for."""
        if not self.options.reduce:
            loss = loss.reshape(self.shape)
        if not self.options.parts:
            return loss
        return KDLossOutput(
            loss,
            self._part(ce) if self.labels is not None else None,
            self._part(divergence) if self.need_divergence else None,
            self._part(entropy),
        )

    def _part(self, values: Tensor) -> Tensor:
        return values.detach() if self.options.reduce else values.detach().reshape(self.shape)


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
    name, parameters = named(options.divergence)
    objective = Objective(*maps, _constant_or_tensor(options.temperature), name, parameters)  # type: ignore[arg-type]
    ce_in_loss = isinstance(alpha, Tensor) or alpha < 1
    divergence_in_loss = isinstance(alpha, Tensor) or alpha > 0
    row_options = RowOptions(
        N,
        labels.shape[-1] if options.shift and labels is not None else 0,
        vocabulary,
        options.ignore_index,
        options.reduction == "mean",
        0.0 if isinstance(alpha, Tensor) else float(alpha),
        None if num_items is None or isinstance(num_items, Tensor) else float(num_items),
        objective.temperature,
    )
    labels = None if labels is None else labels.reshape(N).contiguous()
    weights, labels = _row_weights(
        labels,
        None if token_weights is None else token_weights.reshape(N),
        None if not isinstance(alpha, Tensor) else alpha.reshape(N) if alpha.dim() else alpha,
        num_items if isinstance(num_items, Tensor) else None,
        student,
        row_options,
    )
    return Terms(
        labels if ce_in_loss or options.return_parts else None,
        weights,
        KDOptions(
            vocabulary, ce_in_loss, divergence_in_loss, statistics_dtype(student, teacher),
            options.reduction != "none", options.return_parts, objective,
        ),
        teacher is not None and (divergence_in_loss or options.return_parts),
        student.shape[:-1],
    )  # fmt: skip


def _row_weights(
    labels: Tensor | None,  # [N]
    token_weights: Tensor | None,  # [N]
    alpha: Tensor | None,  # [N], or a scalar
    num_items: Tensor | None,  # one element
    student: Tensor,
    options: RowOptions,
) -> tuple[Tensor, Tensor | None]:
    """Return the weights of the rows, and the labels moved as `shift` asks.

    They take one launch on a GPU.  Weights that are learned, and those on a CPU, are computed by calls of PyTorch.
    """
    given = token_weights, alpha, num_items
    learned = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    if learned or not sweep.runs_kernels(student):
        return rows.row_weights(labels, *given, student, options)
    weights, moved = operators.row_weights(labels, *given, student.detach(), *options)
    return weights, moved if options.sequence else labels


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
    return tuple(tensor.detach() if tensor is not None and tensor.requires_grad else tensor for tensor in tensors)


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
