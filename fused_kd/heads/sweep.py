"""The loss from hidden states: the logits exist for one chunk of tokens at a time.

Let F_s = 2 N V H_s and F_t = 2 N V H_t be the flops of projecting the student's and the teacher's hidden states.  A step
takes F_s + F_t for the logits, F_s for the gradient of the student's hidden states and F_s for that of its weight.  No
chunk is projected twice.

Two lengths are planned (`chunks.py`).  A chunk is as many tokens as have logits at a time.  A group is as many tokens as
have gradients of logits at a time, in the dtype of the products: the two products that take these run once per group.  If
the group is all tokens, the weight's gradient is one product, and there is no sum of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import launching
from ..divergences import divergence_of
from ..rows import are_read, readable
from ..sweep import Buffers, KDOptions, Logits, backend_of, chosen_launch, device_of, lines_of
from ..sweep import sweep as sweep_logits
from .chunks import Plan, plan_chunks
from .head import NONE, Found, Gradients, Head
from .products import has_float32_logits

Function = Callable[[Tensor], Tensor]


class LinearOptions(NamedTuple):
    """The options of a loss from hidden states that its sweep depends on."""

    kd: KDOptions
    needed: tuple[bool, ...]  # gradients of the eight tensors of the heads: the student's five, the teacher's three
    dtype: torch.dtype  # dtype of the student's products
    teacher_dtype: torch.dtype  # dtype of the teacher's products
    logits_dtype: torch.dtype | None  # None: float32 where it is as fast
    workspace_bytes: int | None  # None: as `plan_chunks` chooses
    memory: str = "default"  # or "lean"


class Outside(NamedTuple):
    """The arguments that no operator of PyTorch takes: functions, and a tensor of the caller's that is added to."""

    student_head: Function | None = None
    teacher_head: Function | None = None
    weight_grad_out: Tensor | None = None  # [V', H_s]


NOTHING = Outside()


def returned(options: LinearOptions, outside: Outside) -> list[bool]:
    """Return which gradients are returned: those that are needed, without one that is added to the caller's sum."""
    needed = list(options.needed)
    needed[1] &= outside.weight_grad_out is None
    return needed


