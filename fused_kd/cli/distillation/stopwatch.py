"""Time stamps inside a training step."""

import time
from collections.abc import Sequence

import torch


class Stopwatch:
    """Times the named parts of a step that is repeated.

    On CUDA a stamp is an event in the stream and is read after the last step, so that timing makes nothing wait.
    """

    def __init__(self, parts: Sequence[str], device: torch.device) -> None:
        self.parts = tuple(parts)
        self.device = device
        self._stamps: list[list[float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._stamps.append([self._now()])

    def lap(self) -> None:
        """Ends a part, the first one that has not ended in this step."""
        self._stamps[-1].append(self._now())

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each part, for every step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            {part: _between(a, b) for part, a, b in zip(self.parts, stamps, stamps[1:], strict=False)}
            for stamps in self._stamps
        ]

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _between(first: "float | torch.cuda.Event", last: "float | torch.cuda.Event") -> float:
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    return float(first.elapsed_time(last)) / 1000  # type: ignore[union-attr, arg-type]
