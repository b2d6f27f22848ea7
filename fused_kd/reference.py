"""The losses as textbooks write them, in plain PyTorch: the oracle of the tests and of `fused-kd check`.

    L = (1 - alpha) CE(y, softmax(z_s)) + alpha T^2 D(softmax(z_t / T), softmax(z_s / T))

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).  These functions
keep several [N, V] arrays.  They share no formula and no check with the rest of the package.
"""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergences
from .divergences import Divergence
from .options import Function, KDLossOutput, Lora, Scale, Softcap


def kl_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
) -> Tensor:  # [N]
    """Return the forward KL of each row, KL(softmax(z_t / T) || softmax(z_s / T)), in nats, with 0 log 0 = 0."""
    log_p = F.log_softmax(student_logits / temperature, dim=-1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)
    massless = log_q.isneginf()
    if bool(massless.any()):
        log_p, log_q = log_p.masked_fill(massless, 0.0), log_q.masked_fill(massless, 0.0)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def reverse_kl_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
) -> Tensor:  # [N]
    """Return the reverse KL of each row, KL(softmax(z_s / T) || softmax(z_t / T)), in nats.

    Source: Gu et al., "MiniLLM", 2023 (arXiv:2306.08543).
    """
    return kl_divergence(teacher_logits, student_logits, temperature)


def mixed_kl_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
    reverse: float = 0.5,
) -> Tensor:  # [N]
    """Return (1 - reverse) times the forward KL plus reverse times the reverse KL of each row, in nats."""
    forward = kl_divergence(student_logits, teacher_logits, temperature)
    return (1 - reverse) * forward + reverse * reverse_kl_divergence(student_logits, teacher_logits, temperature)


def _kl_from_mixture(
    log_mass: Tensor,  # [N, V], log-probabilities, as is the other
    log_other: Tensor,
    share: float,  # of the first in the mixture
) -> Tensor:  # [N]
    """Return KL(mass || share mass + (1 - share) other) of each row."""
    massless = log_mass.isneginf()
    empty = massless & log_other.isneginf()  # the derivative of logaddexp would be NaN
    log_mixture = torch.logaddexp(
        log_mass.masked_fill(empty, 0.0) + math.log(share), log_other.masked_fill(empty, 0.0) + math.log1p(-share)
    )
    return (log_mass.exp() * (log_mass - log_mixture).masked_fill(massless, 0.0)).sum(-1)


def jensen_shannon_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
    beta: float = 0.5,
) -> Tensor:  # [N]
    """Return beta KL(q || m) + (1 - beta) KL(p || m) of each row, m = (1 - beta) p + beta q, in nats.

    p is the student's distribution and q the teacher's.  Source: Agarwal et al., "On-Policy Distillation of Language
    Models", arXiv:2306.13649.
    """
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, temperature)
    return beta * _kl_from_mixture(log_q, log_p, beta) + (1 - beta) * _kl_from_mixture(log_p, log_q, 1 - beta)


def skew_kl_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
    skew: float = 0.1,
) -> Tensor:  # [N]
    """Return KL(q || skew q + (1 - skew) p) of each row, in nats.  Source: Ko et al., "DistiLLM", arXiv:2402.03898."""
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl_from_mixture(log_q, log_p, skew)


def skew_reverse_kl_divergence(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
    skew: float = 0.1,
) -> Tensor:  # [N]
    """Return KL(p || skew p + (1 - skew) q) of each row, in nats.  Source: Ko et al., "DistiLLM", arXiv:2402.03898."""
    return skew_kl_divergence(teacher_logits, student_logits, temperature, skew)


def total_variation_distance(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
) -> Tensor:  # [N]
    """Return sum |p - q| / 2 of each row.  Source: Wen et al., "f-Divergence Minimization", arXiv:2307.15190."""
    log_p, log_q = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:  # [N, V] each
    return F.log_softmax(student_logits / temperature, dim=-1), F.log_softmax(teacher_logits / temperature, dim=-1)


DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "mixed_kl": mixed_kl_divergence,
    "jsd": jensen_shannon_divergence,
    "skew_kl": skew_kl_divergence,
    "skew_reverse_kl": skew_reverse_kl_divergence,
    "tvd": total_variation_distance,
}


def divergence_values(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    temperature: float,
    divergence: str | Divergence,
) -> Tensor:  # [N]
    """Return a divergence of each row.  One that has no formula here is the sum of its `elements`."""
    name, parameters = divergences.named(divergence)
    if name in DIVERGENCES:
        return DIVERGENCES[name](student_logits, teacher_logits, temperature, *parameters)
    return (
        divergences.of(name, parameters)
        .elements(*_log_probabilities(student_logits, teacher_logits, temperature))
        .sum(-1)
    )


def student_entropy(
    student_logits: Tensor,  # [N, V]
    temperature: float,
) -> Tensor:  # [N]
    """Return the entropy of softmax(z_s / T) of each row, in nats, with 0 log 0 = 0."""
    log_p = F.log_softmax(student_logits / temperature, dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def mapped(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the logits of a head's output x: scale x, or softcap tanh(scale x / softcap)."""
    z = x if scale == 1 else scale * x
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


# fmt: off
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: Literal[True],
) -> KDLossOutput: ...
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: bool,
) -> Tensor | KDLossOutput: ...
# fmt: on
def kd_loss(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    alpha: float | Tensor = 0.5,
    temperature: float = 1.0,
    divergence: str | Divergence = "forward_kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = False,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Softcap = None,
    logit_scale: Scale = 1.0,
    teacher_grad: bool = False,
    inplace_backward: bool = False,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Return the loss of `fused_kd.kd_loss`, computed by the formula.  Every argument means the same.

    The computation is in float32, or in float64 if an input is float64.  Arguments are not checked, and
    `inplace_backward` has no effect.
    """
    if shift:  # score the logits of all positions but the last
        assert labels is not None
        student_logits = student_logits[..., :-1, :]
        teacher_logits = None if teacher_logits is None else teacher_logits[..., :-1, :]
        lasts, labels = labels[..., :1].shape, labels[..., 1:]
        token_weights = None if token_weights is None else token_weights[..., 1:]
        alpha = alpha[..., 1:] if isinstance(alpha, Tensor) and alpha.dim() else alpha
    shape, V = student_logits.shape[:-1], vocab_size or student_logits.shape[-1]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    softcaps, scales = _pair(logit_softcap), _pair(logit_scale)
    student = student_logits[..., :V].reshape(-1, V).to(dtype)
    N = student.shape[0]

    weight = torch.ones(N, dtype=dtype, device=student.device)
    if token_weights is not None:
        weight = token_weights.reshape(N).to(dtype)
    if labels is not None:
        labels = labels.reshape(N).long()
        weight = weight.where(labels != ignore_index, 0.0)
    learns = weight.requires_grad and torch.is_grad_enabled()  # then a weight of 0 has a gradient: the loss of its row
    counted = weight != 0
    if learns and labels is not None:
        counted = labels != ignore_index
    elif learns:
        counted = torch.ones_like(counted)

    def rows(tensor: Tensor) -> Tensor:  # only rows that count, since the others may hold anything
        return tensor if bool(counted.all()) else tensor[counted]

    def reduce(row_values: Tensor) -> Tensor:
        weighted = rows(weight) * row_values
        if reduction == "none":
            losses = weighted.new_zeros(N).masked_scatter(counted, weighted).reshape(shape)
            return torch.cat([losses, losses.new_zeros(lasts)], -1) if shift else losses
        if reduction == "sum":
            return weighted.sum()
        divisor = weight.sum() if num_items is None else num_items
        if divisor == 0 and not bool((weight != 0).any()):  # no row counts
            return weighted.sum() * 0
        return weighted.sum() / divisor

    student = mapped(rows(student), scales[0], softcaps[0])
    if not isinstance(alpha, Tensor):
        alpha = float(alpha)
    elif alpha.dim():
        alpha = rows(alpha.reshape(N))
    temperature = float(temperature)
    loss, value, ce = torch.zeros_like(student[:, 0]), None, None
    if labels is not None:
        ce = F.cross_entropy(student, rows(labels), reduction="none")
        loss = loss + (1 - alpha) * ce
    if teacher_logits is not None and (isinstance(alpha, Tensor) or alpha != 0):
        teacher_logits = teacher_logits if teacher_grad else teacher_logits.detach()
        teacher = rows(teacher_logits[..., :V].reshape(-1, V)).to(dtype)
        teacher = mapped(teacher, scales[1], softcaps[1])
        value = divergence_values(student, teacher, temperature, divergence)
        loss = loss + alpha * temperature**2 * value
    if not return_parts:
        return reduce(loss)
    ce, value = (None if part is None else reduce(part.detach()) for part in (ce, value))
    return KDLossOutput(reduce(loss), ce, value, reduce(student_entropy(student.detach(), temperature)))


# fmt: off
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: Literal[True],
) -> KDLossOutput: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: bool,
) -> Tensor | KDLossOutput: ...
# fmt: on
def linear_kd_loss(
    student_hidden: Tensor,  # [..., H_s]
    student_weight: Tensor | None,  # [V, H_s]
    teacher_hidden: Tensor | None,  # [..., H_t]
    teacher_weight: Tensor | None,  # [V, H_t]
    labels: Tensor | None = None,  # [...]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    student_head: Function | None = None,
    teacher_head: Function | None = None,
    student_lora: Lora | None = None,
    alpha: float | Tensor = 0.5,
    temperature: float = 1.0,
    divergence: str | Divergence = "forward_kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = False,
    token_weights: Tensor | None = None,  # [...]
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Softcap = None,
    logit_scale: Scale = 1.0,
    teacher_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    memory: str = "default",
    compact: bool | None = None,
    counted_rows: int | None = None,
    weight_grad_out: Tensor | None = None,  # [V, H_s]
    weight_grad_scale: float | Tensor = 1.0,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Return the loss of `fused_kd.linear_kd_loss`: `kd_loss` of the whole logits that the two heads give.

    Every argument means the same, but for the following.  With `logits_dtype=None` logits have the dtype of the products,
    as those of a model's own head.  `workspace_bytes`, `memory`, `compact` and `counted_rows` have no effect.
    `weight_grad_out` gets its gradient in backward, so that `weight_grad_scale` has no effect either.
    """

    def logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, head: Function | None) -> Tensor:
        if head is not None:
            return head(hidden)
        assert weight is not None
        if logits_dtype is None:
            return F.linear(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(*(None if t is None else t.to(logits_dtype) for t in (hidden, weight, bias)))  # type: ignore[arg-type]

    def add_to_sum(gradient: Tensor) -> None:
        assert weight_grad_out is not None
        weight_grad_out.add_(gradient)

    if weight_grad_out is not None and student_weight is not None:
        student_weight = student_weight.detach().requires_grad_()
        student_weight.register_hook(add_to_sum)
    student_logits = logits(student_hidden, student_weight, student_bias, student_head)
    if student_lora is not None:
        A, B, scale = student_lora
        low_rank = F.linear(F.linear(student_hidden.to(A.dtype), A), B) * scale
        student_logits = student_logits + low_rank.to(student_logits.dtype)
    teacher_logits = None
    if teacher_hidden is not None:
        with torch.set_grad_enabled(teacher_grad and torch.is_grad_enabled()):
            teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_head)
    return kd_loss(
        student_logits, teacher_logits, labels,
        alpha=alpha, temperature=temperature, divergence=divergence, ignore_index=ignore_index, reduction=reduction,
        shift=shift, token_weights=token_weights, num_items=num_items, vocab_size=vocab_size,
        logit_softcap=logit_softcap, logit_scale=logit_scale, teacher_grad=teacher_grad, return_parts=return_parts,
    )  # fmt: skip
