"""The operator `fused_kd::linear_losses`: the sweep over chunks of hidden states as one node of a graph.

It is opaque to `torch.compile`, `torch.export`, fake tensors and flop counters: they see its arguments, its results and
its cost, as they do of a matrix product.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..operators import KD_ARGUMENTS, KD_SCHEMA
from ..sweep import lines_of, new_counters, new_statistics, row_losses
from .sweep import Gradients, Head, LinearOptions, has_unit, planned_chunk, sweep, unit_weights

# The schema has the tensors first, then the fields of KDOptions and of LinearOptions, in their order.
LINEAR_LOSSES = operators.define(
    "linear_losses",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    f"Tensor? teacher_bias, Tensor? labels, Tensor weights, Tensor? upstream, {KD_SCHEMA}, bool[] needed, "
    "ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int? workspace_bytes) "
    # The number of results is fixed, since a list has no fallback under `is_grads_batched`.  A gradient that is not needed
    # is an empty tensor.
    f"-> ({', '.join(['Tensor'] * 12)})",
)
_operator = operators.packet(LINEAR_LOSSES)


def linear_losses(
    *tensors: Tensor | None,  # the six of the heads; labels [N] or None; weights [3, N]; upstream [N] or None
    options: LinearOptions,
) -> tuple[Tensor, ...]:
    """Return the fields of `Losses`; a scalar unit, or an empty tensor; and the needed gradients, divided by the unit.

    The gradients are those of sum_i (w_ce CE + w_d D), times the upstream gradient of each row if that is given.
    `unit_weights` says why there is a unit.
    """
    if not torch.compiler.is_compiling():
        _register_flops()
    kd, *rest = options
    *found, unit, a, b, c, d, e, f = _operator(*tensors, *operators.packed(kd), *rest)
    gradients = (gradient for gradient, need in zip((a, b, c, d, e, f), options.needed, strict=True) if need)
    return *found, unit, *gradients


def _options(arguments: Sequence[Any]) -> LinearOptions:
    """Return the options from the arguments that follow the tensors in the schema."""
    return LinearOptions(operators.unpacked(*arguments[:KD_ARGUMENTS]), *arguments[KD_ARGUMENTS:])


def _new_gradients(heads: Sequence[Tensor | None], options: LinearOptions) -> list[Gradients]:
    """Return accumulators for the student, or for student and teacher; an empty list if no gradient is needed."""
    count = 0 if not any(options.needed) else 2 if any(options.needed[3:]) else 1
    return [
        Gradients(Head(*heads[i : i + 3]), options.needed[i : i + 3], options.kd.dtype, options.kd.vocab_size)  # type: ignore[arg-type]
        for i in range(0, 3 * count, 3)
    ]


@operators.implements(LINEAR_LOSSES)
def _linear_losses(*arguments) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    heads, (labels, weights, upstream), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    student, teacher = Head(*heads[:3]), None if heads[3] is None else Head(*heads[3:])
    N, chunk_rows = weights.shape[1], planned_chunk(student, teacher, options)
    chunks = -(-N // chunk_rows)
    statistics = new_statistics(weights, options.kd)
    counters = new_counters(student.hidden, lines_of(N, chunks, options.kd) + 1)
    gradients = _new_gradients(heads, options)
    scaled, unit = weights, weights.new_empty(0)
    if gradients:
        scaled, unit = unit_weights(weights, upstream, options)
    sweep(student, teacher, labels, scaled, options, gradients, statistics, counters, chunk_rows)
    losses = row_losses(statistics, weights, counters, options.kd, labels is not None, teacher is not None)
    found = iter([tensor for head_gradients in gradients for tensor in head_gradients])
    return *losses, unit, *(next(found) if need else weights.new_empty(0) for need in options.needed)


@operators.fakes(LINEAR_LOSSES)
def _(*arguments):  # type: ignore[no-untyped-def]
    heads, (labels, weights, _), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    gradients = [
        torch.empty_like(
            tensor, dtype=tensor.dtype if i % 3 == 0 else options.kd.dtype, memory_format=torch.contiguous_format
        )
        if options.needed[i]
        else weights.new_empty(0)
        for i, tensor in enumerate(heads)
    ]
    unit = weights.new_empty(() if has_unit(options) else 0)
    return *operators.new_losses(heads[3], labels, weights, options.kd), unit, *gradients


operators.register_transforms(LINEAR_LOSSES)


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
