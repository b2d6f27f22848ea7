"""Times of a training step on the CPU, float32, over those of eager PyTorch, measured by turns in one process.

A step runs on one thread, and its processor time counts, not the clock's.  `kd_loss` meets at hundreds of barriers per
step.  With two threads on busy cores it took seven times as long as eager PyTorch, instead of a fifth.
"""

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.testing.peers import eager
from fused_kd.testing.problems import ALPHA

from .figures import Figures, one_thread

# Logits of more than 32 MB: below, an allocator (glibc's) may or may not give eager PyTorch the pages it had before, which
# makes a factor of two.
LOGITS = 128, 128_256  # N, V
HEADS = 192, 49_152, 576  # N, V, H
T = 2.0


def eager_from_heads(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    return eager(F.linear(hidden, weight), F.linear(teacher, teacher_weight), labels, T)


@one_thread()
def ratios() -> Figures:
    N, V = LOGITS
    logits = 3 * torch.randn(N, V), 3 * torch.randn(N, V), torch.randint(V, (N,))
    of_logits = _ratio(kd_loss, functools.partial(eager, temperature=T), logits, gradients=1, rounds=6)
    N, V, H = HEADS
    weights = (torch.randn(V, H).mul_(3 / H**0.5) for _ in range(2))
    heads = torch.randn(N, H), next(weights), torch.randn(N, H), next(weights), torch.randint(V, (N,))
    of_heads = _ratio(linear_kd_loss, eager_from_heads, heads, gradients=2, rounds=4)
    return {
        "time from logits, fused / eager": {"kd_loss": of_logits},
        "time, fused / eager": {"linear_kd_loss, trained head": of_heads},
    }


def _ratio(
    fused: Callable[..., Tensor], eager: Callable[..., Tensor], tensors: Sequence[Tensor], gradients: int, rounds: int
) -> float:
    """Return the ratio of the minima, which other work on the machine disturbs least."""
    leaves = [tensor.requires_grad_() for tensor in tensors[:gradients]]

    def fused_step() -> Tensor:
        return fused(*tensors, alpha=ALPHA, temperature=T)

    def seconds(loss: Callable[[], Tensor]) -> float:
        start = time.thread_time()
        torch.autograd.grad(loss(), leaves)
        return time.thread_time() - start

    torch.testing.assert_close(fused_step(), eager(*tensors))
    pairs = [(seconds(fused_step), seconds(lambda: eager(*tensors))) for _ in range(rounds)]
    ours, theirs = map(min, zip(*pairs, strict=True))
    return ours / theirs