class Model:
    """One of the two models in the sweep: the heads whose logits add up, or a function; and the gradients it needs."""

    def __init__(
        self,
        heads: Sequence[Head],  # the head, and that of a LoRA; of a function only the hidden states are used
        needed: Sequence[Sequence[bool]],  # the gradients of hidden states, weight and bias of each
        learns: bool,  # whether the gradient of its logits is written: the student's is if the teacher learns
        products: torch.dtype,
        options: LinearOptions,
        function: Function | None = None,
        weight_grad_out: Tensor | None = None,
    ) -> None:
        self.given, self.function, self.products = heads, function, products
        self.learns = learns
        self._vocab_size, self._dtype = options.kd.vocab_size, options.kd.dtype
        self.logits_dtype = options.logits_dtype or default_logits_dtype(heads[0].hidden, products)
        self.gradients: list[Gradients] = []
        # Of a function: the gradient, the rows that count, None for all, and a chunk's hidden states and logits.
        self._hidden_gradient: Tensor | None = None
        self._counted: Tensor | None = None
        self._graph: tuple[Tensor, ...] = ()
        if function is not None:
            self._hidden_gradient = torch.zeros_like(heads[0].hidden) if needed[0][0] else None
        elif self.learns:
            outs = weight_grad_out, *[None] * len(heads)
            self.gradients = [
                Gradients(head, need, self._dtype, self._vocab_size, out)
                for head, need, out in zip(heads, needed, outs, strict=False)
            ]
        self.heads: list[Head] = []  # in the dtype of the products
        self._logits: Tensor | None = None
        self._rounded: Tensor | None = None

    def start(self, weights: Tensor, plan: Plan) -> None:
        """Cast the heads, and allocate the buffers."""
        if self.function is not None:
            counted = are_read(weights)
            self._counted = None if readable(counted) and bool(counted.all()) else counted[:, None]
            return
        self.heads = [head.cast(self.products, self._vocab_size) for head in self.given]
        for sums, head in zip(self.gradients, self.heads, strict=False):
            sums.prepare(head, weights)
        is_own = self.learns and self.logits_dtype != self.products
        in_group = self.learns and not is_own
        head = self.heads[0]
        self._logits = head.logits_buffer(plan.gradient_rows if in_group else plan.chunk_rows, self.logits_dtype)
        self._rounded = head.logits_buffer(plan.gradient_rows, self.products) if is_own else None

    def logits(self, rows: slice, first: int) -> Tensor:  # [1, C, V]
        """Return the logits of a chunk, of a group that begins at `first`."""
        if self.function is not None:
            return self._logits_of_function(rows)
        assert self._logits is not None
        count = self.given[0].hidden[rows].shape[0]
        begin = rows.start - first if self.learns and self._rounded is None else 0
        out = self._logits[begin : begin + count]
        for i, head in enumerate(self.heads):
            head.write_logits(rows, out, add=i > 0)
        return out[None]

    def _logits_of_function(self, rows: slice) -> Tensor:
        assert self.function is not None
        hidden = self._without_others(rows, self.given[0].hidden[rows].detach())
        has_gradient = self._hidden_gradient is not None
        with torch.set_grad_enabled(has_gradient):
            found = self.function(hidden.requires_grad_(has_gradient))
        if has_gradient:
            if not found.requires_grad:
                raise ValueError(
                    "student_head: expected logits through which its hidden states get a gradient, got ones without a "
                    "graph; do not compute them under torch.no_grad() or torch.inference_mode()"
                )
            self._graph = hidden, found
        logits = found.detach()
        return logits[None] if self.learns else logits[None, :, : self._vocab_size]

    def _without_others(self, rows: slice, values: Tensor) -> Tensor:  # of [C, H]
        """Return values with 0 in rows that do not count: a function may take a maximum over its rows, as int8 ones do."""
        return values if self._counted is None else torch.where(self._counted[rows], values, 0.0)

    def target(self, rows: slice, first: int, logits: Tensor) -> Tensor:  # [1, C, V]
        """Return the memory for the gradient of a chunk's logits; the logits' own, unless the products want another dtype.

        A bias adds up gradients that are not rounded.
        """
        if self.function is not None:
            return torch.empty_like(logits)
        if self._rounded is None or self._adds_bias:
            return logits
        begin = rows.start - first
        return self._rounded[None, begin : begin + logits.shape[1]]

    @property
    def _adds_bias(self) -> bool:
        return any(sums.bias is not None for sums in self.gradients)

    def settle(self, rows: slice, first: int, gradient: Tensor) -> None:  # [1, C, V]
        """Take what the gradient of a chunk's logits gives at once: that of a bias, or of a function's hidden states."""
        if self._hidden_gradient is not None:
            hidden, logits = self._graph
            self._graph = ()
            (found,) = torch.autograd.grad(logits, hidden, gradient[0])
            self._hidden_gradient[rows] = self._without_others(rows, found)
            return
        for sums in self.gradients:
            sums.add_bias(gradient[0])
        if self._rounded is not None and self._adds_bias:
            begin = rows.start - first
            self._rounded[begin : begin + gradient.shape[1]] = gradient[0]

    def release_logits(self) -> None:
        """Free the logits after the last chunk, unless the gradients lie in their memory."""
        if not self.learns or self._rounded is not None:
            self._logits = None

    def multiply(self, rows: slice, *, is_only: bool) -> None:
        """Add the products of a group's gradients."""
        group = self._logits if self._rounded is None else self._rounded
        for sums, head in zip(self.gradients, self.heads, strict=False):
            assert group is not None
            sums.add(rows, group[: head.hidden[rows].shape[0]], head, is_only=is_only)

    def results(self) -> list[Found]:
        """Free the buffers, and return the gradients of each head."""
        self._logits = self._rounded = None
        self.heads = []
        if not self.gradients:
            return [(self._hidden_gradient, None, None), *[NONE] * (len(self.given) - 1)]
        return [sums.results() for sums in self.gradients]


