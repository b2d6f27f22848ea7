"""The drawings are those that docs/drawings.py draws, and what they say of eager PyTorch is counted."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_kd.testing.peers import eager

from .pages import DOCS

specification = importlib.util.spec_from_file_location("drawings", DOCS / "drawings.py")
assert specification is not None
assert specification.loader is not None
drawings = importlib.util.module_from_spec(specification)
specification.loader.exec_module(drawings)

N, V = 4, 500


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawing_is_what_is_drawn(name: str):
    assert (drawings.FOLDER / name).read_text() == drawings.DRAWINGS[name](), "run `python docs/drawings.py`"


def test_every_drawing_is_on_a_page():
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert [file.name for file in drawings.FOLDER.iterdir() if f"(drawings/{file.name})" not in pages] == []
    assert {file.name for file in drawings.FOLDER.iterdir()} == set(drawings.DRAWINGS)


class Passes(TorchDispatchMode):
    """Counts the bytes that operators read and write, in passes over a bfloat16 [N, V] array."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [tensor for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, torch.Tensor)]
            # An expanded scalar has the shape of an array, and the bytes of a scalar.
            sizes = [tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel() == N * V]
            self.count += sum(size for size in sizes if size >= 2 * N * V) / (2 * N * V)
        return result


def test_passes_of_eager_pytorch_are_counted():
    student, teacher = (torch.randn(N, V, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    with Passes() as passes:
        eager(student, teacher, torch.randint(V, (N,)), 2.0).backward()
    assert passes.count == drawings.EAGER_PASSES
