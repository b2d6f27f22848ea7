"""Time stamps: the host's clock, or on a GPU events in the stream, which are waited for only when they are read."""

import time

import torch

Stamp = float | torch.cuda.Event


def stamp(device: torch.device) -> Stamp:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def finish(device: torch.device) -> None:
    """Wait for the stamps taken so far, so that they can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_between(first: Stamp, last: Stamp) -> float:
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    return float(first.elapsed_time(last)) / 1000  # type: ignore[union-attr, arg-type]
