"""The loss from hidden states: chunks of tokens whose logits exist one chunk at a time, and the plan of the chunks.

With F = 2 N V H flops, the student's F_s and the teacher's F_t, a step takes F_s + F_t for the logits, F_s for the
gradient of the hidden states and F_s for that of the weight: the gradient of a chunk's logits is taken while they are
there, over them, so nothing is projected twice.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .matmul import accumulate, project
from .row_losses import KDOptions, gradient_arguments, row_values

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
    autocast_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    workspace_bytes: int | None = None,
) -> Plan:
    """The chunks and the memory of a step, before anything runs.

    Args:
        rows: N, tokens that count.
        vocab_size: V.
        student_hidden_size, teacher_hidden_size: H_s and H_t; None without a teacher.
        dtype: of the student's hidden states and weight, and so of their gradients.
        teacher_dtype: of the teacher's.  Default: dtype.
        autocast_dtype: what torch.autocast runs the products in.  Default: None, no autocast.
        logits_dtype: of a chunk's logits.  Default: that of the products.
        hidden_grad, weight_grad, bias_grad: which gradients of the student are asked for.  None of them: the loss only.
        workspace_bytes: bound of the buffers that grow with a chunk.  By default a chunk has 256 tokens under a frozen
            head, or what 240 MB hold; under a trained one 1 024, or what 512 MB hold or as much as the float32 weight
            gradient takes.

    Raises:
        ValueError: workspace_bytes is too small for one token; the message names what one takes.
    """
    products, teacher_products = autocast_dtype or dtype, autocast_dtype or teacher_dtype or dtype
    any_grad = hidden_grad or weight_grad or bias_grad
    row_bytes = {"student logits": row_stride(vocab_size) * (logits_dtype or products).itemsize}
    if teacher_hidden_size is not None:
        row_bytes["teacher logits"] = row_stride(vocab_size) * (logits_dtype or teacher_products).itemsize
    if any_grad and logits_dtype not in (None, products):
        row_bytes["student logits' gradient, rounded"] = vocab_size * products.itemsize
    weight_elements = vocab_size * student_hidden_size if weight_grad else 0
    sum_bytes = weight_elements * max(4, products.itemsize)
    chunk_rows = _chunk_rows(rows, vocab_size, sum(row_bytes.values()), sum_bytes, workspace_bytes)
    workspace = {name: chunk_rows * size for name, size in row_bytes.items()}

    casts = [student_hidden_size] if products != dtype else []
    if teacher_hidden_size is not None and teacher_products != (teacher_dtype or dtype):
        casts.append(teacher_hidden_size)
    weights = {"weights in the autocast dtype": vocab_size * sum(casts) * products.itemsize}
    sums = {"weight gradient, summed in float32": sum_bytes if dtype.itemsize < 4 else 0}
    gradients = {
        "hidden gradient": hidden_grad * rows * student_hidden_size * dtype.itemsize,
        "weight gradient": weight_elements * dtype.itemsize,
        "bias gradient": bias_grad * vocab_size * dtype.itemsize,
    }
    forward = sum((*workspace.values(), *weights.values(), sum_bytes, gradients["hidden gradient"]))
    if rows <= chunk_rows:  # the teacher's logits make room for the weight gradient
        forward -= min(sum_bytes, workspace.get("teacher logits", 0))
    backward = sum((*sums.values(), *gradients.values()))
    return Plan(
        chunk_rows,
        -(-rows // chunk_rows),
        {name: size for name, size in (workspace | weights | sums | gradients).items() if size},
        sum(workspace.values()),
        max(forward, backward),
    )


def _chunk_rows(
    rows: int,
    vocabulary: int,
    row_bytes: int,  # of a chunk's buffers, for one row
    sum_bytes: int,  # of the float32 weight gradient; 0 under a frozen head
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


class Head(NamedTuple):
    """The last hidden states of a model and its output head: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V', H]
    bias: Tensor | None  # [V']

    def cast(self, dtype: torch.dtype, vocab_size: int) -> "Head":
        """The real columns, in the dtype of the products; views where that is the dtype they have."""
        bias = None if self.bias is None else self.bias[:vocab_size].to(dtype)
        return Head(self.hidden, self.weight[:vocab_size].to(dtype), bias)

    def logits_buffer(self, options: "LinearOptions") -> Tensor:  # [C, V]
        V, dtype = self.weight.shape[0], options.logits_dtype or self.weight.dtype
        return self.weight.new_empty(options.chunk_rows, row_stride(V), dtype=dtype)[:, :V]

    def logits(self, rows: slice, out: Tensor) -> Tensor:  # [1, C, V]
        """Of some rows, written over `out`."""
        hidden = self.hidden[rows].to(self.weight.dtype)
        project(hidden, self.weight, self.bias, out[: hidden.shape[0]])
        return out[None, : hidden.shape[0]]


