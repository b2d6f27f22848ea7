"""Learned token weights and alpha at the ends of their ranges: their gradients are those of the plain formula."""

import pytest
import torch
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss, reference

from .oracle import relative_error

N, V, H = 6, 1237, 16
WEIGHTS = {
    "some are 0": [0.0, 1.5, 0.0, 0.5, 1.0, -0.0],
    "all are 0": [0.0] * N,
}
LOSSES = {"logits": (kd_loss, reference.kd_loss), "hidden states": (linear_kd_loss, reference.linear_kd_loss)}


def make(kind, device, dtype=torch.float32, rows=N) -> tuple[list[Tensor], Tensor]:
    """Arguments up to the labels, and the labels, of which the last but one is ignored."""
    if kind == "logits":
        given = [3 * torch.randn(rows, V) for _ in range(2)]
    else:
        given = [scale * torch.randn(size, H) for scale, size in ((1.0, rows), (0.7, V)) * 2]
    labels = torch.randint(V, (rows,), device=device)
    if rows > 1:
        labels[-2] = -100
    return [tensor.to(dtype).to(device) for tensor in given], labels


def plain(row_losses: Tensor, weights: Tensor, counted: Tensor, reduction: str, num_items: float | None) -> Tensor:
    """The reduction by its formula; the mean of no weight at all is 0."""
    weights = weights.where(counted, 0.0)
    total = weights.sum() if num_items is None else num_items
    if reduction == "mean" and total == 0:
        return 0 * (weights * row_losses).sum()
    weighted = weights * row_losses
    return weighted if reduction == "none" else weighted.sum() / (total if reduction == "mean" else 1)


