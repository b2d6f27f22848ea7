"""Objects as the option `divergence`: in modules, copies, compilers and transforms; and divergences of one's own."""

import copy
import dataclasses
import os
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fused_kd import KDLoss, LinearKDLoss, divergences, kd_loss, linear_kd_loss, reference
from fused_kd.divergences import DIVERGENCES, JSD, Divergence, ForwardKL, SkewKL, SkewReverseKL, TotalVariation

from .custom import AlphaDivergence, TriangularDiscrimination
from .divergences import NAMES, OBJECTS, each_object
from .oracle import EPSILON, relative_error

N, V, H_S, H_T = 6, 203, 8, 6
OWN = [AlphaDivergence(0.3), AlphaDivergence(0.5), AlphaDivergence(order=0.8)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(device="cpu", dtype=torch.float32):
    student, teacher = (3 * torch.randn(2, N, V, dtype=dtype)).to(device)
    return student, teacher, torch.randint(V, (N,), device=device)


def heads(device="cpu"):
    return [torch.randn(*shape, device=device) for shape in ((N, H_S), (V, H_S), (N, H_T), (V, H_T))]


# Names, objects, modules


@each_object
def test_an_object_is_a_value(divergence):
    again = type(divergence)(*divergence.parameters)
    assert divergence == again
    assert hash(divergence) == hash(again)
    assert eval(repr(divergence), vars(divergences)) == divergence
    assert pickle.loads(pickle.dumps(divergence)) == divergence
    assert copy.deepcopy(divergence).parameters == divergence.parameters
    assert divergences.of(*divergences.named(divergence)) == divergence
    assert dataclasses.replace(divergence) == divergence
    with pytest.raises(dataclasses.FrozenInstanceError):
        divergence.name = "other"


def test_other_parameters_are_another_divergence():
    assert JSD(0.3) != JSD(0.5)
    assert SkewKL() != SkewReverseKL()
    given = logits()
    assert not torch.allclose(kd_loss(*given, divergence=JSD(0.3)), kd_loss(*given, divergence=JSD()))


@each_object
@pytest.mark.parametrize("module", [KDLoss, LinearKDLoss])
def test_a_module_takes_an_object(module, divergence):
    labels = torch.randint(V, (N,))
    if module is KDLoss:
        given, loss = logits()[:2], kd_loss
    else:
        given, loss = heads(), linear_kd_loss
    made = module(divergence=divergence)
    expected = loss(*given, labels, divergence=divergence)
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(each(*given, labels), expected)
        assert each.divergence == divergence
    shown = "" if divergence == ForwardKL() else f"divergence={divergence!r}"
    assert repr(made) in (f"{module.__name__}({shown})", f"{module.__name__}(divergence={divergence!r})")
    made.divergence = "tvd"
    assert torch.equal(made(*given, labels), loss(*given, labels, divergence=TotalVariation()))
    assert repr(made) == f"{module.__name__}(divergence='tvd')"


@pytest.mark.parametrize("wrong", ["kl", "JSD", "", None, 0.5, JSD, ["jsd"], JSD().parameters])
def test_what_is_no_divergence_is_refused(wrong):
    expected = r"^divergence: expected 'forward_kl', .*'tvd'.* or an object of fused_kd.divergences, got "
    for call in (
        lambda: kd_loss(*logits(), divergence=wrong),
        lambda: linear_kd_loss(*heads(), torch.zeros(N, dtype=torch.long), divergence=wrong),
        lambda: KDLoss(divergence=wrong),
        lambda: LinearKDLoss(divergence=wrong),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


# Compilers and transforms


@each_object
def test_compiled(divergence, fresh_compiler):
    student, teacher, labels = logits()
    student.requires_grad_()

    def loss(student):
        return kd_loss(student, teacher, labels, temperature=2.0, divergence=divergence, return_parts=True)

    found, expected = torch.compile(loss, backend="aot_eager", fullgraph=True)(student), loss(student)
    for ours, eager in zip(found, expected, strict=True):
        assert relative_error(ours, eager.detach().double()) < 2 * EPSILON
    assert torch.equal(*(torch.autograd.grad(x.loss, student)[0] for x in (found, expected)))


@pytest.mark.parametrize("kind", ["logits", "hidden states", "module"])
def test_a_compiled_loss_whose_parameter_changes(fresh_compiler, kind):
    """The object may be made outside of the graph, or in it of a number."""
    given, labels = (heads() if kind == "hidden states" else logits()[:2]), torch.randint(V, (N,))
    given[0].requires_grad_()

    def loss(*given, divergence):
        if kind == "module":
            return KDLoss(temperature=2.0, divergence=divergence)(*given, labels)
        return (kd_loss if kind == "logits" else linear_kd_loss)(*given, labels, temperature=2.0, divergence=divergence)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=kind != "module")
    for divergence in (JSD(0.3), JSD(0.7), JSD(0.7), SkewKL(0.2), "reverse_kl", JSD(0.4), AlphaDivergence(0.4)):
        found, expected = (f(*given, divergence=divergence) for f in (compiled, loss))
        assert relative_error(found.detach(), expected.detach().double()) < 2 * EPSILON
        assert torch.equal(*(torch.autograd.grad(x, given[0])[0] for x in (found, expected)))


def test_an_object_made_in_a_graph(fresh_compiler):
    student, teacher, labels = logits()

    def loss(student, beta):
        return kd_loss(student, teacher, labels, divergence=JSD(beta))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for beta in (0.25, 0.5, 0.75):
        assert relative_error(compiled(student, beta), loss(student, beta).double()) < 2 * EPSILON


@pytest.mark.parametrize("divergence", [*OBJECTS, *OWN], ids=str)
def test_transforms(divergence):
    student, teacher, labels = logits()

    def loss(student, teacher):
        return kd_loss(student, teacher, labels, temperature=2.0, divergence=divergence, teacher_grad=True)

    leaves = [z.clone().requires_grad_() for z in (student, teacher)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.func.grad(loss, (0, 1))(student, teacher), expected))
    batch = torch.stack([student, 2 * student]), torch.stack([teacher, teacher + 1])
    found = torch.func.vmap(torch.func.grad(loss))(*batch)
    for one, *given in zip(found, *batch, strict=True):
        assert torch.allclose(one, torch.func.grad(loss)(*given), rtol=1e-6, atol=1e-8)


