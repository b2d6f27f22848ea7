"""What a call would launch on a GPU, without one: kernels of Triton and operators of PyTorch, by name.

Tensors are fake there: they have shapes and dtypes, no values and no memory, so any size is free.  They say that they are
on the CPU, since PyTorch records no graph of CUDA tensors without a build for CUDA; what the package chooses by device is
chosen as for a GPU.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import launch as one_launch
from .. import operators as ops
from ..devices import DEVICES
from ..heads import operator as linear_operator
from ..heads import products as matmul

GPU = "H100"  # that launches are planned for
KERNELS = {  # by module
    "row_statistics": ("row_statistics_kernel",),
    "logit_gradient": ("logit_gradient_kernel",),
    "loss_and_gradient": ("whole_kernel", "shared_kernel"),
    "scale": ("scale_kernel",),
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FLOAT32_PRODUCTS = {f"aten.{name}.{overload}" for name in ("mm", "addmm") for overload in ("dtype", "dtype_out")}
RELABELLED = {"_unsafe_view", "_reshape_alias"}  # views that do not say so


class Launches(TorchDispatchMode):
    """Counts while it is active; `kernels` and `operators` stay afterwards."""

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
    """Results of 16-bit products in float32 for fake and meta tensors: PyTorch has right ones for all since 2.13."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if matmul.RELEASE >= (2, 13) or str(func) not in FLOAT32_PRODUCTS:
            return func(*args, **kwargs)
        a, b, dtype = args[-3:]
        return kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@contextlib.contextmanager
def opened_operators() -> Iterator[None]:
    """The package's operators as the functions behind them: modes see what they do, and fake tensors run it."""
    with contextlib.ExitStack() as patches:
        for name in ("row_statistics", "logit_gradient", "logit_gradient_", "loss_and_gradient", "loss_and_gradient_"):
            patches.enter_context(patch.object(ops, name, getattr(ops, f"_{name}")))
        patches.enter_context(patch.object(linear_operator, "_operator", linear_operator._linear_row_losses))
        # It reads the operator that is replaced.
        patches.enter_context(patch.object(linear_operator, "_register_flops", lambda: None))
        yield


@contextlib.contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Tensors made here are fake, and run down to the kernels' launch.  `with` what it gives, launches are counted."""
    launches = Launches()
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(opened_operators())
        for module, name, replacement in _as_on_a_gpu(launches):
            contexts.enter_context(patch.object(module, name, replacement))
        contexts.enter_context(FakeTensorMode())
        contexts.enter_context(Float32Products())
        yield launches


def _as_on_a_gpu(launches: Launches) -> Iterator[tuple[ModuleType, str, Any]]:
    from ..backends.triton.launch import Launch, plan  # with Triton

    def default_launch(student: Tensor, itemsize: int) -> Launch:
        outer, inner, vocabulary = student.shape
        return plan(max(1, outer * inner), vocabulary, itemsize, DEVICES[GPU].processors)

    kernels = ops._kernels()
    yield ops, "_backend", lambda *_: kernels
    yield matmul, "_has_float32_products", lambda _: True
    yield one_launch, "device_of", lambda _: DEVICES[GPU]
    for name, kernel_names in KERNELS.items():
        module = importlib.import_module(f"fused_kd.backends.triton.{name}")
        for kernel_name in kernel_names:
            yield module, kernel_name, _Kernel(launches.kernels, name)
        # They ask for addresses; the interpreter, under which kernels may be imported, does not round to bfloat16.
        for function, replacement in (
            ("default_launch", default_launch),
            ("is_wide", lambda *_: True),
            ("roundable", lambda gradient: gradient),
        ):
            if hasattr(module, function):
                yield module, function, replacement


class _Kernel:
    def __init__(self, count: Counter[str], name: str) -> None:
        self.count, self.name = count, name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            self.count[self.name] += 1

        return launch
