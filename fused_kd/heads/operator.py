"""The operator `fused_kd::linear_row_losses`: the sweep of `linear.py` as one node of a graph.

To `torch.compile`, `torch.export`, fake tensors and flop counters it is opaque, as a product is: they see its arguments,
its results and its cost.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import operators as ops
from ..logit_map import LogitMap
from ..sweep import KDOptions
from . import sweep as linear
from .sweep import Gradients, Head, LinearOptions

LINEAR_ROW_LOSSES = ops.define(
    "linear_row_losses",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor ce_weight, Tensor kl_weight, float temperature, SymInt vocab_size, "
    "bool ce_in_loss, bool kl_in_loss, ScalarType statistics_dtype, float[] student_map, float[] teacher_map, "
    "bool[] needed, ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int? workspace_bytes) "
    # A fixed number, since a list of results has no fallback under `is_grads_batched`; empty where not needed.
    f"-> ({', '.join(['Tensor'] * 9)})",
)
_operator = ops.operator(LINEAR_ROW_LOSSES)


def linear_row_losses(
    *tensors: Tensor | None,  # those of the heads; labels or None, row weights: [N], the weights in float64
    options: LinearOptions,
) -> list[Tensor]:
    """CE and KL, `[N]` float64; a scalar; in units of it the gradients of sum_i w_ce CE + w_kl KL that are needed."""
    if not torch.compiler.is_compiling():
        _register_flops()
    kd, *rest = options
    ce, kl, unit, *gradients = _operator(*tensors, *kd, *rest)
    return [ce, kl, unit, *(gradient for gradient, need in zip(gradients, options.needed, strict=True) if need)]


def _options(arguments: Sequence[Any]) -> LinearOptions:
    """Of what follows the tensors in the schema."""
    temperature, V, ce_in_loss, kl_in_loss, dtype, student_map, teacher_map, *rest = arguments
    maps = LogitMap(*student_map), LogitMap(*teacher_map)
    return LinearOptions(KDOptions(temperature, V, ce_in_loss, kl_in_loss, dtype, *maps), *rest)


def _new_gradients(heads: Sequence[Tensor | None], options: LinearOptions) -> list[Gradients]:
    """Of the student, or of student and teacher; none where none is needed."""
    count = 0 if not any(options.needed) else 2 if any(options.needed[3:]) else 1
    return [
        Gradients(Head(*heads[i : i + 3]), options.needed[i : i + 3], options.kd.dtype, options.kd.vocab_size)  # type: ignore[arg-type]
        for i in range(0, 3 * count, 3)
    ]


@ops.implements(LINEAR_ROW_LOSSES)
def _linear_row_losses(*arguments) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    heads, (labels, ce_weight, kl_weight), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    student, teacher = Head(*heads[:3]), None if heads[3] is None else Head(*heads[3:])
    gradients = _new_gradients(heads, options)
    unit = ce_weight.new_ones(())
    if gradients:
        unit = linear.gradient_unit(ce_weight, kl_weight, options.kd)
        ce_weight, kl_weight = ce_weight / unit, kl_weight / unit
    ce, kl = linear.sweep(student, teacher, labels, ce_weight, kl_weight, options, gradients)
    found = iter([tensor for of_head in gradients for tensor in of_head])
    return ce, kl, unit, *(next(found) if need else ce.new_empty(0) for need in options.needed)


@ops.fakes(LINEAR_ROW_LOSSES)
def _(*arguments):  # type: ignore[no-untyped-def]
    heads, (_, ce_weight, kl_weight), options = arguments[:6], arguments[6:9], _options(arguments[9:])
    gradients = [
        torch.empty_like(
            tensor, dtype=tensor.dtype if i % 3 == 0 else options.kd.dtype, memory_format=torch.contiguous_format
        )
        if options.needed[i]
        else ce_weight.new_empty(0)
        for i, tensor in enumerate(heads)
    ]
    return torch.empty_like(ce_weight), torch.empty_like(kl_weight), ce_weight.new_empty(()), *gradients


ops.complete(LINEAR_ROW_LOSSES)


def _register_flops() -> None:
    """At the first call that may be counted: PyTorch's flop counter imports Triton, which then could not be interpreted.

    A counter that is active already has taken its copy of the formulas.
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
    """Two a multiplication: the logits, and as many again for the gradient of hidden states and for that of the weight."""
    options = _options(arguments[4:])
    V, needed = options.kd.vocab_size, options.needed
    flops = 2 * hidden[0] * V * hidden[1] * (1 + needed[0] + needed[1])
    if teacher_hidden is not None:
        flops += 2 * hidden[0] * V * teacher_hidden[1] * (1 + needed[3] + needed[4])
    return int(flops)
