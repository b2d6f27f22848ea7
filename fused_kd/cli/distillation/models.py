"""Teacher and student: loading a causal language model, and making a student of some of the teacher's layers."""

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import UserError
from ..hub import cached_if_out_of_reach
from ..outputs import written_beside
from ..sources import locate

FROM_TEACHER = "from-teacher"


def load_model(source: str, dtype: torch.dtype) -> Any:
    """The model of a hub name, a folder or a GGUF file (dequantised), on the CPU, for evaluation."""
    folder, options = locate(source)
    try:
        with cached_if_out_of_reach(folder):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise UserError(f"cannot load a causal language model from {source}: {_reason(error)}") from error


def load_tokenizer(source: str) -> Any:
    folder, options = locate(source)
    try:
        with cached_if_out_of_reach(folder):
            return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise UserError(f"cannot load a tokenizer from {source}: {_reason(error)}") from error


def make_student(source: str, teacher: Any, layers: Fraction) -> tuple[Any, list[int] | None]:
    """The student before training, with weights in float32, and which of the teacher's layers it has, if of any."""
    if source == FROM_TEACHER:
        return student_from_layers(teacher, layers)
    return load_model(source, torch.float32), None


def student_from_layers(
    teacher: Any,
    count: Fraction,  # a number of layers, or below 1 a share of the teacher's
) -> tuple[Any, list[int]]:
    """A model of the teacher's architecture with evenly spaced layers of it, and which ones.

    Everything but the layers (embeddings, last norm, head) is the teacher's whole.  The student is built anew and given
    weights, rather than cut out of a copy, so that what depends on a layer's index (its place in the KV cache, its kind
    of attention) is right.
    """
    total = teacher.config.num_hidden_layers
    kept = spaced_layers(total, max(1, round(total * count)) if count < 1 else int(count))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    if hasattr(config, "quantization_config"):  # of the GGUF file; the student's weights are not quantised
        del config.quantization_config
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    prefix = _layers_name(teacher) + "."
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


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer for from_pretrained; they take the place of what the folder held."""
    try:
        with written_beside(folder) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    except SafetensorError as error:
        raise UserError(f"cannot write {folder}: {_reason(error)}") from error


def spaced_layers(total: int, count: int) -> list[int]:
    """`count` of the layers 0 to total - 1, evenly spaced, the first and the last among them."""
    if count > total:
        raise UserError(f"--student-layers: the teacher has {total} layers, got {count}")
    if count == 1:
        return [0]
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]


def vocabulary(teacher: Any, student: Any, tokenizer: Any, vocab_size: int | None) -> int:
    """How many leading columns of the logits are real, V."""
    sizes = [width(model) for model in (teacher, student)]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise UserError(
            f"the teacher has a vocabulary of {sizes[0]}, the student one of {sizes[1]}; if both pad the same "
            f"{len(tokenizer)} tokens, pass --vocab-size {len(tokenizer)}"
        )
    if vocab_size is not None and vocab_size > min(sizes):
        raise UserError(f"--vocab-size: the models have vocabularies of {sizes[0]} and {sizes[1]}, got {vocab_size}")
    return sizes[0] if vocab_size is None else vocab_size


def width(model: Any) -> int:
    """How many logits the model gives a token, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def check_length(name: str, model: Any, sequence: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise UserError(f"--sequence-length: the {name} reads at most {longest} tokens, got {sequence}")


def check_same_tokens(teacher_tokenizer: Any, source: str) -> None:
    """The student, if it brings a tokenizer, must mean the same tokens by the same ids."""
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        if any(Path(source).glob("tokenizer*")):
            raise
        return  # a folder without one: the teacher's serves both
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        different = len(ours.items() ^ theirs.items())
        raise UserError(
            f"teacher and student need one vocabulary, token by token: their tokenizers differ in {different} entries"
        )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _layers_name(model: Any) -> str:
    """The name of the list of decoder layers: `model.layers`, `transformer.h`, ..."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return str(name)
    raise UserError(f"found no list of layers in {type(model).__name__}; name a student by --student")


def _reason(error: Exception) -> str:
    """The first line of what it says, with its kind where it does not speak to users."""
    line = str(error).strip().partition("\n")[0]
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