# A divergence of one's own


@pytest.mark.parametrize("divergence", OWN, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "alpha": 1.0}, {"logit_softcap": 9.0, "vocab_size": V - 3}]
)
def test_ones_own(device, divergence, options):
    student, teacher, labels = logits(device)
    labels = labels.clamp(max=V - 4)
    options = {"divergence": divergence, "temperature": 2.5, "teacher_grad": True, "return_parts": True} | options
    found = []
    for loss, dtype in ((kd_loss, torch.float32), (reference.kd_loss, torch.float64)):
        leaves = [z.to(dtype).requires_grad_() for z in (student, teacher)]
        output = loss(*leaves, labels, **options)
        found.append([*(part.detach() for part in output), *torch.autograd.grad(output.loss.sum(), leaves)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 2e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ones_own_from_hidden_states(device, reduction):
    labels = torch.randint(V, (N,), device=device)
    labels[2] = -100
    given, found = heads(device), []
    options = {"divergence": OWN[0], "temperature": 2.0, "reduction": reduction, "teacher_grad": True}
    for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        value = loss(*leaves, labels, workspace_bytes=4 * 2 * 4 * 256, **options)
        found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 4e-6


def test_ones_own_of_masked_tokens_and_of_rows_that_do_not_count(device):
    student, teacher, labels = logits(device)
    student[:, 3] = teacher[:, 3] = -torch.inf
    teacher[1, 10:], student[2, 40] = -torch.inf, -torch.inf
    student[4], labels[4] = torch.nan, -100
    labels[labels != -100] = 0
    options = {"divergence": OWN[0], "temperature": 2.0, "reduction": "none", "alpha": 0.8}
    found = []
    for loss, dtype in ((kd_loss, torch.float32), (reference.kd_loss, torch.float64)):
        leaf = student.to(dtype).requires_grad_()
        value = loss(leaf, teacher.to(dtype), labels, **options)
        found.append([value.detach(), *torch.autograd.grad(value.sum(), leaf)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact.nan_to_num(0.0)) < 2e-6


@pytest.mark.parametrize("divergence", [*OWN, TriangularDiscrimination()], ids=str)
def test_gradcheck_of_ones_own(divergence):
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"alpha": 0.6, "temperature": 1.5, "teacher_grad": True, "divergence": divergence}
    assert torch.autograd.gradcheck(lambda *z: kd_loss(*z, torch.arange(3), **options), (student, teacher))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ones_own_without_gradients(mode, dtype):
    given, hidden = logits(dtype=dtype), [x.to(dtype) for x in heads()]
    with mode():
        again = [x.clone() for x in given], [x.clone() for x in hidden]
        found = kd_loss(*again[0], divergence=OWN[0]), linear_kd_loss(*again[1], again[0][2], divergence=OWN[0])
    expected = kd_loss(*given, divergence=OWN[0]), linear_kd_loss(*hidden, given[2], divergence=OWN[0])
    assert all(map(torch.equal, found, expected))


def test_ones_own_in_a_module_and_a_compiler(fresh_compiler):
    given = logits()
    loss = KDLoss(divergence=OWN[0])
    expected = loss(*given)
    assert torch.equal(expected, kd_loss(*given, divergence=OWN[0]))
    assert not torch.allclose(expected, KDLoss(divergence=OWN[1])(*given))
    assert repr(loss) == "KDLoss(divergence=AlphaDivergence(order=0.3))"
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*given), expected.double()) < 2 * EPSILON
    assert torch.equal(pickle.loads(pickle.dumps(loss))(*given), expected)


