"""The autograd functions of the losses.

Results that are saved for backward are also returned, so that autograd knows that the gradient depends on the inputs
through them.  A second derivative arrives in `backward` as an upstream gradient of such a result, and is refused there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators
from .heads.operator import linear_losses
from .heads.sweep import LinearOptions, Outside, returned
from .launch import SinglePass
from .rows import readable
from .scaling import is_batched, scaled
from .sweep import KDOptions, weight_gradients

Backward = Callable[..., tuple[Tensor | None, ...]]


def _first_order(backward: Backward) -> Backward:
    """Return a backward pass that takes the upstream gradient of the first output, and refuses one of any other output."""

    @functools.wraps(backward)
    def first_order(ctx: Any, upstream: Tensor | None, *other_upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        # A compiler passes a gradient for every output, and refuses second derivatives by itself.
        if not torch.compiler.is_compiling() and any(gradient is not None for gradient in other_upstreams):
            operators.refuse_derivative()
        return (None,) * len(ctx.needs_input_grad) if upstream is None else backward(ctx, upstream)

    return first_order


class _Constant(torch.autograd.Function):
    """An operator that is called in a backward pass under `create_graph=True`.

    Its results require grad, as the caller asked for, and their derivative is refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        operators.refuse_derivative()


def _in_backward(operator: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
    is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    results: tuple[Tensor, ...] = _Constant.apply(operator, *arguments) if is_recorded else operator(*arguments)
    return results


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward, also those made under `torch.inference_mode()`, such as a teacher's logits or labels.

    PyTorch refuses to save an inference tensor, since it has no version to check.  An ordinary tensor in the same memory is
    saved instead.
    """
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        tensors = tuple(None if tensor is None else _without_inference(tensor) for tensor in tensors)
    ctx.save_for_backward(*tensors)


def _without_inference(tensor: Tensor) -> Tensor:
    if not tensor.is_inference():
        return tensor
    same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return same.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _may_write_over_saved(upstream: Tensor) -> bool:
    """Return whether a backward pass may overwrite saved tensors: no other pass follows, and none records this one."""
    is_recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return not (is_recorded or is_batched(upstream) or _graph_is_kept())


def _graph_is_kept() -> bool:
    """Return whether another backward pass may follow (`retain_graph=True`)."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # a PyTorch that does not say
        return True


class KDLossFunction(torch.autograd.Function):
    """The losses of the rows from logits, in two passes.

    The weights of each row hold alpha, T^2, token weights and the divisor of the mean.  Backward multiplies them by the
    upstream gradient, so every reduction and every upstream gradient is right, as is a repeated backward.  It saves the
    logits, which the caller holds anyway, and O(N) numbers.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None: no divergence
        labels: Tensor | None,  # [N]; None: no CE
        weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 adds nothing, whatever it holds
        options: KDOptions,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:  # the fields of Losses
        return tuple(operators.losses(student, teacher, labels, weights, *operators.packed(options)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.inplace_backward = inputs
        _save(ctx, *tensors, output[4])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, weights, statistics = ctx.saved_tensors
        student_gradient = teacher_gradient = for_weights = None
        student_grad, teacher_grad, _, weights_grad, *_ = ctx.needs_input_grad
        if student_grad or teacher_grad:
            options = operators.packed(ctx.options)
            arguments = student, teacher, labels, statistics, weights, upstream, teacher_grad, *options
            if ctx.inplace_backward and not (torch.is_grad_enabled() or is_batched(upstream)):
                teacher_gradient = operators.logit_gradient_(*arguments)
                torch.autograd.graph.increment_version(student)
                student_gradient = student.detach()
            else:
                student_gradient, teacher_gradient = _in_backward(operators.logit_gradient, *arguments)
        if weights_grad:
            for_weights = weight_gradients(statistics, weights, upstream, ctx.options)
        return (
            student_gradient if student_grad else None, teacher_gradient if teacher_grad else None, None, for_weights,
            None, None,
        )  # fmt: skip


class Overwritten:
    """A record, shared by two autograd functions, that the loss has overwritten the logits with their gradient."""

    gradient: Tensor | None = None  # set by the backward pass of the loss


class OverwriteFunction(torch.autograd.Function):
    """The identity, applied to logits that the loss is about to overwrite.  It finds a later use of the logits.

    Its `backward` raises unless the upstream gradient is the one that the loss has written.  Anything computed from the
    logits after the loss took the gradient for logits.  Its own gradient would be added to the loss's, and the sum is a
    tensor elsewhere in memory.
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


class SinglePassFunction(torch.autograd.Function):
    """The sum of the row losses from logits, with the gradient from the same pass.

    Backward multiplies the gradient by the upstream gradient, in place if no other backward pass can follow.  It saves the
    gradient and O(N) numbers, so that the logits of both models can be freed after the forward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None: no divergence
        labels: Tensor | None,  # [N]; None: no CE
        weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 adds nothing, whatever it holds
        options: KDOptions,
        launch: SinglePass,
        written: "Overwritten | None",  # given if the gradient overwrites the student; None: it has its own memory
    ) -> tuple[Tensor, ...]:  # the fields of Losses; the gradient
        arguments = student, teacher, labels, weights, list(launch), *operators.packed(options)
        if written is None:
            return tuple(operators.losses_and_gradient(*arguments))
        losses = operators.losses_and_gradient_(*arguments)
        torch.autograd.graph.increment_version(student)
        return *losses, student.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, _, weights, ctx.options, _, ctx.written = inputs
        _save(ctx, weights, *output[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, statistics, gradient = ctx.saved_tensors
        for_weights = None
        if ctx.needs_input_grad[3]:
            for_weights = weight_gradients(statistics, weights, upstream, ctx.options)
        in_place = _may_write_over_saved(upstream)
        (gradient,) = scaled([gradient], [upstream], [gradient.dtype], in_place=in_place)
        if ctx.written is not None:
            ctx.written.gradient = gradient
        return gradient, None, None, for_weights, None, None, None


class LinearKDLossFunction(torch.autograd.Function):
    """The sum of the row losses, from hidden states and heads.

    The forward pass takes the gradients chunk by chunk, while a chunk's logits exist.  Backward multiplies them by the
    upstream gradient, in place if no other backward pass can follow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor,  # [N, H_s]
        weight: Tensor | None,  # [V', H_s], V' >= vocab_size; None with a function in its place
        bias: Tensor | None,  # [V']
        lora_hidden: Tensor | None,  # [N, r]; None: no LoRA
        lora_weight: Tensor | None,  # [V', r]
        teacher_hidden: Tensor | None,  # [N, H_t]; None: no divergence
        teacher_weight: Tensor | None,  # [V'', H_t]; None with a function in its place
        teacher_bias: Tensor | None,  # [V'']
        labels: Tensor | None,  # [N]; None: no CE
        weights: Tensor,  # [3, N]
        upstream: Tensor | None,  # a scalar, that of weight_grad_out; None: 1
        options: LinearOptions,
        outside: Outside,
    ) -> tuple[Tensor, ...]:  # the fields of Losses; unit and gradients
        heads = hidden, weight, bias, lora_hidden, lora_weight, teacher_hidden, teacher_weight, teacher_bias
        return linear_losses(*heads, labels, weights, upstream, options=options, outside=outside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *heads, _, weights, upstream, ctx.options, ctx.outside = inputs
        ctx.dtypes = _dtypes(heads, ctx.options, ctx.outside)
        _save(ctx, weights, upstream, *output[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, taken, statistics, unit, *saved = ctx.saved_tensors
        factors = [upstream, unit] if unit.numel() else [upstream]
        if taken is not None:
            factors = [_over_what_was_taken(upstream, taken)]
        gradients = scaled(saved, factors, ctx.dtypes, in_place=_may_write_over_saved(upstream))
        for_weights = None
        if ctx.needs_input_grad[WEIGHTS]:
            for_weights = weight_gradients(statistics, weights, upstream, ctx.options.kd)
        return *_for_heads(gradients, ctx.options, ctx.outside), None, for_weights, None, None, None


WEIGHTS = 9  # the index of the weights of the rows among the inputs of the linear functions


def _over_what_was_taken(
    upstream: Tensor,
    taken: Tensor,  # the upstream gradient that forward has taken for the caller's sum of the weight's gradient
) -> Tensor:
    """Return 1, the factor of the other gradients, which forward has taken with that upstream gradient too.

    Raises:
        RuntimeError: the upstream gradient is another one, on a CPU.  On a GPU the result is NaN.
    """
    is_same = (upstream.double() - taken).abs() <= 1e-6 * taken.abs()
    if readable(is_same) and not is_batched(is_same) and not bool(is_same):
        raise RuntimeError(
            f"weight_grad_scale: expected the upstream gradient of the loss, {upstream.item():g}, got {taken.item():g}, by "
            "which forward has multiplied what it added to weight_grad_out; pass it, and take what was added away"
        )
    return torch.where(is_same, 1.0, torch.nan)


class LinearKDRowLossesFunction(torch.autograd.Function):
    """The row losses, one value per row.  Their upstream gradients come with backward, which projects the chunks again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        *inputs: Any,  # as in LinearKDLossFunction
    ) -> tuple[Tensor, ...]:  # the fields of Losses
        *tensors, options, outside = inputs
        return linear_losses(*tensors, options=_without_gradients(options), outside=outside)[:5]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.options, ctx.outside = inputs
        _save(ctx, *tensors, output[4])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *heads, labels, weights, statistics = ctx.saved_tensors
        gradients: Sequence[Tensor] = []
        for_weights = None
        if any(ctx.options.needed):
            operator = functools.partial(linear_losses, options=ctx.options, outside=ctx.outside)
            unit, *found = _in_backward(operator, *heads, labels, weights, upstream)[5:]
            factors, in_place = [unit] if unit.numel() else [], not torch.is_grad_enabled()
            gradients = scaled(found, factors, _dtypes(heads, ctx.options, ctx.outside), in_place=in_place)
        if ctx.needs_input_grad[WEIGHTS]:
            for_weights = weight_gradients(statistics, weights, upstream, ctx.options.kd)
        return *_for_heads(gradients, ctx.options, ctx.outside), None, for_weights, None, None, None


def _without_gradients(options: LinearOptions) -> LinearOptions:
    kd, needed, *rest = options  # PyTorch 2.7 does not trace `_replace`
    return LinearOptions(kd, (False,) * len(needed), *rest)  # type: ignore[arg-type]


def _dtypes(heads: Sequence[Tensor | None], options: LinearOptions, outside: Outside) -> list[torch.dtype]:
    """Return the dtypes of the gradients that are returned."""
    pairs = zip(heads, returned(options, outside), strict=True)
    return [tensor.dtype for tensor, is_returned in pairs if is_returned and tensor is not None]


def _for_heads(gradients: Sequence[Tensor], options: LinearOptions, outside: Outside) -> list[Tensor | None]:
    """Return the gradients with None for each tensor of the heads that needs no gradient, or has it elsewhere."""
    given = iter(gradients)
    return [next(given) if is_returned else None for is_returned in returned(options, outside)]


def apply(function: type[torch.autograd.Function], *inputs: Any) -> tuple[Tensor, ...]:
    """Apply a function.

    PyTorch binds the arguments of a function with a `setup_context` to its signature at every call, which takes longer than
    the sweep of a few rows.  Only `torch.func` and compilers need a function of that form, and get it.
    """
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        function = _in_eager_mode(function)
    results: tuple[Tensor, ...] = function.apply(*inputs)
    return results


@functools.cache
def _in_eager_mode(function: Any) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)
