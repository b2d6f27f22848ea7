"""The losses as modules: the same functions, options and defaults."""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functional import kd_loss, linear_kd_loss
from .logit_map import Scale, Softcap
from .options import KDLossOutput


class _Loss(nn.Module):
    """The options of a loss, checked as it is made.  An alpha that is a tensor is a parameter or a buffer of the module."""

    alpha: float | Tensor
    temperature: float
    ignore_index: int
    reduction: str
    vocab_size: int | None
    logit_softcap: Softcap
    logit_scale: Scale
    teacher_grad: bool
    return_parts: bool

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.check_options(**{name: checks.plain(value) for name, value in options.items()})
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        value = checks.plain(value)  # torch.compile would take a number of numpy's for an array
        if name == "alpha":  # a number may follow a tensor, which nn.Module would refuse
            for held in (self.__dict__, self._parameters, self._buffers):
                held.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
                return
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in self._options)


def _shown(value: object) -> str:
    return f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class KDLoss(_Loss):
    """`kd_loss` as a module; see there for shapes, dtypes and errors.

    Args: the options of `kd_loss` that hold for a whole training run, with the same defaults.  An alpha that is a tensor
        belongs to the module: a parameter if it is an `nn.Parameter`, a buffer if not.  Options may be set anew.
    """

    inplace_backward: bool

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
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
            ignore_index=ignore_index,
            reduction=reduction,
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
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            token_weights=token_weights,
            num_items=num_items,
            vocab_size=self.vocab_size,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            teacher_grad=self.teacher_grad,
            inplace_backward=self.inplace_backward,
            return_parts=self.return_parts,
        )


class LinearKDLoss(_Loss):
    """`linear_kd_loss` as a module; see there for shapes, dtypes and errors.  It holds no weights: pass the heads'.

    Args: the options of `linear_kd_loss` that hold for a whole training run, with the same defaults.  An alpha that is a
        tensor belongs to the module: a parameter if it is an `nn.Parameter`, a buffer if not.  Options may be set anew.
    """

    logits_dtype: torch.dtype | None
    workspace_bytes: int | None

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        logit_softcap: Softcap = None,
        logit_scale: Scale = 1.0,
        teacher_grad: bool = False,
        logits_dtype: torch.dtype | None = None,
        workspace_bytes: int | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_size=vocab_size,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            teacher_grad=teacher_grad,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            return_parts=return_parts,
        )

    def forward(
        self,
        student_hidden: Tensor,  # [..., H_s]
        student_weight: Tensor,  # [V, H_s]
        teacher_hidden: Tensor | None,  # [..., H_t]
        teacher_weight: Tensor | None,  # [V, H_t]
        labels: Tensor | None = None,  # [...]
        *,
        student_bias: Tensor | None = None,  # [V]
        teacher_bias: Tensor | None = None,  # [V]
        token_weights: Tensor | None = None,  # [...]
        num_items: int | float | Tensor | None = None,
    ) -> Tensor | KDLossOutput:
        return linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            alpha=self.alpha,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            token_weights=token_weights,
            num_items=num_items,
            vocab_size=self.vocab_size,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            teacher_grad=self.teacher_grad,
            logits_dtype=self.logits_dtype,
            workspace_bytes=self.workspace_bytes,
            return_parts=self.return_parts,
        )
