"""A gradient that comes with the loss: when it does, what backward makes of it, and the memory that it takes.

Its values are those of the other tests, whose `device` is also one where all losses that can take one launch do.
"""

import functools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_kd import autograd, kd_loss, linear_kd_loss, reference
from fused_kd import one_launch as one_launch_module
from fused_kd import operators as ops
from fused_kd.backends import cpu
from fused_kd.backends import triton as kernels
from fused_kd.devices import DEVICES
from fused_kd.launch import ONE, PLAN, TWO, default_one_launch, device_of, is_chosen, requested
from fused_kd.logit_map import LogitMap
from fused_kd.testing.memory import peak_bytes

from .oracle import relative_error, value_and_gradient

N, V = 6, 501


@pytest.fixture
def on_an_h100(monkeypatch):
    """What is chosen by device is chosen as there."""
    monkeypatch.setattr("fused_kd.launch.device_of", lambda _: DEVICES["H100"])


@pytest.fixture
def one_launch(monkeypatch):
    monkeypatch.setenv(PLAN, ONE)


@pytest.fixture(params=["cpu", "kernels"])
def device(request, one_launch):
    """In one launch on both, unlike elsewhere."""
    return request.getfixturevalue("kernel_device") if request.param == "kernels" else torch.device("cpu")


@pytest.fixture
def taken(monkeypatch):
    """Names of the functions that kd_loss went through."""
    found = []
    for name in ("KDLossFunction", "KDLossAndGradientFunction"):
        function = getattr(autograd, name)

        def apply(*arguments, of=function.apply, name=name):
            found.append(name.removesuffix("Function"))
            return of(*arguments)

        monkeypatch.setattr(function, "apply", apply)
    return found


def inputs(dtype=torch.float32, rows=N, vocabulary=V):
    student, teacher = (3 * torch.randn(rows, vocabulary, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(vocabulary, (rows,))


# --- when


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"inplace_backward": True}, {"return_parts": True}])
def test_a_loss_whose_gradient_is_needed_takes_it_along(on_an_h100, taken, dtype, options):
    student, teacher, labels = inputs(dtype)
    kd_loss(student * 1, teacher, labels, **options)
    assert taken == ["KDLossAndGradient"]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float16, {}),  # the gradient of a mean would underflow before a loss scale comes
        (torch.float32, {"reduction": "none"}),
        (torch.float32, {"teacher_grad": True}),
        (torch.float32, {"alpha": 1.0, "return_parts": True}),  # cross-entropy for the log alone
        (torch.float32, {"alpha": 0.0, "return_parts": True}),
    ],
)
def test_other_losses_take_two_launches(on_an_h100, taken, dtype, options):
    student, teacher, labels = inputs(dtype)
    kd_loss(student, teacher.requires_grad_("teacher_grad" in options), labels, **options)
    assert taken == ["KDLoss"]


def test_a_loss_in_float64_for_a_teacher_that_is_left_out_takes_two(one_launch, taken):
    student, teacher, labels = inputs()
    loss = kd_loss(student, teacher.double(), labels, alpha=0.0)
    assert taken == ["KDLoss"]
    expected = reference.kd_loss(student.double(), teacher.double(), labels, alpha=0.0)
    assert relative_error(loss.detach(), expected.detach()) < 1e-14


def test_without_a_gradient_there_is_none(on_an_h100, taken):
    student, teacher, labels = inputs()
    kd_loss(student.detach(), teacher, labels)
    kd_loss(student.detach(), teacher, labels, alpha=torch.full((N,), 0.5, requires_grad=True))
    with torch.no_grad():
        kd_loss(student, teacher, labels)
    assert taken == ["KDLoss"] * 3


def test_a_compiled_loss_takes_two_launches(one_launch, monkeypatch):
    monkeypatch.setattr(cpu, "loss_and_gradient", lambda *_: pytest.fail("taken along"))
    student, teacher, labels = inputs()
    loss = torch.compile(lambda student: kd_loss(student, teacher, labels), backend="aot_eager", fullgraph=True)
    loss(student).backward()
    assert student.grad is not None


def test_a_cpu_takes_two_launches_unless_asked(taken):
    given = inputs()
    assert device_of(torch.device("cpu")) is None
    kd_loss(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLAN, ONE)
        kd_loss(*given)
    assert taken == ["KDLoss", "KDLossAndGradient"]


def test_a_device_chooses_by_what_its_cache_holds(monkeypatch):
    student, teacher, _ = inputs(torch.bfloat16)
    choices = {}
    for name in DEVICES:
        monkeypatch.setattr("fused_kd.launch.device_of", lambda _, name=name: DEVICES[name])
        choices[name] = [is_chosen(student, teacher, vocabulary) for vocabulary in (1000, 32_000, 128_256, 262_144)]
    assert choices == {name: [True] * 4 for name in DEVICES}
    monkeypatch.setattr("fused_kd.launch.device_of", lambda _: DEVICES["A100"]._replace(l2_bytes=2**22))
    assert not is_chosen(student, teacher, 262_144)
    monkeypatch.setenv(PLAN, ONE)
    assert is_chosen(student, teacher, 262_144)


