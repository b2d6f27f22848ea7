"""linear_kd_loss against the float64 oracle: values, the gradients of hidden states, weight and bias, any upstream one."""

import pytest
import torch

from fused_kd import KDLossOutput, LinearKDLoss, linear_kd_loss, reference

from .heads import CHUNKED, Given, N, assert_matches_oracle, make, run
from .oracle import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_the_oracle(device, temperature, alpha, reduction):
    options = {"temperature": temperature, "alpha": alpha, "reduction": reduction}
    assert_matches_oracle(make(device), upstream=3.0, workspace_bytes=CHUNKED, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision(device, dtype, logits_dtype, reduction):
    given = make(device, dtype)
    options = {"temperature": 2.0, "logits_dtype": logits_dtype, "reduction": reduction}
    assert_matches_oracle(given, workspace_bytes=CHUNKED, **options)
    results = run(linear_kd_loss, given, **options)
    assert results.pop("value").dtype == torch.float32
    assert {gradient.dtype for gradient in results.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_float32_logits_a_bias_gradient_is_rounded_once(device, dtype):
    """It is summed before the logits' gradient is rounded to the dtype of the products."""
    given = make(device, dtype, shape=(64,))
    options = {"temperature": 2.0, "logits_dtype": torch.float32}
    found = run(linear_kd_loss, given, **options)["bias"]
    options.pop("logits_dtype")
    exact = run(reference.linear_kd_loss, given.to(torch.float64), **options)["bias"]
    assert relative_error(found, exact) <= 1.001 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": 5.0},
        {"logit_scale": (0.25, 1.0), "logit_softcap": (None, 6.0)},
        {"ignore_index": 3, "reduction": "sum"},
        {"num_items": 99},
        {"biased": False},
    ],
)
def test_options(device, options):
    given = make(device)
    given.labels[2] = 3
    assert_matches_oracle(given, workspace_bytes=CHUNKED, temperature=3.0, **options)


def test_heads_of_other_dtypes(device):
    """A student in float32 under a teacher in bfloat16, whose logits are float32 too."""
    given = make(device)
    teacher = {k: getattr(given, k).detach().bfloat16() for k in ("teacher_hidden", "teacher_weight")}
    ours = run(linear_kd_loss, given._replace(**teacher))
    eager = run(reference.linear_kd_loss, given._replace(**{k: tensor.float() for k, tensor in teacher.items()}))
    assert all(relative_error(ours[name], eager[name].double()) < 1e-6 for name in eager)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocab_size_leaves_out_the_padding(device, reduction):
    given = make(device)
    given.labels.remainder_(1000)
    options = {"vocab_size": 1000, "reduction": reduction}
    with torch.no_grad():
        given.weight[1000:], given.bias[1000:], given.teacher_weight[1000:] = 1e3, torch.nan, torch.inf
    shorter = given._replace(teacher_weight=given.teacher_weight.detach()[:1100])
    ours = run(linear_kd_loss, shorter, **options)
    clean = Given(given.hidden, given.weight[:1000], given.teacher_hidden, given.teacher_weight[:1000], given.labels,
                  given.bias[:1000])  # fmt: skip
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64), reduction=reduction)
    assert relative_error(ours["value"], oracle["value"]) < 1e-6
    assert relative_error(ours["hidden"], oracle["hidden"]) < 1e-6
    for name in ("weight", "bias"):
        assert relative_error(ours[name][:1000], oracle[name]) < 1e-6
        assert not ours[name][1000:].any()


