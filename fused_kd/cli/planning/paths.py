"""The memory of the loss step, array by array, before anything runs.

A ledger lists the operations of a step in their order: what each allocates, and what is gone once it is done.  It has what
grows with tokens x vocabulary or with a head.  A few hundred bytes per token are left out (in one launch up to 6 kB, 0.6%
of the token's logits), and so are, on a CPU, the blocks of at most 64 MB in which the backward pass of linear_kd_loss
multiplies.

The step is a function that projects both hidden states, takes the loss and returns it, and then a backward pass.  The
function's variables are gone before backward; gradients are the first, so none is added to another.

Tests compare the ledgers with measured allocations on a CPU.  CUDA tensors go through the same operators of PyTorch, whose
results are as large; scratch differs, such as the workspace of cuBLAS (8 MB, 32 MB on Hopper).
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ...devices import DEVICES, Device
from ...heads.chunks import Plan, plan_chunks

EAGER, KD_LOSS, IN_PLACE, LINEAR = "eager PyTorch", "kd_loss", "kd_loss in place", "linear_kd_loss"
LEAN = "linear_kd_loss, lean"
PREFERRED = (LINEAR, KD_LOSS, IN_PLACE, EAGER)  # the first of those that take the same; lean is for who needs it
SAME = 1.01  # times the least memory: not told apart
MOST_TOKENS = 2**30  # of any step


class LossStep(NamedTuple):
    """The sizes and options of a step."""

    tokens: int  # N
    vocab_size: int  # V
    student_hidden: int  # H_s
    teacher_hidden: int  # H_t
    dtype: torch.dtype = torch.bfloat16  # of hidden states, weights and logits
    trained: bool = True  # whether the student's head gets a gradient
    logits_dtype: torch.dtype | None = None  # as of linear_kd_loss: of a chunk
    workspace_bytes: int | None = None  # as of linear_kd_loss
    in_one_launch: bool = True  # whether kd_loss takes the gradient with the loss, as on a GPU, but for float16 logits
    device: str | None = None  # the GPU that linear_kd_loss is planned for, by its name; None: a CPU
    card_bytes: int = 0  # the memory of the card; 0: the smallest with this GPU

    @property
    def logits_bytes(self) -> int:
        """Return U, the bytes of an [N, V] array in the dtype."""
        return self.tokens * self.vocab_size * self.dtype.itemsize

    @property
    def inputs(self) -> dict[str, int]:
        """Return the bytes of the inputs, which every path holds before and after the step."""
        width = (self.student_hidden + self.teacher_hidden) * self.dtype.itemsize
        return {
            "hidden states": self.tokens * width,
            "head weights": self.vocab_size * width,
            "labels": 8 * self.tokens,
        }

    @property
    def gradients(self) -> dict[str, int]:
        """Return the bytes of the gradients that the step leaves."""
        width = self.student_hidden * self.dtype.itemsize
        return {"weight gradient": self.trained * self.vocab_size * width, "hidden gradient": self.tokens * width}

    @property
    def products(self) -> dict[str, int]:
        """Number of products of N x V x H for each side, the same on every path."""
        return {"student": 3 if self.trained else 2, "teacher": 1}

    @property
    def flops(self) -> dict[str, int]:
        """Flops of the products, two per multiplication."""
        widths = {"student": self.student_hidden, "teacher": self.teacher_hidden}
        return {side: count * 2 * self.tokens * self.vocab_size * widths[side] for side, count in self.products.items()}

    @property
    def chunks(self) -> Plan:
        """Chunks of linear_kd_loss; raises ValueError if workspace_bytes is too small."""
        return self._planned("default")

    @property
    def slabs(self) -> Plan:
        """Slabs of linear_kd_loss in lean mode; without the bound if that is too small for a slab."""
        try:
            return self._planned("lean")
        except ValueError:
            return self._replace(workspace_bytes=None)._planned("lean")

    def _planned(self, memory: str) -> Plan:
        device: Device | None = None
        if self.device:
            device = DEVICES[self.device]._replace(memory_bytes=self.card_bytes)
        return plan_chunks(
            self.tokens, self.vocab_size, self.student_hidden, self.teacher_hidden, dtype=self.dtype,
            logits_dtype=self.logits_dtype, weight_grad=self.trained, workspace_bytes=self.workspace_bytes,
            device=device, memory=memory,
        )  # fmt: skip


class Operation(NamedTuple):
    name: str
    allocates: Mapping[str, int] = {}  # bytes, by the array's name
    frees: tuple[str, ...] = ()  # once it is done
    backward: bool = False


class Array(NamedTuple):
    name: str
    bytes: int
    first: int  # index of the operation that allocates it
    last: int | None  # ... after which it is gone; None: it stays

    def is_alive(self, operation: int) -> bool:
        return self.first <= operation and (self.last is None or operation <= self.last)


@dataclass(frozen=True)
class Ledger:
    operations: tuple[Operation, ...]

    @cached_property
    def arrays(self) -> list[Array]:
        """Arrays in the order of their allocation, without those of no bytes."""
        freed = {name: index for index, operation in enumerate(self.operations) for name in operation.frees}
        return [
            Array(name, size, index, freed.get(name))
            for index, operation in enumerate(self.operations)
            for name, size in operation.allocates.items()
            if size
        ]

    @cached_property
    def held(self) -> list[int]:
        """Return the bytes that are held during each operation, before it frees anything."""
        indices = range(len(self.operations))
        return [sum(array.bytes for array in self.arrays if array.is_alive(index)) for index in indices]

    @property
    def peak_bytes(self) -> int:
        """Return the most bytes held at once, beyond inputs."""
        return max(self.held)

    @property
    def peak(self) -> int:
        """Return the index of the operation with the peak."""
        return self.held.index(self.peak_bytes)

    @property
    def at_peak(self) -> list[Array]:
        return [array for array in self.arrays if array.is_alive(self.peak)]


def ledgers(step: LossStep) -> dict[str, Ledger]:
    """Return the ledger of each path, by its name."""
    return {
        EAGER: eager(step),
        KD_LOSS: kd_loss(step),
        IN_PLACE: kd_loss(step, in_place=True),
        LINEAR: linear(step),
        LEAN: lean(step),
    }


def eager(step: LossStep) -> Ledger:
    """Return the ledger of heads and `fused_kd.testing.peers.eager`, the formula as training code writes it."""
    logits, wide = step.logits_bytes, 4 * step.tokens * step.vocab_size
    converts = step.dtype.itemsize < 4  # .float() of a float32 tensor is the tensor
    copy = wide if converts else 0
    suffix = ", float32" * converts  # of gradients before `float()` rounds them
    ce, kl = "CE gradient", "KL gradient"

    def distribution(side: str, log: str) -> list[Operation]:
        convert = Operation(
            f"{side}.float() / T", {f"{side}, float32": copy, f"{side} / T": wide}, (f"{side}, float32",)
        )
        return [convert, Operation(f"log_softmax of {side}", {log: wide}, (f"{side} / T",))]

    def rounded(name: str) -> list[Operation]:
        return [Operation("float()", {name: logits}, (name + suffix,))] if converts else []

    # kl_div has q (log q - log p) with q = exp(log q), by which backward multiplies.
    log_ratio, product = "log q - log p", "q (log q - log p)"
    copy_for_ce, log_p_at_1 = "student, float32, for CE", "log p at T = 1"
    forward = [
        *distribution("student", "log p"),
        *distribution("teacher", "log q"),
        Operation("kl_div", {log_ratio: wide, "q": wide, product: wide}, (log_ratio, product)),
        Operation("cross_entropy", {copy_for_ce: copy, log_p_at_1: wide}, (copy_for_ce,)),
        Operation("return", {}, ("log q", "student logits", "teacher logits")),
    ]
    g = "gradient of "
    backward = [
        Operation("cross_entropy", {g + log_p_at_1: wide, ce + suffix: wide}, (g + log_p_at_1, log_p_at_1)),
        *rounded(ce),
        Operation("kl_div, mul", {g + log_ratio: wide}, ("q",)),
        Operation("kl_div, sub", {f"{g}log p": wide}, (g + log_ratio,)),
        Operation("log_softmax", {f"{g}student / T": wide}, (f"{g}log p", "log p")),
        Operation("/ T", {kl + suffix: wide}, (f"{g}student / T",)),
        *rounded(kl),
        Operation("sum of CE, KL", {}, (kl,)),  # in place, into CE's
        Operation("student's head", step.gradients, (ce,)),
    ]
    return _ledger(_heads(step) + forward, backward)


def kd_loss(step: LossStep, *, in_place: bool = False) -> Ledger:
    """Return the ledger of heads and `kd_loss`; it keeps the gradient for backward, or in two launches the logits."""
    gradient = {} if in_place else {"gradient of student logits": step.logits_bytes}
    loss = Operation("kd_loss", gradient, ("teacher logits",) if in_place else ("teacher logits", "student logits"))
    head = Operation("student's head", step.gradients, ("student logits",) if in_place else tuple(gradient))
    return _ledger([*_heads(step), loss], [head]) if step.in_one_launch else _ledger(_heads(step), [loss, head])


def linear(step: LossStep) -> Ledger:
    """Return the ledger of `linear_kd_loss`, which takes the gradients in its forward pass, in the buffers of chunks.

    A group is the chunks whose logits' gradients are multiplied together.
    """
    chunks = step.chunks
    sums = "weight gradient, summed in float32"
    one_group = chunks.gradient_rows >= step.tokens
    of_group = ["student logits' gradient, rounded"]
    of_chunk = ["teacher logits"]
    (of_chunk if of_group[0] in chunks.buffers else of_group).append("student logits")
    total = _sizes(chunks, sums) or _sizes(chunks, "weight gradient")
    rounded = _sizes(chunks, "weight gradient") if sums in total else {}
    # The logits leave before the last group is multiplied.  If there are several groups, the sum is there before.
    forward = [
        Operation(
            "a chunk's loss", _sizes(chunks, "hidden gradient", *of_chunk, *of_group), tuple(of_chunk) * one_group
        ),
        Operation("a group's products", total, (*of_group, *(() if one_group else of_chunk))),
    ]
    last = Operation("rounding of the sum", rounded, (sums,))
    if step.dtype == torch.float16:  # in backward, which multiplies by the unit
        return _ledger(forward, [last._replace(name="times upstream")])
    return _ledger([*forward, last] if rounded else forward, [Operation("times upstream")])


def lean(step: LossStep) -> Ledger:
    """Return the ledger of `linear_kd_loss(..., memory="lean")`: slabs of the vocabulary over all tokens."""
    slabs = step.slabs
    gradients = [name for name in slabs.buffers if name in step.gradients]
    others = [name for name in slabs.buffers if name not in gradients]
    slab = Operation("a slab's gradients", _sizes(slabs, *gradients, *others), tuple(others))
    return _ledger([slab], [Operation("times upstream")])


def _sizes(plan: Plan, *names: str) -> dict[str, int]:
    return {name: plan.buffers[name] for name in names if name in plan.buffers}


def _heads(step: LossStep) -> list[Operation]:
    return [Operation(f"{side}'s head", {f"{side} logits": step.logits_bytes}) for side in ("student", "teacher")]


def _ledger(forward: list[Operation], backward: list[Operation]) -> Ledger:
    return Ledger((*forward, *(operation._replace(backward=True) for operation in backward)))


def needed_bytes(step: LossStep, ledger: Ledger) -> int:
    """Return the bytes at the peak, inputs included."""
    return sum(step.inputs.values()) + ledger.peak_bytes


def most_tokens(step: LossStep, path: str, capacity: int) -> int:
    """Return a number of tokens that fit into `capacity` bytes when one more do not; 0 if none do.

    linear_kd_loss cuts tokens into equal chunks, so just above a multiple of a chunk it may take less again.
    """

    def needed(tokens: int) -> int:
        other = step._replace(tokens=tokens)
        return needed_bytes(other, ledgers(other)[path])

    most = max(0, capacity) // step._replace(tokens=1).inputs["hidden states"]
    return bisect.bisect_right(range(1, most + 1), capacity, key=needed)


def least_memory(step: LossStep) -> str:
    """Return the path whose peak is the smallest, inputs included; lean mode, which takes longer, left out."""
    needed = {path: needed_bytes(step, ledger) for path, ledger in ledgers(step).items() if path in PREFERRED}
    return next(path for path in PREFERRED if needed[path] <= SAME * min(needed.values()))


def linear_from(step: LossStep) -> int | None:
    """Return the number of tokens from which `linear_kd_loss` takes the least memory; None if there is none.

    A few numbers above it may take up to 1% more again, where a chunk is rounded to a multiple of tokens, or up to 3% on a
    GPU, where the plan changes with the number of tokens.
    """

    def is_linear(tokens: int) -> bool:
        return least_memory(step._replace(tokens=tokens)) == LINEAR

    # Its peak grows until a chunk is full, and falls with the next token, which makes a chunk more.
    chunk = step._replace(tokens=MOST_TOKENS).chunks.chunk_rows
    powers = [1 << bits for bits in range(MOST_TOKENS.bit_length())]
    too_few = max((tokens for tokens in powers if not is_linear(tokens)), default=0)
    if too_few == MOST_TOKENS:
        return None
    full = range(chunk, 4 * max(too_few, chunk), chunk)
    too_few = max((tokens for tokens in full if not is_linear(tokens)), default=too_few)
    enough = min((too_few // chunk + 1) * chunk, max(1, 2 * too_few))
    between = range(too_few + 1, enough)
    return between.start + bisect.bisect_left(between, True, key=is_linear)
