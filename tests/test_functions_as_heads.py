"""teacher_head and student_head in linear_kd_loss: functions from hidden states to logits in place of weights."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_kd import LinearKDLoss, linear_kd_loss, reference
from fused_kd.testing import memory

from .heads import CHUNKED, H_S, H_T, Given, N, V, make
from .oracle import EPSILON, relative_error
from .unread import unread

EAGER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Normed(nn.Module):
    """A head with a norm of its own before it, and a softcap behind it, whose `tanh` saves its result."""

    def __init__(self, weight: torch.Tensor, softcap: float | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(weight.shape[1], eps=1e-6, dtype=weight.dtype, device=weight.device)
        self.head = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype, device=weight.device)
        self.head.weight = nn.Parameter(weight.detach().clone())
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(hidden))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Int8(nn.Module):
    """A head whose weight is stored as int8, with one scale per row, and widened at every call."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        weight = weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.stored = (weight / self.scale).round().to(torch.int8)

    @property
    def weight(self) -> torch.Tensor:
        return self.stored * self.scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


class Seen:
    """A function that notes the shapes of the hidden states that it gets."""

    def __init__(self, function) -> None:
        self.function, self.shapes = function, []

    def __call__(self, hidden):
        self.shapes.append(tuple(hidden.shape))
        return self.function(hidden)


def linear(weight: torch.Tensor):
    return lambda hidden: F.linear(hidden, weight.detach())


