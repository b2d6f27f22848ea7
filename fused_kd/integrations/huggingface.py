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
from ..options import KDLossOutput, Lora

SAME = 1e-3  # largest relative difference between the logits of body and head and the model's own: that of rounding


class SplitModel(nn.Module):
    """A model as logits = softcap(scale * (hidden weight^T + bias)), where `hidden` are the last hidden states of its body.

    The head may have an adapter, or be quantised.  A model whose logits are computed in another way stays whole: `body`
    returns its logits, and `head` is None.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head: nn.Module | None = model.get_output_embeddings()
        self.scale, self.softcap = scale_and_softcap(model.config)

    def body(self, tokens: Tensor) -> Tensor:  # [batch, sequence, H]
        if self.head is None:
            return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
        # PEFT's `base_model` is no body, but what puts the adapters into the whole model.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

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
        ValueError: a model has no head, or the student's is none that `student_arguments` knows.
    """
    heads = student_arguments(_head("student", student))
    heads |= {"teacher_weight": None} if teacher is None else teacher_arguments(_head("teacher", teacher))
    options |= {"return_parts": True, **_maps(student, teacher)}
    result: KDLossOutput = linear_kd_loss(
        student_hidden=hidden, teacher_hidden=teacher_hidden, labels=labels, **heads, **options
    )
    return result


def student_arguments(head: nn.Module) -> dict[str, Any]:
    """Return the arguments of `linear_kd_loss` that stand for a student's output head, adapter included.

    Args:
        head: `nn.Linear`; one with a LoRA adapter of PEFT, or in PEFT's `modules_to_save`; or any module of which nothing
            is trained.

    Raises:
        ValueError: something is trained in another module than these, or the adapter is not a single plain LoRA: it has
            dropout in training mode, a bias, DoRA or another variant.
    """
    own = _copy_in_use(head)
    if _is_linear(own):
        return {"student_weight": own.weight, "student_bias": own.bias}
    if isinstance(getattr(own, "lora_A", None), nn.ModuleDict) and _is_linear(own.base_layer):
        lora = _lora(own)
        return {"student_weight": own.base_layer.weight, "student_bias": own.base_layer.bias, "student_lora": lora}
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            f"the student's head: expected nn.Linear, alone or with a LoRA adapter, where something is trained, got "
            f"{type(own).__module__}.{type(own).__qualname__}; freeze it, or take the loss of its logits"
        )
    return {"student_weight": None, "student_head": head}


def teacher_arguments(head: nn.Module) -> dict[str, Any]:
    """Return the arguments of `linear_kd_loss` that stand for a teacher's output head, which may be any module."""
    own = _copy_in_use(head)
    if _is_linear(own):
        return {"teacher_weight": own.weight, "teacher_bias": own.bias}
    return {"teacher_weight": None, "teacher_head": head}


def _copy_in_use(head: Any) -> Any:
    """Return the module itself, or of PEFT's `modules_to_save` the copy of the active adapter."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = [] if head.disable_adapters else _active(head, copies)
    return copies[active[0]] if active else head.original_module


def _is_linear(module: Any) -> bool:
    """Return whether its weight and bias say all: no quantised layer, which keeps something else as its weight."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module.weight.is_floating_point()
    )


def _active(layer: Any, adapters: nn.ModuleDict) -> list[str]:
    names = layer.active_adapter
    return [name for name in ([names] if isinstance(names, str) else names) if name in adapters]


def _lora(layer: Any) -> Lora | None:
    """Return A, B and scale of a layer of PEFT, None if it adds nothing to its base layer."""
    if layer.merged and not layer.disable_adapters:
        return None
    names = [] if layer.disable_adapters else _active(layer, layer.lora_A)
    wrong = "a merged adapter that is disabled; unmerge it" if layer.merged else None
    if len(names) > 1:
        wrong = f"several active ones, {', '.join(names)}; activate one, or merge the others"
    for name in names:
        dropout = layer.lora_dropout[name]
        if name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name):
            wrong = "DoRA or another variant"
        elif layer.lora_B[name].bias is not None:
            wrong = "a bias (lora_bias=True)"
        elif dropout.training and getattr(dropout, "p", 0) > 0:
            wrong = f"dropout of {dropout.p} in training mode; take lora_dropout=0 for the head"
    if wrong is not None:
        raise ValueError(f"the student's head: expected a single plain LoRA adapter, got {wrong}")
    if not names:
        return None
    (name,) = names
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


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


def _head(side: str, model: SplitModel) -> nn.Module:
    if model.head is None:
        raise ValueError(f"the {side}'s logits are not an output head of its last hidden states: use kd_loss")
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
