"""linear_kd_loss against the float64 oracle: values, the gradients of hidden states, weight and bias, memory, work."""

import inspect
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import KDLossOutput, LinearKDLoss, checks, linear_kd_loss, reference
from fused_kd.heads import chunks as chunk_plan
from fused_kd.heads import products as matmul
from fused_kd.heads import sweep as linear
from fused_kd.heads.operator import linear_row_losses
from fused_kd.heads.products import accumulate, project
from fused_kd.sweep import KDOptions, row_values
from fused_kd.testing.memory import peak_bytes

from .oracle import EPSILON, relative_error

N, V, H_S, H_T = 28, 1237, 24, 40
# Bytes for 10 float32 tokens a chunk, so that the last one has 8.  Below 4 rows a thread, BLAS sums the hidden gradient's
# V terms one after another, and its error, three times that of more rows, is not ours.
CHUNKED = 10 * 2 * 1280 * 4
F_S, F_T = 2 * N * V * H_S, 2 * N * V * H_T


class Given(NamedTuple):
    """The arguments in their order; `student_bias` goes by name."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> "Given":
        """In another dtype, and for the student as leaves that want a gradient."""
        tensors = {name: tensor for name, tensor in self._asdict().items() if name != "labels"}
        cast = {name: tensor.detach().to(dtype).clone() for name, tensor in tensors.items()}
        for name in ("hidden", "weight", "bias"):
            cast[name].requires_grad_()
        return Given(labels=self.labels, **cast)


def make(device, dtype=torch.float32, shape=(N,), vocabulary=V, scale=1.0) -> Given:
    """Heads whose logits have a standard deviation of 3 scale."""
    head = [3 * scale * torch.randn(vocabulary, width) / width**0.5 for width in (H_S, H_T)]
    given = Given(
        torch.randn(*shape, H_S), head[0], torch.randn(*shape, H_T), head[1],
        torch.randint(vocabulary, shape), torch.randn(vocabulary),
    )  # fmt: skip
    on_device = Given(*(tensor.to(device) for tensor in given))
    return on_device.to(dtype)


def run(loss, given: Given, *, biased=True, upstream=1.0, **options) -> dict[str, Tensor]:
    """The value and every gradient; of reduction "none", with the upstream gradients 1, 2, ... times `upstream`."""
    for tensor in (given.hidden, given.weight, given.bias):
        tensor.grad = None
    value = loss(*given[:5], student_bias=given.bias if biased else None, **options)
    ramp = torch.arange(1, value.numel() + 1, device=value.device, dtype=value.dtype).reshape(value.shape)
    value.backward(upstream * ramp)
    gradients = {"hidden": given.hidden.grad, "weight": given.weight.grad, "bias": given.bias.grad if biased else None}
    return {"value": value.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def assert_matches_oracle(given: Given, floor=4 * EPSILON, **options) -> None:
    """Every result within twice the error of eager in the same dtype, or `floor`, of the float64 oracle."""
    ours = run(linear_kd_loss, given, **options)
    options.pop("workspace_bytes", None)
    eager = run(reference.linear_kd_loss, given, **options)
    options.pop("logits_dtype", None)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), **options)
    assert ours.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert exact.norm() > 0
        bound = max(2 * relative_error(eager[name], exact), floor)
        assert relative_error(ours[name], exact) <= bound, name


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
    """A student in float32 under a teacher in bfloat16: the teacher's logits are those of its own head."""
    given = make(device)
    given = given._replace(**{k: getattr(given, k).detach().bfloat16() for k in ("teacher_hidden", "teacher_weight")})
    ours, eager = (run(loss, given) for loss in (linear_kd_loss, reference.linear_kd_loss))
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


# --- rows that do not count


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("looked_at", [True, False])  # False: as on a GPU, where nobody looks at the labels
def test_an_ignored_row_may_hold_anything(device, reduction, looked_at, monkeypatch):
    given = make(device, shape=(2, 5))
    given.labels[0, 1] = given.labels[1, 4] = -100
    options = {"reduction": reduction, "workspace_bytes": CHUNKED}
    clean = run(linear_kd_loss, given, **options)
    with torch.no_grad():
        given.hidden[0, 1] = given.teacher_hidden[0, 1] = torch.nan
        given.hidden[1, 4] = torch.inf
    if not looked_at:
        from fused_kd import rows

        monkeypatch.setattr(rows, "readable", lambda tensor: False)
    dirty = run(linear_kd_loss, given, **options)
    assert not dirty["hidden"][0, 1].any()
    for name in clean:
        assert relative_error(dirty[name], clean[name].double()) < 1e-6, name