def run(loss, given: Given, *, student=None, teacher=None, upstream=1.0, **options) -> dict[str, torch.Tensor]:
    """The value and the gradients of the student, whose head is a function or its weight."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in given[:2])
    if student is not None:
        options.setdefault("vocab_size", V)
    value = loss(
        hidden, weight if student is None else None,
        given.teacher_hidden, given.teacher_weight if teacher is None else None, given.labels,
        student_head=student, teacher_head=teacher, **options,
    )  # fmt: skip
    ramp = torch.arange(1, value.numel() + 1, device=value.device, dtype=value.dtype).reshape(value.shape)
    value.backward(upstream * ramp)
    assert (weight.grad is None) == (student is not None)
    return {"value": value.detach(), "hidden": hidden.grad} | ({"weight": weight.grad} if student is None else {})


def assert_matches_oracle(given: Given, make_student=None, make_teacher=None, floor=4 * EPSILON, **options) -> None:
    """Every result within twice the error of eager in the same dtype, or `floor`, of the float64 oracle."""

    def of(loss, own, **options):
        torch.manual_seed(1)  # the same norms
        student, teacher = (
            None if new is None else new(weight)
            for new, weight in ((make_student, own.weight), (make_teacher, own.teacher_weight))
        )
        return run(loss, own, student=student, teacher=teacher, **options)

    ours = of(linear_kd_loss, given, **options)
    for name in ("workspace_bytes", "compact", "counted_rows"):
        options.pop(name, None)
    eager, exact = (
        of(reference.linear_kd_loss, given, **options),
        of(reference.linear_kd_loss, given.to(torch.float64), **options),
    )
    for name in exact:
        assert exact[name].norm() > 0, name
        bound = max(2 * relative_error(eager[name], exact[name]), floor)
        assert relative_error(ours[name], exact[name]) <= bound, name


# --- values and gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_functions_give_what_weights_give(device, reduction):
    given = make(device)
    options = {"temperature": 2.0, "reduction": reduction, "workspace_bytes": CHUNKED}
    weights = run(linear_kd_loss, given, **options)
    teacher = run(linear_kd_loss, given, teacher=linear(given.teacher_weight), **options)
    for name in weights:
        assert relative_error(teacher[name], weights[name].double()) < 1e-6
    student = run(linear_kd_loss, given, student=linear(given.weight), **options)
    both = run(linear_kd_loss, given, student=linear(given.weight), teacher=linear(given.teacher_weight), **options)
    for name in ("value", "hidden"):
        assert relative_error(student[name], weights[name].double()) < 1e-6
        assert relative_error(both[name], weights[name].double()) < 1e-6


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_with_a_norm_of_their_own(device, softcap, reduction):
    """A `tanh` keeps its result for its own gradient, so the loss must not write over the logits."""
    given = make(device)

    def new(weight):
        return Normed(weight, softcap)

    assert_matches_oracle(given, new, new, temperature=2.0, reduction=reduction, workspace_bytes=CHUNKED)
    assert_matches_oracle(given, None, new, temperature=2.0, reduction=reduction, workspace_bytes=CHUNKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_teacher(device, dtype):
    given = make(device, dtype)
    head = Int8(given.teacher_weight.float())
    head.scale = head.scale.to(dtype)
    same = given._replace(teacher_weight=head.weight)
    options = {"logits_dtype": dtype}  # a function's logits have the dtype that it gives them
    found, expected = run(linear_kd_loss, given, teacher=head, **options), run(linear_kd_loss, same, **options)
    for name in expected:
        assert relative_error(found[name], expected[name].double()) < (1e-6 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_dtype(dtype, logits):
    """Without the unit of a float16 gradient, that of a mean over 2^24 rows would be 0."""
    given = make("cpu", dtype)

    def new(weight):
        def function(hidden):
            z = F.linear(hidden, weight.detach())
            return z if z.dtype == torch.float64 else z.to(logits)

        return function

    assert_matches_oracle(given, new, new, num_items=2**24, upstream=2.0**24, floor=2e-6)


@pytest.mark.parametrize("way", ["columns", "rows", "transposed", "expanded"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_in_any_memory(device, way, reduction):
    given = make(device)

    def new(weight):
        def function(hidden):
            z = F.linear(hidden, weight.detach())
            if way == "columns":  # every second of twice the columns
                return torch.stack([z, z], -1).flatten(1)[:, ::2]
            if way == "rows":
                return torch.cat([z, z], 1)[:, :V]
            if way == "expanded":  # all columns alike
                return z[:, :1].expand(-1, V)
            return z.T.contiguous().T

        return function

    assert_matches_oracle(given, new, new, reduction=reduction, workspace_bytes=CHUNKED)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_columns_than_the_vocabulary(device, reduction):
    given = make(device)
    given.labels.remainder_(1000)
    narrow = [weight.detach()[:1000].clone() for weight in (given.weight, given.teacher_weight)]
    functions = [linear(torch.cat([weight, torch.full_like(weight, torch.nan)])) for weight in narrow]
    wide = dict(zip(("student", "teacher"), functions, strict=True))
    options = {"reduction": reduction, "vocab_size": 1000}
    # The gradient of a column without meaning is 0, and 0 times NaN in the function's own product would be NaN.
    wide["student"] = linear(torch.cat([narrow[0], 1e3 * torch.ones_like(narrow[0])]))
    found = run(linear_kd_loss, given, **wide, **options)
    same = given._replace(weight=narrow[0], teacher_weight=narrow[1]).to(torch.float64)
    exact = run(reference.linear_kd_loss, same, reduction=reduction)
    for name in ("value", "hidden"):
        assert relative_error(found[name], exact[name]) < 1e-6, name


def test_parts_and_entropy(device):
    given = make(device)
    functions = {"student_head": linear(given.weight), "teacher_head": linear(given.teacher_weight)}
    options = {"temperature": 2.0, "return_parts": True, "workspace_bytes": CHUNKED}
    expected = linear_kd_loss(*given[:5], **options)
    found = linear_kd_loss(
        given.hidden, None, given.teacher_hidden, None, given.labels, vocab_size=V, **functions, **options
    )
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert relative_error(a, b.detach().double()) < 1e-6, name


def test_a_teacher_that_learns_beside_a_student_that_is_a_function():
    given = make("cpu")
    weight = given.teacher_weight.clone().requires_grad_()
    exact = given.teacher_weight.double().requires_grad_()
    options = {"teacher_grad": True}
    run(linear_kd_loss, given._replace(teacher_weight=weight), student=linear(given.weight), **options)
    double = given.to(torch.float64)._replace(teacher_weight=exact)
    run(reference.linear_kd_loss, double, student=linear(double.weight), **options)
    assert relative_error(weight.grad, exact.grad) < 1e-6


# --- calls


def test_a_function_sees_one_chunk_at_a_time():
    given = make("cpu")
    student, teacher = Seen(linear(given.weight)), Seen(linear(given.teacher_weight))
    run(linear_kd_loss, given, student=student, teacher=teacher, workspace_bytes=CHUNKED)
    assert len(student.shapes) > 1
    for width, shapes in ((H_S, student.shapes), (H_T, teacher.shapes)):
        assert sum(rows for rows, _ in shapes) == N
        assert {own for _, own in shapes} == {width}
    run(linear_kd_loss, given, student=student, teacher=teacher, workspace_bytes=CHUNKED, reduction="none")
    assert sum(rows for rows, _ in student.shapes) == 3 * N  # once more in backward


def test_ignored_rows_are_not_seen_on_the_cpu():
    given = make("cpu")
    given.labels[:3] = -100
    teacher = Seen(linear(given.teacher_weight))
    run(linear_kd_loss, given, teacher=teacher)
    assert sum(rows for rows, _ in teacher.shapes) == N - 3


def test_without_a_weight_of_the_divergence_the_teacher_is_not_called():
    given = make("cpu")

    def teacher(hidden):
        raise AssertionError

    expected = linear_kd_loss(given.hidden, given.weight, None, None, given.labels, alpha=0.0)
    found = linear_kd_loss(*given[:3], None, given.labels, teacher_head=teacher, alpha=0.0)
    assert torch.equal(found, expected)


def test_a_teacher_has_no_graph_and_its_parameters_no_gradient():
    given = make("cpu")
    head = Normed(given.teacher_weight)
    modes = []

    def teacher(hidden):
        logits = head(hidden)
        modes.append((torch.is_grad_enabled(), hidden.requires_grad, logits.requires_grad))
        return logits

    run(linear_kd_loss, given, teacher=teacher)
    assert set(modes) == {(False, False, False)}
    assert all(parameter.grad is None for parameter in head.parameters())


def test_a_students_parameters_get_no_gradient():
    given = make("cpu")
    head = Normed(given.weight)
    run(linear_kd_loss, given, student=head)
    assert all(parameter.grad is None for parameter in head.parameters())
    with torch.no_grad():
        assert not linear_kd_loss(given.hidden, None, *given[2:5], student_head=head).requires_grad


def test_autocast_holds_inside_functions(device):
    given = make(device)
    dtypes = []

    def noting(weight):
        def function(hidden):
            assert not weight.requires_grad
            logits = F.linear(hidden, weight)
            dtypes.append(logits.dtype)
            return logits

        return function

    functions = {"student": noting(given.weight.detach()), "teacher": noting(given.teacher_weight)}
    for reduction in ("mean", "none"):
        with torch.autocast(device.type, torch.bfloat16):
            value = linear_kd_loss(
                given.hidden, None, given.teacher_hidden, None, given.labels, vocab_size=V, reduction=reduction,
                student_head=functions["student"], teacher_head=functions["teacher"],
            )  # fmt: skip
        value.sum().backward()  # outside: functions are called again under the autocast of forward
    assert set(dtypes) == {torch.bfloat16}
    assert given.hidden.grad.dtype == torch.float32


def test_the_logits_of_a_chunk_are_gone_when_the_next_are_made():
    """So is the graph of a student's function, which may hold more."""
    given = make("cpu")
    alive = {"student": [], "teacher": []}

    def watched(side, weight):
        logits = []

        def function(hidden):
            alive[side].append(sum(memory() is not None for memory in logits))
            found = F.linear(hidden, weight.detach())
            logits.append(weakref.ref(found.untyped_storage()))
            return found

        return function

    functions = {side: watched(side, weight) for side, weight in (("student", given[1]), ("teacher", given[3]))}
    run(linear_kd_loss, given, **functions, workspace_bytes=CHUNKED)
    for side in alive:
        assert len(alive[side]) > 1
        assert not any(alive[side]), side


