"""The training loop, and the evaluation before and after it."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...output import KDLossOutput
from . import memory
from .data import Blocks, batch_order, next_tokens
from .stopwatch import Stopwatch

Loss = Callable[..., KDLossOutput]  # fused_kd.kd_loss, or another of its signature

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
    """Means over the held-out tokens that have a next token; in nats, at temperature 1."""

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
    loss_bytes: int  # peak of the loss, forward and backward, beyond the logits of teacher and student

    def curves(self) -> dict[str, list[float]]:
        return {"loss": self.loss, "kl": self.kl, "ce": self.ce, "gradient_norm": self.gradient_norm}

    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.loss))


def train(
    teacher: Any,
    student: Any,
    blocks: Blocks,
    loss: Loss,
    settings: Settings,
    on_step: Callable[[int, KDLossOutput], None],  # (steps done, values on the device)
) -> History:
    """Trains the student in place.

    The loss is taken on a leaf that holds the student's logits, and its gradient then handed to the model.  That is the
    same gradient as one backward pass through both, and tells apart what the loss costs and what the model.
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
        labels = next_tokens(tokens)
        watch.start()
        with torch.no_grad(), settings.autocast():
            teacher_logits = teacher(input_ids=tokens, use_cache=False).logits  # [batch, sequence, V']
        watch.lap()
        with settings.autocast():
            student_logits = student(input_ids=tokens, use_cache=False).logits
        watch.lap()
        leaf = student_logits.detach().requires_grad_()
        result = _kd(loss, leaf, teacher_logits, labels, settings)
        watch.lap()
        result.loss.backward()  # type: ignore[no-untyped-call]
        watch.lap()
        student_logits.backward(leaf.grad)
        watch.lap()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_NORM)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        watch.lap()
        values.append(torch.stack([*_values(result), norm]))
        on_step(len(values), result)

    def once_more() -> None:  # on the last batch, after the timed steps: measuring memory is slow
        leaf = student_logits.detach().requires_grad_()
        _kd(loss, leaf, teacher_logits, labels, settings).loss.backward()  # type: ignore[no-untyped-call]

    del result, leaf  # no second gradient in memory while the loss is measured
    seconds = watch.seconds()
    losses, kl, ce, norms = torch.stack(values).T.tolist()
    return History(losses, kl, ce, norms, seconds, memory.peak_bytes(once_more, settings.device))


@torch.no_grad()
def evaluate(teacher: Any, student: Any, blocks: Blocks, loss: Loss, settings: Settings) -> Evaluation:
    student.eval()
    sums = torch.zeros(3, device=settings.device)
    count = 0
    for tokens in blocks.held_out.split(settings.batch):
        labels = next_tokens(tokens)
        count += tokens.numel() - tokens.shape[0]
        with settings.autocast():
            teacher_logits = teacher(input_ids=tokens, use_cache=False).logits
            student_logits = student(input_ids=tokens, use_cache=False).logits
        options = {"reduction": "sum", "vocab_size": settings.vocabulary, "return_parts": True}
        _, kl, ce = _values(loss(student_logits, teacher_logits, labels, alpha=1.0, **options))
        teacher_ce = loss(teacher_logits, None, labels, alpha=0.0, **options).loss
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


def _kd(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, settings: Settings) -> KDLossOutput:
    return loss(
        student,
        teacher,
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
