"""Training steps that can be run pass by pass: their buffers, their memory, their launches on a GPU."""

import gc

import torch
from torch import Tensor

from .memory import peak_bytes
from .peers import Loss
from .problems import Inputs

PASSES = ("forward", "backward", "both")
COLD = 2  # buffers of so many times the last-level cache leave nothing in it from their last use


class Step:
    """A training step of a loss.  On a GPU each run takes the next buffers, so that none of them is in the L2 cache."""

    def __init__(self, loss: Loss, buffers: list[Inputs], temperature: float) -> None:
        self.loss, self.buffers, self.temperature = loss, buffers, temperature
        self.turn = 0
        self.value: Tensor | None = None

    def next(self) -> Inputs:
        self.turn = (self.turn + 1) % len(self.buffers)
        self.buffers[self.turn].clear()
        self.value = None
        return self.buffers[self.turn]

    def forward(self) -> None:
        self.value = self.loss(self.buffers[self.turn], self.temperature)

    def backward(self) -> None:
        assert self.value is not None
        self.value.backward()  # type: ignore[no-untyped-call]

    def both(self) -> None:
        self.forward()
        self.backward()

    def prepare(self, which: str) -> None:
        """Run everything that the pass needs before it.  This is not timed."""
        self.next()
        if which == "backward":
            self.forward()

    def run(self, which: str) -> None:
        getattr(self, which)()


def rotation(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Return the inputs, and on a GPU enough copies to exceed its L2 cache.  A CPU's caches are warm in training too."""
    if device.type != "cuda":
        return [inputs]
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64_000_000)
    copies = 1 + COLD * cache // max(1, inputs.nbytes)
    return [inputs, *(inputs.copy() for _ in range(int(copies)))]


def peak_beyond(step: Step, device: torch.device) -> int:
    """Return the most bytes that a step holds at once, beyond its inputs and the gradients that it leaves."""
    inputs = step.next()
    peak = peak_bytes(step.both, device)
    gradients = sum(leaf.grad.nbytes for leaf in inputs.student if leaf.grad is not None)
    step.next()
    return peak - gradients


def launches(step: Step, device: torch.device) -> int | None:
    """Return the number of kernels that a step launches on a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    step.next()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step.both()
        torch.cuda.synchronize(device)
    return [event.device_type.name for event in record.events() or ()].count("CUDA")


def released(device: torch.device) -> None:
    """Release the memory of the last shape."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
