"""The autograd functions: what is saved, what is recomputed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from . import statistics as stats


class KDOptions(NamedTuple):
    temperature: float
    vocab_size: int  # how many leading columns of the student are real
    ce_in_loss: bool  # False: CE is computed for the caller's log only
    kl_in_loss: bool
    inplace_backward: bool
    dtype: torch.dtype  # of the statistics: float32, or float64 for float64 logits


class KDLossFunction(torch.autograd.Function):
    """Row losses w_ce CE + w_kl KL from logits.

    Alpha, T^2, token weights and the divisor of the mean are all in the two weights of a row, and backward multiplies
    these by the upstream gradient: any reduction, any upstream gradient and a repeated backward are right without a
    look at their values.  Saved are the logits, which the caller holds anyway, and O(N) floats.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [outer, inner, V'], V' >= vocab_size
        teacher: Tensor | None,  # [outer', inner', vocab_size]; None leaves out KL
        labels: Tensor | None,  # [N]; None leaves out CE
        ce_weight: Tensor,  # [N], float64
        kl_weight: Tensor,  # [N], float64; a row with both weights 0 counts for nothing, whatever it holds
        options: KDOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:  # row losses, CE and KL, [N] float64 each; the last two for the log
        real, dtype = student[..., : options.vocab_size], options.dtype
        statistics = ops.row_statistics(
            real, teacher, ce_weight.to(dtype), kl_weight.to(dtype), options.temperature, labels is not None
        )
        loss = ce = kl = torch.zeros_like(ce_weight)
        if labels is not None:
            index = labels.clamp(0, options.vocab_size - 1).long().view(*student.shape[:2], 1)
            ce = stats.cross_entropy(statistics, real.gather(2, index).flatten())
        if teacher is not None:
            kl = stats.kl_divergence(statistics)
        if options.ce_in_loss:
            loss = loss + torch.where(ce_weight == 0, 0.0, ce_weight * ce)
        if options.kl_in_loss:
            loss = loss + torch.where(kl_weight == 0, 0.0, kl_weight * kl)
        ctx.options = options
        ctx.save_for_backward(student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, statistics, ce_weight, kl_weight, ce, kl = ctx.saved_tensors
        options: KDOptions = ctx.options
        student_gradient = ce_weight_gradient = kl_weight_gradient = None
        if ctx.needs_input_grad[0]:
            arguments = (
                student, teacher if options.kl_in_loss else None, labels if options.ce_in_loss else None, statistics,
                (ce_weight * upstream).to(options.dtype), (kl_weight * upstream).to(options.dtype),
                options.temperature, options.vocab_size,
            )  # fmt: skip
            if options.inplace_backward:
                ops.logit_gradient_(*arguments)
                torch.autograd.graph.increment_version(student)
                student_gradient = student.detach()
            else:
                student_gradient = ops.logit_gradient(*arguments)
        counted = (ce_weight != 0) | (kl_weight != 0)
        if ctx.needs_input_grad[3]:
            ce_weight_gradient = torch.where(counted, upstream * ce, 0.0)
        if ctx.needs_input_grad[4]:
            kl_weight_gradient = torch.where(counted, upstream * kl, 0.0)
        return student_gradient, None, None, ce_weight_gradient, kl_weight_gradient, None
