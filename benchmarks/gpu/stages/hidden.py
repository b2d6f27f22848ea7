"""A step of linear_kd_loss from hidden states, beside the time of its bare products, its planned memory and its peers."""

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.products import bare_products
from fused_kd import plan_chunks
from fused_kd.devices import Device
from fused_kd.heads import chunks
from fused_kd.heads.chunks import Plan
from fused_kd.heads.sweep import default_logits_dtype
from fused_kd.launching import device_of
from fused_kd.testing import peers, problems
from fused_kd.testing.peers import OURS, Loss, Peer, ours_with
from fused_kd.testing.plans import in_chunks
from fused_kd.testing.replacing import replaced
from fused_kd.testing.shapes import Shape

from ..context import Context
from ..subjects import TEMPERATURE, measured, released
from ..timing import timed

TARGET = 1.2  # times the bare products
HALF_TARGET = 0.56  # times the step whose rows all count, with half of the rows ignored
HEADS = {"trained": True, "frozen": False}
HALF = f"{OURS}, half ignored"
OTHERS = (
    "TRL chunked divergence", "Liger chunked JSD, beta = 0", "Liger fused linear JSD, beta = 0", "orda-kernel",
)  # fmt: skip
SUBJECT_SECONDS = 12.0
BATCHES = 2  # steps take longer here


class Variant(NamedTuple):
    """Our loss with options of its own."""

    name: str
    build: Any  # a function without arguments, which returns the loss
    planned: Mapping[str, Any] = MappingProxyType({})  # the options that its plan depends on
    half: bool = False  # whether half of the rows are ignored
    target: float | None = None  # times the step of the first variant
    telling: bool = True  # whether it is measured at every vocabulary


def results(context: Context) -> Iterator[dict[str, Any]]:
    """Measure what is most telling first, at every vocabulary, and then chunks of other lengths at the first one."""
    sizes = context.sizes._replace(batches=min(BATCHES, context.sizes.batches))
    context = context._replace(sizes=sizes)
    seconds: dict[Any, float] = {}
    for vocabulary in sizes.hidden_vocabularies:
        for head, inputs in _inputs(context, vocabulary).items():
            variants = of_options(context, HEADS[head])
            if vocabulary != sizes.hidden_vocabularies[0]:
                variants = [variant for variant in variants if variant.telling]
            yield from at(context, inputs, head, variants, OTHERS if HEADS[head] else (), seconds)
            released()
    for head, inputs in _inputs(context, sizes.hidden_vocabularies[0]).items():
        yield from at(context, inputs, head, of_chunks(context, HEADS[head]), (), seconds)


def _inputs(context: Context, vocabulary: int) -> dict[str, problems.Inputs]:
    inputs = problems.make(_shape(context, vocabulary), context.device)
    return {"trained": inputs, "frozen": frozen(inputs)}


def _shape(context: Context, vocabulary: int) -> Shape:
    sizes = context.sizes
    return Shape("gpu", "", "hidden", sizes.rows, vocabulary, sizes.hidden, sizes.hidden, sizes.dtype)


def frozen(inputs: problems.Inputs) -> problems.Inputs:
    hidden, weight = inputs.student
    return inputs._replace(student=(hidden, weight.detach()))


def at(
    context: Context,
    inputs: problems.Inputs,
    head: str,
    variants: list[Variant],
    others: tuple[str, ...],
    seconds: dict[Any, float],  # of the bare products and of the step with the defaults, by vocabulary and head
) -> Iterator[dict[str, Any]]:
    """Give a record for each variant and each peer."""
    shape = _shape(context, inputs.student[1].shape[0])
    given = {"vocabulary": shape.vocab_size, "rows": shape.rows, "hidden": shape.student_hidden, "head": head}
    place = shape.vocab_size, head
    if (place, "products") not in seconds:
        run = bare_products(inputs, HEADS[head])
        products = timed({0: run}, context.sizes.batches, context.sizes.rounds)[0]
        seconds[place, "products"] = products.seconds
        yield {**given, "subject": "bare products", "computes": "products", **products._asdict()}
        del run
        released()
    half = problems.half_ignored(inputs)
    wanted = [(Peer(v.name, "hidden", v.build), v, half if v.half else inputs) for v in variants]
    wanted += [(peer, None, inputs) for peer in peers.of(shape) if peer.name in others]
    for peer, variant, own in wanted:
        for result in measured(context, shape, [own], [(peer, TEMPERATURE)], SUBJECT_SECONDS):
            if variant is not None:
                result |= planned(context, shape, HEADS[head], variant)
            if "seconds" in result:
                if result["subject"] == OURS:
                    seconds[place, OURS] = result["seconds"]
                result["times_the_products"] = result["seconds"] / seconds[place, "products"]
                if (place, OURS) in seconds:
                    result["times_the_default"] = result["seconds"] / seconds[place, OURS]
            yield result | given


