"""The gradient that is taken with the loss: when that happens, how backward scales it, and the memory that it takes.

The other tests check its values, since their fixture `device` also runs them with one launch wherever that is possible.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import kd_loss, linear_kd_loss, reference
from fused_kd import launching as launch_module
from fused_kd.backends import cpu
from fused_kd.backends import triton as kernels
from fused_kd.devices import DEVICES
from fused_kd.divergences import Objective
from fused_kd.launching import ONE, TWO, VARIABLE, device_of, requested, single_pass
from fused_kd.logit_map import LogitMap
from fused_kd.sweep import KDOptions, Logits, chosen_launch
from fused_kd.testing import launching
from fused_kd.testing.memory import peak_bytes

from .oracle import relative_error, value_and_gradient

N, V = 6, 501


@pytest.fixture
def on_an_h100():
    """Choose launches as on an H100."""
    with launching(device="H100"):
        yield


@pytest.fixture
def one_launch():
    with launching(ONE):
        yield


@pytest.fixture(params=["cpu", "kernels"])
def device(request, one_launch):
    """In one launch on both, unlike elsewhere."""
    return request.getfixturevalue("kernel_device") if request.param == "kernels" else torch.device("cpu")


@pytest.fixture
def taken():
    """Names of the operators that kd_loss calls."""
    with Operators() as operators:
        yield operators.found


class Operators(TorchDispatchMode):
    """Names and results of the package's operators."""

    def __init__(self):
        super().__init__()
        self.found, self.results = [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.namespace == "fused_kd":
            self.found.append(function.overloadpacket.__name__)
            self.results.append(result)
        return result


def inputs(dtype=torch.float32, rows=N, vocabulary=V):
    student, teacher = (3 * torch.randn(rows, vocabulary, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(vocabulary, (rows,))


# --- when


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"inplace_backward": True}, {"return_parts": True}])
def test_a_loss_whose_gradient_is_needed_takes_it_along(on_an_h100, taken, dtype, options):
    student, teacher, labels = inputs(dtype)
    kd_loss(student * 1, teacher, labels, **options)
    assert taken == ["losses_and_gradient_" if options.get("inplace_backward") else "losses_and_gradient"]


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
    assert taken == ["losses"]


def test_a_loss_in_float64_for_a_teacher_that_is_left_out_takes_two(one_launch, taken):
    student, teacher, labels = inputs()
    loss = kd_loss(student, teacher.double(), labels, alpha=0.0)
    assert taken == ["losses"]
    expected = reference.kd_loss(student.double(), teacher.double(), labels, alpha=0.0)
    assert relative_error(loss.detach(), expected.detach()) < 1e-14


def test_without_a_gradient_there_is_none(on_an_h100, taken):
    student, teacher, labels = inputs()
    kd_loss(student.detach(), teacher, labels)
    kd_loss(student.detach(), teacher, labels, alpha=torch.full((N,), 0.5, requires_grad=True))
    with torch.no_grad():
        kd_loss(student, teacher, labels)
    assert taken == ["losses"] * 3


def test_a_compiled_loss_takes_two_launches(one_launch, monkeypatch):
    monkeypatch.setattr(cpu, "statistics_and_gradient", lambda *_: pytest.fail("taken along"))
    student, teacher, labels = inputs()
    loss = torch.compile(lambda student: kd_loss(student, teacher, labels), backend="aot_eager", fullgraph=True)
    loss(student).backward()
    assert student.grad is not None


BY_DEFAULT = ONE  # of a CPU


def test_a_cpu_takes_its_default_unless_asked(taken):
    given = inputs()
    assert device_of(torch.device("cpu")) is None
    kd_loss(*given)
    for asked in (ONE, TWO):
        with launching(asked):
            kd_loss(*given)
    names = {ONE: "losses_and_gradient", TWO: "losses"}
    assert taken == [names[BY_DEFAULT], names[ONE], names[TWO]]


def test_a_device_chooses_by_what_its_cache_holds_and_how_fast_its_memory_is():
    def is_single_pass(vocabulary):
        logits = torch.empty(1, 8192, vocabulary, dtype=torch.bfloat16, device="meta")
        return single_pass(logits, logits, in_place=False) is not None

    choices = {}
    for name in DEVICES:
        with launching(device=name):
            choices[name] = [is_single_pass(vocabulary) for vocabulary in (1000, 32_000, 128_256, 262_144)]
    assert choices.pop("H200") == choices.pop("B200") == [True, False, False, False]  # rows of one program, and shared
    assert choices == {name: [True] * 4 for name in choices}
    assert len(choices) == len(DEVICES) - 2
    with launching(device=DEVICES["A100"]._replace(l2_bytes=2**22)):
        assert not is_single_pass(262_144)
        with launching(ONE):
            assert is_single_pass(262_144)


@pytest.mark.parametrize(("version", "clusters"), [("3.7.1", False), ("3.8.0", True), ("3.10.0+git1", True)])
def test_clusters_need_a_triton_that_reduces_over_them(monkeypatch, version, clusters):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("triton.__version__", version)
    launch_module._cuda_device.cache_clear()
    assert device_of(torch.device("cuda", 0)) == DEVICES["H100"]._replace(clusters=clusters)
    launch_module._cuda_device.cache_clear()