# --- upstream gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backward_multiplies_by_its_own_upstream_gradient(device, reduction, dtype):
    given = make(device, dtype)
    leaves = given.hidden, given.weight, given.bias
    loss = linear_kd_loss(*given[:5], student_bias=given.bias, reduction=reduction)

    def gradients(upstream):
        return torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream), retain_graph=True)

    upstream = 5 * (1 + 2**-8)  # not a bfloat16
    once, scaled, again = gradients(1.0), gradients(upstream), gradients(1.0)
    for a, b, c in zip(once, scaled, again, strict=True):
        assert torch.equal(a, c)
        assert relative_error(b, upstream * a.double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    if reduction == "mean":  # what is saved of the hidden states' gradient is in their dtype
        assert torch.equal(scaled[0], (once[0].float() * upstream).to(dtype))


@pytest.fixture
def unwritten_is_nan():
    """PyTorch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_read_that_is_not_written(device, dtype, unwritten_is_nan):
    """Products in bfloat16 on a CPU with AMX multiply the memory between rows by 0 (seen with PyTorch 2.7 to 2.14)."""
    given = make(device, dtype, shape=(64,))
    assert all(gradient.isfinite().all() for gradient in run(linear_kd_loss, given).values())


def test_a_mean_over_many_rows_does_not_underflow_in_float16(device):
    """With the loss scale of AMP coming in backward, gradients of 1e-9 a logit have to survive the forward pass."""
    given = make(device, torch.float16, shape=(16,), vocabulary=8000, scale=0.05)
    with torch.no_grad():
        given.bias.mul_(0.05)
    options = {"num_items": 2**20, "alpha": 1.0, "temperature": 10.0, "upstream": 2.0**20}
    ours = run(linear_kd_loss, given, **options)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), **options)
    for name in ("hidden", "weight", "bias"):
        assert relative_error(ours[name], oracle[name]) < 2e-3, name


def test_alpha_and_token_weights_get_gradients(device):
    given = make(device)
    given.labels[3] = -100
    for reduction in ("mean", "none"):
        found = []
        for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
            alpha = torch.full((N,), 0.3, device=device, dtype=torch.float64, requires_grad=True)
            weights = torch.linspace(0.5, 1, N, device=device, dtype=torch.float64).requires_grad_()
            run(loss, given.to(dtype), alpha=alpha, token_weights=weights, temperature=2.0, reduction=reduction)
            found.append((alpha.grad, weights.grad))
        for ours, oracle in zip(*found, strict=True):
            assert relative_error(ours, oracle) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradcheck(reduction, alpha):
    given = make("cpu", torch.float64, shape=(3,), vocabulary=5)
    given.labels[1] = -100

    def loss(hidden, weight, bias):
        options = {"alpha": alpha, "temperature": 3.0, "reduction": reduction, "logit_softcap": (7.0, None)}
        return linear_kd_loss(hidden, weight, *given[2:5], student_bias=bias, **options)

    assert torch.autograd.gradcheck(loss, (given.hidden, given.weight, given.bias))


def test_a_pytorch_that_does_not_say_whether_the_graph_is_kept(monkeypatch):
    """Saved tensors have to survive the first backward pass then, as if there were a second one."""
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    given = make("cpu")
    loss = linear_kd_loss(*given[:5])
    first, second = (torch.autograd.grad(3 * loss, given.weight, retain_graph=keep) for keep in (True, False))
    assert torch.equal(first[0], second[0])


# --- interface


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_parts(device, alpha):
    given = make(device)
    given.labels[2] = -100
    ours, eager = (
        loss(*given[:5], alpha=alpha, temperature=2.0, return_parts=True)
        for loss in (linear_kd_loss, reference.linear_kd_loss)
    )
    assert isinstance(ours, KDLossOutput)
    assert not ours.divergence.requires_grad
    assert not ours.ce.requires_grad
    torch.testing.assert_close(ours.ce, eager.ce)
    torch.testing.assert_close(ours.loss, (1 - alpha) * ours.ce + alpha * 4 * ours.divergence)
    if alpha:
        torch.testing.assert_close(ours.divergence, eager.divergence)
    rows = linear_kd_loss(*given[:5], alpha=alpha, reduction="none", return_parts=True)
    assert rows.divergence.shape == rows.ce.shape == (N,)
    assert rows.ce[2] == rows.divergence[2] == 0


def test_module_passes_its_options_on():
    given = make("cpu")
    given.labels.remainder_(1200)
    given.labels[0] = 5
    options = {
        "alpha": 0.2, "temperature": 3.0, "ignore_index": 5, "reduction": "sum", "vocab_size": 1200,
        "logit_softcap": 9.0, "logit_scale": 0.5, "logits_dtype": torch.float32, "workspace_bytes": CHUNKED,
    }  # fmt: skip
    module = LinearKDLoss(**options)
    assert torch.equal(
        module(*given[:5], student_bias=given.bias), linear_kd_loss(*given[:5], student_bias=given.bias, **options)
    )
    assert torch.equal(LinearKDLoss()(*given[:5]), linear_kd_loss(*given[:5]))
