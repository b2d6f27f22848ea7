"""Transforms of torch.func and higher derivatives: the supported ones are right, the others raise."""

from functools import partial

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss
from fused_kd import operators as ops
from fused_kd.divergences import Objective
from fused_kd.sweep import KDOptions

B, N, V, H_S, H_T = 3, 4, 50, 8, 6


def from_logits(student, teacher, labels, **options):
    return kd_loss(student, teacher, labels, temperature=3.0, **options).sum()


def from_hidden(hidden, weight, teacher_hidden, labels, **options):
    teacher_weight = torch.linspace(-1, 1, V * H_T).sin().reshape(V, H_T)
    return linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, labels, temperature=3.0, **options).sum()


LABELS = torch.arange(B * N).reshape(B, N)


def samples(loss):
    """Inputs, their batch dimensions, and those to differentiate."""
    if loss is from_logits:
        return (torch.randn(B, N, V), torch.randn(B, N, V), LABELS), (0, 0, 0), (0,)
    return (torch.randn(B, N, H_S), torch.randn(V, H_S), torch.randn(B, N, H_T), LABELS), (0, None, 0, 0), (0, 1)


both = pytest.mark.parametrize("loss", [from_logits, from_hidden])
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def recorded(loss, inputs, argnums):
    """The loss with its graph, and the inputs to differentiate, which come first, as leaves."""
    leaves = [inputs[i].clone().requires_grad_() for i in argnums]
    return loss(*leaves, *inputs[len(leaves) :]), leaves


