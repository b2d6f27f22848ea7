"""Both losses under torch.compile and torch.export: one graph, equal to eager mode, with no more memory kept alive."""

import functools
import io
import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from fused_kd import KDLoss, LinearKDLoss, kd_loss, linear_kd_loss
from fused_kd import operators as ops
from fused_kd.divergences import Objective
from fused_kd.heads.products import RELEASE
from fused_kd.launching import ONE, TWO, launching, single_pass
from fused_kd.logit_map import IDENTITY_MAP, LogitMap
from fused_kd.rows import RowOptions
from fused_kd.sweep import KDOptions

from .oracle import relative_error

N, V = 6, 501
H_S, H_T = 16, 24
GRAPH = "aot_eager"  # captures the graphs of both passes; Inductor also compiles them, at a second per kernel on a CPU
INDUCTOR = "inductor" if shutil.which("g++") or shutil.which("clang++") else GRAPH
by_inductor = functools.partial(pytest.param, INDUCTOR, marks=pytest.mark.slow)  # the same with Inductor's code
both = pytest.mark.parametrize("backend", [GRAPH, by_inductor()])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function, *leaves):
    value = function(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)  # unused: a teacher that is a constant
    return [value.detach(), *(gradient for gradient in found if gradient is not None)]


def equal_to_the_last_bit(function, *leaves, backend, **options):
    """Gradients, and the value but for the order in which the compiler adds rows."""
    (value, *ours), (eager_value, *eager) = (
        gradients(f, *leaves) for f in (torch.compile(function, backend=backend, fullgraph=True, **options), function)
    )
    return relative_error(value, eager_value.double()) < 2e-7 and all(map(torch.equal, ours, eager))


IN_PLACE = {"num_items": 10, "return_parts": True, "inplace_backward": True}
IN_PLACE_OF_BOTH = {"inplace_backward": True, "teacher_grad": True}


@pytest.mark.parametrize(
    ("backend", "dynamic", "options"),
    [
        *itertools.product(
            [GRAPH],
            [False, True],
            [
                {},
                {"temperature": 3.0, "reduction": "none"},
                {"alpha": 1.0, "reduction": "sum", "vocab_size": 400, "teacher_grad": True},
                {"alpha": 0.0, "logit_softcap": 5.0, "logit_scale": (0.5, 1.0)},
                IN_PLACE,
                IN_PLACE_OF_BOTH,
            ],
        ),
        by_inductor(True, {}),
        by_inductor(False, IN_PLACE),
        by_inductor(False, IN_PLACE_OF_BOTH),
    ],
)
def test_kd_loss_is_one_graph(backend, dynamic, options):
    labels = torch.randint(400, (2, N))
    labels[0, 3] = -100

    def loss(hidden, teacher):
        teacher = 2 * teacher if options.get("teacher_grad") else teacher.detach()
        result = kd_loss(3 * hidden.tanh(), teacher, labels[:, : hidden.shape[1]], **options)
        return (result.loss + 0 * result.divergence if options.get("return_parts") else result).sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (N, N - 2) if dynamic else (N,):
        leaves = [torch.randn(2, rows, V, requires_grad=True) for _ in range(2)]
        for ours, eager in zip(gradients(compiled, *leaves), gradients(loss, *leaves), strict=True):
            assert relative_error(ours, eager.double()) < 1e-6  # the compiler's own tanh


@both
def test_kd_loss_is_equal_to_the_last_bit(backend):
    teacher, labels = torch.randn(N, V), torch.randint(V, (N,))
    student = torch.randn(N, V, requires_grad=True)
    assert equal_to_the_last_bit(
        lambda student: kd_loss(student, teacher, labels, temperature=2.0), student, backend=backend
    )


BOTH_IN_CHUNKS = {"workspace_bytes": 10_240, "teacher_grad": True}


