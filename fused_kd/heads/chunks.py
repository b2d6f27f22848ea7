"""The plan of `linear_kd_loss`: the chunks that it cuts its tokens into, and the memory that a step takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Each chunk reads and writes the whole float32 weight gradient, which costs about as much as the products of a few hundred
# tokens.  Under a frozen head there is no weight gradient, and a few hundred tokens keep the products efficient.
TRAINED_CHUNK = 1024  # tokens
TRAINED_WORKSPACE = 512_000_000  # bytes, or the bytes of the float32 weight gradient if these are more
FROZEN_CHUNK = 256  # tokens
FROZEN_WORKSPACE = 240_000_000  # bytes; together with the operators' own buffers below 300 MB for any vocabulary
MIN_CHUNK = 64  # tokens
CHUNK_MULTIPLE = 16  # tokens
ROW_MULTIPLE = 64  # the elements from one row to the next are a multiple of this, so that all rows are aligned


@dataclass(frozen=True)
class Plan:
    """The chunks that `linear_kd_loss` cuts N tokens into, and the memory that it takes beyond its inputs.

    The plan leaves out a few hundred bytes per token, and on a CPU the operators' own buffers: 2.6 MB per thread, or ten
    rows of float32 logits if these are more.  It is a GPU's: a CPU leaves out the rows that do not count, and copies hidden
    states only if autocast changes their dtype.  With `retain_graph=True` the gradients take twice the memory, since
    backward then keeps those that it multiplies.

    Attributes:
        chunk_rows: tokens per chunk.
        chunks: the number of chunks.
        buffers: the bytes of each buffer by its name; gradients are included.
        workspace_bytes: bytes of the buffers that grow with a chunk; the option `workspace_bytes` bounds them.
        peak_bytes: the most bytes that are held at once, gradients included.
    """

    chunk_rows: int
    chunks: int
    buffers: Mapping[str, int]
    workspace_bytes: int
    peak_bytes: int

    @property
    def peak_bytes_beyond_gradients(self) -> int:
        """Return the peak without the gradients that are returned."""
        return self.peak_bytes - sum(size for name, size in self.buffers.items() if name.endswith("gradient"))


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
    workspace_bytes: int | None = None,
) -> Plan:
    """Return the chunks and the memory of a step of `linear_kd_loss`, without running it.

    Args:
        rows: N, the number of tokens that count.
        vocab_size: V, the number of real columns.
        student_hidden_size, teacher_hidden_size: H_s and H_t.  The teacher's is None if there is no teacher.
        dtype: the dtype of the student's hidden states and their gradient, and of its head.
        teacher_dtype: the same for the teacher.  Default: dtype.
        weight_dtype, teacher_weight_dtype: the dtypes of the heads, if autocast lets them differ from the hidden states'.
            Default: the dtype of the hidden states.
        autocast_dtype: the dtype of the products under torch.autocast.  Default: None, no autocast.
        logits_dtype: the dtype of a chunk's logits.  Default: the dtype of the products.
        hidden_grad, weight_grad, bias_grad: whether the student's hidden states, weight and bias get gradients.  If all
            three are False, only the loss is computed.
        teacher_hidden_grad, teacher_weight_grad, teacher_bias_grad: the same for the teacher (`teacher_grad=True`).
        workspace_bytes: bound of the buffers that grow with a chunk.  By default a chunk has at most 256 tokens and 240 MB
            under a frozen head.  Under a trained head it has at most 1 024 tokens, and at most 512 MB or as many bytes as
            the float32 weight gradient, whichever is more.  It never has fewer than 64 tokens.

    Returns:
        The tokens per chunk, the number of chunks, the bytes of each buffer, and the peak.

    Raises:
        ValueError: workspace_bytes is too small for one token.  The message says how many bytes one token takes.
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
            row_bytes[f"{side.model} logits' gradient, rounded"] = row_stride(vocab_size) * side.products.itemsize
    sum_bytes = [side.weight_grad * vocab_size * side.hidden_size * max(4, side.products.itemsize) for side in sides]
    chunk_rows = _chunk_rows(rows, vocab_size, sum(row_bytes.values()), sum(sum_bytes), workspace_bytes)
    workspace = {name: chunk_rows * size for name, size in row_bytes.items()}

    casts = [side.hidden_size * side.products.itemsize for side in sides if side.products != side.weight_dtype]
    copies = [rows * side.hidden_size * side.products.itemsize for side in sides if side.copies_hidden]
    operands = {"weights in the autocast dtype": vocab_size * sum(casts), "hidden states that count": sum(copies)}
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
    forward = sum((*workspace.values(), *operands.values(), *sum_bytes, hidden))
    if rows <= chunk_rows and not sides[-1].any_grad:  # a single chunk frees the teacher's logits before it multiplies
        after = sum_bytes[0] + bias_grad * workspace.get("student logits' gradient, rounded", 0)
        forward -= min(after, workspace.get("teacher logits", 0))
    backward = sum((*sums.values(), *gradients.values()))
    return Plan(
        chunk_rows,
        -(-rows // chunk_rows),
        {name: size for name, size in (workspace | operands | sums | gradients).items() if size},
        sum(workspace.values()),
        max(forward, backward),
    )


class _Side(NamedTuple):
    """One of the two models, as far as the plan depends on it."""

    model: str  # "student" or "teacher"
    hidden_size: int
    dtype: torch.dtype  # dtype of the hidden states
    weight_dtype: torch.dtype
    products: torch.dtype  # dtype of the products
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def prefix(self) -> str:
        """Return the prefix of the names of this model's gradients; the student has none."""
        return "" if self.model == "student" else f"{self.model} "

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad

    @property
    def copies_hidden(self) -> bool:
        """Return whether the copy of the hidden states has memory of its own.

        The product that makes the weight's gradient takes a copy with zeros for the rows that do not count.  It lies in the
        memory of the hidden states' gradient, if there is one in the dtype of the products.
        """
        return self.weight_grad and not (self.hidden_grad and self.dtype == self.products)


def _chunk_rows(
    rows: int,
    vocabulary: int,
    row_bytes: int,  # bytes of a chunk's buffers, per row
    sum_bytes: int,  # bytes of the float32 weight gradients; 0 under frozen heads
    workspace_bytes: int | None,
) -> int:
    """Return the tokens per chunk: chunks of about equal size, a multiple of CHUNK_MULTIPLE if there are several."""
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
    """Return the elements from one row of a chunk's logits to the next.

    Rows are aligned.  The stride is no multiple of 1024, at which all rows would map to the same cache sets.
    """
    stride = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return stride + ROW_MULTIPLE if stride % 1024 == 0 else stride
