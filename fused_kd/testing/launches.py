"""A fake GPU that counts the launches of a call: kernels of Triton and operators of PyTorch, by name.

Its tensors are fake: they have shapes and dtypes, but no values and no memory, so any size is free.  Their device is the
CPU, because PyTorch records no graph of CUDA tensors without a build for CUDA.  Still the package plans as for a GPU.
"""

import contextlib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import launch as planning
from .. import operators as ops
from .. import sweep
from ..devices import DEVICES
from ..heads import operator as linear_operator
from ..heads import products as matmul
from ..launching import launching
from .replacing import replaced

GPU = "H100"  # the device that launches are planned for
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FLOAT32_PRODUCTS = {f"aten.{name}.{overload}" for name in ("mm", "addmm") for overload in ("dtype", "dtype_out")}
Replacement = tuple[ModuleType, str, Any]  # module, name of its attribute, value
RELABELLED = {"_unsafe_view", "_reshape_alias"}  # views that PyTorch does not mark as views


class Launches(TorchDispatchMode):
    """A mode that counts launches while it is active.  `kernels` and `operators` keep the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
        if written and not func.is_view and name not in ALLOCATIONS | RELABELLED:
            self.operators[name] += 1
        return result


class Float32Products(TorchDispatchMode):
    """A mode that gives 16-bit products of fake tensors their float32 results; before 2.13 some of PyTorch's are wrong."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if matmul.RELEASE >= (2, 13) or str(func) not in FLOAT32_PRODUCTS:
            return func(*args, **kwargs)
        a, b, dtype = args[-3:]
        return kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@contextlib.contextmanager
def opened_operators() -> Iterator[None]:
    """Replace the package's operators by the functions behind them, so that modes and fake tensors see each step."""
    opened: list[Replacement] = [
        (ops, name, getattr(ops, f"_{name}"))
        for name, value in vars(ops).items()
        if isinstance(value, (OpOverloadPacket, ops.Operator)) and hasattr(ops, f"_{name}")
    ]
    opened.append((linear_operator, "_operator", linear_operator._linear_losses))
    opened.append((linear_operator, "_register_flops", lambda: None))  # it reads the operator that is replaced
    with replaced(opened):
        yield


@contextlib.contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Make tensors fake, and run calls down to the launch of each kernel.  The context's value counts launches."""
    launches = Launches()
    with opened_operators(), launching(device=GPU), counted_kernels(launches), FakeTensorMode(), Float32Products():
        yield launches


@contextlib.contextmanager
def counted_kernels(launches: Launches) -> Iterator[None]:
    """Count the launches of kernels instead of running them; the package calls them whatever its tensors' device."""
    with replaced(list(_as_on_a_gpu(launches))):
        yield


def _as_on_a_gpu(launches: Launches) -> Iterator[Replacement]:
    from ..launch import Launch, two_passes

    def default_launch(student: Tensor, itemsize: int) -> Launch:
        outer, inner, vocabulary = student.shape
        return two_passes(max(1, outer * inner), vocabulary, itemsize, DEVICES[GPU].processors)

    yield sweep, "runs_kernels", lambda _: True
    yield matmul, "_has_float32_products", lambda _: True
    for name, (module, _) in kernels().items():
        yield module, name, _Kernel(launches.kernels, name)
    for module in (*_modules(), planning):
        # These functions need addresses, or allocate under the interpreter.
        for function, replacement in (
            ("default_launch", default_launch),
            ("is_wide", lambda *_: True),
            ("roundable", lambda gradient: gradient),
        ):
            if hasattr(module, function):
                yield module, function, replacement


def kernels() -> dict[str, tuple[ModuleType, Any]]:
    """Return every kernel of the Triton backend by its name, which ends in "_kernel", and the module that defines it."""
    return {
        name: (module, kernel)
        for module in _modules()
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__
    }


def _modules() -> list[ModuleType]:
    package = sweep._kernels()
    return [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]


class _Kernel:
    def __init__(self, count: Counter[str], name: str) -> None:
        self.count, self.name = count, name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            self.count[self.name] += 1

        return launch