def test_the_name_of_ones_own():
    given = logits()
    assert torch.equal(kd_loss(*given, divergence="alpha"), kd_loss(*given, divergence=AlphaDivergence()))


def test_a_divergence_without_kernels_runs_on_a_cpu_alone(device):
    student, teacher, labels = logits(device)
    loss = lambda: kd_loss(student.requires_grad_(), teacher, labels, divergence=TriangularDiscrimination())  # noqa: E731
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        exact = reference.kd_loss(student.double(), teacher.double(), labels, divergence=TriangularDiscrimination())
        assert relative_error(loss().detach(), exact) < 1e-6
        return
    with pytest.raises(NotImplementedError, match=r"^divergence: expected one with kernels for CUDA tensors, got "
                       r"TriangularDiscrimination\(\); give its class a method kernels\(\) .* to the CPU$"):  # fmt: skip
        loss()


def test_a_divergence_without_elements_says_so():
    @dataclass(frozen=True)
    class Nothing(Divergence):
        name: ClassVar[str] = "nothing"

    with pytest.raises(NotImplementedError, match=r"Nothing: expected a method elements\(log_p, log_q\), got none"):
        kd_loss(*logits(), divergence=Nothing())


@pytest.mark.parametrize("name", [*NAMES, "alpha"])
def test_a_name_that_another_has_is_refused(name):
    before = dict(DIVERGENCES)
    with pytest.raises(ValueError, match=f"name: expected one that no divergence has, got '{name}', the name of "):
        type("Other", (Divergence,), {"name": name})
    assert before == DIVERGENCES


def test_a_divergence_may_be_defined_again():
    """A notebook defines a class anew when a cell is run again."""
    given = logits()[:2]
    for factor in (1.0, 2.0):

        @dataclass(frozen=True)
        class Scaled(Divergence):
            name: ClassVar[str] = "scaled"
            scale: float = factor

            def elements(self, log_p, log_q):
                return self.scale * TotalVariation().elements(log_p, log_q)

        tvd = kd_loss(*given, divergence="tvd", alpha=1.0)
        for divergence in ("scaled", Scaled(), Scaled(factor)):
            found = kd_loss(*given, divergence=divergence, alpha=1.0)
            torch.testing.assert_close(found, factor * tvd)