def test_a_cluster_needs_a_gradient_whose_rows_are_aligned():
    """That of a slice of columns is contiguous: its rows may start anywhere though the logits' are aligned."""
    logits = torch.empty(1, 8192, 32_000, dtype=torch.bfloat16)
    for columns, ctas in ((31_984, 4), (31_987, 1)):
        part = logits[..., :columns]
        with launching(ONE, device="H100"):
            assert single_pass(part, part, in_place=False).ctas == ctas
            assert single_pass(part, part, in_place=True).ctas == 4
            assert single_pass(logits, part, columns, in_place=False).ctas == 4


@pytest.mark.parametrize(("student_cap", "teacher_cap"), [(None, None), (30.0, None), (None, 30.0)])
def test_a_softcap_is_not_launched_as_a_cluster(on_an_h100, student_cap, teacher_cap):
    """Triton does not compile that."""
    logits = torch.empty(1, 8192, 16_384, dtype=torch.bfloat16)
    maps = [LogitMap(1.0, cap or math.inf) for cap in (student_cap, teacher_cap)]
    options = KDOptions(16_384, False, True, torch.float32, objective=Objective(*maps, temperature=2.0))
    with launching(device=DEVICES["H100"]):  # of a Triton that compiles clusters
        launch = chosen_launch(Logits(logits, logits, None), options, in_place=False)
    assert (launch.ctas > 1) == (student_cap is teacher_cap)


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_of_heads_take_one_launch_each(one_launch, monkeypatch, frozen):
    """Also in float16, whose gradients are counted in a power of two of their size."""
    calls, running = [], []

    def recorded(name, function):
        def call(*arguments):
            if not running:  # not what a function of the backend calls by itself
                calls.append(name)
            running.append(name)
            result = function(*arguments)
            running.pop()
            return result

        return call

    for name in ("row_statistics", "logit_gradient", "statistics_and_gradient"):
        monkeypatch.setattr(cpu, name, recorded(name, getattr(cpu, name)))
    heads = [torch.randn(*shape, dtype=torch.float16) for shape in ((N, 8), (V, 8), (N, 8), (V, 8))]
    heads[0].requires_grad_()
    heads[1].requires_grad_(not frozen)
    linear_kd_loss(*heads, torch.randint(V, (N,))).backward()
    assert calls == ["statistics_and_gradient"]


# --- as asked


def test_a_launch_can_be_asked_for(monkeypatch):
    student = torch.empty(1, N, 100_000, dtype=torch.bfloat16)
    monkeypatch.setenv(VARIABLE, "programs=5,warps=8,columns=8")
    launch = single_pass(student, student, in_place=True)
    assert (launch.splits, launch.ctas, launch.num_warps, launch.columns) == (5, 1, 8, 8)
    assert launch.columns_per_split % (8 * 32 * 8) == 0
    assert launch.columns_per_split * 4 < 100_000 <= launch.columns_per_split * 5
    monkeypatch.setenv(VARIABLE, "cluster=16,warps=4,columns=8")
    launch = single_pass(student, student, in_place=True)
    assert (launch.splits, launch.ctas, launch.lanes) == (0, 16, 16 * 4 * 32)


@pytest.mark.parametrize("text", ["both", "cluster=3,warps=8,columns=8", "programs=0,warps=8,columns=8", "cluster=16"])
def test_what_can_not_be_asked_for(monkeypatch, text):
    student, teacher, labels = inputs()
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected auto, one-launch, two-launches, .* got '{text}'"):
        kd_loss(student, teacher, labels)


def test_an_empty_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert requested() == "auto"


def test_launches_asked_for_agree(kernel_device):
    given = inputs(vocabulary=5000)
    student, teacher, labels = (tensor.detach().to(kernel_device) for tensor in given)
    results = []
    for text in (TWO, ONE, "cluster=1,warps=4,columns=4", "programs=7,warps=4,columns=4"):
        with launching(text):
            results.append(value_and_gradient(kd_loss, student, teacher, labels, temperature=3.0))
    for value, gradient in results[1:]:
        assert relative_error(value, results[0][0].double()) < 2e-7
        assert relative_error(gradient, results[0][1].double()) < 4e-7


# --- backward


def test_backward_hands_on_what_forward_has_made(one_launch):
    student, teacher, labels = inputs()
    with Operators() as operators:
        loss = kd_loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    *_, made = operators.results[0]
    assert gradient.data_ptr() == made.data_ptr()
    logits = student * 1
    (gradient,) = torch.autograd.grad(3 * kd_loss(logits, teacher, labels, inplace_backward=True), logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.3, 2.0**16, 0.0])
def test_any_upstream_gradient_and_backward_again(device, dtype, inplace, upstream):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is computed on the CPU only")
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
def test_peak_memory_is_not_above_that_of_two_launches(inplace, dtype):
    """Take a step from hidden states: logits of both models, loss, backward through the head."""
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
        with launching(plan):
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
    kernels.scale_(view, [torch.tensor(factor, dtype=torch.float64, device=kernel_device)], view)
    assert torch.equal(view, expected)
    assert torch.equal(tensor[outside.bool()], before[outside.bool()])


def test_scale_of_nothing(kernel_device):
    nothing = torch.empty(1, 0, V, device=kernel_device)
    kernels.scale_(nothing, [torch.tensor(2.0, device=kernel_device)], nothing)
