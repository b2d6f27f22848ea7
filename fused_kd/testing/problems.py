"""The tensors of a problem, and the formulas of the losses that peers compute, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .shapes import Shape

ALPHA, TEMPERATURE = 0.5, 2.0
IGNORED = -100
SPREAD = 3.0  # standard deviation of the logits


class Inputs(NamedTuple):
    """The tensors of a problem: logits, or hidden states and weight, of both models.  The student's get gradients."""

    student: tuple[Tensor, ...]  # [N, V]; [N, H_s], [V, H_s]
    teacher: tuple[Tensor, ...]  # [N, V]; [N, H_t], [V, H_t]
    labels: Tensor  # [N]

    def copy(self) -> "Inputs":
        student = tuple(leaf.detach().clone().requires_grad_() for leaf in self.student)
        return Inputs(student, tuple(tensor.clone() for tensor in self.teacher), self.labels.clone())

    def clear(self) -> None:
        for leaf in self.student:
            leaf.grad = None

    def release(self) -> None:
        """Free what steps have left on the leaves: gradients and a `main_grad`."""
        self.clear()
        for leaf in self.student:
            vars(leaf).pop("main_grad", None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.student, *self.teacher, self.labels))


def make(shape: Shape, device: torch.device) -> Inputs:
    """Return random logits of standard deviation SPREAD, or hidden states and weights that give them, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).to(shape.dtype)

    N, V = shape.rows, shape.vocab_size
    streams: list[tuple[Tensor, ...]] = []
    for width in (shape.student_hidden, shape.teacher_hidden):
        if shape.inputs == "logits":
            streams.append((normal(N, V, scale=SPREAD),))
        else:
            streams.append((normal(N, width), normal(V, width, scale=SPREAD / width**0.5)))
    for leaf in streams[0]:
        leaf.requires_grad_()
    return Inputs(streams[0], streams[1], torch.randint(V, (N,), generator=generator, device=device))


def half_ignored(inputs: Inputs) -> Inputs:
    """Return the same problem with half of its rows ignored, scattered."""
    rows = inputs.labels.numel()
    ignored = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: rows // 2]
    return inputs._replace(labels=inputs.labels.index_fill(0, ignored.to(inputs.labels.device), IGNORED))


def gradient_of(leaf: Tensor) -> Tensor | None:
    """Return the gradient of a leaf: its `main_grad`, if it has one."""
    return getattr(leaf, "main_grad", leaf.grad)


def logits_of(stream: tuple[Tensor, ...]) -> Tensor:
    return stream[0] if len(stream) == 1 else F.linear(*stream)


# A function of the student's logits, the teacher's logits, labels and T.
Part = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _soft(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    soft = -(F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum(-1).mean()
    return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * soft


def _ce(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(student, labels)


def _ce_and_tvd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    distance = 0.5 * (F.softmax(student, -1) - F.softmax(teacher, -1)).abs().sum(-1)
    return F.cross_entropy(student, labels) + distance.mean()


# The divergences by name, as tables call them.
WORDS = {
    "forward_kl": "KL",
    "reverse_kl": "reverse KL",
    "mixed_kl": "mixed KL",
    "jsd": "JSD",
    "skew_kl": "skew KL",
    "skew_reverse_kl": "skew reverse KL",
    "tvd": "total variation",
}


def _loss_with(divergence: str) -> Part:
    return lambda student, teacher, labels, temperature: reference.kd_loss(
        student, teacher, labels, alpha=ALPHA, temperature=temperature, divergence=divergence
    )


def _alone(divergence: str) -> Part:
    return lambda student, teacher, labels, temperature: reference.divergence_values(
        student, teacher, temperature, divergence
    ).mean()


# The formulas of the peers, as means over rows.
PARTS: dict[str, Part] = {
    "CE + soft CE": _soft,  # its value differs from CE + KL, its gradient does not
    "CE": _ce,
    "CE + TVD": _ce_and_tvd,
    **{f"CE + {word}": _loss_with(divergence) for divergence, word in WORDS.items()},
    **{word: _alone(divergence) for divergence, word in WORDS.items()},
}


def exact(part: str, inputs: Inputs, temperature: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return value and gradients of a part in float64."""
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in inputs.student)
    teacher = logits_of(tuple(tensor.double() for tensor in inputs.teacher))
    value = PARTS[part](logits_of(leaves), teacher, inputs.labels, temperature)
    return value.detach(), torch.autograd.grad(value, leaves)