def test_ignored_rows_are_not_projected_on_the_cpu():
    given = make("cpu")
    given.labels[:3] = -100
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5]).backward()
    assert counter.get_total_flops() * N == (3 * F_S + F_T) * (N - 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(N,), (0,), (2, 0)])
def test_no_row_counts(device, reduction, shape):
    given = make(device, shape=shape)
    given.labels.fill_(-100)
    for name, result in run(linear_kd_loss, given, reduction=reduction).items():
        assert not result.any(), name
        assert not result.isnan().any(), name
    assert given.hidden.grad.shape == given.hidden.shape


def test_a_label_that_cannot_be_raised_gives_nan(monkeypatch):
    from fused_kd import rows

    given = make("cpu")
    given.labels[1] = V
    for module in (checks, rows):
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    losses = linear_kd_loss(*given[:5], reduction="none")
    assert losses.isnan().tolist() == [False, True, *[False] * (N - 2)]
    assert linear_kd_loss(*given[:5]).isnan()


# --- which gradients, and what they cost


@pytest.mark.parametrize(
    ("asked", "flops"),
    [
        (("hidden", "weight", "bias"), 3 * F_S + F_T),
        (("hidden", "weight"), 3 * F_S + F_T),
        (("hidden",), 2 * F_S + F_T),  # a frozen head, LoRA
        (("weight",), 2 * F_S + F_T),
        (("bias",), F_S + F_T),
        ((), F_S + F_T),  # the loss only
    ],
)
@pytest.mark.parametrize("chunked", [None, CHUNKED])
def test_only_what_is_asked_for_is_computed(asked, flops, chunked):
    given = make("cpu")
    for name in {"hidden", "weight", "bias"} - set(asked):
        getattr(given, name).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss = linear_kd_loss(*given[:5], student_bias=given.bias, workspace_bytes=chunked)
        if asked:
            loss.backward()
    assert counter.get_total_flops() == flops
    whole = run(reference.linear_kd_loss, given.to(torch.float64))
    for name in ("hidden", "weight", "bias"):
        gradient = getattr(given, name).grad
        assert (gradient is not None) == (name in asked)
        assert gradient is None or relative_error(gradient, whole[name]) < 1e-6


def test_no_gradient_work_without_gradients():
    given = make("cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5])
    assert counter.get_total_flops() == F_S + F_T
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], alpha=0.0)  # the teacher is not needed
    assert counter.get_total_flops() == 3 * F_S


@pytest.mark.parametrize("needed", [(True,) * 6, (True, True, False) * 2, (False, True) + (False,) * 4, (False,) * 6])
def test_flops_are_counted_as_they_are_spent(needed):
    """The operator is counted by its formula, and here is what the products inside it come to."""
    given = make("cpu")
    kd = KDOptions(1.0, V, True, True, torch.float32)
    options = linear.LinearOptions(kd, needed, torch.float32, torch.float32, None, CHUNKED)
    weights = torch.ones(N, dtype=torch.float64)
    heads = [t.detach() for t in (given.hidden, given.weight, given.bias, *given[2:4], given.bias)]
    with FlopCounterMode(display=False) as formula:
        linear_row_losses(*heads, given.labels, weights, weights, options=options)
    gradients = [linear.Gradients(linear.Head(*heads[i : i + 3]), needed[i : i + 3], torch.float32, V) for i in (0, 3)]
    with FlopCounterMode(display=False) as spent:
        linear.sweep(
            linear.Head(*heads[:3]), linear.Head(*heads[3:]), given.labels, weights, weights, options,
            gradients if any(needed) else [],
        )  # fmt: skip
    assert formula.get_total_flops() == spent.get_total_flops()


