"""The fast forms of what a step calls, against the general ones: row weights, autograd functions, operators."""

from unittest.mock import Mock, patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import kd_loss, linear_kd_loss, rows
from fused_kd import operators as ops
from fused_kd.autograd import _in_eager_mode, apply
from fused_kd.divergences import Objective
from fused_kd.launching import ONE, single_pass
from fused_kd.logit_map import LogitMap
from fused_kd.rows import RowOptions
from fused_kd.sweep import KDOptions
from fused_kd.testing import launching

B, L, V, H_S, H_T = 2, 6, 203, 8, 6
N = B * L


def some_labels(kind):
    labels = torch.randint(V, (N,))
    if kind != "all count":
        labels[::3] = -100
    return {"none": None, "no row counts": torch.full_like(labels, -100)}.get(kind, labels)


# Row weights of labels and numbers are computed in few calls, others in many.


@pytest.mark.parametrize("labels", ["none", "all count", "some count", "no row counts"])
@pytest.mark.parametrize(("mean", "num_items"), [(False, None), (True, None), (True, 7.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sequence", [0, L])
def test_plain_row_weights_are_those_of_token_weights_of_1(labels, mean, num_items, alpha, sequence):
    given, like = some_labels(labels), torch.empty(())
    options = RowOptions(N, sequence if given is not None else 0, V, -100, mean, alpha, num_items, 2.5)
    plain, moved = rows.row_weights(given, None, None, None, like, options)
    general, also_moved = rows.row_weights(given, torch.ones(N), None, None, like, options)
    of_tensors, _ = rows.row_weights(given, None, torch.tensor(alpha, dtype=torch.float64), None, like, options)
    assert plain.shape == (3, N)
    assert plain.dtype == torch.float64
    for other in (general, of_tensors):
        torch.testing.assert_close(plain, other, rtol=4e-16, atol=0)
        assert torch.equal(plain == 0, other == 0)
    if given is not None:
        assert torch.equal(moved, also_moved)


# An autograd function has one form for eager mode and one for torch.func and compilers.


def losses(device):
    student, teacher = 3 * torch.randn(2, B, L, V, device=device)
    heads = [torch.randn(shape, device=device) for shape in ((B, L, H_S), (V, H_S), (B, L, H_T), (V, H_T))]
    labels = torch.randint(V, (B, L), device=device)
    labels[0, 2] = -100

    def from_logits(student, weights, **options):
        return kd_loss(student, teacher, labels, token_weights=weights, temperature=2.0, **options)

    def from_heads(hidden, weights, weight, **options):
        return linear_kd_loss(hidden, weight, *heads[2:], labels, token_weights=weights, temperature=2.0, **options)

    weights = torch.rand(B, L, device=device)
    return {"logits": (from_logits, (student, weights)), "heads": (from_heads, (heads[0], weights, heads[1]))}


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_forms_of_a_function_give_equal_gradients(device, monkeypatch, kind, reduction):
    loss, inputs = losses(device)[kind]
    used = []
    upstream = torch.rand(B, L, device=device) if reduction == "none" else torch.tensor(0.7, device=device)

    def gradients(form):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with monkeypatch.context() as context:
            for module in ("functional", "linear"):
                context.setattr(f"fused_kd.{module}.apply", form)
            value = loss(*leaves, reduction=reduction)
        return value.detach(), *torch.autograd.grad(value, leaves, upstream)

    def of_transforms(function, *arguments):
        used.append(function)
        return function.apply(*arguments)

    eager, other = gradients(apply), gradients(of_transforms)
    assert len(used) == 1
    assert _in_eager_mode(used[0]) is not used[0]
    assert all(map(torch.equal, eager, other))


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [apply, lambda function, *arguments: function.apply(*arguments)])
def test_both_forms_of_a_function_refuse_a_second_derivative(device, monkeypatch, kind, reduction, form):
    for module in ("functional", "linear"):
        monkeypatch.setattr(f"fused_kd.{module}.apply", form)
    loss, inputs = losses(device)[kind]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    value = loss(*leaves, reduction=reduction).sum()
    for gradient in torch.autograd.grad(value, leaves, create_graph=True):
        assert gradient.requires_grad
        with pytest.raises(NotImplementedError, match="expected one backward pass"):
            torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True, allow_unused=True)


# An operator is called without PyTorch's dispatcher where nothing needs it.


class Dispatched(TorchDispatchMode):
    """The names of the package's operators that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace.startswith("fused_kd"):
            self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reduce", "parts"), [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_operators_have_equal_bits_called_plainly_and_through_the_dispatcher(device, dtype, reduce, parts):
    student, teacher = (3 * torch.randn(2, B, L, V, device=device)).to(dtype)
    labels, weights = torch.randint(V, (N,), device=device), torch.rand(3, N, dtype=torch.float64, device=device)
    weights[:, ::4] = 0
    objective = Objective(LogitMap(0.5, 4.0), temperature=3.0)
    options = ops.packed(KDOptions(V, True, True, torch.float32, reduce, parts, objective))
    with launching(ONE):
        launch = list(single_pass(student, teacher, in_place=False))
    statistics = ops.losses(student, teacher, labels, weights, *options)[4]
    upstream = torch.rand(() if reduce else N, device=device)
    calls = {
        "losses": (student, teacher, labels, weights),
        "losses_and_gradient": (student, teacher, labels, weights, launch),
        "logit_gradient": (student, teacher, labels, statistics, weights, upstream, True),
    }
    for name, arguments in calls.items():
        operator = getattr(ops, name)
        with Dispatched() as dispatched:
            expected = operator(*arguments, *options)
        assert dispatched.names == [name]
        plain = Mock(side_effect=operator.implementation)
        with patch.object(operator, "implementation", plain):
            found = operator(*arguments, *options)
        plain.assert_called_once()
        for ours, other in zip(found, expected, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", ["logits", "heads"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_loss_has_equal_bits_under_a_dispatch_mode(device, kind, reduction, parts):
    loss, inputs = losses(device)[kind]
    results = []
    for mode in (None, Dispatched()):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]

        def step(leaves=leaves):
            output = loss(*leaves, reduction=reduction, return_parts=parts)
            values = list(output) if parts else [output]
            return [value.detach() for value in values] + list(torch.autograd.grad(values[0].sum(), leaves))

        if mode is None:
            results.append(step())
            continue
        with mode:
            results.append(step())
        assert mode.names
    assert all(map(torch.equal, *results))
