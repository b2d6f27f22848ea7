"""The results of every shape and peer as plain records, from which tables, plots and the JSON file are made."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...testing import agreement, peers, problems, steps
from ...testing.peers import Peer
from ...testing.shapes import Shape
from ...testing.words import dtype_name
from . import measure

# Passes over an [N, V] array, the least that a step moves: both logits read, the gradient written.
FLOOR_PASSES = 3


@dataclass(frozen=True)
class Result:
    """The figures of a peer at a shape, or the reason why there are none."""

    group: str
    shape: str
    inputs: str
    rows: int
    vocab_size: int
    student_hidden: int
    teacher_hidden: int
    dtype: str
    peer: str
    computes: str
    reason: str | None = None
    agrees: bool | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    forward: measure.Spread | None = None
    backward: measure.Spread | None = None
    both: measure.Spread | None = None
    peak_bytes: int | None = None  # beyond inputs and gradients
    launches: int | None = None
    joules: float | None = None
    bandwidth: float | None = None  # bytes a second of the floor, where the inputs are logits
    divergence: str = "forward_kl"

    @classmethod
    def of(cls, shape: Shape, peer: Peer, **measured: Any) -> "Result":
        sizes = shape.rows, shape.vocab_size, shape.student_hidden, shape.teacher_hidden
        return cls(
            shape.group, shape.name, shape.inputs, *sizes, dtype_name(shape.dtype), peer.name, peer.computes,
            divergence=peer.divergence, **measured,
        )  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that are equal in two results that can be compared."""
        return (
            self.inputs, self.rows, self.vocab_size, self.student_hidden, self.teacher_hidden, self.dtype,
            self.divergence, self.peer,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def from_dict(record: dict[str, Any]) -> Result:
    passes = {which: measure.Spread(**record[which]) for which in steps.PASSES if record.get(which)}
    return Result(**{**record, **passes})


def measured(shape: Shape, device: torch.device, budget: float, divergence: str = "forward_kl") -> list[Result]:
    """Measure every peer of a divergence at a shape, in about `budget` seconds of timed runs."""
    torch._dynamo.reset()  # compiled peers are compiled for each shape: one that has seen several makes slower code
    buffers = steps.rotation(problems.make(shape, device), device)
    results: list[Result] = []
    prepared: dict[Peer, steps.Step] = {}
    found: dict[Peer, dict[str, Any]] = {}
    for peer in peers.of(shape, divergence):
        reason = peer.missing(device)
        if reason is None:
            try:
                prepared[peer], agreed = agreement.prepared(peer, shape, buffers, device)
                found[peer] = asdict(agreed) | {"peak_bytes": steps.peak_beyond(prepared[peer], device)}
            except Exception as error:  # another's package, which must not end the measurement of the rest
                if peer.name == peers.OURS:
                    raise
                prepared.pop(peer, None)
                reason = _one_line(error)
                steps.released(device)
        if reason is not None:
            results.append(Result.of(shape, peer, reason=reason))
    for which in steps.PASSES:
        for peer, spread in measure.times(prepared, which, device, budget / len(steps.PASSES)).items():
            found[peer][which] = spread
    for peer, step in prepared.items():
        seconds = found[peer]["both"].median
        floor = FLOOR_PASSES * shape.logits * shape.dtype.itemsize
        found[peer]["bandwidth"] = floor / seconds if shape.inputs == "logits" else None
        found[peer]["launches"] = steps.launches(step, device)
        found[peer]["joules"] = measure.joules(step, device, seconds)
        step.next()
        results.append(Result.of(shape, peer, **found[peer]))
    steps.released(device)
    return results


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]
