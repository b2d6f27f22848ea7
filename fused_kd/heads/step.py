"""A step of `linear_kd_loss` as far as its plan depends on it, and the bytes that it holds at each of its stages."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

ROW_MULTIPLE = 64  # the elements from one row to the next are a multiple of this, so that all rows are aligned
# Per token: nine numbers in float32 and in float64, and the three of a second sweep in float64.
STATISTICS_BYTES = 132


class Side(NamedTuple):
    """One of the two models."""

    model: str  # "student" or "teacher"
    hidden_size: int
    dtype: torch.dtype  # dtype of the hidden states
    weight_dtype: torch.dtype
    products: torch.dtype  # dtype of the products
    logits: torch.dtype
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    lora_rank: int = 0  # 0: no adapter on the head

    @property
    def prefix(self) -> str:
        """Return the prefix of the names of this model's gradients; the student has none."""
        return "" if self.model == "student" else f"{self.model} "

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad or self.lora_rank > 0

    @property
    def in_place(self) -> bool:
        """Return whether the gradient of the logits overwrites them; otherwise it has memory of its own."""
        return self.any_grad and self.logits == self.products

    @property
    def copies_hidden(self) -> bool:
        """Return whether the copy of the hidden states has memory of its own.

        The product that makes the weight's gradient takes a copy with zeros for the rows that do not count.  It lies in the
        memory of the hidden states' gradient, if there is one in the dtype of the products.
        """
        return self.weight_grad and not (self.hidden_grad and self.dtype == self.products)

    @property
    def weights(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the width of each `[V, width]` gradient."""
        if self.weight_grad:
            yield f"{self.prefix}weight gradient", self.hidden_size
        if self.lora_rank:
            yield f"{self.prefix}LoRA gradient", self.lora_rank


class Peaks(NamedTuple):
    """The bytes that are held at the stages of a step, in their order."""

    sweep: int  # while a chunk's logits exist
    products: int  # in the products of the last group, which come after the logits have been freed
    rounding: int  # while a float32 sum is rounded at the end of the forward pass
    backward: int


class Step(NamedTuple):
    """The sizes, dtypes and gradients of a step."""

    rows: int  # N
    vocab_size: int  # V
    sides: tuple[Side, ...]

    @property
    def trained(self) -> bool:
        """Return whether a head's weight, or an adapter on it, gets a gradient."""
        return any(side.weight_grad or side.lora_rank for side in self.sides)

    @property
    def any_grad(self) -> bool:
        return any(side.any_grad for side in self.sides)

    @property
    def has_unit(self) -> bool:
        """Return whether gradients stay divided by a unit until backward, so that those of weights stay in float32."""
        return self.any_grad and any(side.products == torch.float16 for side in self.sides)

    def logits(self, columns: int) -> dict[str, int]:
        """Return the bytes per row of the logits that are freed before the products of the last group."""
        stride = row_stride(columns)
        return {f"{side.model} logits": stride * side.logits.itemsize for side in self.sides if not side.in_place}

    def logit_gradients(self, columns: int) -> dict[str, int]:
        """Return the bytes per row of the logits' gradients, which the products of a group take."""
        stride = row_stride(columns)
        return {
            f"{side.model} logits" if side.in_place else f"{side.model} logits' gradient, rounded": (
                stride * side.products.itemsize
            )
            for side in self.sides
            if side.any_grad
        }

    @property
    def operands(self) -> dict[str, int]:
        """Return the bytes of the copies that the products take, beside the inputs."""
        casts = [side.hidden_size * side.products.itemsize for side in self.sides if side.products != side.weight_dtype]
        copies = [self.rows * side.hidden_size * side.products.itemsize for side in self.sides if side.copies_hidden]
        return {"weights in the autocast dtype": self.vocab_size * sum(casts), "hidden states that count": sum(copies)}

    def is_summed(self, side: Side, groups: int) -> bool:
        """Return whether a weight's gradient is summed in float32 and rounded later.

        The only product of a single group writes it in the weight's dtype.
        """
        direct = groups <= 1 and side.weight_dtype == side.products and not self.has_unit
        return side.weight_dtype.itemsize < 4 and not direct

    def sums(self, groups: int) -> dict[str, int]:
        """Return the bytes of the float32 sums of the 16-bit gradients of weights."""
        return {
            f"{name}, summed in float32": self.vocab_size * width * 4
            for side in self.sides
            if self.is_summed(side, groups)
            for name, width in side.weights
        }

    @property
    def weight_gradients(self) -> dict[str, int]:
        return {
            name: self.vocab_size * width * side.weight_dtype.itemsize
            for side in self.sides
            for name, width in side.weights
        }

    @property
    def hidden_gradients(self) -> dict[str, int]:
        return {
            f"{side.prefix}hidden gradient": self.rows * side.hidden_size * side.dtype.itemsize
            for side in self.sides
            if side.hidden_grad
        }

    @property
    def bias_gradients(self) -> dict[str, int]:
        return {
            f"{side.prefix}bias gradient": self.vocab_size * side.weight_dtype.itemsize
            for side in self.sides
            if side.bias_grad
        }

    def peaks(self, chunk_rows: int, gradient_rows: int) -> Peaks:
        """Return the bytes at each stage of a step in chunks.

        A group is the rows whose gradients are multiplied together.  Float32 sums over several groups exist from the first
        group's products on.
        """
        groups = -(-self.rows // gradient_rows)
        held = sum(self.operands.values()) + sum(self.hidden_gradients.values())
        logits = chunk_rows * sum(self.logits(self.vocab_size).values())
        logit_gradients = gradient_rows * sum(self.logit_gradients(self.vocab_size).values())
        sums, rounded = sum(self.sums(groups).values()), sum(self.weight_gradients.values())
        later = sum(
            self.vocab_size * width * side.weight_dtype.itemsize
            for side in self.sides
            if self.is_summed(side, groups)
            for _, width in side.weights
        )  # those that are rounded from a sum
        weights = sums + rounded - later
        gradients = rounded + sum(self.hidden_gradients.values()) + sum(self.bias_gradients.values())
        return Peaks(
            held + logits + logit_gradients + (weights if groups > 1 else 0),
            held + logit_gradients + weights,
            held + weights + (0 if self.has_unit else later),
            gradients + (sums if self.has_unit else 0),
        )


def row_stride(vocabulary: int) -> int:
    """Return the elements from one row of a chunk's logits to the next.

    Rows are aligned.  The stride is no multiple of 1024, at which all rows would map to the same cache sets.
    """
    stride = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return stride + ROW_MULTIPLE if stride % 1024 == 0 else stride
