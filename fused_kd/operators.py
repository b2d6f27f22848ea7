"""The operators: what PyTorch sees of the package.  Schemas, fake versions, registration.

`fused_kd::row_weights` is what a step takes first: the weights of the rows.  `fused_kd::losses` and
`fused_kd::logit_gradient` are the two passes, and `fused_kd::losses_and_gradient` is the single pass that does the work of
both.  Their work is done in `sweep.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import rows, sweep
from . import statistics as stats
from .divergences import Objective
from .launch import SinglePass
from .logit_map import LogitMap
from .rows import RowOptions
from .scaling import is_batched
from .sweep import Buffers, KDOptions, Logits, Losses

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


def packet(name: str) -> torch._ops.OpOverloadPacket:
    """Return PyTorch's operator with that qualified name."""
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name)  # type: ignore[no-any-return]


class Operator:
    """An operator, to be called by the functions of `autograd.py`.

    In plain eager mode its implementation is called at once, since PyTorch's dispatcher takes longer than a few rows do.
    Compilers, transforms, modes and subclasses of tensors get the operator that PyTorch knows.
    """

    def __init__(self, name: str) -> None:
        self.packet, self.implementation = packet(name), IMPLEMENTATIONS[name]
        types = [str(argument.type) for argument in self.packet.default._schema.arguments]
        self.tensors = sum("Tensor" in name for name in types)  # they come first

    def __call__(self, *arguments: Any) -> Any:
        return (self.implementation if _is_plain(arguments[: self.tensors]) else self.packet)(*arguments)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.is_grad_enabled():
        return False
    return all(tensor is None or (type(tensor) is Tensor and not is_batched(tensor)) for tensor in tensors)


# The fields of KDOptions, then those of its objective, as arguments of an operator.
KD_SCHEMA = (
    "SymInt vocab_size, bool ce_in_loss, bool divergence_in_loss, ScalarType statistics_dtype, bool reduce, bool parts, "
    "float temperature, str divergence, float[] numbers"
)
KD_ARGUMENTS = len(KD_SCHEMA.split(", "))


def packed(options: KDOptions) -> tuple[Any, ...]:
    """Return the arguments of KD_SCHEMA."""
    *kd, objective = options
    student_map, teacher_map, temperature, divergence, parameters = objective
    return *kd, temperature, divergence, [*student_map, *teacher_map, *parameters]


def unpacked(*arguments: Any) -> KDOptions:
    """Return the options from the arguments of KD_SCHEMA."""
    *kd, temperature, divergence, numbers = arguments
    student_scale, student_softcap, teacher_scale, teacher_softcap, *parameters = numbers
    maps = LogitMap(student_scale, student_softcap), LogitMap(teacher_scale, teacher_softcap)
    return KDOptions._make((*kd, Objective(*maps, temperature, divergence, tuple(parameters))))


_LOGITS = "Tensor? teacher, Tensor? labels"
_GRADIENT_ARGUMENTS = f"{_LOGITS}, Tensor statistics, Tensor weights, Tensor upstream, bool teacher_grad, {KD_SCHEMA}"
_LOSSES = "Tensor, Tensor, Tensor, Tensor, Tensor"  # the fields of Losses
ROW_WEIGHTS = define(
    "row_weights",
    "(Tensor? labels, Tensor? token_weights, Tensor? alpha, Tensor? num_items, Tensor like, SymInt rows, "
    "SymInt sequence, SymInt vocabulary, int ignore_index, bool mean, float alpha_number, float? items_number, "
    "float temperature) -> (Tensor, Tensor)",
)
LOSSES = define("losses", f"(Tensor student, {_LOGITS}, Tensor weights, {KD_SCHEMA}) -> ({_LOSSES})")
LOSSES_AND_GRADIENT = define(
    "losses_and_gradient",
    f"(Tensor student, {_LOGITS}, Tensor weights, int[] launch, {KD_SCHEMA}) -> ({_LOSSES}, Tensor)",
)
LOSSES_AND_GRADIENT_INPLACE = define(
    "losses_and_gradient_",
    f"(Tensor(a!) student, {_LOGITS}, Tensor weights, int[] launch, {KD_SCHEMA}) -> ({_LOSSES})",
)
LOGIT_GRADIENT = define("logit_gradient", f"(Tensor student, {_GRADIENT_ARGUMENTS}) -> (Tensor, Tensor)")
LOGIT_GRADIENT_INPLACE = define("logit_gradient_", f"(Tensor(a!) student, {_GRADIENT_ARGUMENTS}) -> Tensor")

NO_DERIVATIVE = (
    "fused_kd: expected one backward pass through kd_loss or linear_kd_loss, got a derivative of a gradient "
    "(create_graph=True), or of an operator by itself (an exported loss); use fused_kd.reference, which is plain PyTorch"
)


