"""Time and energy of the passes of a loss, on the machine at hand.

The peers of a shape are timed in turns, round by round, so that a disturbance of the machine disturbs all of them.
"""

import importlib.util
import itertools
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from ...testing.steps import Step
from ..stopwatch import Stamp, finish, seconds_between, stamp

Key = TypeVar("Key", bound=Hashable)
MIN_ROUNDS, MAX_ROUNDS = 4, 100
ENERGY_SECONDS = 1.0
COPY_BYTES = 2**29


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the seconds that a pass took."""

    median: float
    low: float  # quartiles
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(median(seconds), low, high, len(seconds))


def times(steps: Mapping[Key, Step], which: str, device: torch.device, budget: float) -> dict[Key, Spread]:
    """Time one pass of each step for about `budget` seconds, after one run that is not counted."""
    for step in steps.values():
        step.prepare(which)
        step.run(which)
    stamps: dict[Key, list[tuple[Stamp, Stamp]]] = {name: [] for name in steps}
    begin, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - begin < budget):
        for name, step in steps.items():
            step.prepare(which)
            before = stamp(device)
            step.run(which)
            stamps[name].append((before, stamp(device)))
        rounds += 1
        finish(device)
    return {name: Spread.of([seconds_between(*pair) for pair in stamps[name]]) for name in steps}


def joules(step: Step, device: torch.device, seconds: float) -> float | None:
    """Return the energy of a step by the GPU's own counter, if NVML has it, from as many steps as take a second."""
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
    """Measure the bytes per second that `copy_` of 512 MB reads and writes, the best of a few runs."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stamps = [stamp(device)]
    for _ in range(2 + MIN_ROUNDS):
        target.copy_(source)
        stamps.append(stamp(device))
    finish(device)
    return 2 * source.nbytes / min(seconds_between(*pair) for pair in itertools.pairwise(stamps[1:]))
