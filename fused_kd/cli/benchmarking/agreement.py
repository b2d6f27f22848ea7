"""Whether a peer computes what it says, on an input small enough for float64."""

from dataclasses import dataclass

import torch

from ...testing.accuracy import relative_error
from . import problems
from .peers import Loss, Peer
from .shapes import Shape

ROWS, V, HIDDEN = 64, 2003, (96, 160)
# Norm-relative, of the value and of the worst gradient: ten times what eager PyTorch has at least, far below what a wrong
# factor or a missing term makes.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2), torch.float16: (1e-2, 5e-2)}


@dataclass(frozen=True)
class Agreement:
    value_error: float  # relative to float64 on the same inputs
    gradient_error: float  # norm-relative, the worst gradient
    agrees: bool


def check(peer: Peer, loss: Loss, shape: Shape, device: torch.device, temperature: float) -> Agreement:
    small = shape._replace(rows=ROWS, vocab_size=V, student_hidden=HIDDEN[0], teacher_hidden=HIDDEN[1])
    inputs = problems.make(small, device)
    expected, gradients = problems.exact(peer.part, inputs, peer.temperature or temperature)
    value = loss(inputs, peer.temperature or temperature)
    value.backward()  # type: ignore[no-untyped-call]
    errors = [
        relative_error(leaf.grad, gradient) if leaf.grad is not None else float("inf")
        for leaf, gradient in zip(inputs.student, gradients, strict=True)
    ]
    value_error, gradient_error = relative_error(value.detach(), expected), max(errors)
    within = [error <= bound for error, bound in zip((value_error, gradient_error), BOUNDS[shape.dtype], strict=True)]
    return Agreement(value_error, gradient_error, all(within))
