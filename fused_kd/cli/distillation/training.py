"""The training loop, and the evaluation before and after it."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...output import KDLossOutput
from .. import memory
from .data import Blocks, batch_order
from .heads import Loss, SplitModel
from .stopwatch import Stopwatch

# Of a step.  The output heads belong to the loss, which may never make their logits whole.
PARTS = ("teacher forward", "student forward", "loss forward", "loss backward", "student backward", "optimiser")
LOSS_PARTS = ("loss forward", "loss backward")
WARMUP_SHARE = 0.1  # of the steps
FINAL_LR_SHARE = 0.05  # of the peak learning rate, after the cosine
CLIP_NORM = 1.0  # of the gradient


@dataclass(frozen=True)
class Settings:
    alpha: float
    temperature: float
    vocabulary: int  # V, the real columns of the logits
    steps: int
    batch: int  # sequences a step
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
    """What training gave; one value a step."""

    loss: list[float]
    kl: list[float]  # nats, at the temperature of training
    ce: list[float]  # nats
    gradient_norm: list[float]  # before clipping
    seconds: list[dict[str, float]]  # of each of PARTS
    loss_bytes: int  # peak of heads and loss, forward and backward, beyond the hidden states of teacher and student
    gradient_bytes: int  # of that the result: the gradients of the student's hidden states and head

    def curves(self) -> dict[str, list[float]]:
        return {"loss": self.loss, "kl": self.kl, "ce": self.ce, "gradient_norm": self.gradient_norm}

    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.loss))


def train(
    teacher: SplitModel,
    student: SplitModel,
    blocks: Blocks,
    loss: Loss,
    settings: Settings,
    on_step: Callable[[int, KDLossOutput], None],  # (steps done, values on the device)
) -> History:
    """Trains the student in place.

    The loss is taken on a leaf that holds the student's hidden states, and its gradient then handed to the body.  That is
    the same gradient as one backward pass through both, and tells apart what the loss costs and what the model.
    """
    torch.manual_seed(settings.seed)  # dropout
    teacher.eval()
    student.train()
    optimiser = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_share(step, settings.steps))
    watch = Stopwatch(PARTS, settings.device)
    values: list[Tensor] = []  # [4] each, on the device: reading them here would make the host wait
    for tokens in _batches(blocks.train, settings):
        labels = blocks.labels(tokens)
        watch.start()
        with torch.no_grad(), settings.autocast():
            teacher_hidden = teacher.body(tokens)  # [batch, sequence, H_t]
        watch.lap()
        with settings.autocast():
            hidden = student.body(tokens)
        watch.lap()
        leaf = hidden.detach().requires_grad_()
        result = _kd(loss, student, teacher, leaf, teacher_hidden, labels, settings)
        watch.lap()
        result.loss.backward()  # type: ignore[no-untyped-call]
        watch.lap()
        hidden.backward(leaf.grad)
        watch.lap()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        watch.lap()
        values.append(torch.stack([*_values(result), norm]))
        on_step(len(values), result)

    once_more = hidden.detach().requires_grad_()

    def measured() -> None:  # on the last batch, after the timed steps: measuring memory is slow
        _kd(loss, student, teacher, once_more, teacher_hidden, labels, settings).loss.backward()  # type: ignore[no-untyped-call]

    del result, leaf, hidden  # nothing of the last step is in memory while the loss is measured
    seconds = watch.seconds()
    losses, kl, ce, norms = torch.stack(values).T.tolist()
    peak = memory.peak_bytes(measured, settings.device)
    results = [once_more.grad, *(parameter.grad for parameter in student.parameters())]
    gradient_bytes = sum(gradient.nbytes for gradient in results if gradient is not None)
    optimiser.zero_grad()
    return History(losses, kl, ce, norms, seconds, peak, gradient_bytes)


@torch.no_grad()
def evaluate(teacher: SplitModel, student: SplitModel, blocks: Blocks, loss: Loss, settings: Settings) -> Evaluation:
    student.eval()
    sums = torch.zeros(3, device=settings.device)
    count = 0
    for tokens in blocks.held_out.split(settings.batch):
        labels = blocks.labels(tokens)
        count += tokens.shape[0] * blocks.labelled
        options = {"reduction": "sum", "vocab_size": settings.vocabulary, "return_parts": True}
        with settings.autocast():
            teacher_hidden, hidden = teacher.body(tokens), student.body(tokens)
            _, kl, ce = _values(loss(student, teacher, hidden, teacher_hidden, labels, alpha=1.0, **options))
            teacher_ce = loss(teacher, None, teacher_hidden, None, labels, alpha=0.0, **options).loss
        sums += torch.stack([kl, ce, teacher_ce])
    return Evaluation(*(sums / count).tolist())


def learning_rate_share(step: int, steps: int) -> float:
    """The learning rate of a step in units of its peak: a linear warmup, then half a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2


def _batches(train: Tensor, settings: Settings) -> Iterator[Tensor]:  # [batch, sequence] each
    order = batch_order(train.shape[0], settings.steps, settings.batch, settings.seed).to(train.device)
    for chosen in order:
        yield train[chosen]


def _kd(
    loss: Loss, student: SplitModel, teacher: SplitModel, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor,
    settings: Settings,
) -> KDLossOutput:  # fmt: skip
    with settings.autocast():
        return loss(
            student,
            teacher,
            hidden,
            teacher_hidden,
            labels,
            alpha=settings.alpha,
            temperature=settings.temperature,
            vocab_size=settings.vocabulary,
            return_parts=True,
        )


def _values(result: KDLossOutput) -> list[Tensor]:
    """Loss, KL and CE; NaN for a part that was not computed, because its weight is 0."""
    loss = result.loss.detach()
    return [loss, *(torch.full_like(loss, math.nan) if part is None else part for part in (result.kl, result.ce))]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