class Gradients:
    """Of the student's head, those that are asked for; the weight's and the bias's are summed in float32."""

    def __init__(self, head: Head, needed: tuple[bool, bool, bool], dtype: torch.dtype, vocab_size: int) -> None:
        hidden, self._need_weight, bias = needed
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None  # [N, H]
        self.weight: Tensor | None = None  # [V', H]; not before it is needed
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if bias else None  # [V']
        if self._need_weight and not head.hidden.shape[0]:
            self.weight = torch.zeros_like(head.weight, dtype=dtype)
        self._like, self._dtype, self._vocab_size = head.weight, dtype, vocab_size

    def add(
        self,
        rows: slice,
        logit_gradient: Tensor,  # [C, V], in the dtype of the products
        student: Head,  # in the dtype of the products
        counted: Tensor,  # [C]
    ) -> None:
        V = self._vocab_size
        if self.hidden is not None:
            out = self.hidden[rows]
            if out.dtype == logit_gradient.dtype:
                torch.mm(logit_gradient, student.weight, out=out)
            else:
                out.copy_(torch.mm(logit_gradient, student.weight))
        if self._need_weight:
            first = self.weight is None
            if self.weight is None:
                self.weight = torch.empty(self._like.shape, dtype=self._dtype, device=self._like.device)
                self.weight[V:].zero_()
            # A row that does not count may hold anything, and 0 times NaN is NaN.
            hidden = student.hidden[rows].to(logit_gradient.dtype).masked_fill(~counted[:, None], 0.0)
            accumulate(self.weight[:V], logit_gradient, hidden, first=first)
        if self.bias is not None:
            self.bias[:V] += logit_gradient.sum(0, dtype=self.bias.dtype)

    def __iter__(self) -> Iterator[Tensor | None]:
        yield from (self.hidden, self.weight, self.bias)


class LinearOptions(NamedTuple):
    kd: KDOptions
    needed: tuple[bool, bool, bool]  # gradients of the student's hidden states, weight and bias
    chunk_rows: int
    dtype: torch.dtype  # of the student's products
    teacher_dtype: torch.dtype  # of the teacher's
    logits_dtype: torch.dtype | None  # None: the dtype of the products


def sweep(
    student: Head,
    teacher: Head | None,  # None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
    options: LinearOptions,
    gradients: Gradients | None,  # those of sum_i w_ce CE + w_kl KL, added to; None: the loss only
) -> tuple[Tensor, Tensor]:  # CE and KL, [N] float64
    """Every chunk's logits, values and gradients, one chunk after another in the same buffers."""
    N, V = ce_weight.numel(), options.kd.vocab_size
    ce, kl = torch.zeros_like(ce_weight), torch.zeros_like(kl_weight)
    with torch.autocast(student.hidden.device.type, enabled=False):  # the dtypes are chosen already
        student = student.cast(options.dtype, V)
        student_logits = student.logits_buffer(options)
        teacher_logits = None
        if teacher is not None:
            teacher = teacher.cast(options.teacher_dtype, V)
            teacher_logits = teacher.logits_buffer(options)
        for first in range(0, N, options.chunk_rows):
            rows = slice(first, first + options.chunk_rows)
            z = student.logits(rows, student_logits)
            y = None if teacher is None or teacher_logits is None else teacher.logits(rows, teacher_logits)
            arguments = (None if labels is None else labels[rows]), ce_weight[rows], kl_weight[rows], options.kd
            values = row_values(z, y, *arguments)
            ce[rows], kl[rows] = values.ce, values.kl
            if gradients is not None:
                ops.logit_gradient_(*gradient_arguments(z, y, values.statistics, *arguments))
                if rows.stop >= N:  # make room for the weight gradient, if this is the only chunk
                    y = teacher_logits = None
                counted = (ce_weight[rows] != 0) | (kl_weight[rows] != 0)
                gradients.add(rows, z[0].to(options.dtype), student, counted)
    return ce, kl


LARGEST_GRADIENT = 2**8  # of a logit; summed over a vocabulary against weights up to 127 it is still a float16


def gradient_unit(ce_weight: Tensor, kl_weight: Tensor, options: KDOptions) -> Tensor:
    """A scalar on the device, 2^k, in which no gradient of a logit is above 2^8 and the largest possible one near it.

    The forward pass takes the gradients of a mean over thousands of rows, 1e-9 where a probability is 1e-6, and a loss
    scale, which comes with the upstream gradient, comes too late: float16 would lose them.  A power of two, so that
    counting in it rounds nothing.
    """
    largest = options.student_map.scale * (ce_weight.abs() + kl_weight.abs() / options.temperature)
    largest = torch.cat([largest.nan_to_num(0.0, 0.0), largest.new_zeros(1)]).amax()  # 0 of no rows
    return torch.where(largest > 0, torch.exp2(largest.log2().floor()) / LARGEST_GRADIENT, 1.0)


BLOCK_ELEMENTS = 2**23  # of a float32 temporary: 32 MB


def scaled(
    gradients: Iterable[Tensor | None],
    factor: Tensor,  # a scalar
    dtypes: Iterable[torch.dtype | None],
    *,
    in_place: bool,  # where dtypes allow; otherwise what is given stays as it is
) -> list[Tensor | None]:
    """factor * gradient, in the dtype of what it is a gradient of."""
    return [
        None if gradient is None or dtype is None else _scaled(gradient, factor, dtype, in_place)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Rounded once, a block of rows at a time."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    factor = factor.to(wide)  # the product of a 16-bit tensor and a scalar would round the scalar first
    if gradient.dtype == dtype == wide:
        return gradient.mul_(factor) if in_place else gradient * factor
    result = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    block = max(1, BLOCK_ELEMENTS // max(1, math.prod(gradient.shape[1:])))
    for source, target in zip(gradient.split(block), result.split(block), strict=True):
        target.copy_(source.to(wide) * factor)
    return result