@pytest.mark.parametrize(
    ("backend", "dynamic", "options"),
    [
        *itertools.product(
            [GRAPH],
            [False, True],
            [
                {},
                {"temperature": 3.0, "reduction": "none", "logits_dtype": torch.float32},
                {"alpha": 1.0, "reduction": "sum", "vocab_size": 400, "logit_softcap": 5.0},
                BOTH_IN_CHUNKS,
            ],
        ),
        *itertools.starmap(by_inductor, itertools.product([False, True], [{}, BOTH_IN_CHUNKS])),
    ],
)
def test_linear_kd_loss_is_one_graph_and_equal_to_the_last_bit(backend, dynamic, options):
    weight, teacher_weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((V, H_S), (V, H_T), (V,)))
    labels = torch.randint(400, (N,))

    def loss(hidden, weight, bias, *teacher):
        if not options.get("teacher_grad"):
            teacher = [tensor.detach() for tensor in teacher]
        return linear_kd_loss(hidden, weight, *teacher, labels[: hidden.shape[0]], student_bias=bias, **options).sum()

    for rows in (N, N - 2) if dynamic else (N,):
        hidden, teacher_hidden = torch.randn(rows, H_S, requires_grad=True), torch.randn(rows, H_T, requires_grad=True)
        leaves = hidden, weight, bias, teacher_hidden, teacher_weight
        assert equal_to_the_last_bit(loss, *leaves, backend=backend, dynamic=dynamic)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_kd_loss_under_autocast_is_one_graph(dtype, backend):
    """A head in float32 with hidden states in float32, or in bfloat16, as a last nn.Linear gives them."""
    teacher, labels = (torch.randn(N, H_T), torch.randn(V, H_T)), torch.randint(V, (N,))

    def loss(hidden, weight):
        with torch.autocast("cpu", dtype=dtype):
            return linear_kd_loss(hidden, weight, *teacher, labels, temperature=2.0)

    for hidden in (torch.randn(N, H_S), torch.randn(N, H_S, dtype=torch.bfloat16)):
        leaves = hidden.requires_grad_(), torch.randn(V, H_S, requires_grad=True)
        assert equal_to_the_last_bit(loss, *leaves, backend=backend)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{"counted_rows": 4}, {"compact": False}, {"compact": True, "counted_rows": 5}])
def test_rows_are_gathered_in_one_graph(dynamic, reduction, options):
    """The bound leaves rows out; those that do not count may hold anything."""
    hidden, weight = torch.randn(N, H_S), torch.randn(V, H_S, requires_grad=True)
    teacher, labels = (torch.randn(N, H_T), torch.randn(V, H_T)), torch.randint(V, (N,))
    labels[[1, 4]] = -100
    hidden[1] = torch.nan

    def loss(hidden, weight):
        return linear_kd_loss(hidden, weight, *teacher, labels, reduction=reduction, **options).sum()

    found, expected = (
        gradients(f, hidden.requires_grad_(), weight)
        for f in (torch.compile(loss, backend=GRAPH, fullgraph=True, dynamic=dynamic), loss)
    )
    for ours, eager in zip(found, expected, strict=True):
        assert relative_error(ours, eager.double()) < 1e-6
    assert not found[1][[1, 4]].any()


def test_a_bound_that_changes_and_one_that_is_too_small_are_compiled():
    hidden, *rest, labels = given_to(linear_kd_loss)
    labels[0] = -100
    counted = CompileCounterWithBackend(GRAPH)
    compiled = torch.compile(linear_kd_loss, backend=counted, fullgraph=True)
    expected = linear_kd_loss(hidden, *rest, labels).double()
    for bound in (N - 1, N, N + 1, N + 2, N + 3):
        assert relative_error(compiled(hidden, *rest, labels, counted_rows=bound), expected) < 1e-6
    for bound in (N - 2, N - 3):
        assert compiled(hidden, *rest, labels, counted_rows=bound).isnan()
    if not RECOMPILES:
        assert counted.frame_count <= 4


