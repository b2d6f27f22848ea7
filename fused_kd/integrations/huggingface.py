"""Causal language models of Hugging Face transformers: their split into body and head, their losses, a smaller student.

transformers is imported when the first function needs it.
"""

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from .. import kd_loss, linear_kd_loss, reference
from ..options import KDLossOutput

SAME = 1e-3  # largest relative difference between the logits of body and head and the model's own: that of rounding


class SplitModel(nn.Module):
    """A model as logits = softcap(scale * (hidden weight^T + bias)), where `hidden` are the last hidden states of its body.

    A model whose logits are computed in another way stays whole: `body` returns its logits, and `head` is None.  So does
    one with an adapter on its head: the head's weight does not contain the adapter.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        # PEFT's layers keep the one that they adapt; LoRA changes no logits before its first step.
        self.head: nn.Linear | None = None if hasattr(head, "base_layer") else head
        self.scale, self.softcap = scale_and_softcap(model.config)

    def body(self, tokens: Tensor) -> Tensor:  # [batch, sequence, H]
        if self.head is None:
            return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:  # [batch, sequence, V'], before scale and softcap
        return hidden if self.head is None else self.head(hidden)  # type: ignore[no-any-return]


@torch.no_grad()
def split(model: Any, tokens: Tensor) -> SplitModel:
    """Return the model split into body and head if these give its own logits for the tokens, otherwise whole.

    Args:
        model: a causal language model of transformers.  It is put into eval mode.
        tokens: `[batch, sequence]`, token ids.
    """
    result = SplitModel(model.eval())
    own = model(input_ids=tokens, use_cache=False).logits.float()
    try:
        ours = reference.mapped(result.logits(result.body(tokens)).float(), result.scale, result.softcap)
        same = ours.shape == own.shape and float((ours - own).norm()) <= SAME * float(own.norm())
    except (AttributeError, RuntimeError):
        same = False
    if result.head is None or not same:
        result.head, result.scale, result.softcap = None, 1.0, None
    return result


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """Return the scale and the softcap of the logits, which Cohere, Granite and Gemma name in their configs."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return float(scale), getattr(config, "final_logit_softcapping", None)


# Arguments: student, teacher or None, their hidden states, labels; options of the loss as keywords.
Loss = Callable[..., KDLossOutput]


def linear_loss(
    student: SplitModel, teacher: SplitModel | None, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor,
    **options: Any,
) -> KDLossOutput:  # fmt: skip
    """Return `linear_kd_loss` of hidden states.  The logits of neither model exist as a whole.

    Raises:
        ValueError: a model has no head.
    """
    head, teacher_head = _head("student", student), None if teacher is None else _head("teacher", teacher)
    result: KDLossOutput = linear_kd_loss(
        hidden,
        head.weight,
        teacher_hidden,
        None if teacher_head is None else teacher_head.weight,
        labels,
        student_bias=head.bias,
        teacher_bias=None if teacher_head is None else teacher_head.bias,
        return_parts=True,
        **_maps(student, teacher),
        **options,
    )
    return result


def loss_of_logits(loss: Callable[..., Any]) -> Loss:
    """Return a function of hidden states that computes whole logits by the heads, and then this loss of them."""

    def loss_of_hidden(
        student: SplitModel, teacher: SplitModel | None, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor,
        **options: Any,
    ) -> KDLossOutput:  # fmt: skip
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden)
        options |= {"return_parts": True, **_maps(student, teacher)}
        return loss(student.logits(hidden), teacher_logits, labels, **options)  # type: ignore[no-any-return]

    return loss_of_hidden


LOSSES: dict[str, Loss] = {
    "linear": linear_loss,
    "logits": loss_of_logits(kd_loss),
    "eager": loss_of_logits(reference.kd_loss),
}


def _head(side: str, model: SplitModel) -> nn.Linear:
    if model.head is None:
        raise ValueError(
            f"the {side}'s logits are not an output head of its last hidden states, or an adapter is on that head: "
            "pass the weight that acts to linear_kd_loss, or use kd_loss"
        )
    return model.head


def _maps(student: SplitModel, teacher: SplitModel | None) -> dict[str, Any]:
    other = teacher or student
    return {"logit_scale": (student.scale, other.scale), "logit_softcap": (student.softcap, other.softcap)}


def student_from_layers(
    teacher: Any,
    count: Fraction,  # a number of layers, or below 1 a share of the teacher's
) -> tuple[Any, list[int]]:
    """Return a student with evenly spaced layers of the teacher, and the indices of these layers.

    The student has all other weights of the teacher: embeddings, last norm, head.  It is built from a config and then
    loaded, and not cut out of a copy.  So everything that depends on a layer's index is right: its place in the KV cache,
    its kind of attention.

    Raises:
        ValueError: the teacher has fewer layers, or its list of layers cannot be found.
    """
    from transformers import AutoModelForCausalLM

    total = teacher.config.num_hidden_layers
    kept = spaced_layers(total, max(1, round(total * count)) if count < 1 else int(count))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    if hasattr(config, "quantization_config"):  # it describes the GGUF file; the student's weights are not quantised
        del config.quantization_config
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    prefix = layers_name(teacher) + "."
    place = {str(layer): str(index) for index, layer in enumerate(kept)}
    weights = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            if layer not in place:
                continue
            name = f"{prefix}{place[layer]}.{rest}"
        weights[name] = tensor
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval(), kept


def spaced_layers(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced layers from 0 to total - 1, with the first and the last; only the first for count 1."""
    if count > total:
        raise ValueError(f"the teacher has {total} layers, got {count}")
    if count == 1:
        return [0]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]


def layers_name(model: Any) -> str:
    """Return the name of the list of decoder layers: `model.layers`, `transformer.h`, ..."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return str(name)
    raise ValueError(f"found no list of layers in {type(model).__name__}")
