"""Under torch.compile: kd_loss is one graph and equal to the last bit, linear_kd_loss breaks it and gives the same."""

import functools
import shutil

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, ops
from fused_kd.logit_map import IDENTITY_MAP, LogitMap

from .oracle import relative_error

N, V = 6, 501
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
compile_ = functools.partial(torch.compile, backend=BACKEND)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function, *leaves):
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 3.0, "reduction": "none"},
        {"alpha": 1.0, "reduction": "sum", "vocab_size": 400},
        {"alpha": 0.0, "logit_softcap": 5.0, "logit_scale": (0.5, 1.0)},
        {"num_items": 10, "return_parts": True, "inplace_backward": True},
    ],
)
def test_kd_loss_is_one_graph(options, dynamic):
    teacher, labels = torch.randn(2, N, V), torch.randint(400, (2, N))
    labels[0, 3] = -100

    def loss(hidden):
        result = kd_loss(3 * hidden.tanh(), teacher[:, : hidden.shape[1]], labels[:, : hidden.shape[1]], **options)
        return (result.loss + 0 * result.kl if options.get("return_parts") else result).sum()

    compiled = compile_(loss, fullgraph=True, dynamic=dynamic)
    for rows in (N, N - 2):
        hidden = torch.randn(2, rows, V, requires_grad=True)
        for ours, eager in zip(gradients(compiled, hidden), gradients(loss, hidden), strict=True):
            assert relative_error(ours, eager.double()) < 1e-6  # the compiler's own tanh


def test_kd_loss_is_equal_to_the_last_bit():
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    labels = torch.randint(V, (N,))

    def loss(student):
        return kd_loss(student, teacher, labels, temperature=2.0)

    pairs = zip(gradients(compile_(loss, fullgraph=True), student), gradients(loss, student), strict=True)
    assert all(torch.equal(ours, eager) for ours, eager in pairs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_kd_loss_breaks_the_graph_and_is_right(reduction):
    hidden, weight = torch.randn(N, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    teacher = torch.randn(N, 24), torch.randn(V, 24)
    labels = torch.randint(V, (N,))

    def loss(hidden, weight):
        return linear_kd_loss(2 * hidden.tanh(), weight, *teacher, labels, temperature=2.0, reduction=reduction).sum()

    pairs = zip(gradients(compile_(loss), hidden, weight), gradients(loss, hidden, weight), strict=True)
    assert all(relative_error(ours, eager.double()) < 2e-6 for ours, eager in pairs)


@pytest.mark.parametrize("maps", [(IDENTITY_MAP, IDENTITY_MAP), (LogitMap(0.5, 4.0), LogitMap(2.0))])
def test_operators_pass_opcheck(maps):
    student, teacher = torch.randn(2, 3, 11), torch.randn(1, 6, 9)
    weights, labels = torch.rand(6), torch.randint(9, (6,))
    arguments = teacher, weights, weights, 2.0, True, *map(list, maps)
    torch.library.opcheck(ops.row_statistics, (student[..., :9], *arguments))
    statistics = ops.row_statistics(student[..., :9], *arguments)
    arguments = student, teacher, labels, statistics, weights, weights, 2.0, 9, *map(list, maps)
    torch.library.opcheck(ops.logit_gradient, arguments)
    torch.library.opcheck(ops.logit_gradient_, arguments)