def implements(name: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as an operator's implementation on the CPU and on CUDA devices."""

    def register(function: Function) -> Function:
        names = [argument.name for argument in packet(name).default._schema.arguments]

        def traced(*arguments: Any) -> Any:
            return function(
                *(a.item() if name == "temperature" else a for name, a in zip(names, arguments, strict=True))
            )

        IMPLEMENTATIONS[name] = function
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


@implements(ROW_WEIGHTS)
def _row_weights(
    labels: Tensor | None,  # [N]
    token_weights: Tensor | None,  # [N]
    alpha: Tensor | None,  # [N], or a scalar
    num_items: Tensor | None,  # one element
    like: Tensor,  # a tensor on the device
    *options: Any,  # the fields of RowOptions
) -> tuple[Tensor, Tensor]:
    """Return the weights, `[3, N]`, and the moved labels; these are empty if no label is moved."""
    given, found = RowOptions(*options), (labels, token_weights, alpha, num_items, like)
    if not sweep.runs_kernels(like):  # a graph that was made for a GPU
        weights, moved = rows.row_weights(*found, given)
        return weights.contiguous(), moved if given.sequence and moved is not None else _new_labels(labels, like, 0)
    with sweep.device_of(like):
        return sweep.backend_of(like, torch.float32).row_weights(*found, given)  # type: ignore[no-any-return]


@fakes(ROW_WEIGHTS)
def _(labels, token_weights, alpha, num_items, like, N, sequence, *options):  # type: ignore[no-untyped-def]
    return like.new_empty(3, N, dtype=torch.float64), _new_labels(labels, like, N if sequence else 0)


def _new_labels(labels: Tensor | None, like: Tensor, N: int) -> Tensor:
    return (like if labels is None else labels).new_empty(N)


@implements(LOSSES)
def _losses(
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None: no divergence
    labels: Tensor | None,  # [N]; None: no CE
    weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 is not read
    *options: Any,  # as `packed` returns them
) -> Losses:
    return sweep.losses(Logits(student, teacher, labels), weights, unpacked(*options))


@fakes(LOSSES)
def _(student, teacher, labels, weights, *options):  # type: ignore[no-untyped-def]
    return new_losses(teacher, labels, weights, unpacked(*options))


def new_losses(teacher: Tensor | None, labels: Tensor | None, weights: Tensor, options: KDOptions) -> Losses:
    """Return memory for the losses, as fake versions do."""
    N, dtype = weights.shape[1], options.dtype
    shape = () if options.reduce else (N,)

    def part(needed: bool) -> Tensor:
        return weights.new_empty(shape if needed and options.parts else (0,), dtype=dtype)

    loss, statistics = weights.new_empty(shape, dtype=dtype), weights.new_empty(stats.COUNT, N, dtype=dtype)
    return Losses(loss, part(labels is not None), part(teacher is not None), part(True), statistics)


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
def _(student, teacher, labels, statistics, weights, upstream, teacher_grad, *options):  # type: ignore[no-untyped-def]
    return _new_gradient(student), _new_teacher_gradient(teacher, teacher_grad, student)


@implements(LOGIT_GRADIENT_INPLACE)
def _logit_gradient_(student: Tensor, *arguments: Any) -> Tensor:
    return _write_into(student, student, *arguments)


@fakes(LOGIT_GRADIENT_INPLACE)
def _(student, teacher, labels, statistics, weights, upstream, teacher_grad, *options):  # type: ignore[no-untyped-def]
    return _new_teacher_gradient(teacher, teacher_grad, student)


def _write_into(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    statistics: Tensor,  # [9, N]
    weights: Tensor,  # [3, N]
    upstream: Tensor,  # a scalar, or [N]
    teacher_grad: bool,
    *options: Any,
) -> Tensor:
    """Write the student's gradient, and return the teacher's, which is empty if it is not wanted."""
    teacher_gradient = _new_teacher_gradient(teacher, teacher_grad, student)
    buffers, logits = Buffers(gradient, teacher_gradient if teacher_grad else None), Logits(student, teacher, labels)
    sweep.write_gradients(buffers, logits, statistics, weights, upstream, unpacked(*options))
    return teacher_gradient


def _with_gradient(
    gradient: Tensor,  # [outer, inner, V'], written; may be the student
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    launch: Sequence[int],  # the fields of a SinglePass
    *options: Any,
) -> Losses:
    logits = Logits(student, teacher, labels)
    return sweep.losses(logits, weights, unpacked(*options), Buffers(gradient), SinglePass(*launch))


@implements(LOSSES_AND_GRADIENT)
def _losses_and_gradient(student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradient = _new_gradient(student)
    return *_with_gradient(gradient, student, *arguments), gradient


@fakes(LOSSES_AND_GRADIENT)
def _(student, teacher, labels, weights, launch, *options):  # type: ignore[no-untyped-def]
    return *new_losses(teacher, labels, weights, unpacked(*options)), _new_gradient(student)


@implements(LOSSES_AND_GRADIENT_INPLACE)
def _losses_and_gradient_(student: Tensor, *arguments: Any) -> Losses:
    return _with_gradient(student, student, *arguments)


@fakes(LOSSES_AND_GRADIENT_INPLACE)
def _(student, teacher, labels, weights, launch, *options):  # type: ignore[no-untyped-def]
    return new_losses(teacher, labels, weights, unpacked(*options))


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
        torch.library.register_vmap(f"{name}{overload}", _one_by_one(packet(name)))


register_transforms(ROW_WEIGHTS)
register_transforms(LOSSES)
register_transforms(LOSSES_AND_GRADIENT)
register_transforms(LOGIT_GRADIENT)

row_weights = packet(ROW_WEIGHTS)
losses = Operator(LOSSES)
losses_and_gradient = Operator(LOSSES_AND_GRADIENT)
losses_and_gradient_ = packet(LOSSES_AND_GRADIENT_INPLACE)
logit_gradient = Operator(LOGIT_GRADIENT)
logit_gradient_ = packet(LOGIT_GRADIENT_INPLACE)
