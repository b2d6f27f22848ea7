"""The training loop, with the loss measured apart from the models."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import kd_loss
from .text import next_tokens

CLIP = 1.0  # the largest norm of the gradient
REPORT_EVERY = 5  # steps: reading the loss waits for the device


@dataclass
class Settings:
    steps: int
    batch_size: int
    learning_rate: float
    alpha: float
    temperature: float
    seed: int
    vocab_size: int | None
    device: torch.device

    @property
    def loss_options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "temperature": self.temperature, "vocab_size": self.vocab_size}


@dataclass
class Curves:
    """A value for each step."""

    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)  # forward and backward, from logits to their gradient


class Clock:
    """Times on the device: events on a GPU, read once the run is over, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start  # type: ignore[no-any-return]


def batches(rows: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Batches of rows `[B, L]`, shuffled anew each time through, the same for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from (rows[i] for i in torch.randperm(len(rows), generator=generator).split(settings.batch_size))


def loss_step(
    loss_function: Callable[..., Any], student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, settings: Settings
) -> tuple[Any, Tensor]:
    """The loss from logits that are a leaf, and its gradient: the loss alone, without the models on either side."""
    logits = student_logits.detach().requires_grad_()
    output = loss_function(logits, teacher_logits, next_tokens(ids), return_parts=True, **settings.loss_options)
    output.loss.backward()
    assert logits.grad is not None
    return output, logits.grad


def train(
    student: Any,
    teacher: Any,
    rows: Tensor,
    loss_function: Callable[..., Any],
    settings: Settings,
    progress: Callable[[float, float, float], None],
) -> Curves:
    """Trains the student in place; AdamW, a tenth of the steps to warm up, then a linear fall to zero."""
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warm_up = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (settings.steps - step) / settings.steps)
    )
    student.train()
    clock, curves, marks, values = Clock(settings.device), Curves(), [], []
    for step, batch in enumerate(itertools.islice(batches(rows, settings), settings.steps)):
        ids = batch.to(settings.device)
        start = clock.mark()
        with torch.no_grad():
            teacher_logits = teacher(ids).logits
        student_logits = student(ids).logits
        loss_start = clock.mark()
        output, gradient = loss_step(loss_function, student_logits, teacher_logits, ids, settings)
        loss_end = clock.mark()
        student_logits.backward(gradient)
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append((start, loss_start, loss_end, clock.mark()))
        zero = torch.zeros_like(output.loss)
        values.append(torch.stack([output.loss.detach(), *(zero if v is None else v for v in (output.kl, output.ce))]))
        if step % REPORT_EVERY == 0 or step == settings.steps - 1:
            progress(*values[-1].tolist())
    if clock.cuda:
        torch.cuda.synchronize()
    curves.loss, curves.kl, curves.ce = torch.stack(values).T.tolist()
    curves.step_seconds = [clock.seconds(start, end) for start, _, _, end in marks]
    curves.loss_seconds = [clock.seconds(start, end) for _, start, end, _ in marks]
    return curves


@torch.no_grad()
def evaluate(student: Any, teacher: Any, rows: Tensor, settings: Settings) -> dict[str, float]:
    """Held-out KL(teacher || student) in nats a token at T = 1, and the perplexities of both."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in rows.split(settings.batch_size):
        ids = batch.to(settings.device)
        labels = next_tokens(ids)
        options: dict[str, Any] = {"reduction": "sum", "vocab_size": settings.vocab_size}
        teacher_logits = teacher(ids).logits
        of_student = kd_loss(student(ids).logits, teacher_logits, labels, return_parts=True, **options)
        of_teacher = kd_loss(teacher_logits, None, labels, alpha=0.0, **options)
        sums += torch.stack([of_student.kl, of_student.ce, of_teacher]).double().cpu()  # type: ignore[union-attr,list-item]
    kl, ce, teacher_ce = (sums / (rows.shape[0] * (rows.shape[1] - 1))).tolist()
    return {
        "kl": kl,
        "perplexity": torch.tensor(ce).exp().item(),
        "teacher_perplexity": torch.tensor(teacher_ce).exp().item(),
    }


@torch.no_grad()
def logits_of(student: Any, teacher: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    return student(ids).logits, teacher(ids).logits


def loss_memory(
    loss_function: Callable[..., Any], student: Any, teacher: Any, batch: Tensor, settings: Settings
) -> int:
    """Peak bytes that the loss allocates, gradient of the logits included, beyond the logits: one step, not timed."""
    ids = batch.to(settings.device)
    student_logits, teacher_logits = logits_of(student, teacher, ids)
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_step(loss_function, student_logits, teacher_logits, ids, settings)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss_step(loss_function, student_logits, teacher_logits, ids, settings)
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)
