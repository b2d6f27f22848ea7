"""A causal language model in two parts, body and head, and the losses that take it so."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import kd_loss, linear_kd_loss, reference
from ...options import KDLossOutput
from ..errors import UserError

SAME = 1e-3  # relative: body and head give the model's own logits, but for rounding


class SplitModel(nn.Module):
    """logits = softcap(scale * (hidden weight^T + bias)) of the body's last hidden states.

    A model whose logits are made otherwise stays whole: its "hidden states" are its logits, and it has no head.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head: nn.Linear | None = model.get_output_embeddings()
        self.scale, self.softcap = scale_and_softcap(model.config)

    def body(self, tokens: Tensor) -> Tensor:  # [batch, sequence, H]
        if self.head is None:
            return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:  # [batch, sequence, V'], before scale and softcap
        return hidden if self.head is None else self.head(hidden)  # type: ignore[no-any-return]


@torch.no_grad()
def split(
    model: Any,
    tokens: Tensor,  # [batch, sequence], to look at whether body and head give the model's own logits
) -> SplitModel:
    result = SplitModel(model.eval())
    own = model(input_ids=tokens, use_cache=False).logits.float()
    try:
        ours = reference.mapped(result.logits(result.body(tokens)).float(), result.scale, result.softcap)
        same = ours.shape == own.shape and float((ours - own).norm()) <= SAME * float(own.norm())
    except (AttributeError, RuntimeError):
        same = False
    if not same:
        result.head, result.scale, result.softcap = None, 1.0, None
    return result


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """What the model does to its head's output, by the names that Cohere, Granite and Gemma give it."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return float(scale), getattr(config, "final_logit_softcapping", None)


# (student, teacher or None, their hidden states, labels, options of the loss)
Loss = Callable[..., KDLossOutput]


def linear_loss(
    student: SplitModel, teacher: SplitModel | None, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor,
    **options: Any,
) -> KDLossOutput:  # fmt: skip
    """`fused_kd.linear_kd_loss`: neither model's logits exist as a whole."""
    assert student.head is not None
    teacher_head = None if teacher is None else teacher.head
    return linear_kd_loss(  # type: ignore[return-value]
        hidden,
        student.head.weight,
        teacher_hidden,
        None if teacher_head is None else teacher_head.weight,
        labels,
        student_bias=student.head.bias,
        teacher_bias=None if teacher_head is None else teacher_head.bias,
        **_maps(student, teacher),
        **options,
    )


def loss_of_logits(loss: Callable[..., Any]) -> Loss:
    """`fused_kd.kd_loss`, or the reference, of the logits that the heads give."""

    def of_hidden(
        student: SplitModel, teacher: SplitModel | None, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor,
        **options: Any,
    ) -> KDLossOutput:  # fmt: skip
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden)
        return loss(student.logits(hidden), teacher_logits, labels, **_maps(student, teacher), **options)  # type: ignore[no-any-return]

    return of_hidden


def _maps(student: SplitModel, teacher: SplitModel | None) -> dict[str, Any]:
    of = teacher or student
    return {"logit_scale": (student.scale, of.scale), "logit_softcap": (student.softcap, of.softcap)}


LOSSES: dict[str, Loss] = {
    "linear": linear_loss,
    "logits": loss_of_logits(kd_loss),
    "eager": loss_of_logits(reference.kd_loss),
}


def check_split(student: SplitModel, teacher: SplitModel) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if model.head is None:
            raise UserError(
                f"--loss linear: the {name}'s logits are not an output head of its last hidden states; use --loss logits"
            )