def of_options(context: Context, trained: bool) -> list[Variant]:
    """Return our loss as it is planned, and with other options."""
    rounded = {"logits_dtype": context.sizes.dtype}
    bound = functools.partial(_half, target=HALF_TARGET)
    found = [
        Variant(OURS, ours_with),
        Variant(f"{OURS}, lean", _with(memory="lean"), {"memory": "lean"}),
        bound(f"{HALF}, counted_rows", with_counted_rows),
        bound(f"{HALF}, compact", _with(compact=True), telling=False),
        _half(f"{HALF}, not compact", _with(compact=False), planned={}, telling=False),
        Variant(f"{OURS}, 16-bit logits", _with(**rounded), rounded, telling=False),
    ]
    if trained:
        found.append(Variant(f"{OURS}, weight_grad_out", peers.into_main_grad, telling=False))
    return found


def _with(**options: Any) -> Any:
    return functools.partial(ours_with, **options)


def _half(name: str, build: Any, **fields: Any) -> Variant:
    return Variant(name, build, **{"planned": {"share": 2}, **fields}, half=True)


def of_chunks(context: Context, trained: bool) -> list[Variant]:
    """Return our loss in chunks of C tokens whose gradients are multiplied at once, or as one group of all tokens."""
    found = []
    for rows in context.sizes.chunk_rows:
        for group in dict.fromkeys((rows, context.sizes.rows) if trained else (rows,)):
            name = f"{OURS}, chunks of {rows}" + f", groups of {group}" * (group != rows)
            options = {"chunk_rows": rows, "gradient_rows": group}
            found.append(Variant(name, functools.partial(_in_chunks, rows, group), options))
    return found


def _in_chunks(chunk_rows: int, gradient_rows: int) -> Loss:
    def loss(inputs: problems.Inputs, temperature: float) -> torch.Tensor:
        with in_chunks(chunk_rows, gradient_rows):
            return ours_with()(inputs, temperature)

    return loss


def with_counted_rows() -> Loss:
    """Return our loss with the number of rows that count, which is known before the first step is timed."""
    known: dict[int, int] = {}

    def loss(inputs: problems.Inputs, temperature: float) -> torch.Tensor:
        rows = inputs.labels.shape[0]
        if rows not in known:
            known[rows] = int((inputs.labels != problems.IGNORED).sum())
        return ours_with(counted_rows=known[rows])(inputs, temperature)

    return loss


def planned(context: Context, shape: Shape, trained: bool, variant: Variant) -> dict[str, Any]:
    """Return what the plan of a variant says: its chunks, its memory, its modelled seconds; and the variant's target."""
    plan = plan_of(context, shape, trained, **variant.planned)
    found: dict[str, Any] = {
        "planned_bytes": plan.peak_bytes_beyond_gradients, "chunk_rows": plan.chunk_rows,
        "gradient_rows": plan.gradient_rows, "slab_columns": plan.slab_columns,
        "modelled_seconds": plan.modelled_seconds, "modelled_parts": dict(plan.seconds),
    }  # fmt: skip
    if variant.name == OURS:
        found |= {"target": TARGET, "judged": "times_the_products"}
    elif variant.target is not None:
        found |= {"target": variant.target, "judged": "times_the_default"}
    return found


def plan_of(
    context: Context,
    shape: Shape,
    trained: bool,
    share: int = 1,  # one row in so many counts
    chunk_rows: int | None = None,
    gradient_rows: int | None = None,
    **options: Any,
) -> Plan:
    """Return the plan of our loss at a shape; with chunks of a chosen length what it would say of them."""
    hidden = torch.empty(0, dtype=shape.dtype, device=context.device)
    options.setdefault("logits_dtype", default_logits_dtype(hidden, shape.dtype))
    device: Device | None = device_of(context.device)
    sizes = shape.rows // share, shape.vocab_size, shape.student_hidden, shape.teacher_hidden
    chosen = (
        (chunks, "_chosen", lambda *_: (chunk_rows, gradient_rows)),
        (chunks, "_default", chunks._default.__wrapped__),
    )
    with replaced([] if chunk_rows is None else chosen):
        return plan_chunks(*sizes, dtype=shape.dtype, weight_grad=trained, device=device, **options)
