"""Checks of a user's arguments: the argument's name, what was expected, what came, what to do."""

import math

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


def is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"{value!r} ({type(value).__name__})"


def _readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, in eager mode, where that synchronises with nothing."""
    eager = not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter)
    return eager and tensor.device.type == "cpu"


def check_logits(student: Tensor, teacher: Tensor | None, vocab_size: int | None) -> int:
    """The number of real columns, V."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits is None and name == "teacher_logits":
            continue
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_what(logits)}")
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name}: expected dtype float32, bfloat16, float16 or float64, got {logits.dtype}; pass logits, "
                f"not token ids"
            )
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")
        if logits.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a tensor on the CPU or a CUDA device, got one on {logits.device}")
        if logits.device.type == "cuda" and logits.dtype == torch.float64:
            raise TypeError(f"{name}: float64 is computed on the CPU only, got a float64 tensor on {logits.device}")
    widths = [logits.shape[-1] for logits in (student, teacher) if logits is not None]
    if teacher is not None:
        check_device("teacher_logits", teacher, student)
        if teacher.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"teacher_logits: expected the student's leading dimensions {tuple(student.shape[:-1])}, "
                f"got {tuple(teacher.shape[:-1])}"
            )
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"teacher_logits: expected the student's vocabulary of {widths[0]}, got {widths[1]}; if both only pad "
                f"the same vocabulary, pass vocab_size= its real size"
            )
        return widths[0]
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size: expected an integer from 1 to {min(widths)}, got {_what(vocab_size)}")
    return vocab_size


def check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name}: expected a tensor on the student's device {student.device}, got {tensor.device}")


def check_options(
    temperature: float, ignore_index: int, reduction: str, num_items: int | float | Tensor | None
) -> None:
    if not is_number(temperature):
        raise TypeError(
            f"temperature: expected a Python number, got {_what(temperature)}; reading it from a tensor would "
            f"synchronise with the device"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {_what(ignore_index)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items: expected reduction='mean', whose divisor it replaces, got reduction={reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected a number or a tensor of one element, got {_what(num_items)}")
    elif not is_number(num_items):
        raise TypeError(f"num_items: expected a number or a tensor of one element, got {_what(num_items)}")
    elif not num_items > 0:
        raise ValueError(f"num_items: expected a number above 0, got {num_items}")


def check_alpha(alpha: float | Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"alpha: expected a number or a floating-point tensor, got {_what(alpha)}")
        check_row_shape("alpha", alpha, student)
        if _readable(alpha) and not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise ValueError(f"alpha: expected values in [0, 1], got {alpha.min().item()} to {alpha.max().item()}")
    elif not is_number(alpha):
        raise TypeError(f"alpha: expected a number or a floating-point tensor, got {_what(alpha)}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if labels is None and (isinstance(alpha, Tensor) or alpha < 1):
        raise ValueError(
            f"labels: expected a tensor, got None with alpha={_what(alpha)}; without labels there is no cross-entropy "
            f"term: pass alpha=1"
        )
    if teacher is None and (isinstance(alpha, Tensor) or alpha > 0):
        raise ValueError(
            f"teacher_logits: expected a tensor, got None with alpha={_what(alpha)}; without a teacher there is no KL "
            f"term: pass alpha=0"
        )


def check_row_shape(name: str, tensor: Tensor, student: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_what(tensor)}")
    if tensor.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: expected one value a row, shape {tuple(student.shape[:-1])}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, student)


def check_labels(labels: Tensor, student: Tensor, vocabulary: int, ignore_index: int) -> None:
    check_row_shape("labels", labels, student)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels: expected class ids of dtype int64 or int32, got {labels.dtype}")
    if _readable(labels):
        wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
        if bool(wrong.any()):
            raise IndexError(
                f"labels: expected class ids from 0 to {vocabulary - 1} or ignore_index={ignore_index}, "
                f"got {labels[wrong].flatten()[0].item()}"
            )


def check_token_weights(token_weights: Tensor, student: Tensor) -> None:
    check_row_shape("token_weights", token_weights, student)
    if token_weights.is_complex():
        raise TypeError(f"token_weights: expected real numbers, got {token_weights.dtype}")


def check_inplace_backward(student: Tensor) -> None:
    if student.is_leaf and student.requires_grad:
        raise ValueError(
            "inplace_backward: expected student_logits computed by a model, got a leaf that requires grad, whose "
            "memory its owner holds; pass inplace_backward=False"
        )
    extent = 1  # elements that the dimensions seen so far, the narrowest strides first, reach over
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"inplace_backward: expected student_logits whose elements have memory of their own, got strides "
                f"{student.stride()} for shape {tuple(student.shape)} (an expanded tensor?); pass "
                f"inplace_backward=False, or a copy"
            )
        extent += stride * (size - 1)