def test_row_losses_project_again_in_backward():
    given = make("cpu")
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], reduction="none").sum().backward()
    assert counter.get_total_flops() == (F_S + F_T) + (3 * F_S + F_T)


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
    """What is saved has to survive the first backward then, as if there were a second one."""
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    given = make("cpu")
    loss = linear_kd_loss(*given[:5])
    first, second = (torch.autograd.grad(3 * loss, given.weight, retain_graph=keep) for keep in (True, False))
    assert torch.equal(first[0], second[0])


# --- beside the rest of PyTorch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, dtype, reduction):
    """Products in the autocast dtype; of a float32 weight a float32 gradient, better than that of nn.Linear."""
    given = make(device)
    kind = torch.device(device).type
    exact = run(reference.linear_kd_loss, given.to(torch.float64), temperature=2.0, reduction=reduction)
    found = []
    for loss in (linear_kd_loss, reference.linear_kd_loss):
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
    for loss in (linear_kd_loss, reference.linear_kd_loss):
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
    assert not ours.kl.requires_grad
    assert not ours.ce.requires_grad
    torch.testing.assert_close(ours.ce, eager.ce)
    torch.testing.assert_close(ours.loss, (1 - alpha) * ours.ce + alpha * 4 * ours.kl)
    if alpha:
        torch.testing.assert_close(ours.kl, eager.kl)
    rows = linear_kd_loss(*given[:5], alpha=alpha, reduction="none", return_parts=True)
    assert rows.kl.shape == rows.ce.shape == (N,)
    assert rows.ce[2] == rows.kl[2] == 0


def test_module_has_the_options_and_defaults_of_the_function():
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
    assert "alpha=0.2" in repr(module)
    function = inspect.signature(linear_kd_loss).parameters
    defaults, call = (inspect.signature(f).parameters for f in (LinearKDLoss.__init__, LinearKDLoss.forward))
    assert set(function) == (set(defaults) | set(call)) - {"self"}
    assert all(function[name].default == defaults[name].default for name in defaults if name != "self")


def test_reference_has_the_signature_of_the_function():
    parameters = [inspect.signature(f).parameters for f in (linear_kd_loss, reference.linear_kd_loss)]
    assert [(p.name, p.default, p.kind) for p in parameters[0].values()] == [
        (p.name, p.default, p.kind) for p in parameters[1].values()
    ]


# --- the plan, and memory


def test_plan_bounds_the_workspace():
    for bound in (2 * 2 * 32_000, 10**6, 10**8):
        plan = linear.plan(1000, 32_000, 64, 128, workspace_bytes=bound)
        assert plan.workspace_bytes <= bound
        assert plan.workspace_bytes == plan.buffers["student logits"] + plan.buffers["teacher logits"]
        assert plan.chunk_rows * (plan.chunks - 1) < 1000 <= plan.chunk_rows * plan.chunks
    assert linear.plan(1000, 32_000, 64, 128, workspace_bytes=2 * 2 * 32_000).chunk_rows == 1
    assert linear.plan(10, 32_000, 64, 128).chunk_rows == 10  # no larger buffers than there are tokens
    assert linear.plan(0, 32_000, 64, 128).chunks == 0


def test_an_impossible_bound_names_the_smallest_possible_one():
    given = make("cpu")
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least 10240, .* of 1237, got 10239"):
        linear_kd_loss(*given[:5], workspace_bytes=10239)
    linear_kd_loss(*given[:5], workspace_bytes=10240).backward()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden"), [(8192, 128_256, 2048), (2048, 262_144, 640), (100, 32_000, 64)]
)
def test_default_plan(rows, vocabulary, hidden):
    trained = linear.plan(rows, vocabulary, hidden, 2 * hidden)
    accumulator = trained.buffers["weight gradient, summed in float32"]
    assert accumulator == 4 * vocabulary * hidden
    assert trained.chunk_rows <= 1024
    assert trained.workspace_bytes <= max(accumulator, chunk_plan.TRAINED_WORKSPACE)
    frozen = linear.plan(rows, vocabulary, hidden, 2 * hidden, weight_grad=False)
    assert frozen.chunk_rows <= 256
    assert not any("weight" in name for name in frozen.buffers)
    only_loss = linear.plan(rows, vocabulary, hidden, 2 * hidden, weight_grad=False, hidden_grad=False)
    assert only_loss.peak_bytes == only_loss.workspace_bytes


