"""Checks of the arguments of `linear_kd_loss` that say what the heads are and where gradients go."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_device_type,
    check_float_tensor,
    check_leading,
    check_plain_tensor,
    check_positive,
    is_integer,
    is_number,
    vocabulary_of,
    what,
)
from .options import Function, Lora, Options


class Heads(NamedTuple):
    """The arguments of `linear_kd_loss` that say what the heads are, and where the gradient of the weight goes."""

    student_hidden: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    student_head: Function | None
    student_lora: Lora | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_head: Function | None
    counted_rows: int | None
    weight_grad_out: Tensor | None
    weight_grad_scale: float | Tensor


def check_heads(given: Heads, options: Options) -> int:
    """Return V, the number of real columns."""
    _check_teacher_is_whole(given)
    _check_head("student", given.student_hidden, given.student_weight, given.student_bias, given.student_head)
    teacher = given.teacher_hidden, given.teacher_weight, given.teacher_bias, given.teacher_head
    if given.teacher_hidden is not None:
        _check_head("teacher", *teacher)
        check_device("teacher_hidden", given.teacher_hidden, given.student_hidden)
        check_leading("teacher_hidden", given.teacher_hidden, given.student_hidden)
    widths = [weight.shape[0] for weight in (given.student_weight, given.teacher_weight) if weight is not None]
    if not widths:
        if options.vocab_size is None:
            raise ValueError("vocab_size: expected the number of columns, since no head has a weight, got None")
        widths = [options.vocab_size]
    return vocabulary_of("teacher_weight", widths, options.vocab_size)


def _check_teacher_is_whole(given: Heads) -> None:
    head = "teacher_weight" if given.teacher_head is None else "teacher_head"
    has_head = given.teacher_weight is not None or given.teacher_head is not None
    if (given.teacher_hidden is None) == has_head:
        missing, other = ("teacher_hidden", head) if has_head else ("teacher_weight", "teacher_hidden")
        raise ValueError(f"{missing}: expected a tensor beside {other}, got None; without a teacher pass None for both")
    if given.teacher_hidden is None and given.teacher_bias is not None:
        raise ValueError(f"teacher_bias: expected None without a teacher, got {what(given.teacher_bias)}")


def _check_head(
    who: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, function: Function | None
) -> None:
    hidden = check_float_tensor(f"{who}_hidden", hidden, "hidden states")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{who}_hidden: expected shape [..., H] with H >= 1, got {tuple(hidden.shape)}")
    check_device_type(f"{who}_hidden", hidden)
    if function is not None:
        _check_function(who, weight, bias, function)
        return
    weight = check_float_tensor(f"{who}_weight", weight, "the weight of the output head")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{who}_weight: expected shape [V, H] with V >= 1, as in nn.Linear, got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{who}_weight: expected shape [V, {hidden.shape[-1]}] for {who}_hidden of width {hidden.shape[-1]}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        bias = check_float_tensor(f"{who}_bias", bias, "the bias of the output head")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{who}_bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in ((f"{who}_weight", weight), (f"{who}_bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name}: expected a tensor on the device of {who}_hidden, {hidden.device}, got {tensor.device}"
            )
        if products_dtype(tensor) != products_dtype(hidden):
            autocast = "which torch.autocast does not do with float64"
            if torch.float64 not in (tensor.dtype, hidden.dtype):
                autocast = "or run under torch.autocast"
            raise ValueError(
                f"{name}: expected the dtype of {who}_hidden, {hidden.dtype}, got {tensor.dtype}; cast one of them, "
                f"{autocast}"
            )


def _check_function(who: str, weight: Tensor | None, bias: Tensor | None, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{who}_head: expected a function from hidden states to logits, got {what(function)}")
    for name, tensor in ((f"{who}_weight", weight), (f"{who}_bias", bias)):
        if tensor is not None:
            raise ValueError(f"{name}: expected None with {who}_head, which computes the logits, got {what(tensor)}")


def check_logits_of(name: str, logits: object, hidden: Tensor, V: int, *, is_exact: bool) -> None:
    """Check what a function in place of a head returns for hidden states [C, H]: logits [C, V], or wider ones."""
    logits = check_float_tensor(f"{name}: its result", logits, "logits")  # type: ignore[arg-type]
    C, width = hidden.shape[0], logits.shape[-1] if logits.dim() else 0
    if logits.shape != (C, width) or width < V or (is_exact and width > V):
        columns = f"V = {V}" if is_exact else f"at least vocab_size = {V} columns"
        remedy = "; if both models only pad the same vocabulary, pass vocab_size= its real size" if is_exact else ""
        raise ValueError(
            f"{name}: expected logits of shape ({C}, V) with {columns} for hidden states of shape "
            f"{tuple(hidden.shape)}, got {tuple(logits.shape)}{remedy}"
        )
    if logits.device != hidden.device:
        raise ValueError(f"{name}: expected logits on the device of its input, {hidden.device}, got {logits.device}")
    if logits.dtype == torch.float64 and hidden.dtype != torch.float64:
        raise TypeError(
            f"{name}: expected float64 logits from float64 hidden states only, got them from {hidden.dtype}"
        )


def check_head_options(given: Heads, options: Options) -> None:
    """Check the options that depend on the heads."""
    _check_logits_dtype(given.student_hidden, given.teacher_hidden, options.logits_dtype)
    functions = [f"{who}_head" for who in ("student", "teacher") if getattr(given, f"{who}_head") is not None]
    if functions and options.memory == "lean":
        raise ValueError(
            f"memory: expected 'default' with {functions[0]}, got 'lean', which projects by slabs of a weight"
        )
    if given.teacher_head is not None and options.teacher_grad:
        raise ValueError("teacher_grad: expected False with teacher_head, whose parameters get no gradients, got True")
    if given.student_lora is not None:
        _check_lora(given)
    bound = given.counted_rows
    if bound is not None and not is_integer(bound):
        raise TypeError(
            f"counted_rows: expected a number of rows, got {what(bound)}; reading it from a tensor would wait"
        )
    if bound is not None and bound < 0:
        raise ValueError(f"counted_rows: expected at least 0, got {bound}")
    if options.compact is True and bound is None and not may_synchronise():
        raise ValueError(
            "compact: expected None or False under torch.compile, torch.func and in the capture of a CUDA graph, where the "
            "number of rows cannot be read, got True; pass counted_rows, a bound that the host knows"
        )
    _check_weight_grad_out(given, options)
    if (functions or given.weight_grad_out is not None) and torch._C._are_functorch_transforms_active():
        name = functions[0] if functions else "weight_grad_out"
        raise ValueError(f"{name}: expected None under the transforms of torch.func, which cannot follow it")


def may_synchronise() -> bool:
    """Return whether the host may wait for the device: not while a graph is traced, transformed or captured."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _check_lora(given: Heads) -> None:
    if given.student_head is not None:
        raise ValueError("student_lora: expected None with student_head, which computes the logits, got an adapter")
    lora: Any = given.student_lora
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"student_lora: expected (A, B, scale), got {what(lora)}")
    A, B, scale = lora
    weight = given.student_weight
    assert weight is not None
    for name, tensor in (("A", A), ("B", B)):
        check_float_tensor(f"student_lora: {name}", tensor, "the weight of the adapter")
        check_device(f"student_lora: {name}", tensor, given.student_hidden)
    V, H = weight.shape
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[1] != H or B.shape[0] != V:
        raise ValueError(
            f"student_lora: expected A of shape (r, {H}) and B of shape ({V}, r), got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if not is_number(scale) or not math.isfinite(scale):
        raise TypeError(f"student_lora: expected a finite number as the scale, got {what(scale)}")


def _check_weight_grad_out(given: Heads, options: Options) -> None:
    out, weight = given.weight_grad_out, given.student_weight
    scale = given.weight_grad_scale
    if isinstance(scale, Tensor):
        check_plain_tensor("weight_grad_scale", scale)
        if scale.numel() != 1:
            raise ValueError(f"weight_grad_scale: expected one number, got {what(scale)}")
        check_device("weight_grad_scale", scale, given.student_hidden)
    else:
        check_positive("weight_grad_scale", scale, "a finite number above 0, or a tensor of one element")
    if out is None:
        if isinstance(scale, Tensor) or scale != 1:
            raise ValueError(f"weight_grad_scale: expected 1 without weight_grad_out, got {what(scale)}")
        return
    if weight is None:
        raise ValueError(
            "weight_grad_out: expected None with student_head, whose weight gets no gradient, got a tensor"
        )
    check_plain_tensor("weight_grad_out", out)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if out.shape != weight.shape or out.dtype != dtype or not out.is_contiguous() or out.device != weight.device:
        raise ValueError(
            f"weight_grad_out: expected a contiguous tensor of shape {tuple(weight.shape)} and {dtype} on {weight.device}, "
            f"got {what(out)} on {out.device}"
        )
    if out.requires_grad:
        raise ValueError("weight_grad_out: expected a tensor that does not require grad, got one that does")
    models = given.student_hidden, given.teacher_hidden
    # Of either model: the unit is that of all gradients.
    if torch.float16 in [products_dtype(hidden) for hidden in models if hidden is not None]:
        raise ValueError(
            "weight_grad_out: expected None with float16 products, whose gradients have a unit of their own, got a tensor"
        )
    if options.reduction == "none" and (isinstance(scale, Tensor) or scale != 1):
        raise ValueError(f"weight_grad_scale: expected 1 with reduction='none', got {what(scale)}")


def products_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a head's tensor is multiplied: the autocast dtype under torch.autocast, else its own.

    float64 is never cast.
    """
    kind = tensor.device.type
    autocast = tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else tensor.dtype


def _check_logits_dtype(
    student_hidden: Tensor, teacher_hidden: Tensor | None, logits_dtype: torch.dtype | None
) -> None:
    """Check that logits_dtype is float32 or the dtype of both models' products."""
    for hidden in (student_hidden, teacher_hidden):
        if hidden is None or logits_dtype is None:
            continue
        own = products_dtype(hidden)
        if logits_dtype not in (own, torch.promote_types(own, torch.float32)):
            raise ValueError(
                f"logits_dtype: expected None, torch.float32 or the dtype of the products, {own}, got {logits_dtype}"
            )
