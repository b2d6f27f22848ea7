"""The losses as modules, with the same options and defaults as the functions."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .divergences import Divergence
from .functional import kd_loss
from .linear import linear_kd_loss
from .options import Function, KDLossOutput, Lora, Options, Scale, Softcap

DEFAULTS = {option.name: option.default for option in dataclasses.fields(Options)}


class _Loss(nn.Module):
    """A loss with its options, which are checked when it is made.

    An alpha that is a tensor is a parameter or a buffer of the module.
    """

    alpha: float | Tensor
    temperature: float
    divergence: str | Divergence
    ignore_index: int
    reduction: str
    shift: bool
    vocab_size: int | None
    logit_softcap: Softcap
    logit_scale: Scale
    teacher_grad: bool
    return_parts: bool

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.check_options(Options(**{name: checks.plain(value) for name, value in options.items()}))
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = checks.plain(value)  # torch.compile would take a numpy number for an array
        if name == "alpha":  # nn.Module would refuse a number in place of a parameter or buffer
            for held in (self.__dict__, self._parameters, self._buffers):
                held.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
                return
        super().__setattr__(name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults."""
        shown = {name: value for name, value in self._options().items() if not _equal(value, DEFAULTS[name])}
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())


def _equal(value: object, default: object) -> bool:
    return not isinstance(value, Tensor) and value == default


def _shown(value: object) -> str:
    return f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class KDLoss(_Loss):
    """The module of `kd_loss`, whose docstring gives shapes, dtypes and errors.

    Its arguments are the options of `kd_loss` that hold for a whole training run, with the same defaults.  An alpha that is
    a tensor belongs to the module: it is a parameter if it is an `nn.Parameter`, otherwise a buffer.  An option may be
    changed by setting the attribute of its name.
    """

    inplace_backward: bool

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        ignore_index: int = -100,
        reduction: str = "mean",
        shift: bool = False,
        vocab_size: int | None = None,
        logit_softcap: Softcap = None,
        logit_scale: Scale = 1.0,
        teacher_grad: bool = False,
        inplace_backward: bool = False,
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            ignore_index=ignore_index,
            reduction=reduction,
            shift=shift,
            vocab_size=vocab_size,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            teacher_grad=teacher_grad,
            inplace_backward=inplace_backward,
            return_parts=return_parts,
        )

    def forward(
        self,
        student_logits: Tensor,  # [..., V]
        teacher_logits: Tensor | None,  # [..., V]
        labels: Tensor | None = None,  # [...]
        *,
        token_weights: Tensor | None = None,  # [...]
        num_items: int | float | Tensor | None = None,
    ) -> Tensor | KDLossOutput:
        """Return the loss, as `kd_loss` does."""
        result: Tensor | KDLossOutput = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            token_weights=token_weights,
            num_items=num_items,
            **self._options(),
        )
        return result


class LinearKDLoss(_Loss):
    """The module of `linear_kd_loss`, whose docstring gives shapes, dtypes and errors.

    The module holds no heads: pass their weights and biases to each call.

    Its arguments are the options of `linear_kd_loss` that hold for a whole training run, with the same defaults.  An alpha
    that is a tensor belongs to the module: it is a parameter if it is an `nn.Parameter`, otherwise a buffer.  An option may
    be changed by setting the attribute of its name.
    """

    logits_dtype: torch.dtype | None
    workspace_bytes: int | None
    memory: str
    compact: bool | None

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        ignore_index: int = -100,
        reduction: str = "mean",
        shift: bool = False,
        vocab_size: int | None = None,
        logit_softcap: Softcap = None,
        logit_scale: Scale = 1.0,
        teacher_grad: bool = False,
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        memory: str = "default",
        compact: bool | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            ignore_index=ignore_index,
            reduction=reduction,
            shift=shift,
            vocab_size=vocab_size,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            teacher_grad=teacher_grad,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            memory=memory,
            compact=compact,
            return_parts=return_parts,
        )

    def forward(
        self,
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
        token_weights: Tensor | None = None,  # [...]
        num_items: int | float | Tensor | None = None,
        counted_rows: int | None = None,
        weight_grad_out: Tensor | None = None,  # [V, H_s]
        weight_grad_scale: float | Tensor = 1.0,
    ) -> Tensor | KDLossOutput:
        """Return the loss, as `linear_kd_loss` does."""
        result: Tensor | KDLossOutput = linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_head=student_head,
            teacher_head=teacher_head,
            student_lora=student_lora,
            token_weights=token_weights,
            num_items=num_items,
            counted_rows=counted_rows,
            weight_grad_out=weight_grad_out,
            weight_grad_scale=weight_grad_scale,
            **self._options(),
        )
        return result