@pytest.mark.parametrize("asked", [("hidden", "weight"), ("hidden",), ()])
def test_the_loss_runs_in_the_chunks_of_the_plan(asked, monkeypatch):
    given = make("cpu", shape=(1500,), vocabulary=64)
    for name in {"hidden", "weight", "bias"} - set(asked):
        getattr(given, name).requires_grad_(False)
    needed = {f"{name}_grad": name in asked for name in ("hidden", "weight")}
    planned = linear.plan(1500, 64, H_S, H_T, dtype=torch.float32, **needed)
    rows = []
    monkeypatch.setattr(linear, "row_values", lambda z, *rest: rows.append(z.shape[1]) or row_values(z, *rest))
    linear_kd_loss(*given[:5])
    assert len(rows) == planned.chunks == (2 if "weight" in asked else 6)
    assert rows[0] == planned.chunk_rows


def peak(given: Given, **options) -> int:
    def step():
        for tensor in (given.hidden, given.weight):
            tensor.grad = None
        loss = linear_kd_loss(*given[:5], **options)
        if loss.requires_grad:
            loss.backward()

    return peak_bytes(step, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [2, 16, 128, 256])  # 256: one chunk
@pytest.mark.usefixtures("small_blocks")
def test_memory_is_what_the_plan_says(dtype, trained, chunk):
    given = make("cpu", dtype, shape=(256,), vocabulary=8000)
    given.weight.requires_grad_(trained)
    bound = chunk * 2 * 8000 * dtype.itemsize
    plan = linear.plan(256, 8000, H_S, H_T, dtype=dtype, weight_grad=trained, workspace_bytes=bound)
    measured = peak(given, workspace_bytes=bound)
    assert 0.95 * plan.peak_bytes <= measured <= 1.1 * plan.peak_bytes + 600_000  # 3 blocks of 128 KB, 256 rows' values


def test_plan_under_autocast():
    dtypes = {"dtype": torch.float32, "teacher_dtype": torch.float32, "autocast_dtype": torch.bfloat16}
    buffers = linear.plan(100, 1000, H_S, H_T, **dtypes).buffers
    assert buffers["weights in the autocast dtype"] == 1000 * (H_S + H_T) * 2
    assert buffers["teacher logits"] == 100 * linear.row_stride(1000) * 2
    half_teacher = linear.plan(100, 1000, H_S, H_T, **dtypes | {"teacher_dtype": torch.bfloat16}).buffers
    assert half_teacher["weights in the autocast dtype"] == 1000 * H_S * 2
    two_dtypes = dtypes | {"dtype": torch.bfloat16, "weight_dtype": torch.float32}
    buffers = linear.plan(100, 1000, H_S, H_T, **two_dtypes, bias_grad=True).buffers
    assert buffers["hidden gradient"] == 100 * H_S * 2
    assert (buffers["weight gradient"], buffers["bias gradient"]) == (1000 * H_S * 4, 1000 * 4)
    assert buffers["weights in the autocast dtype"] == 1000 * (H_S + H_T) * 2


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_memory_under_autocast_is_what_the_plan_says(trained):
    given = make("cpu", shape=(256,), vocabulary=8000)
    halves = {name: getattr(given, name).detach().bfloat16() for name in ("hidden", "teacher_hidden")}
    given = given._replace(**halves)
    given.hidden.requires_grad_()
    given.weight.requires_grad_(trained)
    bound = 64 * 2 * 8000 * 2
    plan = linear.plan(
        256, 8000, H_S, H_T, dtype=torch.bfloat16, weight_dtype=torch.float32, teacher_weight_dtype=torch.float32,
        autocast_dtype=torch.bfloat16, weight_grad=trained, workspace_bytes=bound,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        measured = peak(given, workspace_bytes=bound)
    assert 0.95 * plan.peak_bytes <= measured <= 1.1 * plan.peak_bytes + 600_000


@pytest.mark.usefixtures("small_blocks")
def test_memory_grows_with_rows_by_hidden_states_only():
    def of(rows, **options):
        return peak(make("cpu", shape=(rows,), vocabulary=8000), workspace_bytes=16 * 2 * 8000 * 4, **options)

    growth = of(512) - of(256)
    assert growth < 256 * (4 * 3 * H_S * 4 + 400)  # 7 % of what a row of float32 logits would be


# --- products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_round_once(dtype, bias, monkeypatch):
    """16-bit operands with a float32 result: the products are exact, their sums float32's."""
    from fused_kd.heads import products as matmul

    monkeypatch.setattr(matmul, "SLAB_ELEMENTS", 100 * H_S)
    given = make("cpu", dtype)
    hidden, weight = given.hidden.detach(), given.weight.detach()
    b = given.bias.detach() if bias else None
    out = torch.empty(N, V)
    project(hidden, weight, b, out)
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if b is None else b.double())
    assert relative_error(out, exact) < 2e-7

    gradient = out.to(dtype)
    product = gradient.double().T @ hidden.double()
    total = torch.full((V, H_S), torch.nan)
    accumulate(total, gradient, hidden, first=True)
    assert relative_error(total, product) < 2e-7
    accumulate(total, gradient, hidden, first=False)
    assert relative_error(total, 2 * product) < 2e-7