@pytest.mark.parametrize(("version", "clusters"), [("3.7.1", False), ("3.8.0", True), ("3.10.0+git1", True)])
def test_clusters_need_a_triton_that_reduces_over_them(monkeypatch, version, clusters):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("triton.__version__", version)
    one_launch_module._cuda_device.cache_clear()
    assert device_of(torch.device("cuda", 0)) == DEVICES["H100"]._replace(clusters=clusters)
    one_launch_module._cuda_device.cache_clear()


@pytest.mark.parametrize(("student_cap", "teacher_cap"), [(None, None), (30.0, None), (None, 30.0)])
def test_a_softcap_is_not_launched_as_a_cluster(on_an_h100, kernel_device, monkeypatch, student_cap, teacher_cap):
    """Triton does not compile that."""
    module = sys.modules["fused_kd.backends.triton.single_pass"]
    planned = []
    monkeypatch.setattr(
        module, "default_one_launch", lambda *a, **k: planned.append(default_one_launch(*a, **k)) or planned[-1]
    )
    logits = torch.randn(1, 2, 4096, device=kernel_device).bfloat16()
    weight = torch.ones(2, dtype=torch.float64, device=kernel_device)
    maps = [LogitMap(1.0, cap or math.inf) for cap in (student_cap, teacher_cap)]
    gradient = torch.empty_like(logits)
    kernels.loss_and_gradient(logits, logits, None, weight, weight, 2.0, gradient, *maps)
    assert (planned[0].splits == 0) == (student_cap is teacher_cap)


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_of_heads_take_one_launch_each(one_launch, monkeypatch, frozen):
    """Also in float16, whose gradients are counted in a power of two of their size."""
    calls = []
    for name in ("row_statistics", "logit_gradient", "loss_and_gradient"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, of=function, name=name: calls.append(name) or of(*a))
    heads = [torch.randn(*shape, dtype=torch.float16) for shape in ((N, 8), (V, 8), (N, 8), (V, 8))]
    heads[0].requires_grad_()
    heads[1].requires_grad_(not frozen)
    linear_kd_loss(*heads, torch.randint(V, (N,))).backward()
    assert calls == ["loss_and_gradient", "row_statistics", "logit_gradient"]  # the last two are within it on a CPU


# --- as asked


def test_a_launch_can_be_asked_for(monkeypatch):
    student = torch.empty(1, N, 100_000, dtype=torch.bfloat16)
    monkeypatch.setenv(PLAN, "programs=5,warps=8,columns=8")
    launch = default_one_launch(student, student, student, wide=True)
    assert (launch.splits, launch.ctas, launch.num_warps, launch.columns) == (5, 1, 8, 8)
    assert launch.columns_per_split % (8 * 32 * 8) == 0
    assert launch.columns_per_split * 4 < 100_000 <= launch.columns_per_split * 5
    monkeypatch.setenv(PLAN, "cluster=16,warps=4,columns=8")
    launch = default_one_launch(student, student, student, wide=True)
    assert (launch.splits, launch.ctas, launch.lanes) == (0, 16, 16 * 4 * 32)


@pytest.mark.parametrize("text", ["both", "cluster=3,warps=8,columns=8", "programs=0,warps=8,columns=8", "cluster=16"])
def test_what_can_not_be_asked_for(monkeypatch, text):
    student, teacher, labels = inputs()
    monkeypatch.setenv(PLAN, text)
    with pytest.raises(ValueError, match=f"{PLAN}: expected auto, one-launch, two-launches, .* got '{text}'"):
        kd_loss(student, teacher, labels)


def test_an_empty_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv(PLAN, "")
    assert requested() == "auto"


def test_launches_asked_for_agree(kernel_device, monkeypatch):
    given = inputs(vocabulary=5000)
    student, teacher, labels = (tensor.detach().to(kernel_device) for tensor in given)
    results = []
    for text in (TWO, ONE, "cluster=1,warps=4,columns=4", "programs=7,warps=4,columns=4"):
        monkeypatch.setenv(PLAN, text)
        results.append(value_and_gradient(kd_loss, student, teacher, labels, temperature=3.0))
    for value, gradient in results[1:]:
        assert relative_error(value, results[0][0].double()) < 2e-7
        assert relative_error(gradient, results[0][1].double()) < 4e-7


# --- backward