def test_memory_of_one_chunk(small_blocks):
    """A function's logits, their gradient and the teacher's logits, of one chunk."""
    vocabulary, width, rows = 4096, 16, 64
    weight, hidden = torch.randn(vocabulary, width), torch.randn(rows, width, requires_grad=True)
    labels, chunk = torch.randint(vocabulary, (rows,)), 8

    def step() -> None:
        linear_kd_loss(
            hidden, None, hidden.detach(), None, labels, student_head=linear(weight), teacher_head=linear(weight),
            vocab_size=vocabulary, workspace_bytes=2 * chunk * vocabulary * 4,
        ).backward()  # fmt: skip

    taken = memory.peak_bytes(step, torch.device("cpu"))
    assert taken <= 3 * chunk * vocabulary * 4 + small_blocks + 8 * hidden.nbytes


# --- rows that do not count


def absmax(weight):
    """A head that quantises its input by one scale for the whole chunk, as dynamic int8 heads do."""

    def function(hidden):
        scale = hidden.detach().abs().amax() / 127
        quantised = hidden + (torch.round(hidden / scale) * scale - hidden).detach()
        return F.linear(quantised, weight.detach())

    return function


def unit(weight):
    """A head that divides by a norm, which has no gradient at 0."""
    return lambda hidden: F.linear(hidden / hidden.norm(dim=-1, keepdim=True), weight.detach())


