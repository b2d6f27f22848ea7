"""Fast: a whole step of kd_loss, forward, backward and all that it launches, beside the floor and its peers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_kd import kd_loss
from fused_kd.launching import ONE, TWO
from fused_kd.testing import launching, peers, problems, steps
from fused_kd.testing.peers import OURS, Loss, Peer
from fused_kd.testing.shapes import Shape

from ..context import Context
from ..graphs import captured
from ..subjects import TEMPERATURE, measured, reason, released
from ..timing import timed
from .machine import copy_bandwidth

TARGET = 1.25  # times the floor, a step at the judged vocabularies
TEMPERATURES = (2.0, 3.0)
FLOOR_PASSES = 3  # over an [N, V] array: both logits read, the gradient written
ONE_LAUNCH, TWO_LAUNCHES = f"{OURS}, one launch", f"{OURS}, two launches"
GRAPH = f"{OURS}, CUDA graph"
OTHERS = ("eager PyTorch", "Liger CE + TVD", "fla KL kernel", "torch.compile")
PEER_SECONDS = 10.0  # without so many left, a peer is not begun


def results(context: Context) -> Iterator[dict[str, Any]]:
    """Measure ours at every vocabulary first, then the others."""
    bandwidth = copy_bandwidth(context)
    yield {"figure": "copy", "bytes_per_second": bandwidth}
    for select in (ours, others):
        for vocabulary in context.sizes.vocabularies:
            yield from at(context, vocabulary, bandwidth, select)


def ours(by_name: dict[str, Peer]) -> list[tuple[Peer, float]]:
    one, two = (
        Peer(name, "logits", lambda plan=plan: as_planned(by_name[OURS].build(), plan))  # type: ignore[misc]
        for name, plan in ((ONE_LAUNCH, ONE), (TWO_LAUNCHES, TWO))
    )
    return [(by_name[OURS], TEMPERATURES[1]), *((peer, TEMPERATURE) for peer in (by_name[OURS], one, two))]


def others(by_name: dict[str, Peer]) -> list[tuple[Peer, float]]:
    return [(by_name[name], TEMPERATURE) for name in OTHERS]


def at(
    context: Context, vocabulary: int, bandwidth: float, select: Callable[[dict[str, Peer]], list[tuple[Peer, float]]]
) -> Iterator[dict[str, Any]]:
    dtype = context.sizes.dtype
    shape = Shape("gpu", "", "logits", context.sizes.rows, vocabulary, 0, 0, dtype)
    floor = FLOOR_PASSES * shape.logits * dtype.itemsize / bandwidth
    buffers = steps.rotation(problems.make(shape, context.device), context.device)
    torch._dynamo.reset()
    wanted = select({peer.name: peer for peer in peers.of(shape)})
    for result in measured(context, shape, buffers, wanted, PEER_SECONDS):
        if "seconds" in result:
            result |= {"floor_seconds": floor, "times_the_floor": result["seconds"] / floor}
            result["bytes_per_second"] = floor * bandwidth / result["seconds"]
            if result["subject"] == OURS and vocabulary in context.sizes.judged:
                result["target"] = TARGET
        yield result
    if select is ours:
        yield {"vocabulary": vocabulary, "rows": shape.rows, **of_graph(context, buffers[0], floor)}
    buffers.clear()
    released()


def as_planned(loss: Loss, plan: str) -> Loss:
    def of_step(inputs: problems.Inputs, temperature: float) -> torch.Tensor:
        with launching(plan):
            return loss(inputs, temperature)

    return of_step


def of_graph(context: Context, inputs: problems.Inputs, floor: float) -> dict[str, Any]:
    """Time the same step as a CUDA graph, where nothing waits for the host."""
    result: dict[str, Any] = {"subject": GRAPH, "computes": "CE + KL", "temperature": TEMPERATURE}
    try:
        graph, _ = captured(step(inputs))
        timing = timed({0: graph.replay}, context.sizes.batches, context.sizes.rounds)[0]
    except Exception as error:
        return {**result, "finding": reason(error)}
    return {**result, **timing._asdict(), "floor_seconds": floor, "times_the_floor": timing.seconds / floor}


def step(inputs: problems.Inputs) -> Callable[[], list[torch.Tensor]]:
    """Return a step that gives the loss and its gradient, with the arguments of the timed steps."""

    def run() -> list[torch.Tensor]:
        (student,), (teacher,), labels = inputs
        loss = kd_loss(student, teacher, labels, alpha=problems.ALPHA, temperature=TEMPERATURE)
        assert isinstance(loss, torch.Tensor)
        return [loss, *torch.autograd.grad(loss, student)]

    return run
