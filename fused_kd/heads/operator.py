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
from ..divergences import divergence_of
from ..operators import KD_ARGUMENTS, KD_SCHEMA
from ..sweep import lines_of, new_counters, new_statistics, row_losses
from . import lean
from .head import Head, gradient_dtype
from .sweep import NOTHING, LinearOptions, Outside, has_unit, planned, returned, sweep, unit_weights

# The tensors of the two models: hidden states, weight and bias of the student, hidden states and weight of its LoRA, and
# hidden states, weight and bias of the teacher.
HEADS, LORA, TEACHER = 8, 3, 5
HIDDEN, BIASES = (0, LORA, TEACHER), (2, TEACHER + 2)
# The schema has the tensors first, then the fields of KDOptions and of LinearOptions, in their order.
LINEAR_LOSSES = operators.define(
    "linear_losses",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    f"Tensor? labels, Tensor weights, Tensor? upstream, {KD_SCHEMA}, bool[] needed, "
    "ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int? workspace_bytes, str memory) "
    # The number of results is fixed, since a list has no fallback under `is_grads_batched`.  A gradient that is not needed
    # is an empty tensor.
    f"-> ({', '.join(['Tensor'] * (6 + HEADS))})",
)
_operator = operators.packet(LINEAR_LOSSES)


def linear_losses(
    *tensors: Tensor
    | None,  # the eight of the heads; labels [N] or None; weights [3, N]; upstream [N], a scalar or None
    options: LinearOptions,
    outside: Outside = NOTHING,
) -> tuple[Tensor, ...]:
    """Return the fields of `Losses`; a scalar unit, or an empty tensor; and the needed gradients, divided by the unit.

    The gradients are those of sum_i (w_ce CE + w_d D), times the upstream gradient of each row if that is given.
    `unit_weights` says why there is a unit.
    """
    kd, *rest = options
    arguments = *tensors, *operators.packed(kd), *rest
    if any(given is not None for given in outside):
        found = _linear_losses(*arguments, outside=outside)
    else:
        if not torch.compiler.is_compiling():
            _register_flops()
        found = _operator(*arguments)
    first, gradients = found[:6], found[6:]
    return *first, *(gradient for gradient, need in zip(gradients, returned(options, outside), strict=True) if need)


def _options(arguments: Sequence[Any]) -> LinearOptions:
    """Return the options from the arguments that follow the tensors in the schema."""
    return LinearOptions(operators.unpacked(*arguments[:KD_ARGUMENTS]), *arguments[KD_ARGUMENTS:])


@operators.implements(LINEAR_LOSSES)
def _linear_losses(*arguments, outside: Outside = NOTHING) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    tensors, (labels, weights, upstream), options = (
        arguments[:HEADS], arguments[HEADS : HEADS + 3], _options(arguments[HEADS + 3 :])
    )  # fmt: skip
    heads, needed = _heads(tensors, options.needed)
    plan = planned(tensors[0], tensors[LORA], tensors[TEACHER], options)
    statistics = new_statistics(weights, options.kd)
    scaled, unit = weights, weights.new_empty(0)
    if any(options.needed):
        scaled, unit = unit_weights(weights, upstream, options, outside)
    counters = new_counters(weights, lines_of(weights.shape[1], plan.chunks, options.kd) + 1)
    run = lean.sweep if options.memory == "lean" else sweep
    found = run(heads, needed, labels, scaled, options, outside, statistics, counters, plan)
    losses = row_losses(statistics, weights, counters, options.kd, labels is not None, tensors[TEACHER] is not None)
    own, (lora_hidden, lora_weight, _), others = found
    gradients = *own, lora_hidden, lora_weight, *others
    return *losses, unit, *(weights.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _heads(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[list[Head | None], list[Sequence[bool]]]:
    """Return the head of the student, that of its adapter and that of the teacher, and which gradients each needs."""
    given = tensors[:LORA], (*tensors[LORA:TEACHER], None), tensors[TEACHER:]  # an adapter has no bias
    heads = [None if hidden is None else Head(hidden, *others) for hidden, *others in given]  # type: ignore[arg-type]
    return heads, [needed[:LORA], (*needed[LORA:TEACHER], False), needed[TEACHER:]]


@operators.fakes(LINEAR_LOSSES)
def _(*arguments):  # type: ignore[no-untyped-def]
    heads, (labels, weights, _), options = (
        arguments[:HEADS],
        arguments[HEADS : HEADS + 3],
        _options(arguments[HEADS + 3 :]),
    )

    def new(i: int, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype if i in HIDDEN else options.kd.dtype if i in BIASES else gradient_dtype(tensor)
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    gradients = [new(i, heads[i]) if need else weights.new_empty(0) for i, need in enumerate(options.needed)]
    unit = weights.new_empty(() if has_unit(options) else 0)
    return *operators.new_losses(heads[5], labels, weights, options.kd), unit, *gradients


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
    hidden, weight, bias, lora_hidden, lora_weight, teacher_hidden, *arguments, out_shape=None, **kwargs
) -> int:
    """Return the flops: 2 N V H for each head's logits, and as many for each gradient of hidden states or of a weight."""
    options = _options(arguments[HEADS + 3 - 6 :])
    V, needed = options.kd.vocab_size, options.needed
    flops = 0
    for shape, i in ((hidden, 0), (lora_hidden, LORA), (teacher_hidden, TEACHER)):
        if shape is None:
            continue
        projected = 1  # times that logits are made
        if options.memory == "lean":
            projected = 1 if teacher_hidden is None else divergence_of(options.kd.objective).sweeps
            projected += any(needed) and (i != TEACHER or options.kd.divergence_in_loss)
        flops += 2 * shape[0] * V * shape[1] * (projected + needed[i] + needed[i + 1])
    return int(flops)