def test_backward_hands_on_what_forward_has_made(one_launch, monkeypatch):
    made = []
    of = ops.write_loss_and_gradient
    monkeypatch.setattr(ops, "write_loss_and_gradient", lambda gradient, *a: made.append(gradient) or of(gradient, *a))
    student, teacher, labels = inputs()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, labels), student)
    assert gradient.data_ptr() == made[0].data_ptr()
    logits = student * 1
    (gradient,) = torch.autograd.grad(3 * kd_loss(logits, teacher, labels, inplace_backward=True), logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.3, 2.0**16, 0.0])
def test_any_upstream_gradient_and_backward_again(device, dtype, inplace, upstream):
    student, teacher, labels = (tensor.detach().to(device) for tensor in inputs(dtype))
    _, expected = value_and_gradient(reference.kd_loss, student.double(), teacher.double(), labels)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf * 1, teacher, labels, inplace_backward=inplace)
    bound = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}[dtype]
    for factor, keep in ((2.0, True), (upstream, True), (upstream, False)):
        (gradient,) = torch.autograd.grad(factor * loss, leaf, retain_graph=keep)
        assert relative_error(gradient, factor * expected) < bound or factor == 0
        assert factor != 0 or not gradient.any()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_compiled_backward_multiplies_too(one_launch):
    """Compiled autograd traces a backward pass whose forward pass was not compiled."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    student, teacher, labels = inputs()
    expected = torch.autograd.grad(3 * kd_loss(student, teacher, labels), student)
    loss = 3 * kd_loss(student, teacher, labels)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    assert torch.equal(student.grad, *expected)


def test_logits_changed_before_backward_raise(one_launch):
    student, teacher, labels = inputs()
    logits = student * 1
    loss = kd_loss(logits, teacher, labels, inplace_backward=True)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_earlier_use_of_logits_that_are_overwritten_raises(one_launch):
    student, teacher, labels = inputs()
    logits = student * 1
    square = (logits**2).sum()
    loss = kd_loss(logits, teacher, labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()


def test_a_row_whose_weight_is_zero_in_float32_alone_has_a_value(device):
    student, teacher, labels = (tensor.detach().to(device) for tensor in inputs())
    weights = torch.ones(N, dtype=torch.float64, device=device)
    weights[1] = 1e-60
    result = kd_loss(
        student.requires_grad_(), teacher, labels, token_weights=weights, reduction="sum", return_parts=True
    )
    result.loss.backward()
    expected = kd_loss(student.detach(), teacher, labels, token_weights=weights, reduction="sum", return_parts=True)
    assert torch.allclose(torch.stack(result), torch.stack(expected), rtol=1e-6)
    assert not student.grad[1].any()
    assert student.grad[0].any()


# --- memory


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_peak_memory_is_not_above_that_of_two_launches(monkeypatch, inplace, dtype):
    """Of a step from hidden states: logits of both models, loss, backward through the head."""
    rows, vocabulary = 256, 8000
    logits_bytes = rows * vocabulary * dtype.itemsize
    hidden, weight, teacher_weight = (torch.randn(n, 16, dtype=dtype) for n in (rows, vocabulary, vocabulary))
    hidden.requires_grad_()
    labels = torch.randint(vocabulary, (rows,))

    def step(upstream):
        hidden.grad = None
        loss = kd_loss(hidden @ weight.T, hidden.detach() @ teacher_weight.T, labels, inplace_backward=inplace)
        (upstream * loss).backward()

    def peak(plan, upstream):
        monkeypatch.setenv(PLAN, plan)
        step(upstream)
        return peak_bytes(functools.partial(step, upstream), torch.device("cpu"))

    for upstream in (1.0, 3.0):
        one, two = peak(ONE, upstream), peak(TWO, upstream)
        assert one <= two + 0.02 * logits_bytes
        assert abs(two - (2 if inplace else 3) * logits_bytes) < 0.35 * logits_bytes


# --- the kernel that scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("placed", ["dense", "batches with gaps", "transposed"])
def test_scale(kernel_device, dtype, factor, placed):
    tensor = torch.randn(2, 5, 1500, device=kernel_device).to(dtype)
    view = {"dense": tensor, "batches with gaps": tensor[:, :-1, 3:], "transposed": tensor.transpose(1, 2)}[placed]
    before, expected = tensor.clone(), (view.float() * factor).to(dtype)
    outside = torch.ones_like(tensor)
    {"dense": outside, "batches with gaps": outside[:, :-1, 3:], "transposed": outside}[placed].zero_()
    kernels.scale_(view, torch.tensor(factor, dtype=torch.float64, device=kernel_device))
    assert torch.equal(view, expected)
    assert torch.equal(tensor[outside.bool()], before[outside.bool()])


def test_scale_of_nothing(kernel_device):
    kernels.scale_(torch.empty(1, 0, V, device=kernel_device), torch.tensor(2.0, device=kernel_device))