def test_compact_is_refused_in_a_graph():
    given = given_to(linear_kd_loss)
    compiled = torch.compile(functools.partial(linear_kd_loss, compact=True), backend=GRAPH)
    with pytest.raises(Exception, match=r"compact: expected None or False under torch.compile"):
        compiled(*given)
    labels = given[-1]
    labels[:3] = -100
    every_row = torch.compile(linear_kd_loss, backend=GRAPH, fullgraph=True)
    assert relative_error(every_row(*given), linear_kd_loss(*given).double()) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_callers_sum_of_a_gradient_breaks_the_graph(reduction):
    """The operations before and after it are compiled, and the sum gets its gradient once."""
    hidden, *rest = given_to(linear_kd_loss)
    weight = rest[0].requires_grad_()

    def step(hidden, out):
        loss = linear_kd_loss(3 * hidden.tanh(), *rest, reduction=reduction, weight_grad_out=out)
        return (2 * loss - loss).sum()

    found = []
    for function in (torch.compile(step, backend=GRAPH), step):
        out = torch.zeros(V, H_S)
        value = function(hidden, out)
        found.append([value.detach(), *torch.autograd.grad(value, hidden), out])
    assert weight.grad is None
    for ours, eager in zip(*found, strict=True):
        assert relative_error(ours, eager.double()) < 1e-6
    assert found[0][2].any()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"_apply|disable"):
        torch.compile(step, backend=GRAPH, fullgraph=True)(hidden, torch.zeros(V, H_S))


def given_to(loss):
    """A student that wants a gradient, and the rest."""
    labels = torch.randint(V, (N,))
    if loss in (kd_loss, KDLoss):
        return torch.randn(N, V, requires_grad=True), torch.randn(N, V), labels
    hidden = torch.randn(N, H_S, requires_grad=True)
    return hidden, torch.randn(V, H_S), torch.randn(N, H_T), torch.randn(V, H_T), labels


TEMPERATURES = [1.0 + 0.15 * i for i in range(15)] + [2.0, 0.5, 1.0, 20.0, 1e-3]
RECOMPILES = RELEASE < (2, 9)  # for every temperature: nothing tells there whether one is a constant


@pytest.mark.skipif(RECOMPILES, reason="PyTorch 2.7 does not say which numbers of a graph are constants")
@pytest.mark.parametrize(
    ("backend", "temperatures", "reduction"),
    [
        *itertools.product([GRAPH], [TEMPERATURES, list(range(1, 10))], ["mean", "none"]),
        by_inductor(TEMPERATURES, "mean"),
    ],
)
@pytest.mark.parametrize("loss", [kd_loss, linear_kd_loss])
def test_a_temperature_that_changes_is_compiled_twice(loss, backend, temperatures, reduction):
    """The first time as a constant of the graph; the second graph takes any."""
    student, *rest = given_to(loss)

    def step(student, temperature):
        return loss(student, *rest, temperature=temperature, reduction=reduction, alpha=0.3).sum()

    counted = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counted, fullgraph=True)
    for temperature in temperatures:
        (value, *ours), (eager_value, *eager) = (
            gradients(lambda student, f=f, T=temperature: f(student, T), student) for f in (compiled, step)
        )
        assert relative_error(value, eager_value.double()) < 2e-7
        assert all(map(torch.equal, ours, eager))
    assert counted.frame_count == 2


@pytest.mark.skipif(RECOMPILES, reason="PyTorch 2.7 does not say which numbers of a graph are constants")
@pytest.mark.parametrize("module", [KDLoss, LinearKDLoss])
def test_a_temperature_of_a_module_that_changes_is_compiled_twice(module):
    given, loss = given_to(module), module(temperature=2.0)
    counted = CompileCounterWithBackend(GRAPH)
    compiled = torch.compile(loss, backend=counted, fullgraph=True)
    for temperature in TEMPERATURES:
        loss.temperature = temperature
        assert relative_error(compiled(*given), loss(*given).double()) < 2e-7
    assert counted.frame_count == 2


