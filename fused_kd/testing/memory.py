"""The peak memory of a function: the most that PyTorch's allocator held at once while it ran."""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that PyTorch's allocator held at once during `function()`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return int(torch.cuda.max_memory_allocated(device)) - before
    return max(itertools.accumulate(allocations(function), initial=0))


def allocations(function: Callable[[], None]) -> list[int]:
    """Return the bytes of every allocation on a CPU in order, also inside operators.  Releases are negative."""
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        record.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return [int(event["args"]["Bytes"]) for event in sorted(events, key=lambda event: event["ts"])]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide the two lines that the profiler's C++ code prints each time."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
