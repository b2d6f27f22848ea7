"""Checks of a user's arguments.  Each message gives the argument's name, what was expected, what came and what to do."""

import math
import numbers
import reprlib
from typing import Any

import torch
from torch import Tensor

from .divergences import DIVERGENCES, Divergence
from .heads.chunks import MEMORIES
from .logit_map import LogitMap
from .options import Options, Scale, Softcap
from .rows import readable

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int32, torch.int64)
REAL_DTYPES = (*LOGIT_DTYPES, torch.uint8, torch.int8, torch.int16, *LABEL_DTYPES)
REDUCTIONS = ("mean", "sum", "none")
FLAGS = ("shift", "teacher_grad", "inplace_backward", "return_parts")
BUILT_IN = (float, int, bool, type(None), Tensor)
SMALLEST, LARGEST = 1e-18, 1e18  # bounds of numbers in the formula: float32 holds their squares and inverses


def plain(value: Any) -> Any:
    """Return a numpy number as a Python number, and any other value unchanged.  numpy need not be installed.

    While a compiler traces, values are returned unchanged: it has turned numpy numbers into arrays before.
    """
    if type(value) in BUILT_IN or torch.compiler.is_compiling() or type(value).__module__ != "numpy":
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def is_number(value: object) -> bool:
    return isinstance(value, (float, int)) and not isinstance(value, bool)  # PyTorch 2.7 does not trace `float | int`


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"  # a list of a million numbers is not printed


def check_logits(student: Tensor, teacher: Tensor | None, vocab_size: int | None) -> int:
    """Return V, the number of real columns."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits is None and name == "teacher_logits":
            continue
        logits = check_float_tensor(name, logits, "logits, not token ids")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., V] with V >= 1, got {tuple(logits.shape)}")
        check_device_type(name, logits)
    if teacher is not None:
        check_device("teacher_logits", teacher, student)
        check_leading("teacher_logits", teacher, student)
    widths = [logits.shape[-1] for logits in (student, teacher) if logits is not None]
    return vocabulary_of("teacher_logits", widths, vocab_size)


def logit_maps(logit_scale: Scale, logit_softcap: Softcap) -> tuple[LogitMap, LogitMap]:
    """Return the maps of student and teacher.  Each option is one value for both models, or a pair."""
    scales, softcaps = _pair("logit_scale", logit_scale), _pair("logit_softcap", logit_softcap)
    for scale in scales:
        check_positive("logit_scale", scale, "a finite number above 0, or a pair of such (student, teacher)")
    for softcap in softcaps:
        if softcap is not None:
            check_positive(
                "logit_softcap", softcap, "None or a finite number above 0, or a pair of such (student, teacher)"
            )
    student, teacher = (
        LogitMap(float(scale), math.inf if softcap is None else float(softcap))
        for scale, softcap in zip(scales, softcaps, strict=True)
    )
    return student, teacher


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return plain(value), plain(value)
    if len(value) != 2:
        raise ValueError(f"{name}: expected one value or a pair (student, teacher), got {len(value)} values")
    return plain(value[0]), plain(value[1])


def check_positive(name: str, value: Any, expected: str, hint: str = "") -> None:
    if not is_number(value):
        raise TypeError(f"{name}: expected {expected}, got {what(value)}{hint}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {what(value)}")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a number from {SMALLEST} to {LARGEST}, got {what(value)}")


def check_plain_tensor(name: str, tensor: object) -> Tensor:
    """Refuse sparse and nested tensors, and DTensors, whose local part the operators would take for the whole tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {what(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one or one of layout {tensor.layout}")
    placements = getattr(tensor, "placements", None)  # only a DTensor has them; this needs no import of its class
    if placements is not None:
        remedy = "pass its full_tensor()"
        if name in ("student_weight", "student_bias"):  # full_tensor() would get a gradient from one rank's rows only
            remedy = (
                "compute the loss inside the forward of the module that fully_shard wraps, where its parameters are "
                "whole"
            )
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor with placements {placements}; {remedy}")
    return tensor


def check_float_tensor(name: str, tensor: Tensor | None, meaning: str) -> Tensor:
    tensor = check_plain_tensor(name, tensor)
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16, float16 or float64, got {tensor.dtype}; pass {meaning}"
        )
    return tensor


def check_device_type(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a tensor on the CPU or a CUDA device, got one on {tensor.device}")
    if tensor.device.type == "cuda" and tensor.dtype == torch.float64:
        raise TypeError(f"{name}: float64 is computed on the CPU only, got a float64 tensor on {tensor.device}")


def check_leading(name: str, teacher: Tensor, student: Tensor) -> None:
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{name}: expected the student's leading dimensions {tuple(student.shape[:-1])}, "
            f"got {tuple(teacher.shape[:-1])}"
        )


def vocabulary_of(name: str, widths: list[int], vocab_size: int | None) -> int:
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"{name}: expected the student's vocabulary of {widths[0]}, got {widths[1]}; if both only pad "
                f"the same vocabulary, pass vocab_size= its real size"
            )
        return widths[0]
    _check_vocab_size(vocab_size, min(widths))
    return vocab_size


