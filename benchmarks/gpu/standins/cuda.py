"""The functions of torch.cuda that stages call, on a CPU."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return 1000 * (end.seconds - self.seconds)


class Stream:
    def wait_stream(self, stream: "Stream") -> None:
        pass


class CUDAGraph(TorchDispatchMode):
    """Records operators while it is captured, and runs them again at a replay: their results take the place of the first.

    What is no operator, such as a value that the host has read, is not repeated, as in a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def graph(captured: CUDAGraph) -> Iterator[None]:
    with captured:
        yield


def as_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that launches a kernel, as one call of a graph that is captured: what the interpreter does is not seen."""

    def call(*arguments: Any) -> Any:
        modes = _get_current_dispatch_mode_stack()
        with _disable_current_modes():
            result = function(*arguments)
        for mode in modes:
            if isinstance(mode, CUDAGraph):
                mode.calls.append((function, arguments, {}, result))
        return result

    return call


REPLACEMENTS: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": Stream,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "get_device_properties": lambda device=None: SimpleNamespace(
        name="a rehearsal", multi_processor_count=132, L2_cache_size=50 * 2**20, total_memory=0, major=9
    ),
}
