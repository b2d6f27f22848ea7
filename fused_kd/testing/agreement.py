"""The agreement of a peer with the formula that it claims to compute, on an input small enough for float64."""

from dataclasses import dataclass

import torch

from . import problems
from .accuracy import relative_error
from .peers import Loss, Peer
from .shapes import Shape
from .steps import Step

ROWS, V, HIDDEN = 64, 2003, (96, 160)
# Bounds of the norm-relative errors of the value and of the worst gradient.  They are at least ten times eager PyTorch's
# errors, and far below the error of a wrong factor or a missing term.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2), torch.float16: (1e-2, 5e-2)}


@dataclass(frozen=True)
class Agreement:
    """The errors of a peer, and whether they are within BOUNDS."""

    value_error: float  # relative to float64 on the same inputs
    gradient_error: float  # norm-relative, of the worst gradient
    agrees: bool


def check(peer: Peer, loss: Loss, shape: Shape, device: torch.device, temperature: float) -> Agreement:
    """Compare the peer's value and gradients with its formula in float64."""
    small = shape._replace(rows=ROWS, vocab_size=V, student_hidden=HIDDEN[0], teacher_hidden=HIDDEN[1])
    inputs = problems.make(small, device)
    expected, gradients = problems.exact(peer.part, inputs, peer.temperature or temperature)
    value = loss(inputs, peer.temperature or temperature)
    value.backward()  # type: ignore[no-untyped-call]
    errors = [
        relative_error(given, gradient) if given is not None else float("inf")
        for given, gradient in zip(map(problems.gradient_of, inputs.student), gradients, strict=True)
    ]
    value_error, gradient_error = relative_error(value.detach(), expected), max(errors)
    within = [error <= bound for error, bound in zip((value_error, gradient_error), BOUNDS[shape.dtype], strict=True)]
    return Agreement(value_error, gradient_error, all(within))


def prepared(peer: Peer, shape: Shape, buffers: list[problems.Inputs], device: torch.device) -> tuple[Step, Agreement]:
    """Return a step of the peer on these buffers, or on copies if it overwrites its inputs, and its agreement."""
    loss = peer.build()
    agreed = check(peer, loss, shape, device, problems.TEMPERATURE)
    own = [buffer.copy() for buffer in buffers] if peer.overwrites else buffers
    return Step(loss, own, peer.temperature or problems.TEMPERATURE), agreed