def sweep(
    heads: Sequence[Head | None],  # the student's, that of its adapter, the teacher's; None: no adapter, no divergence
    needed: Sequence[Sequence[bool]],  # the gradients of hidden states, weight and bias of each
    labels: Tensor | None,  # [N]; None: no CE
    weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 adds nothing, whatever it holds
    options: LinearOptions,
    outside: Outside,
    statistics: Tensor,  # [9, N], written
    counters: Tensor | None,  # zeros, as `lines_of` counts them
    plan: Plan,
) -> list[Found]:  # of each head; `NONE` if it is None
    """Write the statistics of all rows, and return the gradients of sum_i (w_ce CE + w_d D), chunk by chunk."""
    head, adapter, others = heads
    assert head is not None
    N, learns = weights.shape[1], any(any(need) for need in needed)
    student = Model(
        [head] if adapter is None else [head, adapter],
        needed[:2], learns, options.dtype, options, outside.student_head, outside.weight_grad_out,
    )  # fmt: skip
    teacher = None
    if others is not None:
        teacher = Model([others], needed[2:], any(needed[2]), options.teacher_dtype, options, outside.teacher_head)
    models = [student] if teacher is None else [student, teacher]
    learning = [model for model in models if model.learns]
    with torch.autocast(weights.device.type, enabled=False):  # the options hold the dtypes of the products
        for model in models:
            model.start(weights, plan)
        chunk = 0
        for first in range(0, N, plan.gradient_rows):
            group = slice(first, min(N, first + plan.gradient_rows))
            for start in range(first, group.stop, plan.chunk_rows):
                rows = slice(start, min(group.stop, start + plan.chunk_rows))
                z, *y = [model.logits(rows, first) for model in models]
                logits = Logits(z, y[0] if y else None, None if labels is None else labels[rows])
                own = [model.target(rows, first, x) for model, x in zip(learning, (z, *y), strict=False)]
                launch = chosen_launch(logits, options.kd, in_place=own[0] is z) if len(own) == 1 else None
                own_counters = None if counters is None else counters[lines_of(start, chunk, options.kd) :]
                sweep_logits(
                    logits, weights[:, rows], options.kd, statistics[:, rows], own_counters,
                    Buffers(*own) if own else None, launch,
                )  # fmt: skip
                for model, gradient in zip(learning, own, strict=True):
                    model.settle(rows, first, gradient)
                chunk += 1
                del z, y, own, logits  # those of functions are not kept while the next ones are made
            if group.stop == N:  # if there is no other group, the weight's gradient is allocated next: this makes room
                for model in models:
                    model.release_logits()
            for model in learning:
                model.multiply(group, is_only=group.stop - group.start == N)
    found = student.results()
    return [found[0], found[1] if adapter is not None else NONE, NONE if teacher is None else teacher.results()[0]]


def default_logits_dtype(hidden: Tensor, products: torch.dtype) -> torch.dtype:
    """Return float32 (float64 for float64), or 16 bits where float32 results of 16-bit products would be slow."""
    wide = torch.promote_types(products, torch.float32)
    return wide if has_float32_logits(hidden.device, products) else products


def planned(
    hidden: Tensor,  # [N, H_s]
    lora_hidden: Tensor | None,  # [N, r]
    teacher_hidden: Tensor | None,  # [N, H_t]
    options: LinearOptions,
) -> Plan:
    """Return the plan of the chunks.

    Raises:
        ValueError: workspace_bytes is too small for one token.
    """
    need = options.needed
    has_float32 = has_float32_logits(hidden.device, options.dtype)
    return plan_chunks(
        hidden.shape[0], options.kd.vocab_size, hidden.shape[1],
        None if teacher_hidden is None else teacher_hidden.shape[1],
        dtype=options.dtype, teacher_dtype=options.teacher_dtype,
        logits_dtype=options.logits_dtype or (None if has_float32 else options.dtype),
        hidden_grad=need[0], weight_grad=need[1], bias_grad=need[2],
        teacher_hidden_grad=need[5], teacher_weight_grad=need[6], teacher_bias_grad=need[7],
        lora_rank=0 if lora_hidden is None else lora_hidden.shape[1],
        workspace_bytes=options.workspace_bytes, memory=options.memory, device=launching.device_of(hidden.device),
    )  # fmt: skip


def has_unit(options: LinearOptions) -> bool:
    """Return whether the gradients in the forward pass are divided by a unit: in float16 only.

    `unit_weights` takes one for a function in place of the student's head too, whose logits may be float16.
    """
    return any(options.needed) and torch.float16 in (options.dtype, options.teacher_dtype)


def unit_weights(
    weights: Tensor,  # [3, N]
    upstream: Tensor | None,  # [N]; None: 1
    options: LinearOptions,
    outside: Outside,
) -> tuple[Tensor, Tensor]:
    """Return the weights times the upstream gradients over the unit, and the unit: a scalar, or an empty tensor for 1.

    The unit is a power of two.  In this unit the largest possible gradient of a logit is from 2^8 to 2^9.  The forward pass
    takes the gradients of a mean over thousands of rows: about 1e-9 where a probability is 1e-6, which float16 cannot hold.
    A loss scale comes with the upstream gradient, too late.  Division by a power of two is exact.
    """
    if not has_unit(options) and outside.student_head is None:
        return weights if upstream is None else weights * upstream, weights.new_empty(0)
    objective = options.kd.objective
    scale = max(objective.student_map.scale, objective.teacher_map.scale)
    slope = divergence_of(objective).largest_slope / objective.temperature
    with device_of(weights):
        scaled, unit = backend_of(weights, options.kd.dtype).unit_weights(weights, upstream, scale, scale * slope)
    return scaled, unit
