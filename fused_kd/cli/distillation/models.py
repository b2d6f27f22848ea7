"""Teacher and student: load them, check that they go together, save the student."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...integrations.huggingface import student_from_layers
from ..errors import UserError
from ..hub import cached_if_out_of_reach
from ..outputs import written_beside
from ..sources import locate

FROM_TEACHER = "from-teacher"


def load_model(source: str, dtype: torch.dtype) -> Any:
    """Load the model of a hub name, a folder or a GGUF file (dequantised), on the CPU, for evaluation."""
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
    """Return the student before training, in float32, and the teacher's layers that it has if it is made from them."""
    if source != FROM_TEACHER:
        return load_model(source, torch.float32), None
    try:
        return student_from_layers(teacher, layers)
    except ValueError as error:
        raise UserError(f"--student-layers: {error} (or name a student by --student)") from error


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer for from_pretrained, in place of what the folder held."""
    try:
        with written_beside(folder) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    except SafetensorError as error:
        raise UserError(f"cannot write {folder}: {_reason(error)}") from error


def vocabulary(teacher: Any, student: Any, tokenizer: Any, vocab_size: int | None) -> int:
    """Return V, the number of leading columns of the logits that are real."""
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
    """Return the number of logits that the model gives per token, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def check_length(name: str, model: Any, sequence: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence > longest:
        raise UserError(f"--sequence-length: the {name} reads at most {longest} tokens, got {sequence}")


def check_same_tokens(teacher_tokenizer: Any, source: str) -> None:
    """Refuse a student whose own tokenizer means other tokens by the same ids."""
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


def _reason(error: Exception) -> str:
    """Return the first line of the message, with the error's kind if it is not one for users."""
    line = str(error).strip().partition("\n")[0]
    return line if line and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
