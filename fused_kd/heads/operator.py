"""The operator `fused_kd::linear_row_losses`: the sweep over chunks of hidden states as one node of a graph.

It is opaque to `torch.compile`, `torch.export`, fake tensors and flop counters: they see its arguments, its results and
its cost, as they do of a matrix product.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..sweep import KD_SCHEMA, KDOptions, Weights
from .sweep import Gradients, Head, LinearOptions, gradient_unit, sweep

# The schema has the tensors first, then the fields of KDOptions and of LinearOptions, in their order.
LINEAR_ROW_LOSSES = operators.define(
    "linear_row_losses",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    f"Tensor? teacher_bias, Tensor? labels, Tensor ce_weight, Tensor divergence_weight, {KD_SCHEMA}, bool[] needed, "
    "ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int? workspace_bytes) "
    # The number of results is fixed, since a list has no fallback under `is_grads_batched`.  A gradient that is not needed
    # is an empty tensor.
    f"-> ({', '.join(['Tensor'] * 9)})",
)
_operator = operators.operator(LINEAR_ROW_LOSSES)
KD_ARGUMENTS = len(KD_SCHEMA.split(", "))  # the objective is three of them


def linear_row_losses(
    *tensors: Tensor | None,  # the six of the heads; labels [N] or None; the two weights of each row, [N] float64
    options: LinearOptions,
) -> list[Tensor]:
    """Return CE and divergence, `[N]` float64; a scalar unit; and the needed gradients, divided by the unit.

    The gradients are those of sum_i (w_ce CE + w_d D).  `gradient_unit` says why there is a unit.
    """
    if not torch.compiler.is_compiling():
        _register_flops()
    (*kd, objective), *rest = options
    ce, divergence, unit, *gradients = _operator(*tensors, *kd, *operators.packed(objective), *rest)
    return [ce, divergence, unit, *(gradient for gradient, need in zip(gradients, options.needed, strict=True) if need)]


def _options(arguments: Sequence[Any]) -> LinearOptions:
    """Return the options from the arguments that follow the tensors in the schema."""
    *kd, temperature, divergence, numbers = arguments[:KD_ARGUMENTS]
    objective = operators.unpacked(temperature, divergence, numbers)
    return LinearOptions(KDOptions._make([*kd, objective]), *arguments[KD_ARGUMENTS:])


def _new_gradients(heads: Sequence[Tensor | None], options: LinearOptions) -> list[Gradients]:
    """Return accumulators for the student, or for student and teacher; an empty list if no gradient is needed."""
    count = 0 if not any(options.needed) else 2 if any(options.needed[3:]) else 1
    return [
        Gradients(Head(*heads[i : i + 3]), options.needed[i : i + 3], options.kd.dtype, options.kd.vocab_size)  # type: ignore[arg-type]
        for i in range(0, 3 * count, 3)
    ]


@operators.implements(LINEAR_ROW_LOSSES)
def _linear_row_losses(*arguments) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    heads, (labels, *row_weights), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    student, teacher = Head(*heads[:3]), None if heads[3] is None else Head(*heads[3:])
    weights, gradients = Weights(*row_weights), _new_gradients(heads, options)
    unit = weights.ce.new_ones(())
    if gradients:
        unit = gradient_unit(weights, options.kd)
        weights = Weights(weights.ce / unit, weights.divergence / unit)
    ce, divergence = sweep(student, teacher, labels, weights, options, gradients)
    found = iter([tensor for head_gradients in gradients for tensor in head_gradients])
    return ce, divergence, unit, *(next(found) if need else ce.new_empty(0) for need in options.needed)


@operators.fakes(LINEAR_ROW_LOSSES)
def _(*arguments):  # type: ignore[no-untyped-def]
    heads, (_, ce_weight, divergence_weight), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    gradients = [
        torch.empty_like(
            tensor, dtype=tensor.dtype if i % 3 == 0 else options.kd.dtype, memory_format=torch.contiguous_format
        )
        if options.needed[i]
        else ce_weight.new_empty(0)
        for i, tensor in enumerate(heads)
    ]
    return torch.empty_like(ce_weight), torch.empty_like(divergence_weight), ce_weight.new_empty(()), *gradients


operators.register_transforms(LINEAR_ROW_LOSSES)


def _register_flops() -> None:
    """Register the formula of the operator's flops, once PyTorch's flop counter has been imported.

    Importing the flop counter here would import Triton, which could then no longer be interpreted.  A counter that is
    already active has its own copy of the formulas, so the formula is added to that too.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None or _operator in module.flop_registry:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    module.register_flop_formula(_operator)(_flops)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", {})
        registry[_operator] = module.flop_registry[_operator]


def _flops(  # type: ignore[no-untyped-def]
    hidden, weight, bias, teacher_hidden, teacher_weight, *arguments, out_shape=None, **kwargs
) -> int:
    """Return the flops: 2 N V H for each model's logits, and as many for each gradient of hidden states or of a weight."""
    options = _options(arguments[4:])
    V, needed = options.kd.vocab_size, options.needed
    flops = 2 * hidden[0] * V * hidden[1] * (1 + needed[0] + needed[1])
    if teacher_hidden is not None:
        flops += 2 * hidden[0] * V * teacher_hidden[1] * (1 + needed[3] + needed[4])
    return int(flops)
