"""Fixtures of the suites: a shape's inputs, made once for all its tests, and a peer that was seen to be right."""

from typing import NamedTuple

import pytest
import torch

from fused_kd.testing import agreement, peers, problems, shapes, steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Case(NamedTuple):
    shape: shapes.Shape
    peer: peers.Peer
    which: str  # of steps.PASSES

    @property
    def name(self) -> str:
        shape = self.shape
        return f"{shape.name}-N{shape.rows}-V{shape.vocab_size}-{self.peer.name}-{self.which}".replace(" ", "_")


def cases(of: list[shapes.Shape], passes: tuple[str, ...] = steps.PASSES):
    found = [Case(shape, peer, which) for shape in of for peer in peers.of(shape) for which in passes]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


class _Latest:
    """The buffers of the shape that was asked for last: those of two do not fit side by side."""

    shape: shapes.Shape | None = None
    buffers: list[problems.Inputs]

    def of(self, shape: shapes.Shape) -> list[problems.Inputs]:
        if shape != self.shape:
            self.shape, self.buffers = None, []
            steps.released(DEVICE)
            torch._dynamo.reset()
            self.buffers = steps.rotation(problems.make(shape, DEVICE), DEVICE)
            self.shape = shape
        return self.buffers


_latest = _Latest()


@pytest.fixture
def time_case(benchmark):
    """Times a case; `extra_info` has what the peer computes, its errors against float64, memory and launches."""

    def run(case: Case) -> None:
        shape, peer, which = case
        if (reason := peer.missing(DEVICE)) is not None:
            pytest.skip(f"{peer.name}: {reason}")
        step, agreed = agreement.prepared(peer, shape, _latest.of(shape), DEVICE)
        assert agreed.agrees, f"{peer.name} is not {peer.computes}: {agreed}"
        benchmark.group = f"{shape.label}, {which}"
        benchmark.extra_info |= {"peer": peer.name, "computes": peer.computes, "value_error": agreed.value_error}
        benchmark.extra_info["gradient_error"] = agreed.gradient_error
        if which == "both":
            benchmark.extra_info["peak_bytes_beyond_inputs_and_gradients"] = steps.peak_beyond(step, DEVICE)
            benchmark.extra_info["launches"] = steps.launches(step, DEVICE)

        def timed() -> None:
            step.run(which)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.pedantic(timed, setup=lambda: step.prepare(which), rounds=5, warmup_rounds=1)
        step.next()

    return run
