"""`shift=True` is the loss of logits without the last position, and labels, weights and alpha without the first."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import kd_loss, linear_kd_loss, reference

from .oracle import relative_error

B, L, V, H_S, H_T = 2, 5, 203, 8, 6


def inputs(kind, device, shape=(B, L)):
    """Arguments of a loss: logits, or hidden states and head weights, and one label, weight and alpha per token."""
    labels = torch.randint(V, shape, device=device)
    if labels.numel():
        labels.view(-1)[-2] = -100
    weights, alpha = torch.rand(2, *shape, device=device)
    if kind == "logits":
        return 3 * torch.randn(2, *shape, V, device=device), (), labels, weights, alpha
    states = torch.randn(*shape, H_S, device=device), torch.randn(*shape, H_T, device=device)
    return states, (torch.randn(V, H_S, device=device), torch.randn(V, H_T, device=device)), labels, weights, alpha


def call(kind, of, student, teacher, heads, labels, **options):
    if kind == "logits":
        return of.kd_loss(student, teacher, labels, **options)
    return of.linear_kd_loss(student, heads[0], teacher, heads[1], labels, **options)


class Fused:
    kd_loss, linear_kd_loss = staticmethod(kd_loss), staticmethod(linear_kd_loss)


both = pytest.mark.parametrize("kind", ["logits", "hidden"])


def with_gradients(loss, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = loss(*leaves)
    (value, *parts) = output if isinstance(output, tuple) else (output,)
    upstream = torch.linspace(0.5, 1.5, value.numel(), device=value.device).reshape(value.shape)
    gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype), allow_unused=True)
    return [value.detach(), *(part.detach() for part in parts)], gradients


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("of", [Fused, reference], ids=["fused", "reference"])
def test_it_is_the_sliced_loss(device, kind, reduction, per_token, of):
    (student, teacher), heads, labels, weights, alpha = inputs(kind, device)
    options = {"temperature": 2.0, "reduction": reduction, "return_parts": True}

    def loss(cut, student, weights, alpha):
        states = (student, teacher) if not cut else (student[:, :-1], teacher[:, :-1])
        first = 1 if cut else 0
        own = {"alpha": 0.3}
        if per_token:
            own = {"token_weights": weights[:, first:], "alpha": alpha[:, first:]}
        output = call(kind, of, *states, heads, labels[:, first:], shift=not cut, **own, **options)
        if cut and reduction == "none":  # the last position adds nothing, and is there
            output = type(output)(*(torch.cat([part, torch.zeros_like(part[:, :1])], 1) for part in output))
        return output

    (found, expected) = (with_gradients(functools.partial(loss, cut), student, weights, alpha) for cut in (False, True))
    for ours, its in zip(found[0], expected[0], strict=True):
        assert ours.shape == its.shape
        assert relative_error(ours, its.double()) < 1e-6
    for ours, its in zip(found[1], expected[1], strict=True):
        assert (ours is None) == (its is None)
        if ours is not None:
            assert relative_error(ours, its.double()) < 2e-6
    assert not found[1][0][:, -1].any()
    if per_token:
        assert not found[1][1][:, 0].any()


@both
def test_the_last_position_and_the_first_label_may_hold_anything(device, kind):
    (student, teacher), heads, labels, *_ = inputs(kind, device)
    loss = functools.partial(call, kind, Fused, heads=heads, temperature=2.0, shift=True)
    expected = loss(student, teacher, labels=labels)
    student, labels = student.clone(), labels.clone()
    student[:, -1] = torch.nan
    labels[:, 0] = V + 7
    assert torch.equal(loss(student, teacher, labels=labels), expected)


@both
@pytest.mark.parametrize("shape", [(4,), (2, 2, 3), (3, 1), (2, 0), (0, 3)])
def test_the_sequence_is_the_last_leading_dimension(device, kind, shape):
    (student, teacher), heads, labels, *_ = inputs(kind, device, shape)
    found = call(kind, Fused, student, teacher, heads, labels, shift=True, reduction="none")
    assert found.shape == shape
    sliced = student[..., :-1, :], teacher[..., :-1, :], heads, labels[..., 1:]
    assert torch.allclose(found[..., :-1], call(kind, Fused, *sliced, reduction="none"), rtol=1e-6)
    assert not found[..., -1:].any()
    assert call(kind, Fused, student, teacher, heads, labels, shift=True).isfinite()


def test_num_items_counts_moved_labels(device):
    (student, teacher), _, labels, *_ = inputs("logits", device)
    mean = kd_loss(student, teacher, labels, shift=True)
    count = int((labels[:, 1:] != -100).sum())
    assert torch.allclose(mean, kd_loss(student, teacher, labels, shift=True, num_items=count), rtol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_logits_are_copied(device, inplace):
    """The operators of a step are those without shift, but for what moves the labels."""
    (student, teacher), _, labels, *_ = inputs("logits", device)

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= student.numel() // 2 and not result._is_view():
                self.made += function.namespace == "aten"
            return result

    made = []
    for shift in (False, True):
        logits = student.clone().requires_grad_() * 1
        with Largest() as largest:
            kd_loss(logits, teacher, labels, shift=shift, inplace_backward=inplace).backward()
        made.append(largest.made)
    assert made[0] == made[1]


@both
def test_under_vmap(kind):
    (student, teacher), heads, labels, *_ = inputs(kind, "cpu")
    loss = functools.partial(call, kind, Fused, heads=heads, shift=True)
    found = torch.func.vmap(lambda s, t, y: loss(s, t, labels=y))(student, teacher, labels)
    expected = torch.stack([loss(student[i], teacher[i], labels=labels[i]) for i in range(B)])
    assert torch.allclose(found, expected, rtol=1e-6)


@both
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(kind, dynamic):
    torch._dynamo.reset()
    (student, teacher), heads, labels, weights, alpha = inputs(kind, "cpu", (B, L + 2))

    def loss(student, teacher, labels, weights, alpha):
        return call(kind, Fused, student, teacher, heads, labels, token_weights=weights, alpha=alpha, shift=True)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (L + 2, L) if dynamic else (L + 2,):
        given = [tensor[:, :length].contiguous() for tensor in (student, teacher, labels, weights, alpha)]
        found, expected = (
            with_gradients(lambda student, f=f, rest=given[1:]: f(student, *rest), given[0]) for f in (compiled, loss)
        )
        assert relative_error(found[0][0], expected[0][0].double()) < 1e-6
        assert relative_error(found[1][0], expected[1][0].double()) < 1e-6