def test_float32_logits_spare_peaked_logits_their_rounding():
    given = make("cpu", torch.bfloat16, shape=(64,), scale=4.0)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64))
    rounded, exact = (run(linear_kd_loss, given, logits_dtype=dtype) for dtype in (None, torch.float32))
    for name in ("hidden", "weight"):
        assert relative_error(exact[name], oracle[name]) < 0.5 * relative_error(rounded[name], oracle[name])


class ProductsOfAGPU(TorchDispatchMode):
    """Gives CPU tensors the float32 products that PyTorch has for CUDA tensors, which it takes in that release."""

    def __init__(self, release):
        super().__init__()
        self.release = release
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ not in ("mm.dtype", "mm.dtype_out", "addmm.dtype_out"):
            return func(*args, **kwargs)
        self.seen[func.__name__] += 1
        *addend, a, b, dtype = args
        assert a.dtype == b.dtype == torch.bfloat16
        assert dtype == torch.float32
        result = kwargs.get("out", torch.empty(a.shape[0], b.shape[1]))
        product = a.double() @ b.double()
        if addend:
            assert self.release >= (2, 10)  # before, PyTorch asks for a 16-bit one
            assert addend[0] is result  # else cuBLASLt may be asked to add it
            product += addend[0].double() if kwargs.get("beta", 1) else 0.0
        return result.copy_(product)


@pytest.mark.parametrize("release", [(2, 8), (2, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_on_a_gpu_give_float32_from_16_bit_operands(bias, release, monkeypatch):
    """Shown on a CPU: the operators, and what they are given, are those for CUDA tensors."""
    if release > matmul.RELEASE:
        pytest.skip(f"PyTorch {torch.__version__} lacks products of {release[0]}.{release[1]}")
    monkeypatch.setattr(matmul, "RELEASE", release)
    monkeypatch.setattr(matmul, "_has_float32_products", lambda operand: True)
    monkeypatch.setattr(matmul, "SLAB_ELEMENTS", 100 * H_S)
    hidden, weight, vector = (torch.randn(*shape).bfloat16() for shape in ((N, H_S), (V, H_S), (V,)))
    exact = hidden.double() @ weight.double().T + (vector.double() if bias else 0.0)
    out, total = torch.full((N, 1280), torch.nan)[:, :V], torch.full((V, H_S), torch.nan)
    gradient = exact.bfloat16()
    with ProductsOfAGPU(release) as products:
        project(hidden, weight, vector if bias else None, out)
        accumulate(total, gradient, hidden, first=True)
        accumulate(total, gradient, hidden, first=False)
    assert relative_error(out, exact) < 1e-7
    assert relative_error(total, 2 * (gradient.double().T @ hidden.double())) < 1e-7
    if release >= (2, 10):
        assert products.seen == ({"addmm.dtype_out": 3} if bias else {"mm.dtype_out": 1, "addmm.dtype_out": 2})
    else:
        assert set(products.seen) == {"mm.dtype"}


def test_float32_products_are_asked_for_where_pytorch_does_not_refuse_them(monkeypatch):
    def asked(dtype=torch.float16, is_cuda=True):
        return matmul._has_float32_products(SimpleNamespace(dtype=dtype, is_cuda=is_cuda))

    monkeypatch.setattr(torch.version, "hip", None)
    assert asked()
    assert not asked(is_cuda=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert not asked()
    assert asked(torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not asked(torch.bfloat16)