def is_close(found: Tensor, exact: Tensor, bound: float = 2e-6) -> bool:
    return bool(relative_error(found, exact) < bound) if exact.any() else not found.any()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    ramp = torch.arange(1, loss.numel() + 1, dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return list(torch.autograd.grad(loss, leaves, ramp))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("reduction", "num_items"),
    [("mean", None), ("mean", 3), ("mean", torch.tensor(7.0)), ("sum", None), ("none", None)],
)
def test_the_gradient_of_a_weight_that_is_0(device, kind, weights, reduction, num_items):
    ours, oracle = LOSSES[kind]
    num_items = num_items.to(device) if isinstance(num_items, Tensor) else num_items
    given, labels = make(kind, device)
    given[0].requires_grad_()
    learned = torch.tensor(WEIGHTS[weights], device=device, requires_grad=True)
    options = {"alpha": 0.3, "temperature": 2.0}

    exact, exact_weights = (tensor.detach().double().requires_grad_() for tensor in (given[0], learned))
    row_losses = oracle(exact, *(t.double() for t in given[1:]), labels, **options, reduction="none")
    expected = plain(row_losses, exact_weights, labels != -100, reduction, num_items)

    expected_gradients = gradients(expected, exact, exact_weights)
    options |= {"reduction": reduction, "token_weights": learned, "num_items": num_items}
    for function in (ours, oracle):
        loss = function(*given, labels, **options)
        found = gradients(loss, given[0], learned)
        assert all(map(is_close, (loss, *found), (expected, *expected_gradients)))
        assert not found[0][learned == 0].any()
        with torch.no_grad():  # to the last bit what it is where nothing is learned; a head then projects fewer rows
            rtol = 0 if kind == "logits" else 1e-6
            torch.testing.assert_close(loss.detach(), function(*given, labels, **options), rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_of_weight_0_are_not_read_where_nothing_is_learned(device, kind):
    loss, _ = LOSSES[kind]
    given, labels = make(kind, device)
    given[0].requires_grad_()
    weights = torch.tensor(WEIGHTS["some are 0"], device=device)
    spoiled = [tensor.detach().clone() for tensor in given]
    for tensor in (spoiled[0], spoiled[1 if kind == "logits" else 2]):
        tensor[weights == 0] = torch.nan
    spoiled[0].requires_grad_()
    clean, dirty = (loss(*tensors, labels, token_weights=weights, temperature=2.0) for tensors in (given, spoiled))
    torch.testing.assert_close(clean, dirty, rtol=1e-6, atol=0)
    for a, b in zip(gradients(clean, given[0]), gradients(dirty, spoiled[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    with torch.no_grad():  # nothing is learned here either
        assert loss(*spoiled, labels, token_weights=weights.requires_grad_(), temperature=2.0).isfinite()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_row_of_learned_weight_0_spoils_no_other(device, kind, bad):
    """Its own weight's gradient is its loss, NaN or infinite; it adds nothing to the loss and to the parts."""
    loss, _ = LOSSES[kind]
    given, labels = make(kind, device)
    weights = torch.tensor(WEIGHTS["some are 0"], device=device, requires_grad=True)
    if kind == "logits":
        given[0][0, labels[0]] = bad
    else:
        given[0][0] = torch.nan
        given[1].requires_grad_()
    given[0].requires_grad_()
    output = loss(*given, labels, token_weights=weights, temperature=2.0, return_parts=True)
    assert all(value.isfinite() for value in output)
    learned = given[:1] if kind == "logits" else given[:2]
    *of_student, of_weights = gradients(output.loss, *learned, weights)
    assert all(gradient.isfinite().all() for gradient in of_student)
    assert of_weights.isfinite().tolist() == [False, *[True] * (N - 1)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    ("reduction", "num_items"), [("mean", None), ("mean", torch.tensor(3)), ("sum", None), ("none", None)]
)
@pytest.mark.parametrize("return_parts", [False, True])
def test_the_gradient_of_alpha_at_0_and_1(device, kind, reduction, num_items, return_parts):
    ours, oracle = LOSSES[kind]
    given, labels = make(kind, device)
    results = []
    for loss, dtype in ((ours, torch.float32), (oracle, torch.float32), (oracle, torch.float64)):
        alpha = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.0], device=device, dtype=dtype, requires_grad=True)
        weights = torch.tensor(WEIGHTS["some are 0"], device=device, dtype=dtype, requires_grad=True)
        student = given[0].detach().to(dtype).requires_grad_()
        value = loss(
            student, *(tensor.to(dtype) for tensor in given[1:]), labels, alpha=alpha, token_weights=weights,
            temperature=3.0, reduction=reduction, num_items=num_items, return_parts=return_parts,
        )  # fmt: skip
        value = value.loss if return_parts else value
        results.append((value.detach(), *gradients(value, student, alpha, weights)))
    *found, exact = results
    for result in found:
        assert all(map(is_close, result, exact))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learned_weight_of_0_beside_16_bit_heads(device, kind, dtype):
    """Nor does it change the unit that gradients of logits are counted in."""
    loss, oracle = LOSSES[kind]
    given, labels = make(kind, device, dtype)
    results = []
    for learns in (True, False):
        weights = torch.tensor(WEIGHTS["some are 0"], device=device, requires_grad=learns)
        given[0].grad = None
        given[0].requires_grad_()
        loss(*given, labels, token_weights=weights, temperature=2.0).backward()
        results.append((given[0].grad, weights.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    exact_weights = weights.double().requires_grad_()
    exact = oracle(*(t.detach().double() for t in given), labels, token_weights=exact_weights, temperature=2.0)
    (expected,) = gradients(exact, exact_weights)
    assert relative_error(results[0][1], expected) < 5e-3


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_single_row_of_learned_weight_0(device, kind, reduction):
    loss, _ = LOSSES[kind]
    given, labels = make(kind, device, rows=1)
    given[0].requires_grad_()
    weight = torch.zeros(1, device=device, requires_grad=True)
    value = loss(*given, labels, token_weights=weight, temperature=2.0, reduction=reduction)
    of_student, of_weight = gradients(value, given[0], weight)
    assert not value.any()
    assert not of_student.any()
    row_loss = loss(*given, labels, temperature=2.0)
    torch.testing.assert_close(of_weight[0], row_loss if reduction != "mean" else torch.zeros_like(row_loss))


@pytest.mark.parametrize("kind", LOSSES)
def test_under_transforms_and_a_compiler(kind):
    loss, _ = LOSSES[kind]
    given, labels = make(kind, "cpu")
    weights = torch.tensor(WEIGHTS["some are 0"])

    def of_weights(weights):
        return loss(*given, labels, token_weights=weights, temperature=2.0)

    (expected,) = gradients(of_weights(learned := weights.clone().requires_grad_()), learned)
    torch.testing.assert_close(torch.func.grad(of_weights)(weights), expected)
    torch._dynamo.reset()
    compiled = torch.compile(of_weights, backend="aot_eager", fullgraph=True)
    (found,) = gradients(compiled(learned), learned)
    torch.testing.assert_close(found, expected)
