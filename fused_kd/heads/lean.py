"""The loss from hidden states in little memory: the logits of all tokens exist for one slab of the vocabulary at a time.

Let F_s = 2 N V H_s and F_t = 2 N V H_t be the flops of projecting the student's and the teacher's hidden states.  The
slabs are projected once for the statistics, which are merged slab by slab, and once more for the gradients.  So a step
takes 2 F_s + 2 F_t for the logits, F_s for the gradient of the student's hidden states and F_s for that of its weight.  A
divergence of two sweeps takes F_s + F_t more.

The weight's gradient of a slab is one product over all tokens, rounded at once: no sum of it exists.  The gradient of the
hidden states is summed over the slabs in float32.  So nothing grows with V or with N V but what is returned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import ForwardKL, divergence_of
from ..rows import add_something, readable
from ..sweep import KDOptions, backend_of, device_of
from .chunks import Plan, row_stride
from .head import NONE, Found, Head, gradient_dtype, new_gradient, new_rows
from .products import accumulate, project
from .sweep import LinearOptions, Outside, default_logits_dtype

WIDENED_ROWS = 1024  # rows of 16-bit hidden states that a CPU converts to float32 at a time


def sweep(
    heads: Sequence[Head | None],  # the student's, that of its adapter, the teacher's; None: no adapter, no divergence
    needed: Sequence[Sequence[bool]],  # the gradients of hidden states, weight and bias of each
    labels: Tensor | None,  # [N]; None: no CE
    weights: Tensor,  # [3, N]; a row whose weights of CE and divergence are 0 adds nothing, whatever it holds
    options: LinearOptions,
    outside: Outside,
    statistics: Tensor,  # [9, N], written
    counters: object,  # not used, as in `statistics_and_gradient`
    plan: Plan,
) -> list[Found]:  # of each head; `NONE` if it is None
    """Write the statistics of all rows, and return the gradients of sum_i (w_ce CE + w_d D), slab by slab.

    The teacher's may be needed only if the divergence is in the loss.
    """
    kd, device, columns = options.kd, weights.device, plan.slab_columns
    with torch.autocast(device.type, enabled=False), device_of(weights):  # the options hold the dtypes of the products
        products = options.dtype, options.dtype, options.teacher_dtype
        outs = outside.weight_grad_out, None, None
        own = [
            None if head is None else _HeadInSlabs(head, need, dtype, kd, out)
            for head, need, dtype, out in zip(heads, needed, products, outs, strict=True)
        ]
        models = [
            _Model([head for head in of_model if head is not None], columns, options.logits_dtype)
            for of_model in (own[:2], own[2:])
            if of_model[0] is not None
        ]
        walk = _Walk(models, labels, weights, kd, columns)
        sums = walk.take_statistics(statistics, teacher_grad=any(model.learns for model in models[1:]))
        if any(model.learns for model in models):
            for head in own:
                if head is not None:
                    head.prepare(weights)
            walk.take_gradients(statistics, sums)
        return [NONE if head is None else head.found() for head in own]


class _Walk:
    """The passes over the slabs of the vocabulary."""

    def __init__(
        self,
        models: Sequence["_Model"],  # the student, or student and teacher
        labels: Tensor | None,  # [N]
        weights: Tensor,  # [3, N]
        kd: KDOptions,
        columns: int,  # per slab
    ) -> None:
        self.models, self.labels, self.weights, self.kd = models, labels, weights, kd
        self.rows, self.columns = weights.shape[1], columns
        self.kind = divergence_of(kd.objective)
        self.backend: Any = backend_of(weights, kd.dtype)

    def slabs(self) -> Iterator[slice]:
        V = self.kd.vocab_size
        return (slice(first, min(first + self.columns, V)) for first in range(0, V if self.rows else 0, self.columns))

    def labels_in(self, slab: slice) -> Tensor | None:  # [N]
        """Return the labels as columns of a slab; those outside name no column of it."""
        return None if self.labels is None else self.labels - slab.start

    def take_statistics(
        self,
        statistics: Tensor,  # [9, N], written
        *,
        teacher_grad: bool,
    ) -> Tensor | None:  # [3, N]
        """Write the statistics of all rows, and return the sums of a second sweep."""
        objective = self.kd.objective
        has_teacher = len(self.models) > 1
        two_sweeps = has_teacher and self.kind.sweeps == 2
        if two_sweeps:  # the first sweep takes the maxima and normalisers, as for any divergence of one sweep
            objective = objective._replace(divergence=ForwardKL.name, parameters=())
        total = stats.identity(self.rows, statistics.dtype, self.weights.device).double()
        part = torch.zeros_like(statistics, memory_format=torch.contiguous_format)
        for slab in self.slabs():
            z, y = self.logits(slab)
            labels, columns = self.labels_in(slab), slab.stop - slab.start
            self.backend.row_statistics(z, y, labels, self.weights, part, None, objective, self.kd.parts)
            self.backend.merge_(total, part, labels, columns, objective, self.kd.parts)
        if not two_sweeps:
            stats.round_to(statistics, total, objective.temperature, objective.divergence)
            return None
        statistics.copy_(total)
        sums = total.new_zeros(3, self.rows)
        for slab in self.slabs():
            z, y = self.logits(slab)
            self.backend.add_sums_(sums, z, y, self.weights, statistics, self.kd.objective, teacher_grad)
        statistics[stats.C], statistics[stats.SECOND] = sums[0], sums[1]
        return sums

    def logits(self, slab: slice) -> tuple[Tensor, Tensor | None]:  # [1, N, S] each
        """Return the logits of a slab of student and teacher."""
        z, *y = (model.logits(slab) for model in self.models)
        return z, y[0] if y else None

    def take_gradients(
        self,
        statistics: Tensor,  # [9, N]
        sums: Tensor | None,  # [3, N]
    ) -> None:
        """Add up the gradients."""
        kd, student = self.kd, self.models[0]
        teacher = self.models[1] if len(self.models) > 1 and kd.divergence_in_loss else None
        learning = teacher if teacher is not None and teacher.learns else None
        for slab in self.slabs():
            z = student.logits(slab)
            y = None if teacher is None else teacher.logits(slab)
            self.backend.logit_gradient(
                z, y, self.labels_in(slab) if kd.ce_in_loss else None, statistics, self.weights, None,
                student.gradient(slab), None if learning is None else learning.gradient(slab), kd.objective,
                teacher_sums=None if sums is None or learning is None else sums[2],
            )  # fmt: skip
            student.add(slab)
            if learning is not None:
                learning.add(slab)


class _HeadInSlabs:
    """One head, and its gradients: hidden states in float32 until the end, weight and bias finished slab by slab."""

    def __init__(
        self,
        head: Head,
        needed: Sequence[bool],  # gradients of hidden states, weight and bias
        products: torch.dtype,
        kd: KDOptions,
        weight_out: Tensor | None,  # [V', H], which the weight's gradient is added to
    ) -> None:
        self.head, self.products, self.vocab_size, self.sums_dtype = head, products, kd.vocab_size, kd.dtype
        self.need_hidden, self.need_weight, self.need_bias = needed
        self.operand = head.hidden.to(products)  # [N, H]
        self.hidden: Tensor | None = None  # [N, H]
        self.hidden_sum: Tensor | None = None  # [N, H]
        self.weight = weight_out if self.need_weight else None  # [V', H]
        self.adds = self.weight is not None
        self.bias: Tensor | None = None  # [V']

    def prepare(self, weights: Tensor) -> None:  # of [3, N]
        """Allocate the gradients, and copy the hidden states with zeros for the rows that do not count.

        Such a row may hold anything, and in the product of the weight's gradient 0 times NaN would be NaN.  The copy lies
        in the memory of the cast hidden states, or of their gradient, which is written at the end, if it is not the sum.
        """
        hidden, weight = self.head.hidden, self.head.weight
        if self.need_hidden:
            self.hidden_sum = torch.zeros(
                hidden.shape, dtype=torch.promote_types(self.products, torch.float32), device=hidden.device
            )
            if hidden.dtype == self.hidden_sum.dtype:
                self.hidden = self.hidden_sum
        if self.need_weight and not self.adds:
            self.weight = new_gradient(weight, gradient_dtype(weight), self.vocab_size if hidden.shape[0] else 0)
        if self.need_bias:
            self.bias = torch.zeros(weight.shape[0], dtype=self.sums_dtype, device=weight.device)
        if not self.need_weight or (readable(weights) and bool(add_something(weights).all())):
            return
        if self.operand is hidden:
            self.operand = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            if self.need_hidden and self.hidden is None:
                self.hidden = self.operand
        backend_of(weights, torch.float32).copy_counted(hidden, weights, self.operand)

    def add_logits(
        self,
        slab: slice,
        out: Tensor,  # [N, S], written or added to
        *,
        first: bool,  # True: it is written
    ) -> None:
        """Write the head's logits of a slab, or add them."""
        weight = self.head.weight[slab].to(self.products)
        if not first:
            project(self.operand, weight, None, out, add=True)
            return
        bias = None if self.head.bias is None else self.head.bias[slab].to(self.products)
        at_once = WIDENED_ROWS if out.dtype != self.products and not out.is_cuda else max(1, out.shape[0])
        for hidden, logits in zip(self.operand.split(at_once), out.split(at_once), strict=True):
            project(hidden, weight, bias, logits)

    def add(
        self,
        slab: slice,
        gradient: Tensor,  # [N, S], in the dtype of the products
    ) -> None:
        """Add the gradients of a slab of the logits."""
        if self.weight is not None:
            rows = self.weight[slab]
            if self.adds or rows.dtype in (gradient.dtype, torch.float32):
                accumulate(rows, gradient, self.operand, first=not self.adds)
            else:
                product = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
                accumulate(product, gradient, self.operand, first=True)
                rows.copy_(product)
        if self.hidden_sum is not None:
            accumulate(self.hidden_sum, gradient.T, self.head.weight[slab].to(self.products), first=False)

    def found(self) -> Found:
        """Return the gradients."""
        if self.hidden_sum is not None and self.hidden is not self.hidden_sum:
            if self.hidden is None:
                self.hidden = torch.empty_like(self.head.hidden, memory_format=torch.contiguous_format)
            self.hidden.copy_(self.hidden_sum)
        return self.hidden, None if self.adds else self.weight, self.bias


