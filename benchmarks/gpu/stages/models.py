"""A training step at the heads of real models: ours from hidden states and from logits, beside eager PyTorch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.testing import peers, problems, steps
from fused_kd.testing.accuracy import relative_error
from fused_kd.testing.agreement import BOUNDS
from fused_kd.testing.problems import TEMPERATURE, Inputs, logits_of
from fused_kd.testing.shapes import Pair, Shape

from ..context import Context
from ..subjects import reason, released
from ..timing import timed

SOFTCAPS = {"Gemma 2 2B from 9B": 30.0}  # of the models' published configurations
HALVINGS = 2  # of N, where eager PyTorch runs out of memory
BATCHES = 2
COMPILING = 12.0  # seconds; without so many left, torch.compile is not begun
FROM_HIDDEN, FROM_LOGITS, EAGER, COMPILED = "linear_kd_loss", "heads, then kd_loss", "eager PyTorch", "torch.compile"
Loss = Callable[[Inputs], Tensor]


def results(context: Context) -> Iterator[dict[str, Any]]:
    """Measure ours and eager PyTorch for all models first, then torch.compile."""
    sizes = context.sizes._replace(batches=min(BATCHES, context.sizes.batches))
    context = context._replace(sizes=sizes)
    firsts: dict[tuple[str, int], list[Tensor]] = {}
    for pair in sizes.models:
        for halvings in range(HALVINGS + 1):
            result: dict[str, Any] = {}
            for result in at(context, pair, sizes.rows >> halvings, (FROM_HIDDEN, FROM_LOGITS, EAGER), firsts):
                yield result
            if "seconds" in result:
                break
    for pair in sizes.models:
        if context.has(COMPILING):
            torch._dynamo.reset()
            yield from at(context, pair, sizes.rows, (COMPILED,), firsts)


def at(
    context: Context, pair: Pair, rows: int, subjects: tuple[str, ...], firsts: dict[tuple[str, int], list[Tensor]]
) -> Iterator[dict[str, Any]]:
    """Give a record for each subject, with its loss and its gradient beside those of the first one at these sizes."""
    shape = Shape("gpu", pair.name, "hidden", rows, *pair[1:], context.sizes.dtype)
    inputs, losses = problems.make(shape, context.device), of(SOFTCAPS.get(pair.name))
    given = {
        "models": pair.name, "vocabulary": pair.vocab_size, "rows": rows, "hidden": pair.student_hidden,
        "teacher_hidden": pair.teacher_hidden, "softcap": SOFTCAPS.get(pair.name), "temperature": TEMPERATURE,
    }  # fmt: skip
    first = firsts.setdefault((pair.name, rows), [])
    for subject in subjects:
        try:
            result = measured(context, inputs, losses[subject], first)
        except Exception as error:
            ours = subject in (FROM_HIDDEN, FROM_LOGITS) and not isinstance(error, torch.OutOfMemoryError)
            result = {"finding" if ours else "reason": reason(error)}
        yield {**given, "subject": subject, **result}
        inputs.clear()
        released()


def measured(context: Context, inputs: Inputs, loss: Loss, first: list[Tensor]) -> dict[str, Any]:
    step = steps.Step(lambda inputs, _: loss(inputs), [inputs], TEMPERATURE)

    def run() -> None:
        step.next()
        step.both()

    timing = timed({0: run}, context.sizes.batches, context.sizes.rounds)[0]
    assert step.value is not None
    found = [step.value.detach(), *(leaf.grad for leaf in inputs.student[:1] if leaf.grad is not None)]
    result: dict[str, Any] = {**timing._asdict(), "loss": float(found[0])}
    if first:
        differences = [relative_error(tensor, other) for tensor, other in zip(found, first, strict=True)]
        result |= {"loss_difference": differences[0], "gradient_difference": differences[1]}
        bounds = BOUNDS[context.sizes.dtype]
        if not all(difference <= bound for difference, bound in zip(differences, bounds, strict=True)):
            result["finding"] = "not the loss of the first one"
    first[:] = first or found
    return result | {"peak_bytes": steps.peak_beyond(step, context.device)}


def of(softcap: float | None) -> dict[str, Loss]:
    """Return the subjects, each a function of the same inputs."""
    options: dict[str, Any] = {"alpha": problems.ALPHA, "temperature": TEMPERATURE, "logit_softcap": softcap}
    compiled = torch.compile(eager, dynamic=False)

    def from_hidden(inputs: Inputs) -> Tensor:
        return linear_kd_loss(*inputs.student, *inputs.teacher, inputs.labels, **options)  # type: ignore

    def from_logits(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = logits_of(inputs.teacher)
        return kd_loss(logits_of(inputs.student), teacher, inputs.labels, **options)  # type: ignore[no-any-return]

    return {
        FROM_HIDDEN: from_hidden,
        FROM_LOGITS: from_logits,
        EAGER: functools.partial(eager, softcap=softcap),
        COMPILED: lambda inputs: compiled(inputs, softcap),
    }


def eager(inputs: Inputs, softcap: float | None) -> Tensor:
    """Return the loss as training code usually computes it, with the softcap as the models do it."""

    def capped(stream: tuple[Tensor, ...]) -> Tensor:
        logits = logits_of(stream)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    with torch.no_grad():
        teacher = capped(inputs.teacher)
    return peers.eager(capped(inputs.student), teacher, inputs.labels, TEMPERATURE)