def _check_vocab_size(vocab_size: int | None, largest: int | None) -> None:
    if vocab_size is None or (is_integer(vocab_size) and 1 <= vocab_size <= (largest or vocab_size)):
        return
    expected = "an integer, at least 1" if largest is None else f"an integer from 1 to {largest}"
    error = ValueError if is_integer(vocab_size) else TypeError
    raise error(f"vocab_size: expected {expected}, got {what(vocab_size)}")


def check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name}: expected a tensor on the student's device {student.device}, got {tensor.device}")


def check_options(options: Options) -> tuple[LogitMap, LogitMap]:
    """Check the options by themselves, and return the maps of student and teacher."""
    _check_alpha_values(options.alpha)
    hint = "; pass a Python number: reading it from a tensor would synchronise with the device"
    check_positive("temperature", options.temperature, "a finite number above 0", hint)
    if not is_integer(options.ignore_index):
        raise TypeError(f"ignore_index: expected an integer, got {what(options.ignore_index)}")
    check_choice("reduction", options.reduction, REDUCTIONS)
    if not isinstance(options.divergence, Divergence):
        check_choice("divergence", options.divergence, tuple(DIVERGENCES), ", or an object of fused_kd.divergences")
    _check_vocab_size(options.vocab_size, None)
    logits_dtype, workspace_bytes = options.logits_dtype, options.workspace_bytes
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype: expected None or a torch.dtype, got {what(logits_dtype)}")
    if logits_dtype not in (None, *LOGIT_DTYPES):
        raise ValueError(f"logits_dtype: expected None, torch.float32 or the dtype of the products, got {logits_dtype}")
    if workspace_bytes is not None and not is_integer(workspace_bytes):
        raise TypeError(f"workspace_bytes: expected a number of bytes, got {what(workspace_bytes)}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: expected at least 1, got {workspace_bytes}")
    check_choice("memory", options.memory, MEMORIES)
    if options.compact is not None and not isinstance(options.compact, bool):
        raise TypeError(f"compact: expected None, True or False, got {what(options.compact)}")
    for name in FLAGS:
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {what(value)}")
    return logit_maps(options.logit_scale, options.logit_softcap)


def check_choice(name: str, value: object, choices: tuple[str, ...], other: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        *others, last = [repr(choice) for choice in choices]
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}{other}, got {what(value)}")


def check_rows(
    student: Tensor,  # logits or hidden states, [..., any]
    teacher: Tensor | None,
    teacher_name: str,
    labels: Tensor | None,
    token_weights: Tensor | None,
    num_items: int | float | Tensor | None,
    options: Options,
    vocabulary: int,
) -> None:
    """Check the arguments that have one value per row, and the divisor of their sum."""
    _check_num_items(num_items, options.reduction, student)
    if options.shift and labels is None:
        raise ValueError(
            "labels: expected a tensor with shift=True, which moves the labels, got None; pass token ids, or shift=False"
        )
    _check_alpha(options.alpha, student, teacher, labels, teacher_name)
    if labels is not None:
        _check_labels(labels, student, vocabulary, options)
    if token_weights is not None:
        _check_row_shape("token_weights", token_weights, student)
        if token_weights.dtype not in (*REAL_DTYPES, torch.bool):
            raise TypeError(f"token_weights: expected real numbers, got {token_weights.dtype}")


