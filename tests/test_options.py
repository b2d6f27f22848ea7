"""Options in every form that users have them: numpy numbers, an alpha that learns, attributes of the modules."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fused_kd import KDLoss, LinearKDLoss, kd_loss, linear_kd_loss, reference

from .oracle import relative_error

N, V, H = 6, 40, 8
NUMBERS = [np.float64, np.float32, np.float16, np.longdouble, np.int64, np.int32, np.uint8]


def logits(device):
    labels = torch.randint(V, (N,), device=device)
    labels[2] = 3
    return 3 * torch.randn(N, V, device=device), 3 * torch.randn(N, V, device=device), labels


def heads(device):
    hidden, teacher_hidden = torch.randn(2, N, H, device=device)
    weight, teacher_weight = torch.randn(2, V, H, device=device)
    return hidden, weight, teacher_hidden, teacher_weight, torch.randint(V, (N,), device=device)


LOSSES = {kd_loss: logits, linear_kd_loss: heads}
MODULES = {KDLoss: logits, LinearKDLoss: heads}


def with_gradient(loss, given, **options):
    student = given[0].detach().requires_grad_()
    value = loss(student, *given[1:], **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_numpy_numbers_are_numbers(device, loss, kind):
    given = LOSSES[loss](device)
    plain = {"temperature": 2, "alpha": 1, "num_items": 4, "logit_scale": (2, 1), "logit_softcap": 30}
    integers = {"ignore_index": 3, "vocab_size": V}
    if np.issubdtype(kind, np.floating):
        plain |= {"alpha": float(kind(0.3)), "temperature": float(kind(2.1))}
    else:
        integers |= {"workspace_bytes": 2**18} if loss is linear_kd_loss and kind != np.uint8 else {}
    numpy = {name: kind(value) if name != "logit_scale" else (kind(2), kind(1)) for name, value in plain.items()}
    if not np.issubdtype(kind, np.floating):
        numpy |= {name: kind(value) for name, value in integers.items()}
    for ours, expected in zip(
        with_gradient(loss, given, **integers | numpy), with_gradient(loss, given, **integers | plain), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["alpha", "temperature", "num_items", "vocab_size", "ignore_index", "logit_scale"])
def test_no_boolean_is_a_number(loss, name):
    for value in (True, np.True_):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            loss(*LOSSES[loss]("cpu"), **{name: value})


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_alpha_that_learns(device, loss, reduction):
    """A 0-D tensor holds for every row, and gets the sum of their gradients."""
    given = LOSSES[loss](device)
    for value in (0.3, 0.0, 1.0):
        found = []
        for of, dtype in ((loss, torch.float32), (getattr(reference, loss.__name__), torch.float64)):
            alpha = torch.tensor(value, device=device, requires_grad=True)
            inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in given]
            inputs[0].requires_grad_()
            result = of(*inputs, alpha=alpha, temperature=2.0, reduction=reduction)
            found.append([result.detach(), *torch.autograd.grad(result.sum(), (inputs[0], alpha))])
        assert found[0][2].shape == ()
        assert found[0][2].dtype == torch.float32
        for ours, exact in zip(*found, strict=True):
            assert relative_error(ours, exact) < 1e-5  # of a difference, T^2 KL - CE
    plain, tensor = (with_gradient(loss, given, alpha=alpha) for alpha in (0.25, torch.tensor(0.25, device=device)))
    assert all(map(torch.equal, plain, tensor))


@pytest.mark.parametrize("module", MODULES)
def test_an_alpha_that_is_a_parameter_belongs_to_its_module(module):
    given = MODULES[module]("cpu")
    loss = module(alpha=nn.Parameter(torch.tensor(0.25)))
    assert list(dict(loss.named_parameters())) == list(loss.state_dict()) == ["alpha"]
    loss(*given).backward()
    assert loss.alpha.grad.shape == ()
    assert loss.alpha.grad != 0
    assert "alpha=Parameter()" in repr(loss)
    assert loss.to(torch.float64).alpha.dtype == torch.float64
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert isinstance(twin.alpha, nn.Parameter)
        assert twin.alpha is not loss.alpha
        assert torch.equal(twin(*given), loss(*given))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = module(alpha=nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(torch.load(file))
    assert other.alpha == 0.25


@pytest.mark.parametrize("module", MODULES)
def test_an_alpha_that_is_a_tensor_is_a_buffer(module):
    given = MODULES[module]("cpu")
    loss = module(alpha=torch.full((N,), 0.25))
    assert list(dict(loss.named_buffers())) == list(loss.state_dict()) == ["alpha"]
    assert f"alpha=Tensor({N},)" in repr(loss)
    assert loss.to("meta").alpha.device.type == "meta"
    loss.alpha = torch.tensor(0.25)
    assert torch.equal(copy.deepcopy(loss)(*given), module(alpha=0.25)(*given))


@pytest.mark.parametrize("module", MODULES)
def test_alpha_may_become_a_number_or_a_tensor(module):
    """Annealing: whatever it was before."""
    given = MODULES[module]("cpu")
    kinds = [0.25, torch.tensor(0.25), nn.Parameter(torch.tensor(0.25)), np.float32(0.25)]
    expected = module(alpha=0.25)(*given)
    for first in kinds:
        for then in kinds:
            loss = module(alpha=first)
            loss.alpha = then
            assert loss.alpha is then or type(loss.alpha) is float
            assert torch.equal(loss(*given), expected)
            assert len(list(loss.parameters())) == isinstance(then, nn.Parameter)
            assert len(list(loss.buffers())) == (isinstance(then, torch.Tensor) and not isinstance(then, nn.Parameter))


@pytest.mark.parametrize("module", MODULES)
def test_numpy_numbers_of_a_compiled_module(module):
    torch._dynamo.reset()
    given = MODULES[module]("cpu")
    loss = module(temperature=np.float32(2), alpha=np.float64(0.5), logit_scale=np.int64(1))
    assert repr(loss) == f"{module.__name__}(temperature=2.0)"  # the others have their defaults
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for temperature in np.linspace(1, 3, 3):
        loss.temperature = temperature
        assert torch.equal(compiled(*given), module(temperature=float(temperature))(*given))


BAD_OPTIONS = [
    ("alpha", 1.5, ValueError),
    ("alpha", "half", TypeError),
    ("alpha", torch.tensor(2.0), ValueError),
    ("alpha", torch.tensor(1), TypeError),
    ("alpha", torch.full((N,), -1.0), ValueError),
    ("temperature", 0, ValueError),
    ("temperature", torch.tensor(2.0), TypeError),
    ("temperature", 1e200, ValueError),
    ("ignore_index", 1.0, TypeError),
    ("reduction", "avg", ValueError),
    ("divergence", "kl", ValueError),
    ("divergence", None, ValueError),
    ("shift", 1, TypeError),
    ("vocab_size", 0, ValueError),
    ("vocab_size", 2.0, TypeError),
    ("logit_softcap", -1.0, ValueError),
    ("logit_scale", (1.0, "x"), TypeError),
    ("logit_scale", (1.0,) * 3, ValueError),
    ("teacher_grad", 1, TypeError),
    ("return_parts", None, TypeError),
    ("inplace_backward", "yes", TypeError),
    ("logits_dtype", "float32", TypeError),
    ("logits_dtype", torch.int64, ValueError),
    ("workspace_bytes", 0, ValueError),
    ("workspace_bytes", 1e9, TypeError),
]


@pytest.mark.parametrize(("loss", "module"), [(kd_loss, KDLoss), (linear_kd_loss, LinearKDLoss)])
@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS)
def test_a_module_of_a_bad_option_is_not_made(loss, module, name, value, error):
    if name in ("logits_dtype", "workspace_bytes") and loss is kd_loss:
        return
    if name == "inplace_backward" and loss is linear_kd_loss:
        return
    with pytest.raises(error) as of_loss:
        loss(*LOSSES[loss]("cpu"), **{name: value})
    with pytest.raises(error) as of_module:
        module(**{name: value})
    assert f"{name}: expected" in str(of_module.value)
    if name != "vocab_size":  # of which the module does not know the largest
        assert str(of_module.value) == str(of_loss.value)
