"""The operators `fused_kd::row_statistics`, `fused_kd::logit_gradient` and, both in one launch,
`fused_kd::loss_and_gradient`: schemas, fake versions, device dispatch.

CUDA (and ROCm) tensors go to the Triton kernels, CPU tensors to `cpu.py`; with TRITON_INTERPRET=1, CPU tensors go to the
kernels too, which Triton then runs in Python.  Triton is imported when the first kernel is needed.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import statistics as stats
from .backends import cpu
from .logit_map import LogitMap

Function = TypeVar("Function", bound=Callable[..., Any])

# The overload that takes the temperature as a tensor on the CPU, and reads it as it runs: of a compiled graph whose
# temperature changes from call to call.  A float would be a constant of the graph.
TRACED = ".traced"


def define(name: str, schema: str) -> str:
    """The operator's whole name.

    A module that is reloaded or imported anew gets operators in a namespace of their own: compiled graphs, and graphs that
    wait for backward, hold the older ones, and calling an operator that is no more ends the process.
    """
    namespace, turn = "fused_kd", 1
    while hasattr(getattr(torch.ops, namespace), name):
        turn += 1
        namespace = f"fused_kd_{turn}"
    traced = schema.replace("float temperature", "Tensor temperature")
    torch.library.define(f"{namespace}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"{namespace}::{name}{TRACED}", traced, tags=torch.Tag.pt2_compliant_tag)
    return f"{namespace}::{name}"


def operator(name: str) -> torch._ops.OpOverloadPacket:
    """By the whole name."""
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name)  # type: ignore[no-any-return]


_GRADIENT_ARGUMENTS = (
    "Tensor? teacher, Tensor? labels, Tensor statistics, Tensor ce_weight, Tensor kl_weight, float temperature, "
    "SymInt vocab_size, float[] student_map, float[] teacher_map, bool teacher_grad"
)
_ONE_LAUNCH_ARGUMENTS = (
    "Tensor? teacher, Tensor? labels, Tensor ce_weight, Tensor kl_weight, float temperature, SymInt vocab_size, "
    "float[] student_map, float[] teacher_map"
)
ROW_STATISTICS = define(
    "row_statistics",
    "(Tensor student, Tensor? teacher, Tensor ce_weight, Tensor kl_weight, float temperature, bool need_ce, "
    "float[] student_map, float[] teacher_map) -> Tensor",
)
LOGIT_GRADIENT = define("logit_gradient", f"(Tensor student, {_GRADIENT_ARGUMENTS}) -> (Tensor, Tensor)")
LOGIT_GRADIENT_INPLACE = define("logit_gradient_", f"(Tensor(a!) student, {_GRADIENT_ARGUMENTS}) -> Tensor")
LOSS_AND_GRADIENT = define("loss_and_gradient", f"(Tensor student, {_ONE_LAUNCH_ARGUMENTS}) -> (Tensor, Tensor)")
LOSS_AND_GRADIENT_INPLACE = define("loss_and_gradient_", f"(Tensor(a!) student, {_ONE_LAUNCH_ARGUMENTS}) -> Tensor")

row_statistics = operator(ROW_STATISTICS)
logit_gradient = operator(LOGIT_GRADIENT)
logit_gradient_ = operator(LOGIT_GRADIENT_INPLACE)
loss_and_gradient = operator(LOSS_AND_GRADIENT)
loss_and_gradient_ = operator(LOSS_AND_GRADIENT_INPLACE)

NO_DERIVATIVE = (
    "fused_kd: expected one backward pass through kd_loss or linear_kd_loss, got a derivative of a gradient "
    "(create_graph=True), or of an operator by itself (an exported loss); use fused_kd.reference, which is plain PyTorch"
)


def implements(name: str) -> Callable[[Function], Function]:
    """Of an operator, on the CPU and on CUDA devices; the function stays one."""

    def register(function: Function) -> Function:
        names = [argument.name for argument in operator(name).default._schema.arguments]

        def traced(*arguments: Any) -> Any:
            return function(
                *(a.item() if name == "temperature" else a for name, a in zip(names, arguments, strict=True))
            )

        torch.library.impl(name, ("cpu", "cuda"), function)
        torch.library.impl(f"{name}{TRACED}", ("cpu", "cuda"), traced)
        return function

    return register


def fakes(name: str) -> Callable[[Function], Function]:
    """The results of an operator for fake tensors."""

    def register(function: Function) -> Function:
        for overload in ("", TRACED):
            torch.library.register_fake(f"{name}{overload}", function)
        return function

    return register


def _kernels() -> ModuleType:
    try:
        from .backends import triton as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "fused_kd runs CUDA tensors with Triton kernels, and the package triton is not installed: "
            "`pip install triton` (Linux), or move the tensors to the CPU",
            name="triton",
        ) from error
    return kernels


def _backend(student: Tensor, dtype: torch.dtype) -> ModuleType:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32
    return _kernels() if student.is_cuda or interpreted else cpu


def _device_of(student: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(student.device) if student.is_cuda else nullcontext()


@implements(ROW_STATISTICS)
def _row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None leaves out d_T, m_t, e and c
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read, its statistics are those of no columns
    temperature: float,
    need_ce: bool,  # False leaves out d_1
    student_map: Sequence[float],  # a LogitMap
    teacher_map: Sequence[float],
) -> Tensor:  # [6, N], in the dtype of the weights
    with _device_of(student):
        parts = _backend(student, ce_weight.dtype).row_statistics(
            student, teacher, ce_weight, kl_weight, temperature, need_ce, LogitMap(*student_map), LogitMap(*teacher_map)
        )
        return stats.merge(parts, temperature)


@fakes(ROW_STATISTICS)
def _(student, teacher, ce_weight, *arguments):  # type: ignore[no-untyped-def]
    return ce_weight.new_empty(6, ce_weight.shape[0])


def write_gradient(
    gradient: Tensor,  # [outer, inner, V'], written; may be the student
    teacher_gradient: Tensor | None,  # [outer', inner', V], written; may be the teacher
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    statistics: Tensor,  # [6, N]
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read, its gradient is 0
    temperature: float,
    vocab_size: int,  # V; columns from V to V' have gradient 0
    student_map: Sequence[float],  # a LogitMap
    teacher_map: Sequence[float],
) -> None:
    with _device_of(student):
        _backend(student, statistics.dtype).logit_gradient(
            student[..., :vocab_size], teacher, labels, statistics, ce_weight, kl_weight, temperature,
            gradient[..., :vocab_size], teacher_gradient, LogitMap(*student_map), LogitMap(*teacher_map),
        )  # fmt: skip
        gradient[..., vocab_size:] = 0


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _new_teacher_gradient(teacher: Tensor | None, wanted: bool, student: Tensor) -> Tensor:
    """Empty where it is not wanted: an operator has a fixed number of results."""
    return student.new_empty(0) if teacher is None or not wanted else _new_gradient(teacher)


@implements(LOGIT_GRADIENT)
def _logit_gradient(student: Tensor, teacher: Tensor | None, *arguments) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    gradient = _new_gradient(student)
    return gradient, _write_into(gradient, student, teacher, *arguments)


@fakes(LOGIT_GRADIENT)
def _(student, teacher, *arguments):  # type: ignore[no-untyped-def]
    return _new_gradient(student), _new_teacher_gradient(teacher, arguments[-1], student)


@implements(LOGIT_GRADIENT_INPLACE)
def _logit_gradient_(student: Tensor, teacher: Tensor | None, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    return _write_into(student, student, teacher, *arguments)


@fakes(LOGIT_GRADIENT_INPLACE)
def _(student, teacher, *arguments):  # type: ignore[no-untyped-def]
    return _new_teacher_gradient(teacher, arguments[-1], student)


def _write_into(gradient: Tensor, student: Tensor, teacher: Tensor | None, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    """The teacher's gradient, which is empty where it is not wanted."""
    *rest, teacher_grad = arguments
    of_teacher = _new_teacher_gradient(teacher, teacher_grad, student)
    write_gradient(gradient, of_teacher if teacher_grad else None, student, teacher, *rest)
    return of_teacher


