"""linear_kd_loss beside the rest of PyTorch: autocast, checkpointing, tied and strided tensors."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_kd import linear_kd_loss, reference

from .heads import CHUNKED, H_S, N, V, make, run
from .oracle import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, dtype, reduction):
    """Products in the autocast dtype; of a float32 weight a float32 gradient, better than that of nn.Linear."""
    given = make(device)
    kind = torch.device(device).type
    exact = run(reference.linear_kd_loss, given.to(torch.float64), temperature=2.0, reduction=reduction)
    found = []
    for loss in (functools.partial(linear_kd_loss, logits_dtype=dtype), reference.linear_kd_loss):
        with torch.autocast(kind, dtype):
            value = loss(*given[:5], student_bias=given.bias, temperature=2.0, reduction=reduction)
        ramp = torch.arange(1, value.numel() + 1, device=device, dtype=value.dtype).reshape(value.shape)
        gradients = torch.autograd.grad(value, (given.hidden, given.weight, given.bias), ramp)
        found.append(dict(zip(("value", "hidden", "weight", "bias"), (value.detach(), *gradients), strict=True)))
    ours, eager = found
    for name in exact:
        assert ours[name].dtype == torch.float32
        error = relative_error(ours[name], exact[name])
        assert error <= 2 * relative_error(eager[name], exact[name]), name
        assert name == "value" or error > 1e-5, "the products ran in float32"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("parts", [("hidden",), ("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_head_of_two_dtypes(device, dtype, parts, reduction):
    """A model that ends in an nn.Linear gives 16-bit hidden states under autocast, and the head's weight is float32."""
    given = make(device)
    exact = run(reference.linear_kd_loss, given.to(torch.float64), temperature=2.0, reduction=reduction)
    halves = {
        name: getattr(given, name).detach().bfloat16()
        for part in parts
        for name in (part, f"teacher_{part}")
        if name != "teacher_bias"
    }
    given = given._replace(**halves)
    student = [tensor.requires_grad_() for tensor in (given.hidden, given.weight, given.bias)]
    found = []
    for loss in (functools.partial(linear_kd_loss, logits_dtype=dtype), reference.linear_kd_loss):
        with torch.autocast(torch.device(device).type, dtype):
            value = loss(*given[:5], student_bias=given.bias, temperature=2.0, reduction=reduction,
                         teacher_bias=torch.zeros(V, device=device))  # fmt: skip
        ramp = torch.arange(1, value.numel() + 1, device=device, dtype=value.dtype).reshape(value.shape)
        gradients = torch.autograd.grad(value, student, ramp)
        assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in student]
        found.append(dict(zip(("value", "hidden", "weight", "bias"), (value.detach(), *gradients), strict=True)))
    ours, eager = found
    for name in exact:
        assert relative_error(ours[name], exact[name]) <= 2 * relative_error(eager[name], exact[name]), name


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("teachers", [False, True])
def test_autocast_does_not_cast_float64(name, teachers):
    """Nor does that of nn.Linear, which then refuses the product."""
    given = make("cpu")
    parts = {"hidden": given.hidden, "weight": given.weight, "bias": given.bias}
    if teachers:
        parts = {"hidden": given.teacher_hidden, "weight": given.teacher_weight, "bias": torch.zeros(V)}
    parts[name] = parts[name].double()
    head = parts["hidden"], parts["weight"]
    heads = (given.hidden, given.weight, *head) if teachers else (*head, given.teacher_hidden, given.teacher_weight)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            torch.nn.functional.linear(*head, parts["bias"])
        with pytest.raises(
            ValueError, match=r"expected the dtype of .*, which torch.autocast does not do with float64"
        ):
            linear_kd_loss(*heads, given.labels, **{f"{'teacher' if teachers else 'student'}_bias": parts["bias"]})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(use_reentrant, reduction):
    given = make("cpu")
    body = torch.nn.Linear(H_S, H_S)

    def loss(hidden):
        return linear_kd_loss(body(hidden).tanh(), *given[1:5], reduction=reduction).sum()

    leaves = [given.hidden, given.weight, *body.parameters()]
    plain = torch.autograd.grad(loss(given.hidden), leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(loss, given.hidden, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, plain, strict=True))


def test_tied_embeddings():
    given = make("cpu")
    tokens = torch.randint(V, (N,))
    gradients = []
    for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
        cast = given.to(dtype)
        hidden = torch.nn.functional.embedding(tokens, cast.weight).tanh()
        loss(hidden, *cast[1:5], temperature=2.0).backward()
        gradients.append(cast.weight.grad)
    assert relative_error(*gradients) < 1e-6


def test_a_weight_that_is_a_view():
    given = make("cpu")
    whole = torch.randn(V + 10, 2 * H_S).requires_grad_()
    ours, eager = (
        torch.autograd.grad(loss(given.hidden, whole[5 : V + 5, ::2], *given[2:5]), (whole, given.hidden))
        for loss in (linear_kd_loss, reference.linear_kd_loss)
    )
    assert all(relative_error(a, b.double()) < 1e-6 for a, b in zip(ours, eager, strict=True))


def test_strided_hidden_states():
    given = make("cpu", shape=(2, 5))
    hidden, teacher_hidden, labels = given.hidden[:, :-1], given.teacher_hidden[:, :-1], given.labels[:, 1:]
    ours, eager = (
        torch.autograd.grad(loss(hidden, given.weight, teacher_hidden, given.teacher_weight, labels), given.hidden)
        for loss in (linear_kd_loss, reference.linear_kd_loss)
    )
    assert relative_error(ours[0], eager[0].double()) < 1e-6


@pytest.mark.filterwarnings("ignore:teacher_hidden requires grad")
def test_the_teacher_is_a_constant():
    given = make("cpu")
    teacher = [tensor.requires_grad_() for tensor in (given.teacher_hidden, given.teacher_weight, torch.zeros(V))]
    loss = linear_kd_loss(*given[:5], teacher_bias=teacher[2])
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None, None)
    assert not linear_kd_loss(given.hidden.detach(), given.weight.detach(), *given[2:5]).requires_grad


def test_inputs_are_not_modified(device):
    given = make(device, torch.bfloat16)
    before = [tensor.detach().clone() for tensor in given]
    run(linear_kd_loss, given, workspace_bytes=CHUNKED)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
