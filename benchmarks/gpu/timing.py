"""Device time of a step by CUDA events, and the host time that it takes to launch."""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
CLOCK = 2e9  # cycles per second, at most


class Timing(NamedTuple):
    """Seconds of a run on the device; quartiles; seconds that the host takes to launch it."""

    seconds: float  # median
    low: float
    high: float
    host_seconds: float
    samples: int


def timed(runs: Mapping[Key, Callable[[], object]], batches: int, rounds: int) -> dict[Key, Timing]:
    """Time runs in turns, after two runs of each that do not count.

    The device sleeps while the host launches a batch, so that no event waits for the host.
    """
    host: dict[Key, float] = {}
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for key, run in runs.items():
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host[key] = time.perf_counter() - begin
        torch.cuda.synchronize()
    for _ in range(batches):
        for key, run in runs.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
            torch.cuda._sleep(int(1.2 * host[key] * rounds * CLOCK))
            events[0].record()
            for event in events[1:]:
                run()
                event.record()
            torch.cuda.synchronize()
            seconds[key] += [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    return {key: _timing(seconds[key], host[key]) for key in runs}


def _timing(seconds: list[float], host: float) -> Timing:
    low, _, high = quantiles(seconds, n=4)
    return Timing(median(seconds), low, high, host, len(seconds))