def write_loss_and_gradient(
    gradient: Tensor,  # [outer, inner, V'], written; may be the student
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read, its gradient is 0
    temperature: float,
    vocab_size: int,  # V; columns from V to V' have gradient 0
    student_map: Sequence[float],  # a LogitMap
    teacher_map: Sequence[float],
) -> Tensor:  # [6, N]
    """`row_statistics` and `write_gradient` in one launch."""
    with _device_of(student):
        statistics: Tensor = _backend(student, cpu.statistics_dtype(student, teacher)).loss_and_gradient(
            student[..., :vocab_size], teacher, labels, ce_weight, kl_weight, temperature, gradient[..., :vocab_size],
            LogitMap(*student_map), LogitMap(*teacher_map),
        )  # fmt: skip
        gradient[..., vocab_size:] = 0
    return statistics


def _statistics_of_one_launch(student: Tensor, teacher: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_empty(6, weight.shape[0], dtype=cpu.statistics_dtype(student, teacher))


@implements(LOSS_AND_GRADIENT)
def _loss_and_gradient(student: Tensor, *arguments) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    gradient = _new_gradient(student)
    return write_loss_and_gradient(gradient, student, *arguments), gradient


@fakes(LOSS_AND_GRADIENT)
def _(student, teacher, labels, ce_weight, *arguments):  # type: ignore[no-untyped-def]
    return _statistics_of_one_launch(student, teacher, ce_weight), _new_gradient(student)


@implements(LOSS_AND_GRADIENT_INPLACE)
def _loss_and_gradient_(student: Tensor, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    return write_loss_and_gradient(student, student, *arguments)


@fakes(LOSS_AND_GRADIENT_INPLACE)
def _(student, teacher, labels, ce_weight, *arguments):  # type: ignore[no-untyped-def]
    return _statistics_of_one_launch(student, teacher, ce_weight)


def scale_(
    tensor: Tensor,  # [outer, inner, V]
    factor: Tensor,  # a scalar
) -> None:
    """In place; on a GPU, where the host does not know the factor, for one read of it if it is 1."""
    with _device_of(tensor):
        _backend(tensor, torch.promote_types(tensor.dtype, torch.float32)).scale_(tensor, factor)


def _one_by_one(function: torch._ops.OpOverloadPacket) -> Callable[..., tuple[Any, Any]]:
    """A batching rule: the samples of a `torch.vmap` one after another."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def sample(i: int) -> tuple[Any, ...]:
            return tuple(
                argument.select(dim, i) if isinstance(argument, Tensor) and dim is not None else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            )

        results = [function(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return type(results[0])(stacked), type(results[0])(0 for _ in stacked)

    return rule


def refuse_derivative(*_: object) -> None:
    """The backward pass of an operator: the loss's functions in `autograd.py` have one, its operators are their parts."""
    raise NotImplementedError(NO_DERIVATIVE)


def complete(name: str) -> None:
    """What every operator has besides its implementations."""
    for overload in ("", TRACED):
        torch.library.register_autograd(f"{name}{overload}", refuse_derivative)
        torch.library.register_vmap(f"{name}{overload}", _one_by_one(operator(name)))


complete(ROW_STATISTICS)
complete(LOGIT_GRADIENT)
complete(LOSS_AND_GRADIENT)