def _check_num_items(
    num_items: int | float | Tensor | None,
    reduction: str,
    student: Tensor,  # logits or hidden states
) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items: expected reduction='mean', whose divisor it replaces, got reduction={reduction!r}"
        )
    if not isinstance(num_items, Tensor):
        check_positive("num_items", num_items, "a finite number above 0 or a tensor of one element")
        return
    check_plain_tensor("num_items", num_items)
    if num_items.dtype not in REAL_DTYPES:
        raise TypeError(f"num_items: expected real numbers, got {num_items.dtype}")
    if num_items.numel() != 1:
        raise ValueError(f"num_items: expected a number or a tensor of one element, got {what(num_items)}")
    if num_items.device.type != "cpu":
        check_device("num_items", num_items, student)
    if readable(num_items) and not 0 <= num_items.item() < math.inf:  # 0 is right if no row of the batch counts
        raise ValueError(f"num_items: expected a finite number, at least 0, got {num_items.item()}")


def _check_alpha_values(alpha: float | Tensor) -> None:
    if isinstance(alpha, Tensor):
        check_plain_tensor("alpha", alpha)
        if alpha.dtype not in LOGIT_DTYPES:
            raise TypeError(f"alpha: expected a number or a floating-point tensor, got {what(alpha)}")
        if readable(alpha) and not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise ValueError(f"alpha: expected values in [0, 1], got {alpha.min().item()} to {alpha.max().item()}")
    elif not is_number(alpha):
        raise TypeError(f"alpha: expected a number or a floating-point tensor, got {what(alpha)}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {what(alpha)}")


def _check_alpha(
    alpha: float | Tensor,
    student: Tensor,  # logits or hidden states
    teacher: Tensor | None,
    labels: Tensor | None,
    teacher_name: str,
) -> None:
    if isinstance(alpha, Tensor):
        if alpha.dim():
            _check_row_shape("alpha", alpha, student)
        else:
            check_device("alpha", alpha, student)
    if labels is None and (isinstance(alpha, Tensor) or alpha < 1):
        raise ValueError(
            f"labels: expected a tensor, got None with alpha={what(alpha)}; without labels there is no cross-entropy "
            f"term: pass alpha=1"
        )
    if teacher is None and (isinstance(alpha, Tensor) or alpha > 0):
        raise ValueError(
            f"{teacher_name}: expected a tensor, got None with alpha={what(alpha)}; without a teacher there is no KL "
            f"term: pass alpha=0"
        )


def _check_row_shape(name: str, tensor: Tensor, student: Tensor) -> None:
    check_plain_tensor(name, tensor)
    if tensor.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: expected one value a row, shape {tuple(student.shape[:-1])}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, student)


def _check_labels(labels: Tensor, student: Tensor, vocabulary: int, options: Options) -> None:
    _check_row_shape("labels", labels, student)
    if options.shift and labels.dim() == 0:
        raise ValueError(f"shift: expected False without a sequence dimension, got True with labels of shape {()}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels: expected class ids of dtype int64 or int32, got {labels.dtype}")
    ignore_index, held = options.ignore_index, torch.iinfo(labels.dtype)
    if not held.min <= ignore_index <= held.max:  # PyTorch would truncate it to the labels' dtype
        raise ValueError(
            f"ignore_index: expected an integer that labels of {labels.dtype} can hold, got {what(ignore_index)}"
        )
    if readable(labels):
        read = labels[..., 1:] if options.shift else labels
        if read.numel() == 0 or all(0 <= int(value) < vocabulary for value in read.aminmax()):
            return
        wrong = ((read < 0) | (read >= vocabulary)) & (read != ignore_index)
        if bool(wrong.any()):
            raise IndexError(
                f"labels: expected class ids from 0 to {vocabulary - 1} or ignore_index={ignore_index}, "
                f"got {read[wrong].flatten()[0].item()}"
            )
