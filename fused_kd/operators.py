"""The operators of the sweep: schemas, fake versions, device dispatch.

`fused_kd::row_statistics` and `fused_kd::logit_gradient` are the two passes, and `fused_kd::statistics_and_gradient` is the
single pass that does the work of both.  CUDA (and ROCm) tensors go to the Triton kernels, CPU tensors to
`backends/cpu.py`.  With TRITON_INTERPRET=1 CPU tensors go to the kernels too, which Triton then runs in Python.  Triton is
imported when the first kernel is needed.
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
from .divergences import DIVERGENCES, Objective
from .launch import SinglePass
from .logit_map import LogitMap

Function = TypeVar("Function", bound=Callable[..., Any])

# The overload that takes the temperature as a tensor on the CPU and reads it when it runs.  A compiled graph uses it if the
# temperature changes from call to call; a float would be a constant of the graph.
TRACED = ".traced"


def define(name: str, schema: str) -> str:
    """Define an operator and return its qualified name, `namespace::name`.

    If the module is reloaded or imported anew, the operators get a new namespace.  Compiled graphs, and autograd graphs
    that wait for backward, still hold the older operators, and calling an operator that has been removed ends the process.
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
    """Return the operator with that qualified name."""
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name)  # type: ignore[no-any-return]


OBJECTIVE_SCHEMA = "float temperature, str divergence, float[] numbers"


def packed(objective: Objective) -> tuple[float, str, list[float]]:
    """Return the arguments of OBJECTIVE_SCHEMA, which every schema contains."""
    numbers: list[float]
    student_map, teacher_map, temperature, divergence, *numbers = objective
    return temperature, divergence, [*student_map, *teacher_map, *numbers]


def unpacked(temperature: float, divergence: str, numbers: Sequence[float]) -> Objective:
    """Return the objective from the arguments of OBJECTIVE_SCHEMA."""
    student_scale, student_softcap, teacher_scale, teacher_softcap, *others = numbers
    maps = LogitMap(student_scale, student_softcap), LogitMap(teacher_scale, teacher_softcap)
    return Objective(*maps, temperature, divergence, *others)


_GRADIENT_ARGUMENTS = (
    f"Tensor? teacher, Tensor? labels, Tensor coefficients, SymInt vocab_size, bool teacher_grad, {OBJECTIVE_SCHEMA}"
)
_SINGLE_PASS_ARGUMENTS = (
    "Tensor? teacher, Tensor? labels, Tensor ce_weight, Tensor divergence_weight, SymInt vocab_size, ScalarType dtype, "
    f"int[] launch, {OBJECTIVE_SCHEMA}"
)
ROW_STATISTICS = define(
    "row_statistics",
    f"(Tensor student, Tensor? teacher, Tensor counted, ScalarType dtype, bool need_ce, {OBJECTIVE_SCHEMA}) -> Tensor",
)
LOGIT_GRADIENT = define("logit_gradient", f"(Tensor student, {_GRADIENT_ARGUMENTS}) -> (Tensor, Tensor)")
LOGIT_GRADIENT_INPLACE = define("logit_gradient_", f"(Tensor(a!) student, {_GRADIENT_ARGUMENTS}) -> Tensor")
STATISTICS_AND_GRADIENT = define(
    "statistics_and_gradient", f"(Tensor student, {_SINGLE_PASS_ARGUMENTS}) -> (Tensor, Tensor)"
)
STATISTICS_AND_GRADIENT_INPLACE = define(
    "statistics_and_gradient_", f"(Tensor(a!) student, {_SINGLE_PASS_ARGUMENTS}) -> Tensor"
)

row_statistics = operator(ROW_STATISTICS)
logit_gradient = operator(LOGIT_GRADIENT)
logit_gradient_ = operator(LOGIT_GRADIENT_INPLACE)
statistics_and_gradient = operator(STATISTICS_AND_GRADIENT)
statistics_and_gradient_ = operator(STATISTICS_AND_GRADIENT_INPLACE)

NO_DERIVATIVE = (
    "fused_kd: expected one backward pass through kd_loss or linear_kd_loss, got a derivative of a gradient "
    "(create_graph=True), or of an operator by itself (an exported loss); use fused_kd.reference, which is plain PyTorch"
)


def implements(name: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as an operator's implementation on the CPU and on CUDA devices."""

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
    """Return a decorator that registers a function as an operator's implementation for fake tensors."""

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
    """Make the tensors' device the current one, since Triton launches on the current device."""
    return torch.cuda.device(student.device) if student.is_cuda else nullcontext()


@implements(ROW_STATISTICS)
def _row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: d_T, m_t, e and c are not computed
    counted: Tensor,  # [N], bool; a row that is not counted is not read, and has the statistics of no columns
    dtype: torch.dtype,  # float32 or float64
    need_ce: bool,  # False: d_1 is not computed
    *arguments: Any,
) -> Tensor:  # [6, N]
    objective = unpacked(*arguments)
    with _device_of(student):
        parts = _backend(student, dtype).row_statistics(student, teacher, counted, dtype, need_ce, objective)
        return stats.merge(parts, objective.temperature, DIVERGENCES[objective.divergence].mass)


@fakes(ROW_STATISTICS)
def _(student, teacher, counted, dtype, *arguments):  # type: ignore[no-untyped-def]
    return counted.new_empty(6, counted.shape[0], dtype=dtype)