@pytest.mark.parametrize("loss", [kd_loss, linear_kd_loss])
def test_a_temperature_that_stays_is_a_constant_of_the_graph(loss):
    """A tensor on the CPU in the graph would cost CUDA graphs."""
    student, *rest = given_to(loss)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, backend=keep, fullgraph=True)
    for rows in (N, N - 2):  # with a size that changes
        cut = [tensor[:rows] if tensor.shape[0] == N else tensor for tensor in (student, *rest)]
        compiled(*cut, temperature=3.0)
    assert len(graphs) == 2
    assert all(node.meta["example_value"].dim() for graph in graphs for node in graph.graph.find_nodes(op="placeholder")
               if isinstance(node.meta.get("example_value"), torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("loss", [kd_loss, linear_kd_loss])
@pytest.mark.parametrize("label", [V, -1])
def test_a_label_that_is_no_class_gives_nan_in_a_compiled_loss(loss, label):
    """In eager mode it is an IndexError.  An assertion in the graph would refuse `torch.vmap`."""
    student, *rest, labels = given_to(loss)
    labels[2] = label
    with pytest.raises(IndexError, match=f"labels: .* got {label}"):
        loss(student, *rest, labels)
    compiled = torch.compile(loss, backend=GRAPH, fullgraph=True)
    assert compiled(student, *rest, labels).isnan()
    rows = compiled(student, *rest, labels, reduction="none")
    (gradient,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
    for found in (rows[:, None], gradient):
        assert found[2].isnan().all()
        assert found.isnan().sum() == found.shape[1]


def test_a_compiled_teacher_that_requires_grad_is_warned_of():
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V, requires_grad=True)
    with pytest.warns(UserWarning, match="teacher_logits requires grad"):
        torch.compile(lambda s, t: kd_loss(s, t, alpha=1.0), backend=GRAPH)(student, teacher).backward()
    assert teacher.grad is None


class Step(torch.nn.Module):
    """Two heads and the loss."""

    def __init__(self, from_logits):
        super().__init__()
        self.student, self.teacher = torch.nn.Linear(H_S, V, bias=False), torch.nn.Linear(H_T, V, bias=False)
        self.from_logits = from_logits

    def forward(self, hidden, teacher_hidden, labels):
        hidden = hidden.tanh()
        if self.from_logits:
            with torch.no_grad():
                teacher_logits = self.teacher(teacher_hidden)
            return kd_loss(self.student(hidden), teacher_logits, labels, temperature=2.0)
        heads = hidden, self.student.weight, teacher_hidden, self.teacher.weight
        return linear_kd_loss(*heads, labels, temperature=2.0)


def step_inputs(rows):
    return torch.randn(rows, H_S), torch.randn(rows, H_T), torch.randint(V, (rows,))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("from_logits", [True, False])
def test_export_of_the_forward_pass(from_logits, strict):
    if RELEASE < (2, 9):
        pytest.skip("PyTorch 2.7 loses a dynamic size if strict, and saves no infinite number (a softcap that is none)")
    if RELEASE < (2, 11) and not strict:
        pytest.skip("PyTorch 2.9 loses a dynamic size if not strict")
    step, rows = Step(from_logits), torch.export.Dim("rows", min=1, max=4096)
    shapes = ({0: rows}, {0: rows}, {0: rows})
    program = torch.export.export(step, step_inputs(N), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for inputs in (step_inputs(N), step_inputs(3 * N)):
        assert torch.equal(loaded(*inputs), step(*inputs))


@both
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_compiler_keeps_no_more_logits_alive_than_eager_mode(from_logits, backend):
    step, inputs = Step(from_logits), step_inputs(4 * N)

    def saved(function):
        """Shapes of the tensors of at least N V elements that wait for backward."""
        kept = {}

        def pack(tensor):
            if tensor.numel() >= 4 * N * V:
                kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(*inputs)
        return sorted(kept.values())

    expected = [4 * N * V] * 2 if from_logits else []
    with launching(TWO):  # as a compiled loss takes
        assert saved(torch.compile(step, backend=backend, fullgraph=True)) == saved(step) == expected
    with launching(ONE):
        assert saved(step) == expected[:1]  # the gradient alone


def opcheck(operator, *arguments):
    """Check an operator with a temperature that is a number, and that is a tensor; the results are equal."""
    traced = list(arguments)
    (place,) = [i for i, a in enumerate(operator.default._schema.arguments) if a.name == "temperature"]
    traced[place] = torch.tensor(arguments[place], dtype=torch.float64)
    torch.library.opcheck(operator.default, arguments)
    torch.library.opcheck(operator.traced, tuple(traced))
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in given] for given in (arguments, traced)]
    results = operator(*copies[0]), operator.traced(*copies[1])
    for ours, of_float in zip(*(pytree.tree_leaves(result) for result in results), strict=True):
        assert torch.equal(ours, of_float)
    return results[0]


@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize("maps", [(IDENTITY_MAP, IDENTITY_MAP), (LogitMap(0.5, 4.0), LogitMap(2.0))])
@pytest.mark.parametrize(("reduce", "parts"), [(True, False), (True, True), (False, True)])
def test_operators_pass_opcheck(maps, teacher_grad, reduce, parts):
    student, teacher, labels = torch.randn(2, 3, 11), torch.randn(1, 6, 9), torch.randint(9, (6,))
    weights = torch.rand(3, 6, dtype=torch.float64)
    weights[:, 2] = 0
    options = ops.packed(KDOptions(9, True, True, torch.float32, reduce, parts, Objective(*maps, temperature=2.0)))
    *_, statistics = opcheck(ops.losses.packet, student, teacher, labels, weights, *options)
    upstream = torch.rand(()) if reduce else torch.rand(6)
    given = student, teacher, labels, statistics, weights, upstream, teacher_grad, *options
    opcheck(ops.logit_gradient.packet, *given)
    opcheck(ops.logit_gradient_, *given)
    if not teacher_grad:
        launch = list(single_pass(student, teacher, 9, in_place=True, always=True))
        opcheck(ops.losses_and_gradient.packet, student, teacher, labels, weights, launch, *options)
        opcheck(ops.losses_and_gradient_, student, teacher, labels, weights, launch, *options)


@pytest.mark.parametrize("sequence", [0, 3])
@pytest.mark.parametrize("given", ["labels", "token_weights", "alpha", "num_items", "all"])
def test_the_operator_of_the_row_weights_passes_opcheck(device, sequence, given):
    tensors = {
        "labels": torch.randint(9, (6,)), "token_weights": torch.rand(6), "alpha": torch.rand(()),
        "num_items": torch.tensor(7),
    }  # fmt: skip
    some = [tensor.to(device) if given in (name, "all") else None for name, tensor in tensors.items()]
    options = RowOptions(6, sequence if some[0] is not None else 0, 9, -100, True, 0.3, None, 2.0)
    opcheck(ops.row_weights, *some, torch.randn(6, 9, device=device), *options)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((True,) * 3, (True,) * 3), ((True, True, False),) * 2, ((False, True, True), (False,) * 3), ((False,) * 3,) * 2],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [False, True])
def test_the_linear_operator_passes_opcheck(student, teacher, dtype, parts):
    lora = ((4, 2), (9, 2)) if student == (True,) * 3 else ()
    shapes = (4, 3), (9, 3), (9,), *lora, (4, 5), (9, 5), (9,)
    heads = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    if not lora:
        heads[3:3] = None, None
    weights = torch.rand(3, 4, dtype=torch.float64)
    objective = Objective(LogitMap(1.0, 4.0), LogitMap(2.0, 4.0), temperature=2.0)
    kd = ops.packed(KDOptions(8, True, True, torch.float32, parts=parts, objective=objective))
    options = [*student, *[bool(lora)] * 2, *teacher], dtype, dtype, None, 2048, "default"
    for upstream in (None, torch.rand(4)):
        arguments = *heads, torch.randint(8, (4,)), weights, upstream, *kd, *options
        torch.library.opcheck(torch.ops.fused_kd.linear_losses.default, arguments)
