"""The autograd functions: what is saved, what is recomputed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import linear, ops
from .linear import Gradients, Head, LinearOptions
from .row_losses import KDOptions, gradient_arguments, row_values, weight_gradients, weighted_sum


class KDLossFunction(torch.autograd.Function):
    """Row losses w_ce CE + w_kl KL from logits.

    Alpha, T^2, token weights and the divisor of the mean are all in the two weights of a row, and backward multiplies
    these by the upstream gradient: any reduction, any upstream gradient and a repeated backward are right without a
    look at their values.  Saved are the logits, which the caller holds anyway, and O(N) floats.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
        labels: Tensor | None,  # [N]; None leaves out CE
        ce_weight: Tensor,  # [N], float64
        kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
        options: KDOptions,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # row losses, CE and KL, [N] float64 each; the last two for the log
        statistics, ce, kl = row_values(student, teacher, labels, ce_weight, kl_weight, options)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.save_for_backward(student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl)
        ctx.mark_non_differentiable(ce, kl)
        return weighted_sum(ce, kl, ce_weight, kl_weight, options), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        student_gradient = None
        if ctx.needs_input_grad[0]:
            arguments = gradient_arguments(
                student, teacher, statistics, labels, ce_weight * upstream, kl_weight * upstream, ctx.options
            )
            if ctx.inplace_backward:
                ops.logit_gradient_(*arguments)
                torch.autograd.graph.increment_version(student)
                student_gradient = student.detach()
            else:
                student_gradient = ops.logit_gradient(*arguments)
        of_weights = weight_gradients(ctx.needs_input_grad[3:5], upstream, ce_weight, kl_weight, ce, kl)
        return student_gradient, None, None, *of_weights, None, None


def _sweep(
    heads: tuple[Tensor | None, ...],  # hidden, weight and bias of the student, then of the teacher
    labels: Tensor | None,
    ce_weight: Tensor,
    kl_weight: Tensor,
    options: LinearOptions,
    gradients: Gradients | None = None,
) -> tuple[Tensor, Tensor]:
    student, teacher = Head(*heads[:3]), None if heads[3] is None else Head(*heads[3:])  # type: ignore[arg-type]
    return linear.sweep(student, teacher, labels, ce_weight, kl_weight, options, gradients)


def _sweep_with_gradients(
    heads: tuple[Tensor | None, ...],
    labels: Tensor | None,
    ce_weight: Tensor,
    kl_weight: Tensor,
    options: LinearOptions,
) -> tuple[Tensor, Tensor, Gradients, Tensor]:
    """CE, KL, the gradients of sum_i w_ce CE + w_kl KL in units of a scalar, and that scalar."""
    unit = linear.gradient_unit(ce_weight, kl_weight, options.kd)
    gradients = Gradients(Head(*heads[:3]), options.needed, options.kd.dtype, options.kd.vocab_size)  # type: ignore[arg-type]
    ce, kl = _sweep(heads, labels, ce_weight / unit, kl_weight / unit, options, gradients)
    return ce, kl, gradients, unit


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another one (`retain_graph=True`), so that nothing saved may change."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # a PyTorch that does not say
        return True


class LinearKDLossFunction(torch.autograd.Function):
    """The sum of the row losses, from hidden states and heads.

    The gradients are taken in the forward pass, chunk by chunk, while the logits are there; backward multiplies them by
    the upstream gradient, whatever it is, in place if no other backward can follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H_s]
        weight: Tensor,  # [V', H_s], V' >= vocab_size
        bias: Tensor | None,  # [V']
        teacher_hidden: Tensor | None,  # [N, H_t]; None leaves out KL
        teacher_weight: Tensor | None,  # [V'', H_t]
        teacher_bias: Tensor | None,  # [V'']
        labels: Tensor | None,  # [N]; None leaves out CE
        ce_weight: Tensor,  # [N], float64
        kl_weight: Tensor,  # [N], float64
        options: LinearOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:  # the loss, a scalar; CE and KL, [N], for the log; float64
        heads = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
        gradients: Iterable[Tensor | None] = (None, None, None)
        unit = None
        if any(options.needed):
            ce, kl, gradients, unit = _sweep_with_gradients(heads, labels, ce_weight, kl_weight, options)
        else:
            ce, kl = _sweep(heads, labels, ce_weight, kl_weight, options)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in heads[:3]]
        ctx.save_for_backward(*gradients, unit, ce_weight, kl_weight, ce, kl)
        ctx.mark_non_differentiable(ce, kl)
        return weighted_sum(ce, kl, ce_weight, kl_weight, options.kd).sum(), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *saved, unit, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        of_student = saved
        if unit is not None:
            of_student = linear.scaled(saved, upstream * unit, ctx.dtypes, in_place=not _graph_is_kept())
        of_weights = weight_gradients(ctx.needs_input_grad[7:9], upstream, ce_weight, kl_weight, ce, kl)
        return *of_student, None, None, None, None, *of_weights, None


class LinearKDRowLossesFunction(torch.autograd.Function):
    """The row losses one by one: their upstream gradients come with backward, which projects the chunks again."""

    @staticmethod
    def forward(
        ctx: Any,
        *arguments: Any,  # as in LinearKDLossFunction
    ) -> tuple[Tensor, Tensor, Tensor]:  # row losses, CE and KL, [N] float64 each; the last two for the log
        *heads, labels, ce_weight, kl_weight, options = arguments
        ce, kl = _sweep(tuple(heads), labels, ce_weight, kl_weight, options)
        ctx.options = options
        ctx.save_for_backward(*heads, labels, ce_weight, kl_weight, ce, kl)
        ctx.mark_non_differentiable(ce, kl)
        return weighted_sum(ce, kl, ce_weight, kl_weight, options.kd), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *heads, labels, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        of_student: list[Tensor | None] = [None, None, None]
        if any(ctx.options.needed):
            weights = ce_weight * upstream, kl_weight * upstream
            gradients, unit = _sweep_with_gradients(tuple(heads), labels, *weights, ctx.options)[2:]
            dtypes = [None if tensor is None else tensor.dtype for tensor in heads[:3]]
            of_student = linear.scaled(gradients, unit, dtypes, in_place=True)
        of_weights = weight_gradients(ctx.needs_input_grad[7:9], upstream, ce_weight, kl_weight, ce, kl)
        return *of_student, None, None, None, None, *of_weights, None
