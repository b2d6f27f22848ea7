"""The training loop, and the evaluation before and after it."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...integrations.huggingface import Loss, SplitModel
from ...options import KDLossOutput
from ...testing import memory
from ..arguments import named_divergence
from ..stopwatch import Stamp, finish, seconds_between, stamp
from .data import Blocks, batches

# The parts of a step.  The output heads belong to the loss, which may never make their logits whole.
PARTS = ("teacher forward", "student forward", "loss forward", "loss backward", "student backward", "optimiser")
LOSS_PARTS = ("loss forward", "loss backward")
WARMUP_SHARE = 0.1  # of the steps
FINAL_LR_SHARE = 0.05  # of the peak learning rate, after the cosine
CLIP_NORM = 1.0  # of the gradient


@dataclass(frozen=True)
class Settings:
    alpha: float
    temperature: float
    divergence: str  # its name, and its parameters after colons
    vocabulary: int  # V, the real columns of the logits
    steps: int
    batch: int  # sequences per step
    lr: float
    seed: int
    dtype: torch.dtype  # of autocast
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out positions that have a label; in nats, at temperature 1."""

    kl: float  # KL(teacher || student)
    ce: float
    teacher_ce: float

    @property
    def perplexity(self) -> float:
        return _exp(self.ce)

    @property
    def teacher_perplexity(self) -> float:
        return _exp(self.teacher_ce)


@dataclass(frozen=True)
class History:
    """Figures of a training, one value per step."""

    loss: list[float]
    divergence: list[float]  # nats, at the temperature of training
    ce: list[float]  # nats
    gradient_norm: list[float]  # before clipping
    seconds: list[dict[str, float]]  # of each of PARTS
    loss_bytes: int  # peak of heads and loss, forward and backward, beyond the hidden states of teacher and student
    gradient_bytes: int  # of that the result: the gradients of the student's hidden states and head

    def curves(self) -> dict[str, list[float]]:
        return {"loss": self.loss, "divergence": self.divergence, "ce": self.ce, "gradient_norm": self.gradient_norm}

    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.loss))


class Training:
    """A training of the student, in place, step by step.  It can be saved after any step and resumed.

    The loss is taken on a leaf that holds the student's hidden states, and the gradient of the leaf is then passed to the
    body.  This gives the same gradient as one backward pass through both, and separates the time of the loss from the
    model's.
    """

    def __init__(
        self, teacher: SplitModel, student: SplitModel, blocks: Blocks, loss: Loss, settings: Settings
    ) -> None:
        torch.manual_seed(settings.seed)  # dropout
        self.teacher, self.student = teacher.eval(), student.train()
        self.blocks, self.loss, self.settings = blocks, loss, settings
        self._optimiser = torch.optim.AdamW(
            student.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: learning_rate_share(step, settings.steps)
        )
        self._batches = batches(blocks.train, settings.batch, settings.seed)
        self._values: list[Tensor] = []  # [4] each, on the device: reading them here would make the host wait
        self._stamps: list[list[Stamp]] = []  # between the parts of each step
        self._earlier: list[dict[str, float]] = []  # seconds of the steps before a resumption

    @property
    def done(self) -> int:
        return len(self._values)

    def step(self) -> KDLossOutput:
        tokens, device = next(self._batches), self.settings.device
        labels = self.blocks.labels(tokens)
        stamps = [stamp(device)]
        with torch.no_grad(), self.settings.autocast():
            teacher_hidden = self.teacher.body(tokens)  # [batch, sequence, H_t]
        stamps.append(stamp(device))
        with self.settings.autocast():
            hidden = self.student.body(tokens)
        stamps.append(stamp(device))
        leaf = hidden.detach().requires_grad_()
        result = self._kd(leaf, teacher_hidden, labels)
        stamps.append(stamp(device))
        result.loss.backward()  # type: ignore[no-untyped-call]
        stamps.append(stamp(device))
        hidden.backward(leaf.grad)
        stamps.append(stamp(device))
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()
        stamps.append(stamp(device))
        self._values.append(torch.stack([*_values(result), norm]))
        self._stamps.append(stamps)
        return result

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values only, so that loading them runs no code of the file."""
        cuda = self.settings.device.type == "cuda"
        return {
            "student": self.student.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.settings.device) if cuda else None,
            "values": torch.stack(self._values).cpu(),
            "seconds": self._seconds(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the last step of that state."""
        self.student.model.load_state_dict(state["student"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._values = list(state["values"].to(self.settings.device))
        self._earlier = state["seconds"]
        for _ in range(self.done):
            next(self._batches)
        torch.set_rng_state(state["generator"])
        if state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self.settings.device)

    def history(self) -> History:
        """Return the record of the steps done.  Memory is measured here, since that would slow a timed step."""
        tokens = self.blocks.train[: self.settings.batch]
        with torch.no_grad(), self.settings.autocast():
            hidden, teacher_hidden = self.student.body(tokens), self.teacher.body(tokens)
        leaf, labels = hidden.requires_grad_(), self.blocks.labels(tokens)

        def measured() -> None:
            self._kd(leaf, teacher_hidden, labels).loss.backward()  # type: ignore[no-untyped-call]

        peak = memory.peak_bytes(measured, self.settings.device)
        results = [leaf.grad, *(parameter.grad for parameter in self.student.parameters())]
        gradient_bytes = sum(gradient.nbytes for gradient in results if gradient is not None)
        self._optimiser.zero_grad()
        losses, divergences, ce, norms = torch.stack(self._values).T.tolist()
        return History(losses, divergences, ce, norms, self._seconds(), peak, gradient_bytes)

    def _seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each part, for every step."""
        finish(self.settings.device)
        steps = [map(seconds_between, stamps, stamps[1:]) for stamps in self._stamps]
        return self._earlier + [dict(zip(PARTS, seconds, strict=True)) for seconds in steps]

    def _kd(self, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> KDLossOutput:
        with self.settings.autocast():
            return self.loss(
                self.student,
                self.teacher,
                hidden,
                teacher_hidden,
                labels,
                alpha=self.settings.alpha,
                temperature=self.settings.temperature,
                divergence=named_divergence(self.settings.divergence),
                vocab_size=self.settings.vocabulary,
            )


@torch.no_grad()
def evaluate(teacher: SplitModel, student: SplitModel, blocks: Blocks, loss: Loss, settings: Settings) -> Evaluation:
    student.eval()
    sums = torch.zeros(3, device=settings.device)
    count = 0
    for tokens in blocks.held_out.split(settings.batch):
        labels = blocks.labels(tokens)
        count += tokens.shape[0] * blocks.labelled
        options = {"reduction": "sum", "vocab_size": settings.vocabulary}
        with settings.autocast():
            teacher_hidden, hidden = teacher.body(tokens), student.body(tokens)
            _, kl, ce = _values(loss(student, teacher, hidden, teacher_hidden, labels, alpha=1.0, **options))
            teacher_ce = loss(teacher, None, teacher_hidden, None, labels, alpha=0.0, **options).loss
        sums += torch.stack([kl, ce, teacher_ce])
    return Evaluation(*(sums / count).tolist())


def learning_rate_share(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of its peak: a linear warmup, then half a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2


def _values(result: KDLossOutput) -> list[Tensor]:
    """Return loss, divergence and CE; NaN for a part that was not computed because its weight is 0."""
    loss = result.loss.detach()
    parts = result.divergence, result.ce
    return [loss, *(torch.full_like(loss, math.nan) if part is None else part for part in parts)]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
