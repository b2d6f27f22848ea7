"""The losses as modules: the same functions, options and defaults."""

from torch import Tensor, nn

from .functional import kd_loss
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
        inplace_backward: bool = False,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.vocab_size = vocab_size
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
            inplace_backward=self.inplace_backward,
            return_parts=self.return_parts,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, vocab_size={self.vocab_size}, inplace_backward={self.inplace_backward}, "
            f"return_parts={self.return_parts}"
        )
