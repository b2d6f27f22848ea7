"""The losses as modules: the same functions, options and defaults."""

import torch
from torch import Tensor, nn

from .functional import kd_loss, linear_kd_loss
from .logit_map import Scale, Softcap
from .output import KDLossOutput


class KDLoss(nn.Module):
    """`kd_loss` as a module; see there for shapes, dtypes and errors.

    Args: the options of `kd_loss` that hold for a whole training run, with the same defaults.
    """

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
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        self.teacher_grad = teacher_grad
        self.inplace_backward = inplace_backward
        self.return_parts = return_parts

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

    def extra_repr(self) -> str:
        return _options(self)


class LinearKDLoss(nn.Module):
    """`linear_kd_loss` as a module; see there for shapes, dtypes and errors.  It holds no weights: pass the heads'.

    Args: the options of `linear_kd_loss` that hold for a whole training run, with the same defaults.
    """

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
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        self.teacher_grad = teacher_grad
        self.logits_dtype = logits_dtype
        self.workspace_bytes = workspace_bytes
        self.return_parts = return_parts

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

    def extra_repr(self) -> str:
        return _options(self)


def _options(module: nn.Module) -> str:
    """The options of a loss, for its repr."""
    return ", ".join(
        f"{name}={value!r}" for name, value in vars(module).items() if not name.startswith("_") and name != "training"
    )
