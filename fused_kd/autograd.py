"""The autograd functions: what is saved, what is recomputed.

What a function saves of its results are outputs of it, so that PyTorch knows that gradients depend on the inputs by way of
them: a second derivative comes back to `backward` as a gradient of such an output, and is refused there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators as ops
from .heads.operator import linear_row_losses
from .heads.sweep import LinearOptions
from .scaling import is_batched, scaled
from .sweep import KDOptions, gradient_arguments, row_values, row_values_and_gradient, weight_gradients, weighted_sum

Backward = Callable[..., tuple[Tensor | None, ...]]


def _first_order(backward: Backward) -> Backward:
    """A backward pass of the first output's gradient, which refuses one of the others: those that it works with."""

    @functools.wraps(backward)
    def of_outputs(ctx: Any, upstream: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        # A compiler, which refuses second derivatives by itself, shows a gradient of every output.
        if not torch.compiler.is_compiling() and any(gradient is not None for gradient in of_saved):
            ops.refuse_derivative()
        return (None,) * len(ctx.needs_input_grad) if upstream is None else backward(ctx, upstream)

    return of_outputs


class _Constant(torch.autograd.Function):
    """What an operator gives in a backward pass that is itself recorded: it depends on its inputs, and cannot say how."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        ops.refuse_derivative()


def _in_backward(operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
    is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    results: tuple[Tensor, ...] = _Constant.apply(operator, *arguments) if is_recorded else operator(*arguments)
    return results


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for backward, inference tensors too: a teacher's logits, or labels, made under `torch.inference_mode()`.

    PyTorch refuses to save these, since they have no version to check.  A tensor in the same memory is saved instead.
    """
    ctx.save_for_backward(*(None if tensor is None else _without_inference(tensor) for tensor in tensors))


def _without_inference(tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return same.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _may_write_over_saved(upstream: Tensor) -> bool:
    """Whether a backward pass may write its result over what was saved: no other one follows, nothing records it."""
    is_recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return not (is_recorded or is_batched(upstream) or _graph_is_kept())


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another one (`retain_graph=True`), so that nothing saved may change."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # a PyTorch that does not say
        return True


class KDLossFunction(torch.autograd.Function):
    """Row losses w_ce CE + w_kl KL from logits.

    Alpha, T^2, token weights and the divisor of the mean are all in the two weights of a row, and backward multiplies
    these by the upstream gradient: any reduction, any upstream gradient and a repeated backward are right without a
    look at their values.  Saved are the logits, which the caller holds anyway, and O(N) floats.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
        labels: Tensor | None,  # [N]; None leaves out CE
        ce_weight: Tensor,  # [N], float64
        kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
        options: KDOptions,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # row losses, CE and KL, [N] float64 each; statistics, [6, N]
        statistics, ce, kl = row_values(student, teacher, labels, ce_weight, kl_weight, options)
        return weighted_sum(ce, kl, ce_weight, kl_weight, options), ce, kl, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, labels, ce_weight, kl_weight, ctx.options, ctx.inplace_backward = inputs
        _, ce, kl, statistics = output
        _save(ctx, student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        student_gradient = teacher_gradient = None
        student_grad, teacher_grad = ctx.needs_input_grad[:2]
        if student_grad or teacher_grad:
            arguments = gradient_arguments(
                student, teacher, statistics, labels, ce_weight * upstream, kl_weight * upstream, ctx.options
            )
            if ctx.inplace_backward and not (torch.is_grad_enabled() or is_batched(upstream)):
                teacher_gradient = ops.logit_gradient_(*arguments, teacher_grad)
                torch.autograd.graph.increment_version(student)
                student_gradient = student.detach()
            else:
                student_gradient, teacher_gradient = _in_backward(ops.logit_gradient, *arguments, teacher_grad)
        of_weights = weight_gradients(ctx.needs_input_grad[3:5], upstream, ce_weight, kl_weight, ce, kl)
        return (
            student_gradient if student_grad else None, teacher_gradient if teacher_grad else None, None, *of_weights,
            None, None,
        )  # fmt: skip


class Overwritten:
    """Logits in whose memory the loss has put their gradient, `gradient` from backward on."""

    gradient: Tensor | None = None


class OverwriteFunction(torch.autograd.Function):
    """The logits themselves, before the loss writes over them: what is computed from them later comes back to `backward`.

    There the loss's own gradient must have come alone.  Whatever else comes was computed from a gradient, as if it were
    logits; and a sum of both is another tensor, elsewhere in memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, written: Overwritten) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.written = written
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        own, ctx.written.gradient = ctx.written.gradient, None
        if not is_batched(upstream) and (own is None or own.data_ptr() != upstream.data_ptr()):
            raise RuntimeError(
                "inplace_backward: expected student_logits that nothing uses after kd_loss, which has written their "
                "gradient over them, got the gradient of something computed from them later; compute it before kd_loss, "
                "from a copy where it needs their values in backward, or pass inplace_backward=False"
            )
        return upstream, None


class KDLossAndGradientFunction(torch.autograd.Function):
    """The sum of the row losses from logits, with the gradient from the same launch.

    Backward multiplies it by the upstream gradient, whatever that is, and hands it on: in place if no other backward can
    follow.  Saved are the gradient and O(N) floats, so that the logits of both models may go once the loss is there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
        labels: Tensor | None,  # [N]; None leaves out CE
        ce_weight: Tensor,  # [N], float64
        kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
        options: KDOptions,
        written: "Overwritten | None",  # the student's logits, to take the gradient's place; None: it gets its own memory
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # the loss, a scalar; CE and KL, [N], float64; the gradient
        values, gradient = row_values_and_gradient(
            student, teacher, labels, ce_weight, kl_weight, options, in_place=written is not None
        )
        if written is not None:
            torch.autograd.graph.increment_version(student)
            gradient = student.detach()
        loss = weighted_sum(values.ce, values.kl, ce_weight, kl_weight, options).sum()
        return loss, values.ce, values.kl, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, _, ce_weight, kl_weight, _, ctx.written = inputs
        _save(ctx, ce_weight, kl_weight, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ce_weight, kl_weight, ce, kl, gradient = ctx.saved_tensors
        of_weights = weight_gradients(ctx.needs_input_grad[3:5], upstream, ce_weight, kl_weight, ce, kl)
        if _may_write_over_saved(upstream):
            ops.scale_(gradient, upstream)
        else:
            (gradient,) = scaled([gradient], upstream, [gradient.dtype], in_place=False)
        if ctx.written is not None:
            ctx.written.gradient = gradient
        return gradient, None, None, *of_weights, None, None


class LinearKDLossFunction(torch.autograd.Function):
    """The sum of the row losses, from hidden states and heads.

    The gradients are taken in the forward pass, chunk by chunk, while the logits are there; backward multiplies them by
    the upstream gradient, whatever it is, in place if no other backward can follow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
    ) -> tuple[Tensor, ...]:  # the loss, a scalar; CE and KL, [N], float64; what backward takes
        heads = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
        ce, kl, unit, *gradients = linear_row_losses(*heads, labels, ce_weight, kl_weight, options=options)
        return weighted_sum(ce, kl, ce_weight, kl_weight, options.kd).sum(), ce, kl, unit, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *heads, _, ce_weight, kl_weight, ctx.options = inputs
        ctx.dtypes = _dtypes(heads, ctx.options)
        _save(ctx, ce_weight, kl_weight, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ce_weight, kl_weight, ce, kl, unit, *saved = ctx.saved_tensors
        gradients = scaled(saved, upstream * unit, ctx.dtypes, in_place=_may_write_over_saved(upstream))
        of_weights = weight_gradients(ctx.needs_input_grad[7:9], upstream, ce_weight, kl_weight, ce, kl)
        return *_of_heads(gradients, ctx.options), None, *of_weights, None


class LinearKDRowLossesFunction(torch.autograd.Function):
    """The row losses one by one: their upstream gradients come with backward, which projects the chunks again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        *inputs: Any,  # as in LinearKDLossFunction
    ) -> tuple[Tensor, Tensor, Tensor]:  # row losses, CE and KL, [N] float64 each
        *tensors, options = inputs
        ce, kl, _ = linear_row_losses(*tensors, options=_without_gradients(options))
        *_, ce_weight, kl_weight = tensors
        return weighted_sum(ce, kl, ce_weight, kl_weight, options.kd), ce, kl

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        _save(ctx, *tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *heads, labels, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        gradients: list[Tensor] = []
        if any(ctx.options.needed):
            weights = ce_weight * upstream, kl_weight * upstream
            operator = functools.partial(linear_row_losses, options=ctx.options)
            unit, *gradients = _in_backward(operator, *heads, labels, *weights)[2:]
            gradients = scaled(gradients, unit, _dtypes(heads, ctx.options), in_place=not torch.is_grad_enabled())
        of_weights = weight_gradients(ctx.needs_input_grad[7:9], upstream, ce_weight, kl_weight, ce, kl)
        return *_of_heads(gradients, ctx.options), None, *of_weights, None


def _without_gradients(options: LinearOptions) -> LinearOptions:
    kd, needed, dtype, teacher_dtype, logits_dtype, workspace_bytes = options  # PyTorch 2.7 does not trace `_replace`
    return LinearOptions(kd, (False,) * len(needed), dtype, teacher_dtype, logits_dtype, workspace_bytes)


def _dtypes(heads: Sequence[Tensor | None], options: LinearOptions) -> list[torch.dtype]:
    """Of the gradients that are asked for."""
    return [tensor.dtype for tensor, need in zip(heads, options.needed, strict=True) if need and tensor is not None]


def _of_heads(gradients: Sequence[Tensor], options: LinearOptions) -> list[Tensor | None]:
    """One for each tensor of the heads, from those that are asked for."""
    given = iter(gradients)
    return [next(given) if need else None for need in options.needed]
