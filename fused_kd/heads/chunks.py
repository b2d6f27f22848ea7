"""The plan of `linear_kd_loss`: the chunks that it cuts its tokens into, and the memory and the time that a step takes.

On a GPU the plan weighs memory against a model of the time.  A product of few tokens waits for its weight, and a weight's
gradient that is summed over several products is read and written in float32 for each.  So the logits exist for C tokens at
a time, and their gradients, 16-bit numbers, for M tokens, often all of them: then each gradient is one product.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..devices import Device, device_of_name
from . import times
from .step import STATISTICS_BYTES, Side, Step, row_stride

__all__ = ["Plan", "plan_chunks", "row_stride"]

# On a CPU, as measured on two cores: chunks of 512 take 3% less time than chunks of 1 024, whose fresh memory costs page
# faults, and as long as chunks of 256, which read and write the float32 weight gradient more often.  Under a frozen head
# there is no weight gradient.  A group is a chunk: longer ones took longer.
TRAINED_CHUNK = 512  # tokens
TRAINED_WORKSPACE = 512_000_000  # bytes, or the bytes of the float32 weight gradient if these are more
FROZEN_CHUNK = 256  # tokens
FROZEN_WORKSPACE = 240_000_000  # bytes; together with the operators' own buffers below 300 MB for any vocabulary
MIN_CHUNK = 64  # tokens
CHUNK_MULTIPLE = 16  # tokens
# On a GPU.
# The buffers of a chunk and a group take at most this share of the device's memory by default.  With an eighth no plan of
# 8 192 tokens, even on a card of 24 GB with a vocabulary of 262 144, is slower than chunks of USUAL_CHUNK tokens and one
# float32 sum are.  With a sixteenth several are.
MEMORY_SHARE = 1 / 8
SLOWER = 1.02  # times the fastest plan: a plan so fast that takes less memory is taken instead
USUAL_CHUNK = 1024  # tokens; no plan that is slower than chunks of these is taken, if there is a faster one
ROWS_MULTIPLE = 256  # tokens; see `_rounded`
# In lean mode.  The library's own buffers and the rounding of sizes stay within another 20 MB.
LEAN_BYTES = 280_000_000
MIN_SLAB = 256  # columns
SLAB_MULTIPLE = 64  # columns
MEMORIES = ("default", "lean")


@dataclass(frozen=True)
class Plan:
    """The parts that `linear_kd_loss` cuts a step into, and the memory that it takes beyond its inputs.

    The plan leaves out a few hundred bytes per token, and on a CPU the operators' own buffers: 2.6 MB per thread, or ten
    rows of float32 logits if these are more, and in lean mode the weight of a slab in float32.  It is a GPU's: a CPU leaves
    out the rows that do not count, and copies hidden states only if autocast changes their dtype.  With
    `retain_graph=True` the gradients take twice the memory, since backward then keeps those that it multiplies.

    Attributes:
        chunk_rows: C, tokens whose logits exist at once.
        gradient_rows: M, tokens whose logits' gradients are multiplied at once; a multiple of C, or N.
        chunks: the number of chunks of C tokens.
        slab_columns: columns of the vocabulary whose logits exist at once; V, but in lean mode.
        slabs: the number of slabs of columns; 1, but in lean mode.
        buffers: the bytes of each buffer by its name; gradients are included.
        workspace_bytes: bytes of the buffers that grow with C, M or a slab; the option `workspace_bytes` bounds them.
        peak_bytes: the most bytes that are held at once, gradients included.
        seconds: the modelled seconds of each part of a step by its name; empty on a CPU.
    """

    chunk_rows: int
    gradient_rows: int
    chunks: int
    slab_columns: int
    slabs: int
    buffers: Mapping[str, int]
    workspace_bytes: int
    peak_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def peak_bytes_beyond_gradients(self) -> int:
        """Return the peak without the gradients that are returned."""
        return self.peak_bytes - sum(size for name, size in self.buffers.items() if name.endswith("gradient"))

    @property
    def modelled_seconds(self) -> float:
        """Return the modelled seconds of a step; 0 on a CPU."""
        return sum(self.seconds.values())


def plan_chunks(
    rows: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    teacher_weight_dtype: torch.dtype | None = None,
    autocast_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    teacher_hidden_grad: bool = False,
    teacher_weight_grad: bool = False,
    teacher_bias_grad: bool = False,
    lora_rank: int = 0,
    workspace_bytes: int | None = None,
    device: str | Device | None = None,
    memory: str = "default",
) -> Plan:
    """Return the chunks, the memory and the modelled time of a step of `linear_kd_loss`, without running it.

    Args:
        rows: N, the number of tokens that count.
        vocab_size: V, the number of real columns.
        student_hidden_size, teacher_hidden_size: H_s and H_t.  The teacher's is None if there is no teacher.
        dtype: the dtype of the student's hidden states and their gradient, and of its head.
        teacher_dtype: the same for the teacher.  Default: dtype.
        weight_dtype, teacher_weight_dtype: the dtypes of the heads, if autocast lets them differ from the hidden states'.
            Default: the dtype of the hidden states.
        autocast_dtype: the dtype of the products under torch.autocast.  Default: None, no autocast.
        logits_dtype: the dtype of a chunk's logits.  Default: float32, or float64 for products in float64.
        hidden_grad, weight_grad, bias_grad: whether the student's hidden states, weight and bias get gradients.  If all
            three are False and there is no adapter, only the loss is computed.
        teacher_hidden_grad, teacher_weight_grad, teacher_bias_grad: the same for the teacher (`teacher_grad=True`).
        lora_rank: r, the rank of the adapter on the student's head (`student_lora`), which gets a gradient.  Default: 0,
            no adapter.
        workspace_bytes: bound of the buffers that grow with a chunk.  On a GPU the default is an eighth of its memory, and
            no fewer bytes than 64 tokens take.  On a CPU a chunk has at most 256 tokens and 240 MB under a frozen head.
            Under a trained head it has at most 512 tokens, and at most 512 MB or as many bytes as the float32 weight
            gradient, whichever is more.  It never has fewer than 64 tokens.
        device: the GPU to plan for: a name from `fused_kd.devices.DEVICES`, or a `Device`.  Default: None, a CPU.
        memory: "lean" for slabs of the vocabulary over all tokens instead of chunks of tokens.

    Returns:
        The tokens per chunk, the number of chunks, the bytes of each buffer, the peak, and the time of each part.

    Raises:
        ValueError: workspace_bytes is too small for one token, or in lean mode for one slab, and the message says how many
            bytes that takes; device or memory is unknown.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
    device = device_of_name(device)
    products = autocast_dtype or dtype
    student_grads = hidden_grad, weight_grad, bias_grad, lora_rank
    dtypes = dtype, weight_dtype or dtype, products, logits_dtype or _default_logits(products)
    sides = [Side("student", student_hidden_size, *dtypes, *student_grads)]
    if teacher_hidden_size is not None:
        teacher_dtype = teacher_dtype or dtype
        products = autocast_dtype or teacher_dtype
        teacher_grads = teacher_hidden_grad, teacher_weight_grad, teacher_bias_grad
        dtypes = (
            teacher_dtype,
            teacher_weight_dtype or teacher_dtype,
            products,
            logits_dtype or _default_logits(products),
        )
        sides.append(Side("teacher", teacher_hidden_size, *dtypes, *teacher_grads))
    step = Step(rows, vocab_size, tuple(sides))
    plan = (_lean if memory == "lean" else _default)(step, device, workspace_bytes)
    return replace(plan, buffers=dict(plan.buffers), seconds=dict(plan.seconds))  # the caller's own


