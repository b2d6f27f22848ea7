"""A step of linear_kd_loss from hidden states, beside the time of its bare products, its planned memory and its peers."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_kd import linear_kd_loss, plan_chunks
from fused_kd.testing import peers, problems
from fused_kd.testing.peers import OURS, Loss, Peer
from fused_kd.testing.shapes import Shape

from ..context import Context
from ..subjects import TEMPERATURE, measured, released
from ..timing import timed

TARGET = 1.25  # times the bare products
HEADS = {"trained": True, "frozen": False}
OTHERS = (
    "TRL chunked divergence", "Liger chunked JSD, beta = 0", "Liger fused linear JSD, beta = 0", "orda-kernel",
)  # fmt: skip
PEER_SECONDS = 12.0
BATCHES = 2  # steps take longer here


def results(context: Context) -> Iterator[dict[str, Any]]:
    sizes = context.sizes._replace(batches=min(BATCHES, context.sizes.batches))
    context = context._replace(sizes=sizes)
    for vocabulary in sizes.hidden_vocabularies:
        shape = Shape("gpu", "", "hidden", sizes.rows, vocabulary, sizes.hidden, sizes.hidden, sizes.dtype)
        inputs = problems.make(shape, context.device)
        for head, trained in HEADS.items():
            yield from at(context, shape, inputs if trained else frozen(inputs), head)
            released()


def frozen(inputs: problems.Inputs) -> problems.Inputs:
    hidden, weight = inputs.student
    return inputs._replace(student=(hidden, weight.detach()))


def at(context: Context, shape: Shape, inputs: problems.Inputs, head: str) -> Iterator[dict[str, Any]]:
    products = timed({0: bare_products(shape, inputs, HEADS[head])}, context.sizes.batches, context.sizes.rounds)[0]
    given = {"vocabulary": shape.vocab_size, "rows": shape.rows, "hidden": shape.student_hidden, "head": head}
    yield {**given, "subject": "bare products", "computes": "products", **products._asdict()}
    released()
    by_name = {peer.name: peer for peer in peers.of(shape)}
    wanted = [by_name[OURS], *chunked(context, HEADS[head]), Peer(f"{OURS}, float32 logits", "hidden", in_float32)]
    wanted += [by_name[name] for name in OTHERS if HEADS[head]]
    for result in measured(context, shape, [inputs], [(peer, TEMPERATURE) for peer in wanted], PEER_SECONDS):
        result |= given
        if "seconds" in result:
            result["times_the_products"] = result["seconds"] / products.seconds
        if result["subject"] == OURS:
            planned = plan_of(shape, HEADS[head])
            result |= {
                "target": TARGET, "planned_bytes": planned.peak_bytes_beyond_gradients, "chunk_rows": planned.chunk_rows
            }  # fmt: skip
        yield result


def bare_products(shape: Shape, inputs: problems.Inputs, trained: bool) -> Callable[[], None]:
    """Return the products that a step cannot do without, each in one call, of logits that are there as a whole."""
    (hidden, weight), (teacher_hidden, teacher_weight) = (
        tuple(tensor.detach() for tensor in stream) for stream in (inputs.student, inputs.teacher)
    )
    student_logits, teacher_logits = (hidden.new_empty(shape.rows, shape.vocab_size) for _ in range(2))
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight) if trained else None

    def run() -> None:
        torch.mm(hidden, weight.T, out=student_logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        torch.mm(student_logits, weight, out=hidden_gradient)
        if weight_gradient is not None:
            torch.mm(student_logits.T, hidden, out=weight_gradient)

    return run


def plan_of(shape: Shape, trained: bool) -> Any:
    return plan_chunks(
        shape.rows, shape.vocab_size, shape.student_hidden, shape.teacher_hidden, dtype=shape.dtype, weight_grad=trained
    )


def chunked(context: Context, trained: bool) -> list[Peer]:
    """Return our loss with chunks of other lengths."""
    return [
        Peer(f"{OURS}, chunks of {rows}", "hidden", lambda rows=rows: in_chunks(rows, trained))
        for rows in context.sizes.chunk_rows
    ]


def in_float32() -> Loss:
    """Our loss with the logits of a chunk in float32, whose products take 16-bit operands."""
    return functools.partial(step, logits_dtype=torch.float32)


def step(inputs: problems.Inputs, temperature: float, **options: Any) -> torch.Tensor:
    value = linear_kd_loss(
        *inputs.student, *inputs.teacher, inputs.labels, alpha=problems.ALPHA, temperature=temperature, **options
    )
    assert isinstance(value, torch.Tensor)
    return value


def in_chunks(rows: int, trained: bool) -> Loss:
    def loss(inputs: problems.Inputs, temperature: float) -> torch.Tensor:
        (hidden, weight), (teacher_hidden, _) = inputs.student, inputs.teacher
        sizes = weight.shape[0], hidden.shape[1], teacher_hidden.shape[1]
        of_row = plan_of(Shape("", "", "hidden", 1, *sizes, hidden.dtype), trained).workspace_bytes
        return step(inputs, temperature, workspace_bytes=rows * of_row)

    return loss
