"""The memory of the loss step, array by array, before anything runs: which arrays each way of taking the loss has alive.

A ledger is the step in the order in which it runs: what each operation allocates, and what is gone once it is done.  It
holds what grows with tokens x vocabulary or with a head.  A few hundred bytes a token are left out (in one launch up to
6 kB, 0.6% of its logits), and the blocks (64 MB at most) in which linear_kd_loss's backward multiplies.

The ledgers are tested against measured allocations, on a CPU.  CUDA tensors go through the same operators of PyTorch, each
of which has the same result to allocate.  What differs is scratch: cuBLAS has a workspace (8 MB, 32 MB on Hopper); 16-bit
products on a CPU took up to 0.3 MB, and fused_kd's operators take 12 MB there.

The step is a function that projects both hidden states, takes the loss and returns it, and a backward pass: what the
function named is gone before backward, and gradients are the first, so none is added to another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ...heads.chunks import Plan, plan

EAGER, KD_LOSS, IN_PLACE, LINEAR = "eager PyTorch", "kd_loss", "kd_loss in place", "linear_kd_loss"

GB = 10**9
CARDS = {24: "RTX 4090, L4", 40: "A100", 80: "A100, H100", 141: "H200", 192: "B200, MI300X"}  # by nominal GB


class LossStep(NamedTuple):
    """What a plan is made for."""

    tokens: int  # N
    vocab_size: int  # V
    student_hidden: int  # H_s
    teacher_hidden: int  # H_t
    dtype: torch.dtype = torch.bfloat16  # of hidden states, weights and logits
    trained: bool = True  # whether the student's head gets a gradient
    logits_dtype: torch.dtype | None = None  # as of linear_kd_loss
    workspace_bytes: int | None = None  # as of linear_kd_loss
    in_one_launch: bool = True  # whether kd_loss takes the gradient with the loss, as on a GPU, but for float16 logits

    @property
    def logits_bytes(self) -> int:
        """U: a pass over an [N, V] array in the dtype."""
        return self.tokens * self.vocab_size * self.dtype.itemsize

    @property
    def inputs(self) -> dict[str, int]:
        """What the step is given, in bytes: it is held before and after, whatever takes the loss."""
        widths = self.student_hidden + self.teacher_hidden
        return {
            "hidden states": self.tokens * widths * self.dtype.itemsize,
            "head weights": self.vocab_size * widths * self.dtype.itemsize,
            "labels": 8 * self.tokens,
        }

    @property
    def gradients(self) -> dict[str, int]:
        """What the step leaves behind, in bytes."""
        return {
            "weight gradient": self.trained * self.vocab_size * self.student_hidden * self.dtype.itemsize,
            "hidden gradient": self.tokens * self.student_hidden * self.dtype.itemsize,
        }

    @property
    def products(self) -> dict[str, int]:
        """How many products of N x V x H each side takes, on every path alike."""
        return {"student": 3 if self.trained else 2, "teacher": 1}

    @property
    def flops(self) -> dict[str, int]:
        """Of the products: two a multiplication."""
        widths = {"student": self.student_hidden, "teacher": self.teacher_hidden}
        return {side: count * 2 * self.tokens * self.vocab_size * widths[side] for side, count in self.products.items()}

    @property
    def chunks(self) -> Plan:
        """Of linear_kd_loss; raises ValueError as `fused_kd.heads.sweep.plan` does."""
        return plan(
            self.tokens, self.vocab_size, self.student_hidden, self.teacher_hidden, dtype=self.dtype,
            logits_dtype=self.logits_dtype, weight_grad=self.trained, workspace_bytes=self.workspace_bytes,
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
        """In the order of their allocation, without those of no bytes."""
        freed = {name: index for index, operation in enumerate(self.operations) for name in operation.frees}
        return [
            Array(name, size, index, freed.get(name))
            for index, operation in enumerate(self.operations)
            for name, size in operation.allocates.items()
            if size
        ]

    @cached_property
    def held(self) -> list[int]:
        """Bytes during each operation, before it frees what it frees."""
        count = len(self.operations)
        return [sum(array.bytes for array in self.arrays if array.is_alive(index)) for index in range(count)]

    @property
    def peak_bytes(self) -> int:
        """The most at once, beyond inputs."""
        return max(self.held)

    @property
    def peak(self) -> int:
        """Index of the operation in which it comes."""
        return self.held.index(self.peak_bytes)

    @property
    def at_peak(self) -> list[Array]:
        return [array for array in self.arrays if array.is_alive(self.peak)]


def ledgers(step: LossStep) -> dict[str, Ledger]:
    """Of each path, by its name."""
    return {EAGER: eager(step), KD_LOSS: kd_loss(step), IN_PLACE: kd_loss(step, in_place=True), LINEAR: linear(step)}


def eager(step: LossStep) -> Ledger:
    """The formula as training code writes it:

    def loss_of(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
        student_logits = F.linear(student_hidden, student_weight)
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_weight)
        log_p = F.log_softmax(student_logits.float() / T, -1)
        log_q = F.log_softmax(teacher_logits.float() / T, -1)
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return (1 - alpha) * F.cross_entropy(student_logits.float(), labels) + alpha * T**2 * kl
    """
    logits, wide = step.logits_bytes, 4 * step.tokens * step.vocab_size
    converts = step.dtype.itemsize < 4  # .float() of a float32 tensor is the tensor
    copy = wide if converts else 0
    forward = _heads(step)
    for side, log in (("student", "log p"), ("teacher", "log q")):
        forward += [
            Operation(f"{side}.float() / T", {f"{side}, float32": copy, f"{side} / T": wide}, (f"{side}, float32",)),
            Operation(f"log_softmax of {side}", {log: wide}, (f"{side} / T",)),
        ]
    forward += [
        # q (log q - log p) with q = exp(log q), by which backward multiplies
        Operation("kl_div", {"log q - log p": wide, "q": wide, "q (log q - log p)": wide},
                  ("log q - log p", "q (log q - log p)")),
        Operation("cross_entropy", {"student, float32, for CE": copy, "log p at T = 1": wide},
                  ("student, float32, for CE",)),
        Operation("return", {}, ("log q", "student logits", "teacher logits")),
    ]  # fmt: skip
    ce, kl = "CE gradient", "KL gradient"
    wide_ce, wide_kl = (f"{name}, float32" if converts else name for name in (ce, kl))

    def narrowed(name: str) -> list[Operation]:
        return [Operation("float()", {name: logits}, (f"{name}, float32",))] if converts else []

    backward = [
        Operation("cross_entropy", {"gradient of log p at T = 1": wide, wide_ce: wide},
                  ("gradient of log p at T = 1", "log p at T = 1")),
        *narrowed(ce),
        Operation("kl_div, mul", {"gradient of log q - log p": wide}, ("q",)),
        Operation("kl_div, sub", {"gradient of log p": wide}, ("gradient of log q - log p",)),
        Operation("log_softmax", {"gradient of student / T": wide}, ("gradient of log p", "log p")),
        Operation("/ T", {wide_kl: wide}, ("gradient of student / T",)),
        *narrowed(kl),
        Operation("sum of CE, KL", {}, (kl,)),  # in place, into CE's
        Operation("student's head", step.gradients, (ce,)),
    ]  # fmt: skip
    return _ledger(forward, backward)


def kd_loss(step: LossStep, *, in_place: bool = False) -> Ledger:
    """Two heads and `kd_loss(..., inplace_backward=in_place)` of their logits.

    It keeps the gradient for backward, or in two launches the logits.
    """
    gradient = {} if in_place else {"gradient of student logits": step.logits_bytes}
    read = ("teacher logits",) if in_place else ("teacher logits", "student logits")
    loss = Operation("kd_loss", gradient, read)
    head = Operation("student's head", step.gradients, ("student logits",) if in_place else tuple(gradient))
    if step.in_one_launch:
        return _ledger([*_heads(step), loss], [head])
    return _ledger(_heads(step), [loss, head])


def linear(step: LossStep) -> Ledger:
    """`linear_kd_loss`, which takes the gradients in its forward pass: the buffers of `fused_kd.heads.sweep.plan`."""
    chunks = step.chunks
    total = "weight gradient, summed in float32"  # 16-bit weights only: otherwise the sum is the gradient

    def buffers(*names: str) -> dict[str, int]:
        return {name: chunks.buffers[name] for name in names if name in chunks.buffers}

    rounded = "student logits' gradient, rounded"
    teacher_leaves = chunks.chunks <= 1  # ... first: no other chunk needs its buffer, the weight gradient does
    forward = [
        Operation("a chunk's loss",
                  buffers("hidden gradient", "student logits", "teacher logits"),
                  ("teacher logits",) if teacher_leaves else ()),
        Operation("a chunk's products",
                  buffers(rounded, total if total in chunks.buffers else "weight gradient"),
                  ("student logits", rounded, *(() if teacher_leaves else ("teacher logits",)))),
    ]  # fmt: skip
    rounding = buffers("weight gradient") if total in chunks.buffers else {}
    return _ledger(forward, [Operation("times upstream", rounding, (total,))])


def _heads(step: LossStep) -> list[Operation]:
    return [Operation(f"{side}'s head", {f"{side} logits": step.logits_bytes}) for side in ("student", "teacher")]


def _ledger(forward: list[Operation], backward: list[Operation]) -> Ledger:
    return Ledger((*forward, *(operation._replace(backward=True) for operation in backward)))


def needed_bytes(step: LossStep, ledger: Ledger) -> int:
    """At the peak, inputs included."""
    return sum(step.inputs.values()) + ledger.peak_bytes


def most_tokens(step: LossStep, path: str, capacity: int) -> int:
    """A number of tokens that fit into `capacity` bytes when one more do not; 0 if none do.

    linear_kd_loss cuts tokens into equal chunks, so just above a multiple of a chunk it may take less again.
    """

    def fit(tokens: int) -> bool:
        other = step._replace(tokens=tokens)
        return needed_bytes(other, ledgers(other)[path]) <= capacity

    fitting, too_many = 0, 1 + max(0, capacity) // step._replace(tokens=1).inputs["hidden states"]
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fit(middle) else (fitting, middle)
    return fitting


PREFERRED = (LINEAR, KD_LOSS, IN_PLACE, EAGER)  # where they take the same
MOST_TOKENS = 2**30  # of any step
SAME = 1.01  # times the least memory: what is not told apart


def least_memory(step: LossStep) -> str:
    """The path whose peak is the smallest, inputs included."""
    needed = {path: needed_bytes(step, ledger) for path, ledger in ledgers(step).items()}
    return next(path for path in PREFERRED if needed[path] <= SAME * min(needed.values()))


def linear_from(step: LossStep) -> int | None:
    """The number of tokens from which `linear_kd_loss` is the path of the least memory; None if there is none.

    A few numbers above it may take up to 1% more again, where a chunk is rounded to a multiple of tokens.
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
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if is_linear(middle) else (middle, enough)
    return enough