def _default_logits(products: torch.dtype) -> torch.dtype:
    return torch.promote_types(products, torch.float32)


@functools.lru_cache(maxsize=1024)  # a step plans each time, and most steps are alike
def _default(step: Step, device: Device | None, workspace_bytes: int | None) -> Plan:
    """Return the plan of a step in chunks of tokens."""
    V = step.vocab_size
    rows = max(1, step.rows)
    chunk_rows, gradient_rows = (min(rows, size) for size in _chosen(_rounded(step, device), device, workspace_bytes))
    workspace = {name: chunk_rows * size for name, size in step.logits(V).items()}
    workspace |= {name: gradient_rows * size for name, size in step.logit_gradients(V).items()}
    others = step.operands | step.sums(-(-step.rows // gradient_rows)) | _gradients(step)
    seconds = {} if device is None else times.seconds(step, device, chunk_rows, gradient_rows)
    return Plan(
        chunk_rows,
        gradient_rows,
        -(-step.rows // chunk_rows),
        V,
        1,
        {name: size for name, size in (workspace | others).items() if size},
        sum(workspace.values()),
        max(step.peaks(chunk_rows, gradient_rows)),
        seconds,
    )


def _gradients(step: Step) -> dict[str, int]:
    return step.hidden_gradients | step.weight_gradients | step.bias_gradients


def _rounded(step: Step, device: Device | None) -> Step:
    """Return the step that is planned in the place of this one on a GPU, so that batches of about one size share a plan."""
    if device is None or step.rows <= 4 * ROWS_MULTIPLE:
        return step._replace(rows=max(1, step.rows))
    return step._replace(rows=-(-step.rows // ROWS_MULTIPLE) * ROWS_MULTIPLE)


class _Chunks(NamedTuple):
    chunk_rows: int  # C
    gradient_rows: int  # M


@functools.lru_cache(maxsize=1024)
def _chosen(step: Step, device: Device | None, workspace_bytes: int | None) -> _Chunks:
    """Return the tokens per chunk and per group."""
    logits, gradients = (sum(of(step.vocab_size).values()) for of in (step.logits, step.logit_gradients))
    row_bytes = logits + gradients
    if workspace_bytes is not None:
        if workspace_bytes < row_bytes:
            raise ValueError(
                f"workspace_bytes: expected at least {row_bytes}, the buffers of one token with a vocabulary of "
                f"{step.vocab_size}, got {workspace_bytes}"
            )
        bound = workspace_bytes
    else:
        bound = max(_default_bound(step, device), MIN_CHUNK * row_bytes)
    most = bound // row_bytes
    if device is None:
        if workspace_bytes is None:
            most = min(TRAINED_CHUNK if step.trained else FROZEN_CHUNK, most)
        even = _even(step.rows, -(-step.rows // most), most)
        return _Chunks(even, even)
    plans = list(_candidates(step, logits, gradients, bound))
    modelled = {plan: sum(times.seconds(step, device, *plan).values()) for plan in plans}
    fastest = min(modelled.values())
    usual = sum(times.seconds(step, device, USUAL_CHUNK, USUAL_CHUNK).values())
    fast = max(fastest, min(SLOWER * fastest, usual))
    return min(
        (plan for plan in plans if modelled[plan] <= fast), key=lambda plan: (max(step.peaks(*plan)), modelled[plan])
    )


def _default_bound(step: Step, device: Device | None) -> int:
    """Return the most bytes of the buffers that grow with a chunk."""
    if device is not None:
        return int(MEMORY_SHARE * device.memory)
    if not step.trained:
        return FROZEN_WORKSPACE
    sums = [
        step.vocab_size * width * max(4, side.products.itemsize) for side in step.sides for _, width in side.weights
    ]
    return max(TRAINED_WORKSPACE, sum(sums))


def _candidates(
    step: Step,
    logits: int,  # bytes per row of a chunk
    gradients: int,  # bytes per row of a group
    bound: int,  # bytes; at least those of one row
) -> Iterator[_Chunks]:
    """Yield the plans within the bound: the largest chunks and groups that it allows, and halves of these."""
    N, most = step.rows, bound // (logits + gradients)
    for chunks in _doubled(-(-N // most), N):
        even = _even(N, chunks, most)
        yield _Chunks(even, even)
    if not step.trained:
        return
    least = min(MIN_CHUNK, most)
    most_in_group = (bound - least * logits) // gradients
    for groups in _doubled(-(-N // most_in_group), N):
        in_group = -(-N // groups)
        room = bound - in_group * gradients
        most_in_chunk = room // logits if logits else in_group
        if most_in_chunk < 1:
            continue
        for chunks in _doubled(-(-in_group // most_in_chunk), in_group):
            chunk_rows = _even(in_group, chunks, most_in_chunk)
            # A group is whole chunks, which may not fit where the tokens of a chunk have been rounded up.
            group = min(N, -(-in_group // chunk_rows) * chunk_rows)
            if chunk_rows * logits + group * gradients <= bound:
                yield _Chunks(chunk_rows, group)


def _doubled(parts: int, rows: int) -> Iterator[int]:
    """Yield the number of parts and its doubles while a part has at least MIN_CHUNK rows, and at least one number."""
    parts = max(1, parts)
    yield parts
    while 2 * parts * MIN_CHUNK <= rows:
        parts *= 2
        yield parts


def _even(rows: int, parts: int, most: int) -> int:
    """Return the rows per part: parts of about equal size, a multiple of CHUNK_MULTIPLE if there are several."""
    if parts <= 1:
        return max(1, rows)
    even = -(-rows // parts)
    return min(most, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


@functools.lru_cache(maxsize=1024)
def _lean(step: Step, device: Device | None, workspace_bytes: int | None) -> Plan:
    """Return the plan of a step in slabs of the vocabulary, over all tokens."""
    N, V = max(1, step.rows), step.vocab_size
    # The gradient of 16-bit hidden states is summed over the slabs in float32.
    sums = {
        f"{side.prefix}hidden gradient, summed in float32": step.rows * side.hidden_size * 4
        for side in step.sides
        if side.hidden_grad and side.dtype.itemsize < 4
    }
    # Products take hidden states in their dtype, and those of a weight's gradient have zeros for rows that do not count.
    # The latter have room in the hidden gradient, unless that is itself the sum.
    copies = [
        N * side.hidden_size * side.products.itemsize
        for side in step.sides
        if side.dtype != side.products or (side.weight_grad and not (side.hidden_grad and side.dtype.itemsize < 4))
    ]
    others = sums | {"hidden states that count": sum(copies), "statistics": STATISTICS_BYTES * step.rows}
    column_bytes = N * sum((step.logits(1) | step.logit_gradients(1)).values()) // row_stride(1)
    casts = sum(side.hidden_size * side.products.itemsize for side in step.sides if side.products != side.weight_dtype)
    if workspace_bytes is not None:
        smallest = SLAB_MULTIPLE * column_bytes
        if workspace_bytes < smallest:
            raise ValueError(
                f"workspace_bytes: expected at least {smallest}, the buffers of {SLAB_MULTIPLE} columns of {step.rows} "
                f"tokens, got {workspace_bytes}"
            )
        most = workspace_bytes // column_bytes
    else:
        # A CPU multiplies 16-bit numbers in float32, so that it holds the weight of a slab in float32 for a while.
        is_widened = [device is None and side.hidden_grad and side.products.itemsize < 4 for side in step.sides]
        widened = max(4 * side.hidden_size * wide for side, wide in zip(step.sides, is_widened, strict=True))
        most = max(MIN_SLAB, (LEAN_BYTES - sum(others.values())) // (column_bytes + casts + widened))
    most = most // SLAB_MULTIPLE * SLAB_MULTIPLE
    if most % 1024 == 0 and most > SLAB_MULTIPLE:
        most -= SLAB_MULTIPLE  # `row_stride` would add as many
    slabs = -(-V // most)
    columns = -(-V // slabs)
    columns = V if slabs == 1 else -(-columns // SLAB_MULTIPLE) * SLAB_MULTIPLE
    workspace = {name: N * size for name, size in (step.logits(columns) | step.logit_gradients(columns)).items()}
    buffers = workspace | {"weights in the autocast dtype": columns * casts} | others | _gradients(step)
    buffers = {name: size for name, size in buffers.items() if size}
    seconds = {} if device is None else times.lean_seconds(step, device, columns)
    return Plan(
        N,
        N,
        min(1, step.rows),
        columns,
        -(-V // columns),
        buffers,
        sum(workspace.values()),
        sum(buffers.values()),
        seconds,
    )
