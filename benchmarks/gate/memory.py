"""Live bytes of a training step on CPU tensors, at their peak, beyond inputs and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.testing.memory import peak_bytes
from fused_kd.testing.words import dtype_name

from .figures import Figures, one_thread

LOGITS = 256, 32_768  # N, V
HEADS = 256, 16_384, 256, 512  # N, V, H_s, H_t
CHUNK = 64  # rows
CPU = torch.device("cpu")


@one_thread()
def live_bytes() -> Figures:
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = dtype_name(dtype)
        for inplace in (False, True):
            figures[f"kd_loss, {name}" + ", inplace_backward" * inplace] = _beyond(
                *_from_logits(dtype, inplace), inplace
            )
        for trained in (True, False):
            head = "trained" if trained else "frozen"
            figures[f"linear_kd_loss, {name}, {head} head"] = _beyond(*_from_hidden_states(dtype, trained))
        figures[f"linear_kd_loss, {name}, lean"] = _beyond(*_from_hidden_states(dtype, True, memory="lean"))
    return {"live bytes": figures}


def _beyond(loss: Callable[[], Tensor], leaves: Sequence[Tensor], inplace: bool = False) -> int:
    """Return the peak beyond gradients; an in-place gradient has no memory of its own to be subtracted."""
    gradients: list[Tensor] = []
    peak = peak_bytes(lambda: gradients.extend(torch.autograd.grad(loss(), leaves)), CPU)
    return peak - (0 if inplace else sum(gradient.nbytes for gradient in gradients))


def _from_logits(dtype: torch.dtype, inplace: bool) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
    student = torch.randn(LOGITS, dtype=dtype, requires_grad=True).clone()
    teacher, labels = torch.randn(LOGITS, dtype=dtype), torch.randint(LOGITS[1], LOGITS[:1])
    return lambda: kd_loss(student, teacher, labels, temperature=2.0, inplace_backward=inplace), [student]


def _from_hidden_states(
    dtype: torch.dtype, trained: bool, **options: Any
) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
    N, V, H_s, H_t = HEADS
    heads = [torch.randn(shape, dtype=dtype) for shape in ((N, H_s), (V, H_s), (N, H_t), (V, H_t))]
    leaves = [tensor.requires_grad_() for tensor in heads[: 1 + trained]]
    options |= {"temperature": 2.0, "workspace_bytes": CHUNK * 2 * V * dtype.itemsize}
    return lambda: linear_kd_loss(*heads, torch.arange(N), **options), leaves
