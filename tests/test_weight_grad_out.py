"""weight_grad_out: the weight's gradient is added to a sum of the caller's, such as Megatron's main_grad."""

import dataclasses

import pytest
import torch

from fused_kd import LinearKDLoss, linear_kd_loss, reference
from fused_kd.heads import operator
from fused_kd.testing.memory import allocations

from .heads import CHUNKED, H_S, Given, N, V, make, run
from .oracle import relative_error
from .unread import unread

pytestmark = pytest.mark.usefixtures("one_thread")


def sum_for(given, start=1.0):
    dtype = torch.float64 if given.weight.dtype == torch.float64 else torch.float32
    return torch.full(given.weight.shape, start, dtype=dtype, device=given.weight.device)


def added(loss, given, **options):
    """The results with the weight's gradient taken from the sum, which began at ones."""
    out = sum_for(given)
    found = run(loss, given, weight_grad_out=out, **options)
    assert given.weight.grad is None
    return {**found, "weight": (out.double() - 1).reshape(out.shape)}


# An element of a sum that began at 1 has an error of half a float32 epsilon of 1.
ROUNDED = 2.0**-24 * (V * H_S) ** 0.5


def assert_close(found, oracle, bound):
    assert found.keys() == oracle.keys()
    for name, exact in oracle.items():
        room = 4 * ROUNDED / float(exact.norm()) if name == "weight" else 0.0
        assert relative_error(found[name], exact) < bound + room, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunked", [None, CHUNKED])
def test_the_gradient_is_added_to_what_is_there(device, dtype, reduction, chunked):
    given = make(device, dtype)
    options = {"reduction": reduction, "temperature": 2.0}
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), **options)
    found = added(linear_kd_loss, given, workspace_bytes=chunked, **options)
    assert_close(found, oracle, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_adds_it_too(dtype, reduction):
    given = make("cpu", dtype)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), reduction=reduction)
    assert_close(added(reference.linear_kd_loss, given, reduction=reduction), oracle, 2e-2)
    if dtype == torch.float64:
        assert_close(added(linear_kd_loss, given, reduction=reduction), oracle, 1e-12)


def test_two_micro_batches_add_up():
    given, other = make("cpu", torch.bfloat16), make("cpu", torch.bfloat16)
    other = other._replace(weight=given.weight)
    out = sum_for(given, 0.0)
    exact = torch.zeros(V, H_S, dtype=torch.float64)
    for batch in (given, other):
        run(linear_kd_loss, batch, weight_grad_out=out, num_items=2 * N)
        exact += run(reference.linear_kd_loss, batch.to(torch.float64), num_items=2 * N)["weight"]
    assert relative_error(out, exact) < 3e-3


@pytest.mark.parametrize("chunked", [None, CHUNKED])
def test_padding_is_left_as_it_was(device, chunked):
    given = make(device)
    given.labels.remainder_(1000)
    out = sum_for(given, 7.0)
    run(linear_kd_loss, given, vocab_size=1000, weight_grad_out=out, workspace_bytes=chunked)
    assert bool((out[1000:] == 7).all())
    assert bool((out[:1000] != 7).any(1).all())


@pytest.mark.parametrize("rows", [5, 10, N])
def test_several_groups(monkeypatch, rows):
    """Each group adds its product to the sum."""
    given, planned = make("cpu", torch.bfloat16), operator.planned
    oracle = run(reference.linear_kd_loss, given.to(torch.float64))

    def in_groups(*arguments):
        return dataclasses.replace(planned(*arguments), chunk_rows=5, gradient_rows=rows, chunks=3)

    monkeypatch.setattr(operator, "planned", in_groups)
    assert_close(added(linear_kd_loss, given), oracle, 4e-3)


# --- the upstream gradient


@pytest.mark.parametrize("shape", [None, (), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_the_upstream_gradient(device, shape, dtype):
    given = make(device, dtype)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), upstream=1024.5)
    scale = 1024.5 if shape is None else torch.full(shape, 1024.5, device=device)
    found = added(linear_kd_loss, given, upstream=1024.5, weight_grad_scale=scale)
    assert_close(found, oracle, 1e-6 if dtype == torch.float32 else 4e-3)
    for loss in (linear_kd_loss, reference.linear_kd_loss):  # the value is that of the loss
        assert relative_error(loss(*given[:5], student_bias=given.bias).detach(), oracle["value"]) < 4e-3