@pytest.mark.parametrize(
    ("options", "reduction"),
    [({}, "mean"), ({"compact": False}, "mean"), ({"compact": False}, "none"), ({"counted_rows": 12}, "mean")],
    ids=str,
)
@pytest.mark.parametrize("kind", [absmax, unit, linear])
def test_an_ignored_row_may_hold_anything(device, reduction, options, kind):
    """It is left out, or the function sees zeros in its place: a function's rows may depend on one another."""
    given = make(device)
    given.labels[[3, 11, 12]] = -100
    functions = {"student": kind(given.weight), "teacher": kind(given.teacher_weight)}
    clean = run(linear_kd_loss, given, **functions, reduction=reduction, compact=True)
    hidden, teacher_hidden = given.hidden.detach().clone(), given.teacher_hidden.clone()
    hidden[3] = teacher_hidden[3] = torch.nan
    hidden[11] = teacher_hidden[12] = torch.inf
    dirty = given._replace(hidden=hidden, teacher_hidden=teacher_hidden, labels=unread(given.labels))
    found = run(linear_kd_loss, dirty, **functions, reduction=reduction, **options)
    assert not found["hidden"][[3, 11, 12]].any()
    for name in clean:
        assert relative_error(found[name], clean[name].double()) < 1e-6, name


def test_more_rows_than_counted_give_nan():
    given = make("cpu")
    given = given._replace(labels=unread(given.labels))
    found = run(linear_kd_loss, given, student=linear(given.weight), counted_rows=N - 1)
    assert found["value"].isnan()
    assert found["hidden"].isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_counts(device, reduction):
    given = make(device)
    given.labels.fill_(-100)
    functions = {"student": linear(given.weight), "teacher": linear(given.teacher_weight)}
    for name, result in run(linear_kd_loss, given, reduction=reduction, **functions).items():
        assert not result.any(), name


# --- around PyTorch


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_around_a_break_of_the_graph(reduction):
    given = make("cpu")
    functions = {"student": Normed(given.weight), "teacher": Normed(given.teacher_weight)}

    def loss(hidden, *arguments, **options):
        return 2 * linear_kd_loss(2 * hidden, *arguments, **options)

    expected = run(loss, given, reduction=reduction, **functions)
    found = run(torch.compile(loss, backend="aot_eager"), given, reduction=reduction, **functions)
    for name in expected:
        assert relative_error(found[name], expected[name].double()) < 1e-6, name