def write_gradient(
    gradient: Tensor,  # [outer, inner, V'], written; may be the student
    teacher_gradient: Tensor | None,  # [outer', inner', V], written; may be the teacher
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    coefficients: Tensor,  # [7, N]; a row whose coefficients are 0 is not read and has gradient 0
    vocab_size: int,  # V; columns from V to V' have gradient 0
    objective: Objective,
) -> None:
    """Write the gradients of the logits into the given tensors."""
    with _device_of(student):
        _backend(student, coefficients.dtype).logit_gradient(
            student[..., :vocab_size], teacher, labels, coefficients, gradient[..., :vocab_size], teacher_gradient,
            objective,
        )  # fmt: skip
        gradient[..., vocab_size:] = 0


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _new_teacher_gradient(teacher: Tensor | None, wanted: bool, student: Tensor) -> Tensor:
    """Return memory for the teacher's gradient; an empty tensor if it is not wanted.

    An operator always returns the same number of tensors.
    """
    return student.new_empty(0) if teacher is None or not wanted else _new_gradient(teacher)


@implements(LOGIT_GRADIENT)
def _logit_gradient(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gradient = _new_gradient(student)
    return gradient, _write_into(gradient, student, *arguments)


@fakes(LOGIT_GRADIENT)
def _(student, teacher, labels, coefficients, vocab_size, teacher_grad, *arguments):  # type: ignore[no-untyped-def]
    return _new_gradient(student), _new_teacher_gradient(teacher, teacher_grad, student)


@implements(LOGIT_GRADIENT_INPLACE)
def _logit_gradient_(student: Tensor, *arguments: Any) -> Tensor:
    return _write_into(student, student, *arguments)


@fakes(LOGIT_GRADIENT_INPLACE)
def _(student, teacher, labels, coefficients, vocab_size, teacher_grad, *arguments):  # type: ignore[no-untyped-def]
    return _new_teacher_gradient(teacher, teacher_grad, student)


def _write_into(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    coefficients: Tensor,
    vocab_size: int,
    teacher_grad: bool,
    *arguments: Any,
) -> Tensor:
    """Write the student's gradient, and return the teacher's, which is empty if it is not wanted."""
    teacher_gradient = _new_teacher_gradient(teacher, teacher_grad, student)
    written = teacher_gradient if teacher_grad else None
    write_gradient(gradient, written, student, teacher, labels, coefficients, vocab_size, unpacked(*arguments))
    return teacher_gradient


def _write_in_single_pass(
    gradient: Tensor,  # [outer, inner, V'], written; may be the student
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    ce_weight: Tensor,  # [N], float64
    divergence_weight: Tensor,  # [N], float64; a row with both weights 0 is not read and has gradient 0
    vocab_size: int,  # V; columns from V to V' have gradient 0
    dtype: torch.dtype,  # of the statistics
    launch: Sequence[int],  # the fields of a launch.SinglePass
    *arguments: Any,
) -> Tensor:  # [6, N]
    """Write the gradient, and return the statistics of each row."""
    with _device_of(student):
        statistics: Tensor = _backend(student, dtype).statistics_and_gradient(
            student[..., :vocab_size], teacher, labels, ce_weight, divergence_weight, gradient[..., :vocab_size],
            SinglePass(*launch), unpacked(*arguments),
        )  # fmt: skip
        gradient[..., vocab_size:] = 0
    return statistics


@implements(STATISTICS_AND_GRADIENT)
def _statistics_and_gradient(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gradient = _new_gradient(student)
    return _write_in_single_pass(gradient, student, *arguments), gradient


@fakes(STATISTICS_AND_GRADIENT)
def _(student, teacher, labels, ce_weight, divergence_weight, vocab_size, dtype, *arguments):  # type: ignore[no-untyped-def]
    return ce_weight.new_empty(6, ce_weight.shape[0], dtype=dtype), _new_gradient(student)


@implements(STATISTICS_AND_GRADIENT_INPLACE)
def _statistics_and_gradient_(student: Tensor, *arguments: Any) -> Tensor:
    return _write_in_single_pass(student, student, *arguments)


@fakes(STATISTICS_AND_GRADIENT_INPLACE)
def _(student, teacher, labels, ce_weight, divergence_weight, vocab_size, dtype, *arguments):  # type: ignore[no-untyped-def]
    return ce_weight.new_empty(6, ce_weight.shape[0], dtype=dtype)


def scale_(
    tensor: Tensor,  # [outer, inner, V]
    factor: Tensor,  # a scalar
) -> None:
    """Multiply in place.

    On a GPU the kernel is always launched, since the host does not know the factor; if it is 1, only the factor is read.
    """
    with _device_of(tensor):
        _backend(tensor, torch.promote_types(tensor.dtype, torch.float32)).scale_(tensor, factor)


def _one_by_one(function: torch._ops.OpOverloadPacket) -> Callable[..., tuple[Any, Any]]:
    """Return a `torch.vmap` rule that runs the operator for one sample after another."""

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
    """Refuse the derivative of an operator: only the functions in `autograd.py`, which call operators, have one."""
    raise NotImplementedError(NO_DERIVATIVE)


def register_transforms(name: str) -> None:
    """Register an operator's refusal of derivatives and its rule for `torch.vmap`."""
    for overload in ("", TRACED):
        torch.library.register_autograd(f"{name}{overload}", refuse_derivative)
        torch.library.register_vmap(f"{name}{overload}", _one_by_one(operator(name)))


register_transforms(ROW_STATISTICS)
register_transforms(LOGIT_GRADIENT)
register_transforms(STATISTICS_AND_GRADIENT)
