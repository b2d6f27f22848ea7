"""Time, memory, launches and energy of the passes of a loss, on the machine at hand.

Peers of a shape are timed in turns, round by round, so that what disturbs the machine disturbs all of them.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...testing.memory import peak_bytes
from .peers import Loss
from .problems import Inputs

Key = TypeVar("Key", bound=Hashable)
PASSES = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 4, 100
COLD = 2  # times the last-level cache: what buffers must exceed so that none of it is left there from their last use
ENERGY_SECONDS = 1.0
COPY_BYTES = 2**29


@dataclass(frozen=True)
class Spread:
    """Of the seconds that a pass took."""

    median: float
    low: float  # quartiles
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(median(seconds), low, high, len(seconds))


class Step:
    """A training step of a loss; on a GPU each run takes other buffers, so that none of them lies in the L2 cache."""

    def __init__(self, loss: Loss, buffers: list[Inputs], temperature: float) -> None:
        self.loss, self.buffers, self.temperature = loss, buffers, temperature
        self.turn = 0
        self.value: Tensor | None = None

    def next(self) -> Inputs:
        self.turn = (self.turn + 1) % len(self.buffers)
        self.buffers[self.turn].clear()
        self.value = None
        return self.buffers[self.turn]

    def forward(self) -> None:
        self.value = self.loss(self.buffers[self.turn], self.temperature)

    def backward(self) -> None:
        assert self.value is not None
        self.value.backward()  # type: ignore[no-untyped-call]

    def both(self) -> None:
        self.forward()
        self.backward()

    def prepare(self, which: str) -> None:
        """What must have run before a pass, and is not timed."""
        self.next()
        if which == "backward":
            self.forward()

    def run(self, which: str) -> None:
        getattr(self, which)()


def rotation(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs, as many as exceed the L2 cache of a GPU; a CPU, whose caches are warm in training, gets one."""
    if device.type != "cuda":
        return [inputs]
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64_000_000)
    copies = 1 + COLD * cache // max(1, inputs.nbytes)
    return [inputs, *(inputs.copy() for _ in range(int(copies)))]


def times(steps: Mapping[Key, Step], which: str, device: torch.device, budget: float) -> dict[Key, Spread]:
    """Of one pass of each step, after a run that is not counted; for about `budget` seconds."""
    stopwatch = _stopwatch(device)
    for step in steps.values():
        step.prepare(which)
        step.run(which)
    begin, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - begin < budget):
        for name, step in steps.items():
            step.prepare(which)
            stopwatch.time(name, lambda step=step: step.run(which))  # type: ignore[misc]
        rounds += 1
        stopwatch.wait()
    return {name: Spread.of(stopwatch.seconds(name)) for name in steps}


class _Stopwatch:
    def __init__(self) -> None:
        self.found: dict[Hashable, list[float]] = {}

    def time(self, name: Hashable, run: Callable[[], object]) -> None:
        begin = time.perf_counter()
        run()
        self.found.setdefault(name, []).append(time.perf_counter() - begin)

    def wait(self) -> None:
        pass

    def seconds(self, name: Hashable) -> list[float]:
        return self.found[name]


class _CudaStopwatch:
    """By events around a run, which the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def time(self, name: Hashable, run: Callable[[], object]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self.events.setdefault(name, []).append((begin, end))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, name: Hashable) -> list[float]:
        return [begin.elapsed_time(end) / 1000 for begin, end in self.events[name]]


def _stopwatch(device: torch.device) -> _Stopwatch | _CudaStopwatch:
    return _CudaStopwatch(device) if device.type == "cuda" else _Stopwatch()


def peak_beyond(step: Step, device: torch.device) -> int:
    """The most bytes that a step holds at once beyond its inputs and the gradients that it leaves."""
    inputs = step.next()
    peak = peak_bytes(step.both, device)
    gradients = sum(leaf.grad.nbytes for leaf in inputs.student if leaf.grad is not None)
    step.next()
    return peak - gradients


def launches(step: Step, device: torch.device) -> int | None:
    """Kernels that a step launches on a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    step.next()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step.both()
        torch.cuda.synchronize(device)
    return [event.device_type.name for event in record.events() or ()].count("CUDA")


def joules(step: Step, device: torch.device, seconds: float) -> float | None:
    """Energy of a step by the GPU's own counter, where NVML offers it; over as many steps as take a second."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        repeats = max(3, int(ENERGY_SECONDS / seconds))
        torch.cuda.synchronize(device)
        before = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
        for _ in range(repeats):
            step.prepare("both")
            step.run("both")
        torch.cuda.synchronize(device)
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / repeats
    except nvml.NVMLError:
        return None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by `copy_` of 512 MB; the best of a few."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stopwatch = _stopwatch(device)
    for _ in range(2 + MIN_ROUNDS):
        stopwatch.time("copy", lambda: target.copy_(source))
    stopwatch.wait()
    return 2 * source.nbytes / min(stopwatch.seconds("copy")[1:])


def released(device: torch.device) -> None:
    """Gives back what a shape held before the next one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