def test_a_call_in_eager_mode_imports_no_compiler():
    """Importing one takes seconds, and Triton with it, which then can no longer be interpreted."""
    code = (
        "import sys, torch, fused_kd\n"
        "x, w, labels = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8), torch.zeros(4, dtype=torch.long)\n"
        "options = {'teacher_head': lambda x: x @ w.T, 'weight_grad_out': torch.zeros(9, 8)}\n"
        "fused_kd.linear_kd_loss(x, w, x.detach(), None, labels, **options).backward()\n"
        "print({'triton', 'torch._dynamo.eval_frame'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=EAGER)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_compiled_head_runs_compiled():
    given = make("cpu")
    rows = []

    def backend(graph, _):
        def compiled(*arguments):
            rows.append(1)
            return graph(*arguments)

        return compiled

    head = torch.compile(Normed(given.teacher_weight), backend=backend)
    found = run(linear_kd_loss, given, teacher=head, workspace_bytes=CHUNKED)
    assert len(rows) == 3
    expected = run(linear_kd_loss, given, teacher=head._orig_mod, workspace_bytes=CHUNKED)
    assert all(relative_error(found[name], expected[name].double()) < 1e-6 for name in expected)


def test_refused_where_one_graph_is_asked_for():
    given = make("cpu")
    compiled = torch.compile(linear_kd_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(*given[:3], None, given.labels, teacher_head=Normed(given.teacher_weight))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_refused_under_transforms(side):
    given = make("cpu")

    def loss(hidden):
        weights = None if side == "student" else given.weight, None if side == "teacher" else given.teacher_weight
        return linear_kd_loss(
            hidden, weights[0], given.teacher_hidden, weights[1], given.labels, **{f"{side}_head": linear(given.weight)}
        )

    with pytest.raises(ValueError, match=f"{side}_head: expected None under the transforms of torch.func"):
        torch.func.grad(loss)(given.hidden.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    given = make("cpu")
    student, teacher = Normed(given.weight), Normed(given.teacher_weight)

    def loss(hidden, *arguments, **options):
        def step(hidden):
            return linear_kd_loss(hidden, *arguments, **options)

        return torch.utils.checkpoint.checkpoint(step, hidden, use_reentrant=reentrant)

    expected = run(linear_kd_loss, given, student=student, teacher=teacher)
    found = run(loss, given, student=student, teacher=teacher)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_second_derivatives_are_refused():
    given = make("cpu")
    for reduction in ("mean", "none"):
        loss = linear_kd_loss(given.hidden, None, *given[2:5], student_head=linear(given.weight), reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), given.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second|derivative"):
            gradient.sum().backward()


def test_a_teacher_under_inference_mode():
    given = make("cpu")
    with torch.inference_mode():
        teacher_hidden = given.teacher_hidden.clone()
    head = torch.inference_mode()(Normed(given.teacher_weight))
    for reduction in ("mean", "none"):
        found = run(linear_kd_loss, given._replace(teacher_hidden=teacher_hidden), teacher=head, reduction=reduction)
        expected = run(linear_kd_loss, given, teacher=head, reduction=reduction)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_module_takes_functions():
    given = make("cpu")
    student, teacher = Normed(given.weight), Normed(given.teacher_weight)
    module = LinearKDLoss(temperature=2.0, vocab_size=V)
    found = module(
        given.hidden, None, given.teacher_hidden, None, given.labels, student_head=student, teacher_head=teacher
    )
    expected = linear_kd_loss(
        given.hidden, None, given.teacher_hidden, None, given.labels,
        student_head=student, teacher_head=teacher, temperature=2.0, vocab_size=V,
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert not list(module.parameters())  # a head is an argument, no part of the module


def test_beside_the_callers_sum_of_the_weights_gradient():
    given = make("cpu")
    total, head = torch.zeros(V, H_S), linear(given.teacher_weight)
    expected = run(linear_kd_loss, given, teacher=head)
    given.weight.requires_grad_(False)
    loss = linear_kd_loss(*given[:3], None, given.labels, teacher_head=head, weight_grad_out=total)
    loss.backward()
    assert relative_error(total, expected["weight"].double()) < 1e-6
    assert relative_error(given.hidden.grad, expected["hidden"].double()) < 1e-6


def test_int8_of_pytorch_itself():
    """Dynamic quantisation: PyTorch's own linear layer of int8 products, on the CPU."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if (
        "fbgemm" not in torch.backends.quantized.supported_engines
        and "x86" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("PyTorch without int8 products on this CPU")
    given = make("cpu")
    plain = nn.Sequential(nn.Linear(H_T, V))
    head = quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)[0]
    assert "quantized" in type(head).__module__
    with torch.no_grad():
        logits = head(given.teacher_hidden)
    student = F.linear(given.hidden, given.weight)
    expected = reference.kd_loss(student, logits, given.labels, temperature=2.0)
    found = linear_kd_loss(*given[:3], None, given.labels, teacher_head=head, temperature=2.0)
    assert relative_error(found, expected.detach().double()) < 1e-6
    gradients = (torch.autograd.grad(loss, (given.hidden, given.weight)) for loss in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b.double()) < 1e-6


# --- errors


def test_an_exception_in_a_function_is_the_callers_and_changes_nothing():
    given = make("cpu")
    calls = []

    def teacher(hidden):
        calls.append(hidden)
        if len(calls) == 2:
            raise KeyError("of the function")
        return F.linear(hidden, given.teacher_weight)

    options = {"teacher_head": teacher, "workspace_bytes": CHUNKED}
    before = [tensor.detach().clone() for tensor in given]
    with pytest.raises(KeyError, match="of the function"):
        linear_kd_loss(*given[:3], None, given.labels, **options)
    assert all(map(torch.equal, before, given))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    expected = linear_kd_loss(*given[:5], workspace_bytes=CHUNKED)
    assert torch.equal(linear_kd_loss(*given[:3], None, given.labels, **options), expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("error", "wrong", "message"),
    [
        (
            ValueError,
            lambda z: z[:, :-1],
            rf"expected logits of shape \({N}, V\) with V = {V} for .*, got \({N}, {V - 1}\)",
        ),
        (ValueError, lambda z: torch.cat([z, z], 1), rf"got \({N}, {2 * V}\); if both models only pad .* vocab_size="),
        (ValueError, lambda z: z[:-1], rf"got \({N - 1}, {V}\)"),
        (ValueError, lambda z: z[None], rf"got \(1, {N}, {V}\)"),
        (ValueError, lambda z: z.sum(), r"got \(\)"),
        (ValueError, lambda z: z.to("meta"), "expected logits on the device of its input, cpu, got meta"),
        (TypeError, lambda z: (z,), r"its result: expected a tensor, got \("),
        (TypeError, lambda z: z.long(), "its result: expected dtype float32, .*, got torch.int64; pass logits"),
        (TypeError, lambda z: z.double(), "expected float64 logits from float64 hidden states only"),
    ],
)
def test_wrong_logits(side, error, wrong, message):
    given = make("cpu")
    weights = {"student": given.weight, "teacher": given.teacher_weight}
    function, weights[side] = (lambda weight: lambda hidden: wrong(F.linear(hidden, weight)))(weights[side]), None
    with pytest.raises(error, match=f"^{side}_head: .*{message}"):
        linear_kd_loss(
            given.hidden, weights["student"], given.teacher_hidden, weights["teacher"], given.labels,
            **{f"{side}_head": function},
        )  # fmt: skip


def test_too_few_columns_for_vocab_size():
    given = make("cpu")
    with pytest.raises(ValueError, match=r"^teacher_head: .* with at least vocab_size = 1300 columns"):
        linear_kd_loss(
            given.hidden, None, given.teacher_hidden, None, given.labels, vocab_size=1300,
            student_head=linear(torch.ones(1300, H_S)), teacher_head=linear(given.teacher_weight),
        )  # fmt: skip


@pytest.mark.parametrize("decorator", [torch.no_grad(), torch.inference_mode(), lambda f: lambda x: f(x.detach())])
def test_a_students_function_needs_a_graph(decorator):
    given = make("cpu")
    head = decorator(linear(given.weight))
    with pytest.raises(
        ValueError, match=r"student_head: expected logits through which its hidden states get a gradient"
    ):
        linear_kd_loss(given.hidden, None, *given[2:5], student_head=head)
    with torch.no_grad():  # where none is needed it may have none
        linear_kd_loss(given.hidden, None, *given[2:5], student_head=head)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"teacher_head": 3}, "teacher_head: expected a function from hidden states to logits, got 3"),
        (ValueError, {"teacher_head": len}, "teacher_weight: expected None with teacher_head"),
        (ValueError, {"student_head": len}, "student_weight: expected None with student_head"),
        (ValueError, {"teacher_head": len, "teacher_weight": None, "teacher_bias": torch.ones(V)},
         "teacher_bias: expected None with teacher_head"),
        (ValueError, {"teacher_head": len, "teacher_weight": None, "teacher_grad": True},
         "teacher_grad: expected False with teacher_head"),
        (ValueError, {"teacher_head": len, "teacher_weight": None, "memory": "lean"},
         "memory: expected 'default' with teacher_head"),
        (ValueError, {"teacher_head": len, "teacher_weight": None, "teacher_hidden": None},
         "teacher_hidden: expected a tensor beside teacher_head"),
        (ValueError, {"teacher_head": len, "teacher_weight": None, "student_head": len, "student_weight": None},
         "vocab_size: expected the number of columns, since no head has a weight"),
        (ValueError, {"student_head": len, "student_weight": None, "weight_grad_out": torch.zeros(V, H_S)},
         "weight_grad_out: expected None with student_head"),
    ],
)  # fmt: skip
def test_errors(error, arguments, message):
    given = make("cpu")
    tensors = dict(
        zip(("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels"), given[:5], strict=True)
    )
    with pytest.raises(error, match=message):
        linear_kd_loss(**tensors | arguments)