def test_another_upstream_gradient_is_refused_on_a_cpu():
    given, out = make("cpu"), torch.zeros(V, H_S)
    for scale, upstream in ((1.0, 2.0), (2.0, 1.0), (torch.tensor(8.0), 1.0), (1.0, 0.0)):
        loss = linear_kd_loss(*given[:5], weight_grad_out=out, weight_grad_scale=scale)
        expected = rf"weight_grad_scale: expected the upstream gradient of the loss, {upstream:g}, got {float(scale):g}"
        with pytest.raises(RuntimeError, match=expected):
            loss.backward(torch.tensor(upstream))
        assert given.hidden.grad is None
    third = torch.tensor(1 / 3)
    linear_kd_loss(*given[:5], weight_grad_out=out, weight_grad_scale=1 / 3).backward(third)  # a float's and a double's


def test_another_upstream_gradient_gives_nan_where_it_is_not_looked_at():
    given, out = make("cpu"), torch.zeros(V, H_S)
    for upstream, is_nan in ((2.0, True), (1.0, False)):
        loss = linear_kd_loss(*given[:5], student_bias=given.bias, weight_grad_out=out)
        found = torch.autograd.grad(loss, (given.hidden, given.bias), unread(torch.tensor(upstream)))
        assert all(bool(gradient.isnan().all()) == is_nan for gradient in found)


def test_every_other_gradient_has_the_upstream_gradient_once():
    """Also those of token weights and of the teacher."""
    found = []
    for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
        torch.manual_seed(1)
        given = make("cpu").to(dtype)
        given = given._replace(teacher_hidden=given.teacher_hidden.requires_grad_())
        weights = torch.linspace(0.5, 1, N, dtype=torch.float64, requires_grad=True)
        options = {"weight_grad_out": sum_for(given), "weight_grad_scale": 3.0, "upstream": 3.0, "teacher_grad": True}
        result = run(loss, given, token_weights=weights, **options)
        found.append([result["hidden"], result["bias"], given.teacher_hidden.grad, weights.grad])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-6


# --- when nothing is added


def test_nothing_is_added_without_gradients():
    given, out = make("cpu"), torch.ones(V, H_S)
    with torch.no_grad():
        linear_kd_loss(*given[:5], weight_grad_out=out)
    with torch.inference_mode():
        linear_kd_loss(*given[:5], weight_grad_out=out)
    linear_kd_loss(*given[:5], reduction="none", weight_grad_out=out)  # added in backward
    given.labels.fill_(-100)
    linear_kd_loss(*given[:5], weight_grad_out=out).backward()
    assert bool((out == 1).all())


def test_a_frozen_weight_and_a_second_backward_pass():
    """The sum is the caller's wish, whatever requires grad; forward has added to it, once."""
    given = make("cpu")
    exact = run(reference.linear_kd_loss, given.to(torch.float64), biased=False)["weight"]
    given.weight.requires_grad_(False)
    out = torch.zeros(V, H_S)
    loss = linear_kd_loss(*given[:5], weight_grad_out=out)
    assert relative_error(out, exact) < 1e-6
    first = torch.autograd.grad(loss, given.hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, given.hidden)[0])
    assert relative_error(out, exact) < 1e-6


def test_a_module_passes_it_on():
    given, out = make("cpu"), torch.zeros(V, H_S)
    LinearKDLoss()(*given[:5], weight_grad_out=out, weight_grad_scale=2.0).backward(torch.tensor(2.0))
    exact = run(reference.linear_kd_loss, given.to(torch.float64), biased=False, upstream=2.0)["weight"]
    assert relative_error(out, exact) < 1e-6


def test_under_autocast():
    given, out = make("cpu"), torch.zeros(V, H_S)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kd_loss(*given[:5], weight_grad_out=out)
    loss.backward()
    assert given.weight.grad is None
    exact = run(reference.linear_kd_loss, given.to(torch.float64), biased=False)["weight"]
    assert relative_error(out, exact) < 1e-2


# --- memory


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_no_second_array_of_the_weights_size(chunk, dtype):
    H, vocabulary = 512, 1500
    given = Given(
        torch.randn(64, H), torch.randn(vocabulary, H) / H**0.5, torch.randn(64, H), torch.randn(vocabulary, H) / H**0.5,
        torch.randint(vocabulary, (64,)), torch.zeros(vocabulary),
    ).to(dtype)  # fmt: skip
    out = sum_for(given)
    largest = {}
    for name, options in (("ours", {}), ("given", {"weight_grad_out": out})):

        def step(options=options):
            given.weight.grad = given.hidden.grad = None
            linear_kd_loss(*given[:5], workspace_bytes=chunk * 10 * 1536, **options).backward()

        largest[name] = max(allocations(step))
    smallest = vocabulary * H * 2  # bytes of a bfloat16 array; a chunk's logits take fewer
    assert largest["ours"] >= smallest > 1.2 * largest["given"]
