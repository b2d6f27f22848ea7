"""How `linear_kd_loss` cuts its tokens into chunks, and the memory that a step takes, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

# A chunk writes the float32 weight gradient anew, which costs about as much as the products of a few hundred tokens; a
# frozen head has no such term, and some hundred tokens keep the products efficient.
TRAINED_CHUNK = 1024
TRAINED_WORKSPACE = 512_000_000  # bytes, or as much as the weight gradient's sum takes
FROZEN_CHUNK = 256
FROZEN_WORKSPACE = 240_000_000  # bytes; with the operators' own buffers under 300 MB for any vocabulary
MIN_CHUNK = 64
CHUNK_MULTIPLE = 16  # tokens
ROW_MULTIPLE = 64  # elements from one row of a chunk to the next, so that rows of any vocabulary are aligned


@dataclass(frozen=True)
class Plan:
    """How `linear_kd_loss` cuts N tokens into chunks, and the memory that it takes beyond its inputs.

    Besides these there are a few hundred bytes a token, on a CPU the operators' own buffers of 12 MB, and with
    `retain_graph=True` the gradients twice, since backward then leaves what it multiplies as it was.
    """

    chunk_rows: int  # tokens of a chunk
    chunks: int
    buffers: Mapping[str, int]  # bytes of each, by name; the gradients among them
    workspace_bytes: int  # of the buffers that grow with a chunk, which `workspace_bytes` bounds
    peak_bytes: int  # the most that is held at once, gradients included

    @property
    def peak_bytes_beyond_gradients(self) -> int:
        return self.peak_bytes - sum(size for name, size in self.buffers.items() if name.endswith("gradient"))


def plan(
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
    workspace_bytes: int | None = None,
) -> Plan:
    """The chunks and the memory of a step, before anything runs.

    Args:
        rows: N, tokens that count.
        vocab_size: V.
        student_hidden_size, teacher_hidden_size: H_s and H_t; None without a teacher.
        dtype: of the student's hidden states and head, and so of their gradients.
        teacher_dtype: of the teacher's.  Default: dtype.
        weight_dtype, teacher_weight_dtype: of the heads, where autocast lets it be another one than the hidden states'.
        autocast_dtype: what torch.autocast runs the products in.  Default: None, no autocast.
        logits_dtype: of a chunk's logits.  Default: that of the products.
        hidden_grad, weight_grad, bias_grad: which gradients of the student are asked for.  None of them: the loss only.
        teacher_hidden_grad, teacher_weight_grad, teacher_bias_grad: which of the teacher (`teacher_grad=True`).
        workspace_bytes: bound of the buffers that grow with a chunk.  By default a chunk has 256 tokens under a frozen
            head, or what 240 MB hold; under a trained one 1 024, or what 512 MB hold or as much as the float32 weight
            gradient takes.

    Raises:
        ValueError: workspace_bytes is too small for one token; the message names what one takes.
    """
    student_grads = hidden_grad, weight_grad, bias_grad
    dtypes = dtype, weight_dtype or dtype, autocast_dtype or dtype
    sides = [_Side("student", student_hidden_size, *dtypes, *student_grads)]
    if teacher_hidden_size is not None:
        teacher_dtype = teacher_dtype or dtype
        teacher_grads = teacher_hidden_grad, teacher_weight_grad, teacher_bias_grad
        dtypes = teacher_dtype, teacher_weight_dtype or teacher_dtype, autocast_dtype or teacher_dtype
        sides.append(_Side("teacher", teacher_hidden_size, *dtypes, *teacher_grads))
    row_bytes: dict[str, int] = {}
    for side in sides:
        row_bytes[f"{side.model} logits"] = row_stride(vocab_size) * (logits_dtype or side.products).itemsize
        if side.any_grad and logits_dtype not in (None, side.products):
            row_bytes[f"{side.model} logits' gradient, rounded"] = vocab_size * side.products.itemsize
    sum_bytes = [side.weight_grad * vocab_size * side.hidden_size * max(4, side.products.itemsize) for side in sides]
    chunk_rows = _chunk_rows(rows, vocab_size, sum(row_bytes.values()), sum(sum_bytes), workspace_bytes)
    workspace = {name: chunk_rows * size for name, size in row_bytes.items()}

    casts = [side.hidden_size * side.products.itemsize for side in sides if side.products != side.weight_dtype]
    weights = {"weights in the autocast dtype": vocab_size * sum(casts)}
    sums: dict[str, int] = {}
    gradients: dict[str, int] = {}
    for side, size in zip(sides, sum_bytes, strict=True):
        itemsize = side.weight_dtype.itemsize
        sums[f"{side.prefix}weight gradient, summed in float32"] = size if itemsize < 4 else 0
        gradients |= {
            f"{side.prefix}hidden gradient": side.hidden_grad * rows * side.hidden_size * side.dtype.itemsize,
            f"{side.prefix}weight gradient": side.weight_grad * vocab_size * side.hidden_size * itemsize,
            f"{side.prefix}bias gradient": side.bias_grad * vocab_size * itemsize,
        }
    hidden = sum(size for name, size in gradients.items() if name.endswith("hidden gradient"))
    forward = sum((*workspace.values(), *weights.values(), *sum_bytes, hidden))
    if rows <= chunk_rows and not sides[-1].any_grad:  # the teacher's logits make room for what comes after them
        after = sum_bytes[0] + workspace.get("student logits' gradient, rounded", 0)
        forward -= min(after, workspace.get("teacher logits", 0))
    backward = sum((*sums.values(), *gradients.values()))
    return Plan(
        chunk_rows,
        -(-rows // chunk_rows),
        {name: size for name, size in (workspace | weights | sums | gradients).items() if size},
        sum(workspace.values()),
        max(forward, backward),
    )


class _Side(NamedTuple):
    """Student or teacher, for the plan."""

    model: str
    hidden_size: int
    dtype: torch.dtype  # of the hidden states
    weight_dtype: torch.dtype
    products: torch.dtype  # what its products run in
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def prefix(self) -> str:
        """Of the names of its gradients: the student's are those that one expects."""
        return "" if self.model == "student" else f"{self.model} "

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad


def _chunk_rows(
    rows: int,
    vocabulary: int,
    row_bytes: int,  # of a chunk's buffers, for one row
    sum_bytes: int,  # of the float32 weight gradients; 0 under frozen heads
    workspace_bytes: int | None,
) -> int:
    """Chunks of equal size, as near as `CHUNK_MULTIPLE` lets them be."""
    if workspace_bytes is not None:
        limit = workspace_bytes // row_bytes
        if limit < 1:
            raise ValueError(
                f"workspace_bytes: expected at least {row_bytes}, the buffers of one token with a vocabulary of "
                f"{vocabulary}, got {workspace_bytes}"
            )
    else:
        frozen = min(FROZEN_CHUNK, FROZEN_WORKSPACE // row_bytes)
        trained = min(TRAINED_CHUNK, max(TRAINED_WORKSPACE, sum_bytes) // row_bytes)
        limit = max(MIN_CHUNK, trained if sum_bytes else frozen)
    if rows <= limit:
        return max(1, rows)
    even = -(-rows // -(-rows // limit))
    return min(limit, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)


def row_stride(vocabulary: int) -> int:
    """Elements from one row of a chunk's logits to the next: aligned, and not at one place of the caches for every row."""
    stride = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return stride + ROW_MULTIPLE if stride % 1024 == 0 else stride
