"""linear_kd_loss beside eager PyTorch and torch.compile of it, forward and backward: time in one run, and peak memory.

    pytest benchmarks/test_linear_kd_loss.py --benchmark-columns=min,median,stddev

The eager peer is the formula as training code writes it: two heads, `F.cross_entropy`, `F.kl_div`; each peer is first
checked to give the same loss.  On a CPU the memory tests take about a minute each; deselect them with `-k time`.
"""

import pytest
import torch
import torch.nn.functional as F
from test_kd_loss import eager as eager_of_logits

from fused_kd import linear_kd_loss
from fused_kd.cli.memory import peak_bytes

ALPHA, T = 0.5, 2.0


def eager(hidden, weight, teacher_hidden, teacher_weight, labels, *, alpha, temperature):
    with torch.no_grad():
        teacher_logits = F.linear(teacher_hidden, teacher_weight)
    return eager_of_logits(F.linear(hidden, weight), teacher_logits, labels, alpha=alpha, temperature=temperature)


PEERS = {"fused": linear_kd_loss, "eager": eager, "compiled": torch.compile(eager)}


def given(rows, vocabulary, student_width, teacher_width, dtype):
    torch.manual_seed(0)
    heads = []
    for width in (student_width, teacher_width):
        heads += [torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).mul_(3 / width**0.5).to(dtype)]
    return [*heads, torch.randint(vocabulary, (rows,))]


def step_of(loss, arguments):
    hidden, weight, *_ = arguments

    def step():
        hidden.grad = weight.grad = None
        value = loss(*arguments, alpha=ALPHA, temperature=T)
        value.backward()
        return value.detach()

    return step


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1024, 49_152, 576), (512, 262_144, 640)])
def test_time_with_a_trained_head(benchmark, peer, rows, vocabulary, width):
    arguments = given(rows, vocabulary, width, width, torch.float32)
    for tensor in arguments[:2]:
        tensor.requires_grad_()
    step = step_of(PEERS[peer], arguments)
    with torch.no_grad():
        expected = eager(*arguments, alpha=ALPHA, temperature=T)
    torch.testing.assert_close(step(), expected)
    benchmark.group = f"N = {rows}, V = {vocabulary}, H = {width}, float32, trained head"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("trained", "bound"), [(True, 1.1e9), (False, 0.3e9)])
def test_memory(trained, bound):
    """Beyond inputs and gradients, N = 2 048, V = 262 144, H = 640 under a teacher of 1 152, bfloat16."""
    arguments = given(2048, 262_144, 640, 1152, torch.bfloat16)
    arguments[0].requires_grad_()
    arguments[1].requires_grad_(trained)
    peak = peak_bytes(step_of(linear_kd_loss, arguments), torch.device("cpu"))
    beyond = peak - sum(tensor.grad.nbytes for tensor in arguments[:2] if tensor.grad is not None)
    print(f"{'trained' if trained else 'frozen'} head: {beyond / 1e6:.0f} MB beyond inputs and gradients")
    assert beyond <= bound