@both
@reductions
def test_grad_is_that_of_backward(loss, reduction):
    inputs, _, argnums = samples(loss)
    loss = partial(loss, reduction=reduction)
    value, leaves = recorded(loss, inputs, argnums)
    pairs = zip(torch.func.grad(loss, argnums)(*inputs), torch.autograd.grad(value, leaves), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


@both
@reductions
def test_vmap_is_a_loop_over_samples(loss, reduction):
    inputs, in_dims, argnums = samples(loss)
    loss = partial(loss, reduction=reduction)
    for function in (loss, torch.func.grad(loss, argnums)):
        batched = torch.func.vmap(function, in_dims)(*inputs)
        for i in range(B):
            one = function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            pairs = [(batched, one)] if isinstance(one, torch.Tensor) else zip(batched, one, strict=True)
            assert all(torch.allclose(many[i], single, rtol=1e-6, atol=1e-8) for many, single in pairs)


def test_vmap_over_another_dimension_and_an_unbatched_teacher():
    student, teacher = torch.randn(N, B, V), torch.randn(N, V)
    found = torch.func.vmap(from_logits, (1, None, 0))(student, teacher, LABELS)
    for i in range(B):
        assert torch.allclose(found[i], from_logits(student[:, i], teacher, LABELS[i]))


def test_inplace_backward_under_transforms_writes_over_nothing():
    (student, teacher, labels), _, _ = samples(from_logits)
    before = student.clone()
    found = torch.func.grad(partial(lambda s, *rest, **o: from_logits(2 * s, *rest, **o), inplace_backward=True))(
        student, teacher, labels
    )
    expected = torch.func.grad(lambda s: from_logits(2 * s, teacher, labels))(student)
    assert torch.equal(found, expected)
    assert torch.equal(student, before)


@reductions
def test_rows_are_gathered_by_a_bound(reduction):
    """For each sample its own."""
    inputs, in_dims, argnums = samples(from_hidden)
    hidden, weight, teacher_hidden, labels = inputs
    labels = labels.clone()
    labels[0, 1] = labels[1, 0] = labels[2, 3] = -100
    hidden[labels == -100] = torch.nan
    inputs = hidden, weight, teacher_hidden, labels
    expected = partial(from_hidden, reduction=reduction, compact=False)
    for bound in (N - 1, N, N + 1):
        loss = partial(from_hidden, reduction=reduction, counted_rows=bound)
        for found, rows in ((loss, expected), (torch.func.grad(loss, argnums), torch.func.grad(expected, argnums))):
            pairs = [torch.func.vmap(function, in_dims)(*inputs) for function in (found, rows)]
            for ours, other in zip(*pairs, strict=True):
                assert torch.allclose(ours, other, rtol=1e-6, atol=1e-8)
    assert torch.func.vmap(partial(from_hidden, counted_rows=N - 2), in_dims)(*inputs).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compact": True}, "compact: expected None or False under torch.compile, torch.func"),
        ({"weight_grad_out": torch.zeros(V, H_S)}, "weight_grad_out: expected None under the transforms of torch.func"),
    ],
)
def test_what_transforms_cannot_follow_is_refused(options, message):
    inputs, in_dims, argnums = samples(from_hidden)
    loss = partial(from_hidden, **options)
    for function in (torch.func.grad(loss, argnums), torch.func.vmap(loss, in_dims)):
        with pytest.raises(ValueError, match=message):
            function(*inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_upstream_gradients_must_be_those_of_the_callers_sum():
    (hidden, weight, teacher_hidden, labels), _, _ = samples(from_hidden)
    out = torch.zeros(V, H_S)
    leaf = hidden.requires_grad_()
    loss = from_hidden(leaf, weight, teacher_hidden, labels, weight_grad_out=out)
    upstreams = torch.tensor([1.0, 2.0])
    (found,) = torch.autograd.grad(loss, leaf, upstreams, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found[0], one)
    assert found[1].isnan().all()


@both
@reductions
def test_a_second_derivative_is_refused(loss, reduction):
    """Also where only the gradient's dependence on the inputs, not on the upstream gradient, would be lost: a penalty."""
    inputs, _, argnums = samples(loss)
    value, leaves = recorded(partial(loss, reduction=reduction), inputs, argnums)
    for gradient in torch.autograd.grad(value, leaves, create_graph=True):
        assert gradient.requires_grad
        with pytest.raises(NotImplementedError, match="expected one backward pass"):
            (value + gradient.square().sum()).backward(retain_graph=True)


def test_a_second_derivative_of_a_loss_with_inplace_backward_is_refused():
    (student, teacher, labels), _, _ = samples(from_logits)
    student.requires_grad_()
    loss = from_logits(2 * student, teacher, labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        gradient.square().sum().backward()


@both
def test_a_second_derivative_by_transforms_is_refused(loss):
    inputs, _, _ = samples(loss)
    penalty = lambda *inputs: torch.func.grad(loss)(*inputs).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        torch.func.grad(penalty)(*inputs)
    for transform in (torch.func.hessian, torch.func.jacfwd):  # forward mode
        with pytest.raises(NotImplementedError, match="forward mode"):
            transform(loss)(*inputs)


def test_the_second_derivative_of_a_gradient_of_alpha_is_refused():
    (student, teacher, labels), _, _ = samples(from_logits)
    student.requires_grad_()
    alpha = torch.full((B, N), 0.5, requires_grad=True)
    loss = kd_loss(student, teacher, labels, alpha=alpha)
    (gradient,) = torch.autograd.grad(loss, alpha, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one backward pass"):
        gradient.sum().backward()


def test_an_operator_by_itself_refuses_to_be_differentiated():
    student, weights = torch.randn(1, 4, V, requires_grad=True), torch.ones(3, 4, dtype=torch.float64)
    labels, options = LABELS[0], ops.packed(KDOptions(V, True, False, torch.float32))
    loss, *_, statistics = torch.ops.fused_kd.losses(student, None, labels, weights, *options)
    for result in (loss, statistics.sum()):
        with pytest.raises(NotImplementedError, match="an operator by itself"):
            result.backward()


def test_vmap_of_an_operator_over_its_last_dimension():
    """The losses bring the samples to the front before they call it."""
    student, weights = torch.randn(1, 4, V, B), (torch.rand(4, B) > 0.3).double().expand(3, 4, B)

    def losses(student, weights):
        options = KDOptions(V, True, False, torch.float32, reduce=False, objective=Objective(temperature=2.0))
        return ops.losses(student, None, LABELS[0], weights, *ops.packed(options))

    batched = torch.func.vmap(losses, (3, 2))(student, weights)
    for i in range(B):
        for many, single in zip(batched, losses(student[..., i], weights[..., i]), strict=True):
            assert torch.equal(many[i], single)


@both
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # one upstream gradient after another
def test_many_upstream_gradients_at_once_are_a_loop_over_them(device, loss, reduction, dtype):
    inputs, _, argnums = samples(loss)
    inputs = [x.to(device).to(dtype if x.is_floating_point() else x.dtype) for x in inputs]
    given = [inputs[0], *(x.to(device) for x in inputs[1:])]
    if loss is from_logits:
        function = lambda *leaves: kd_loss(*leaves, *given[1:], temperature=3.0, reduction=reduction)  # noqa: E731
    else:
        teacher_weight = torch.randn(V, H_T, device=device, dtype=dtype)
        function = lambda *leaves: linear_kd_loss(  # noqa: E731
            *leaves, given[2], teacher_weight, given[3], temperature=3.0, reduction=reduction
        )
    leaves = [given[i].requires_grad_() for i in argnums]
    value = function(*leaves)
    upstreams = torch.randn(3, *value.shape, device=device)
    many = torch.autograd.grad(value, leaves, upstreams, is_grads_batched=True, retain_graph=True)
    for i, upstream in enumerate(upstreams):
        for found, expected in zip(many, torch.autograd.grad(value, leaves, upstream, retain_graph=True), strict=True):
            assert torch.equal(found[i], expected)


@reductions
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_upstream_gradients_write_over_no_logits(device, reduction):
    (student, teacher, labels), _, _ = samples(from_logits)
    leaf = student.to(device).requires_grad_()
    expected = kd_loss(leaf, teacher.to(device), labels.to(device), reduction=reduction)
    found = kd_loss(leaf * 1, teacher.to(device), labels.to(device), reduction=reduction, inplace_backward=True)
    upstreams = torch.randn(3, *found.shape, device=device)
    pairs = [torch.autograd.grad(loss, leaf, upstreams, is_grads_batched=True)[0] for loss in (found, expected)]
    assert torch.allclose(*pairs, rtol=1e-5, atol=1e-8)


@both
def test_jacobians_are_those_of_single_upstream_gradients(loss):
    inputs, _, _ = samples(loss)
    function = partial(loss, reduction="none")
    rows = torch.func.jacrev(
        lambda first: torch.stack([function(first, *inputs[1:]), 2 * function(first, *inputs[1:])])
    )(inputs[0])
    expected = torch.func.grad(lambda first: function(first, *inputs[1:]))(inputs[0])
    assert torch.allclose(rows[0], expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(rows[1], 2 * expected, rtol=1e-6, atol=1e-8)
