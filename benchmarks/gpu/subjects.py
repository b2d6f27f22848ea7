"""The subjects that are timed: a training step of a peer at a shape, or the reason why it has no figure."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fused_kd.testing import agreement, problems, steps
from fused_kd.testing.peers import Peer
from fused_kd.testing.problems import TEMPERATURE
from fused_kd.testing.shapes import Shape

from .context import Context
from .timing import timed

_agreed: dict[str, agreement.Agreement] = {}


def released() -> None:
    """Give back the memory that the last subject held."""
    gc.collect()
    torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Subject:
    """A step of a peer on buffers, and its error on a small problem, once per peer."""

    def __init__(self, peer: Peer, buffers: list[problems.Inputs], temperature: float = TEMPERATURE) -> None:
        self.peer, self.temperature = peer, peer.temperature or temperature
        self.loss = peer.build()
        own = [buffer.copy() for buffer in buffers] if peer.overwrites else buffers
        self.step = steps.Step(self.loss, own, self.temperature)

    def run(self) -> None:
        self.step.prepare("both")
        self.step.run("both")

    def described(self, shape: Shape, device: torch.device) -> dict[str, Any]:
        """Return the name, what is computed, and how far that is from float64."""
        if self.peer.name not in _agreed:
            _agreed[self.peer.name] = agreement.check(self.peer, self.loss, shape, device, TEMPERATURE)
        found = _agreed[self.peer.name]
        result = {
            "subject": self.peer.name, "computes": self.peer.part, "temperature": self.temperature,
            "value_error": found.value_error, "gradient_error": found.gradient_error,
        }  # fmt: skip
        if not found.agrees:
            result["finding" if self.peer.name.startswith("fused_kd") else "reason"] = "not the loss that it says it is"
        return result


def measured(
    context: Context, shape: Shape, buffers: list[problems.Inputs], wanted: Iterable[tuple[Peer, float]], seconds: float
) -> Iterator[dict[str, Any]]:
    """Time the step of each peer at its temperature, and take its peak memory; give a record for each peer.

    An exception in another package, or memory that does not suffice, costs the peer its figures and no more.
    """
    for peer, temperature in wanted:
        given = {"vocabulary": shape.vocab_size, "rows": shape.rows}
        named = {**given, "subject": peer.name, "temperature": peer.temperature or temperature}
        missing = peer.missing(context.device)
        if missing is not None or not context.has(seconds):
            yield {**named, "reason": missing or "no time was left"}
            continue
        try:
            yield {**given, **_measured(context, shape, Subject(peer, buffers, temperature))}
        except Exception as error:
            ours = peer.name.startswith("fused_kd") and not isinstance(error, torch.OutOfMemoryError)
            yield {**named, "finding" if ours else "reason": reason(error)}
        for buffer in buffers:
            buffer.release()
        released()


def _measured(context: Context, shape: Shape, subject: Subject) -> dict[str, Any]:
    described = subject.described(shape, context.device)
    timing = timed({0: subject.run}, context.sizes.batches, context.sizes.rounds)[0]
    return {**described, **timing._asdict(), "peak_bytes": steps.peak_beyond(subject.step, context.device)}
