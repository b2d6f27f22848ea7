"""Time and memory of kd_loss beside eager PyTorch and torch.compile of it, forward and backward, in one run.

    pytest benchmarks/test_kd_loss.py --benchmark-columns=min,median,stddev

The eager peer is the formula as training code writes it, with `F.cross_entropy` and `F.kl_div`; each peer is first checked
to give the same loss.  `extra_info` has the peak of allocated bytes beyond inputs and gradient (CPU).
"""

import pytest
import torch
import torch.nn.functional as F

from fused_kd import kd_loss
from fused_kd.cli.memory import peak_bytes

N, V, ALPHA = 256, 128_256, 0.5


def eager(student, teacher, labels, *, alpha, temperature):
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=-1)
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(student.float(), labels) + alpha * temperature**2 * kl


PEERS = {"fused": kd_loss, "eager": eager, "compiled": torch.compile(eager)}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_forward_and_backward(benchmark, peer, temperature):
    torch.manual_seed(0)
    student = (3 * torch.randn(N, V)).requires_grad_()
    teacher, labels = 3 * torch.randn(N, V), torch.randint(V, (N,))

    def step():
        student.grad = None
        loss = PEERS[peer](student, teacher, labels, alpha=ALPHA, temperature=temperature)
        loss.backward()
        return loss

    torch.testing.assert_close(step(), eager(student, teacher, labels, alpha=ALPHA, temperature=temperature))
    student.grad = None
    benchmark.group = f"N = {N}, V = {V}, float32, T = {temperature}"
    beyond = peak_bytes(step, student.device) - student.numel() * student.element_size()
    benchmark.extra_info["peak MB beyond inputs and gradient"] = round(beyond / 1e6, 1)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    if peer == "fused":
        assert beyond <= 32e6