class _Model:
    """Heads whose logits add up, and memory for a slab of their logits and of the gradient."""

    def __init__(self, heads: Sequence[_HeadInSlabs], columns: int, logits_dtype: torch.dtype | None) -> None:
        self.heads, self.columns = heads, columns
        self.products = heads[0].products
        self.logits_dtype = logits_dtype or default_logits_dtype(heads[0].head.hidden, self.products)
        self.learns = any(head.need_hidden or head.need_weight or head.need_bias for head in heads)
        self._logits = self._new(self.logits_dtype)
        self._rounded: Tensor | None = None  # [N, S], in the dtype of the products

    def _new(self, dtype: torch.dtype) -> Tensor:  # [N, S]
        hidden = self.heads[0].head.hidden
        return new_rows(hidden, hidden.shape[0], self.columns, row_stride(self.columns), dtype)

    def logits(self, slab: slice) -> Tensor:  # [1, N, S]
        """Return the logits of a slab."""
        out = self._logits[:, : slab.stop - slab.start]
        for i, head in enumerate(self.heads):
            head.add_logits(slab, out, first=i == 0)
        return out[None]

    @property
    def need_bias(self) -> bool:
        return any(head.need_bias for head in self.heads)

    def gradient(self, slab: slice) -> Tensor:  # [1, N, S]
        """Return memory for the gradient of a slab: that of the logits, or in the dtype of the products.

        A bias adds up gradients that are not rounded.
        """
        if self._rounded is None and self.learns and self.logits_dtype != self.products:
            self._rounded = self._new(self.products)
        memory = self._logits if self._rounded is None or self.need_bias else self._rounded
        return memory[None, :, : slab.stop - slab.start]

    def add(self, slab: slice) -> None:
        """Add the gradients of the heads, from the memory that `gradient` has returned."""
        if not self.learns:
            return
        written = self.gradient(slab)[0]
        for head in self.heads:
            if head.bias is not None:
                torch.sum(written, 0, dtype=head.bias.dtype, out=head.bias[slab])
        if written.dtype != self.products:
            assert self._rounded is not None
            written = self._rounded[:, : slab.stop - slab.start].copy_(written)
        for head in self.heads:
            head.add(slab, written)
