"""Groups of chunks: the logits of one chunk exist at a time, and the gradients of a group's are multiplied at once."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fused_kd import linear_kd_loss, plan_chunks, reference
from fused_kd.heads import head, operator, products
from fused_kd.heads.sweep import default_logits_dtype
from fused_kd.testing import launching
from fused_kd.testing.launches import fake_gpu
from fused_kd.testing.memory import allocations

from .heads import H_S, H_T, N, V, assert_matches_oracle, make, run
from .oracle import relative_error
from .test_launches import take_step

pytestmark = pytest.mark.usefixtures("one_thread")

# Tokens per chunk and per group, of 14: all at once; three chunks in one group; a last group that is a short chunk; a
# group per chunk.
FORMS = [(N, N), (5, N), (5, 10), (5, 5)]
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def planned_as(monkeypatch):
    """A function that sets the tokens per chunk and per group."""
    planned = operator.planned

    def set_form(form):
        def as_asked(*arguments):
            plan = planned(*arguments)
            chunks = -(-arguments[0].shape[0] // form[0])
            return dataclasses.replace(plan, chunk_rows=form[0], gradient_rows=form[1], chunks=chunks)

        monkeypatch.setattr(operator, "planned", as_asked)

    return set_form


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_matches_the_oracle(device, planned_as, form, dtype):
    planned_as(form)
    given = make(device, dtype)
    given.labels[[0, 6]] = -100
    assert_matches_oracle(given, temperature=2.0, upstream=3.0)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_losses_take_the_groups_in_backward(planned_as, form, dtype):
    planned_as(form)
    assert_matches_oracle(make("cpu", dtype), reduction="none", upstream=3.0)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("logits_dtype", [None, "products"])
def test_a_teacher_that_learns_and_padding(planned_as, form, dtype, biased, logits_dtype):
    planned_as(form)
    found = []
    for loss, to in ((linear_kd_loss, dtype), (reference.linear_kd_loss, torch.float32),
                     (reference.linear_kd_loss, torch.float64)):  # fmt: skip
        torch.manual_seed(1)
        given = make("cpu", dtype).to(to)
        given.labels.remainder_(1000)
        with torch.no_grad():
            given.weight[1000:] = torch.nan
        teacher = [getattr(given, name).requires_grad_() for name in ("teacher_hidden", "teacher_weight")]
        options = {"temperature": 2.0, "teacher_grad": True, "vocab_size": 1000, "biased": biased}
        if to == dtype and logits_dtype:
            options["logits_dtype"] = dtype
        if loss is reference.linear_kd_loss:
            options.pop("vocab_size")
            given = given._replace(weight=given.weight[:1000], teacher_weight=teacher[1][:1000], bias=given.bias[:1000])
            for tensor in (given.weight, given.bias):
                tensor.retain_grad()
        result = run(loss, given, **options)
        found.append(
            [result["value"], result["hidden"], result["weight"][:1000], teacher[0].grad, teacher[1].grad[:1000]]
        )
        if biased:
            found[-1].append(result["bias"][:1000])
        if loss is linear_kd_loss:
            assert not result["weight"][1000:].any()
            assert not teacher[1].grad[1000:].any()
    ours, eager, exact = found
    rounded = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype]
    for one, other, oracle in zip(ours, eager, exact, strict=True):
        assert relative_error(one, oracle) <= max(2 * relative_error(other, oracle), rounded)


@pytest.mark.parametrize(("form", "groups", "chunks"), [((256, 256), 1, 1), ((64, 256), 1, 4), ((64, 128), 2, 4),
                                                        ((64, 192), 2, 4), ((64, 64), 4, 4)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_grad", [False, True])
def test_a_gradient_is_one_product_per_group(planned_as, form, groups, chunks, dtype, teacher_grad):
    planned_as(form)
    with fake_gpu() as launches:
        student, teacher = (torch.randn(256, H, dtype=dtype) for H in (H_S, H_T))
        weight, teacher_weight = (torch.randn(V, H, dtype=dtype) for H in (H_S, H_T))
        leaves, labels = [student, weight, teacher, teacher_weight][: 2 + 2 * teacher_grad], torch.randint(V, (256,))
        for leaf in leaves:
            leaf.requires_grad_()
        heads = student, weight, teacher, teacher_weight
        _, names = take_step(launches, lambda: linear_kd_loss(*heads, labels, teacher_grad=teacher_grad), leaves)
    learning = 1 + teacher_grad
    assert names["addmm"] == learning * groups  # of weights
    assert names["mm"] == 2 * chunks + learning * groups  # projections, and gradients of hidden states
    rounded = dtype == torch.bfloat16 and groups > 1  # float16 stays in float32 until backward multiplies by the unit
    assert names.get("_to_copy", 0) == learning * rounded


@pytest.mark.parametrize(("form", "is_summed"), [((16, 64), False), ((64, 64), False), ((16, 32), True)])
@pytest.mark.usefixtures("small_blocks")
def test_one_group_makes_no_float32_sum(planned_as, form, is_summed):
    H, vocabulary = 512, 1500
    planned_as(form)
    hidden, weight = (
        torch.randn(64, H).bfloat16().requires_grad_(),
        torch.randn(vocabulary, H).bfloat16().requires_grad_(),
    )
    teacher, labels = (torch.randn(64, 8).bfloat16(), torch.randn(vocabulary, 8).bfloat16()), torch.randint(9, (64,))
    largest = max(allocations(lambda: linear_kd_loss(hidden, weight, *teacher, labels).backward()))
    assert largest == vocabulary * H * (4 if is_summed else 2)


def test_one_group_is_as_exact_as_a_float32_sum(planned_as):
    """The weight's gradient is rounded once, and the hidden gradient does not depend on the groups."""
    given = make("cpu", torch.bfloat16, shape=(64,))
    exact = run(reference.linear_kd_loss, given.to(torch.float64), temperature=2.0)
    found = {}
    for form in ((16, 64), (16, 16)):
        planned_as(form)
        found[form] = run(linear_kd_loss, given, temperature=2.0)
    one, several = found.values()
    assert relative_error(one["weight"], exact["weight"]) <= 1.01 * relative_error(several["weight"], exact["weight"])
    assert relative_error(one["hidden"], exact["hidden"]) <= 1.01 * relative_error(several["hidden"], exact["hidden"])
    assert torch.equal(one["bias"], several["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_in_the_plan_of_a_gpu(device, dtype, trained):
    """The same results with tensors on a CPU in the chunks and groups that are planned for an H100."""
    given = make(device, dtype, shape=(96,))
    given.weight.requires_grad_(trained)
    given.labels[::3] = -100
    bound = 16 * plan_chunks(1, V, H_S, H_T, dtype=dtype, weight_grad=trained).workspace_bytes
    plan = plan_chunks(64, V, H_S, H_T, dtype=dtype, weight_grad=trained, workspace_bytes=bound, device="H100")
    assert plan.chunks > 1
    exact = run(reference.linear_kd_loss, given.to(torch.float64))
    with launching(device="H100"):
        found = run(linear_kd_loss, given, workspace_bytes=bound)
    for name in found:
        assert relative_error(found[name], exact[name]) < (1e-6 if dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [(5, N), (5, 5)])
def test_products_have_a_result_in_the_dtype_of_the_operands_or_in_float32(
    planned_as, monkeypatch, weight_dtype, autocast, form
):
    """PyTorch has no others on a GPU: a bfloat16 weight under float16 autocast is summed in float32."""
    planned_as(form)
    results = []

    def accumulate(total, gradient, hidden, *, first):
        assert gradient.dtype == hidden.dtype == autocast
        results.append(total.dtype)
        products.accumulate(total, gradient, hidden, first=first)

    monkeypatch.setattr(head, "accumulate", accumulate)
    given = make("cpu", weight_dtype)
    with torch.autocast("cpu", autocast):
        loss = linear_kd_loss(*given[:5])
    loss.backward()
    assert set(results) <= {autocast, torch.float32}
    assert given.weight.grad.dtype == weight_dtype
    exact = run(reference.linear_kd_loss, given.to(torch.float64), biased=False)["weight"]
    (ours,) = torch.autograd.grad(loss_under(autocast, given), given.weight)
    assert relative_error(ours, exact) < 1.2e-2


def loss_under(autocast, given):
    with torch.autocast("cpu", autocast):
        return linear_kd_loss(*given[:5])


# --- the dtype of the logits

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_where_that_is_one_product(dtype, monkeypatch):
    def default(device):
        return default_logits_dtype(SimpleNamespace(device=device), dtype)

    monkeypatch.setattr(torch.version, "hip", None)
    for release, on_a_gpu in (((2, 7), dtype), ((2, 9), dtype), ((2, 10), torch.float32), ((3, 0), torch.float32)):
        monkeypatch.setattr(products, "RELEASE", release)
        assert default(CPU) == torch.float32
        assert default(GPU) == on_a_gpu
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert default(GPU) == (torch.float32 if dtype == torch.bfloat16 else torch.float16)  # PyTorch refuses the product
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert default(GPU) == dtype
    assert default(CPU) == torch.float32


def test_wide_products_have_wide_logits(monkeypatch):
    monkeypatch.setattr(products, "RELEASE", (2, 7))
    for dtype in (torch.float32, torch.float64):
        assert default_logits_dtype(torch.empty(0), dtype) == dtype


@pytest.mark.parametrize("logits_dtype", [None, torch.float32, torch.bfloat16])
def test_the_buffers_have_that_dtype(monkeypatch, logits_dtype):
    """And the gradient that the products take is 16-bit in either case."""
    seen = set()
    buffer = head.Head.logits_buffer

    def recorded(self, rows, dtype):
        seen.add(dtype)
        return buffer(self, rows, dtype)

    monkeypatch.setattr(head.Head, "logits_buffer", recorded)
    given = make("cpu", torch.bfloat16)
    linear_kd_loss(*given[:5], logits_dtype=logits_dtype).backward()
    assert seen == {torch.bfloat16} | ({torch.float32} if logits_dtype != torch.bfloat16 else set())
