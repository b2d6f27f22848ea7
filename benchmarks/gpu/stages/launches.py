"""Launches: all that one step launches, with times, by the profiler."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fused_kd.testing import peers, problems, steps
from fused_kd.testing.peers import OURS
from fused_kd.testing.shapes import Shape

from ..context import Context
from ..subjects import TEMPERATURE, released

WARM_UPS = 3


def results(context: Context) -> Iterator[dict[str, Any]]:
    sizes = context.sizes
    shapes = [
        Shape("gpu", "", inputs, sizes.rows, sizes.judged[0], width, width, sizes.dtype)
        for inputs, width in (("logits", 0), ("hidden", sizes.hidden))
    ]
    for shape in shapes:
        (ours,) = (peer for peer in peers.of(shape) if peer.name == OURS)
        step = steps.Step(ours.build(), [problems.make(shape, context.device)], TEMPERATURE)
        events = list(launched(step, context.device))
        yield {
            "from": shape.inputs, "vocabulary": shape.vocab_size, "rows": shape.rows, "count": len(events),
            "microseconds": sum(event["microseconds"] for event in events), "events": events,
        }  # fmt: skip
        del step
        released()


def launched(step: steps.Step, device: torch.device) -> Iterator[dict[str, Any]]:
    """Names and microseconds of what ran on the device, in order."""
    for _ in range(WARM_UPS):
        step.prepare("both")
        step.run("both")
    step.prepare("both")
    torch.cuda.synchronize()
    kind = device.type.upper()
    with profile(activities=[getattr(ProfilerActivity, kind)]) as record:
        step.run("both")
        torch.cuda.synchronize()
    for event in sorted(record.events() or (), key=lambda event: event.time_range.start):
        if event.device_type.name == kind:
            yield {"name": event.name[:120], "microseconds": event.time_range.elapsed_us()}
