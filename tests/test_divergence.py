"""The option `divergence`: the reference against the formulas of the papers, and the losses against the reference."""

import functools
import math

import pytest
import torch

from fused_kd import KDLoss, LinearKDLoss, kd_loss, linear_kd_loss, operators, reference
from fused_kd.divergences import Objective
from fused_kd.logit_map import LogitMap
from fused_kd.sweep import KDOptions

from .oracle import assert_matches_oracle, relative_error, value_and_gradient

N, V, H_S, H_T = 6, 203, 8, 6
T = 2.0


def logits(device="cpu", dtype=torch.float32):
    student, teacher = (3 * torch.randn(2, N, V, dtype=dtype)).to(device)
    return student, teacher, torch.randint(V, (N,), device=device)


def paper(divergence, student, teacher):
    """KL from the definition, of probabilities in float64."""
    p, q = (torch.softmax(z.double() / T, -1) for z in (student, teacher))
    return (q * (q / p).log() if divergence == "forward_kl" else p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_reference_is_the_definition(divergence):
    student, teacher, labels = logits(dtype=torch.float64)
    student.requires_grad_()
    output = reference.kd_loss(
        student, teacher, labels, temperature=T, divergence=divergence, reduction="none", alpha=0.3, return_parts=True
    )
    expected = paper(divergence, student, teacher)
    assert relative_error(output.divergence, expected.detach()) < 1e-14
    loss = 0.7 * torch.nn.functional.cross_entropy(student, labels, reduction="none") + 0.3 * T**2 * expected
    assert relative_error(output.loss.detach(), loss.detach()) < 1e-14
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (output.loss, loss)]
    assert relative_error(*gradients) < 1e-13


def test_the_gradients_of_the_docstring():
    """The gradients of student and teacher for reverse KL, by hand: alpha T p (log(p / q) - D) and alpha T (q - p)."""
    student, teacher, _ = logits(dtype=torch.float64)
    for name, first, second in (("reverse_kl", student, teacher), ("forward_kl", teacher, student)):
        student.requires_grad_(), teacher.requires_grad_()
        loss = reference.kd_loss(
            student, teacher, None, temperature=T, divergence=name, alpha=1.0, reduction="sum", teacher_grad=True
        )
        of_first, of_second = torch.autograd.grad(loss, (first, second))
        w, o = (torch.softmax(z.detach() / T, -1) for z in (first, second))
        ratio = (w / o).log()
        assert relative_error(of_first, T * w * (ratio - (w * ratio).sum(-1, keepdim=True))) < 1e-12
        assert relative_error(of_second, T * (o - w)) < 1e-12


def test_masked_tokens_of_the_reference():
    student, teacher, _ = logits(dtype=torch.float64)
    student[:, 3] = teacher[:, 3] = -math.inf  # both mask it
    kl = functools.partial(reference.kd_loss, labels=None, alpha=1.0, temperature=T, reduction="none")
    for name in ("forward_kl", "reverse_kl"):
        rest = [torch.cat([z[:, :3], z[:, 4:]], 1) for z in (student, teacher)]
        assert torch.allclose(kl(student, teacher, divergence=name), kl(*rest, divergence=name), rtol=1e-13)
    teacher[0, 5] = -math.inf  # the teacher alone
    student[1, 5] = -math.inf  # the student alone
    assert kl(student, teacher, divergence="forward_kl").isposinf().tolist() == [False, True] + [False] * (N - 2)
    assert kl(student, teacher, divergence="reverse_kl").isposinf().tolist() == [True] + [False] * (N - 1)


def terms(student, teacher, weight, temperature):
    """The norm of what adds up to the gradient of a row: of p log(p / q), and of p times its mean."""
    p, q = (torch.log_softmax(z.double() / temperature, -1) for z in (student, teacher))
    mean = (p.exp() * (p - q)).sum(-1, keepdim=True)
    return weight * temperature * (p.exp() * ((p - q).abs() + mean)).norm()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"logit_softcap": (9.0, 7.0)}, {"shift": True}])
def test_reverse_kl_from_logits(device, alpha, options):
    student, teacher, labels = logits(device)
    labels[1] = -100
    counted = labels != -100
    if "shift" in options:
        counted = torch.cat([counted[1:], counted[:1] & False])
    caps = options.get("logit_softcap", (math.inf, math.inf))
    capped = [
        cap * torch.tanh(z / cap) if cap < math.inf else z for z, cap in zip((student, teacher), caps, strict=True)
    ]
    weight = alpha if options.get("reduction") == "none" else alpha / int(counted.sum())
    for temperature in (0.5, 1.0, 2.0, 5.0):
        assert_matches_oracle(
            kd_loss, student, teacher, labels, terms=terms(*(z[counted] for z in capped), weight, temperature),
            alpha=alpha, temperature=temperature, divergence="reverse_kl", **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reverse_kl_from_16_bit_logits(device, dtype):
    student, teacher, labels = logits(device)
    assert_matches_oracle(kd_loss, student.to(dtype), teacher.to(dtype), labels, temperature=T, divergence="reverse_kl")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_divergence_from_hidden_states(device, divergence, reduction):
    states = torch.randn(N, H_S, device=device), torch.randn(N, H_T, device=device)
    weights = torch.randn(V, H_S, device=device), torch.randn(V, H_T, device=device)
    labels = torch.randint(V, (N,), device=device)
    found = []
    for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (*states, *weights)]
        value = loss(
            leaves[0], leaves[2], leaves[1], leaves[3], labels, temperature=T, divergence=divergence,
            reduction=reduction, teacher_grad=True, workspace_bytes=4 * 2 * 4 * 256,
        )  # fmt: skip
        found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 2e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_teacher_learns_and_parts_are_logged(device, divergence):
    found = []
    student, teacher, labels = logits(device)
    for loss, dtype in ((kd_loss, torch.float32), (reference.kd_loss, torch.float64)):
        leaves = [z.detach().to(dtype).requires_grad_() for z in (student, teacher)]
        output = loss(
            *leaves, labels, temperature=T, divergence=divergence, teacher_grad=True, return_parts=True, alpha=0.4
        )
        found.append([*(part.detach() for part in output), *torch.autograd.grad(output.loss, leaves)])
    for ours, exact in zip(*found, strict=True):
        assert relative_error(ours, exact) < 1e-6


def test_masked_tokens_of_reverse_kl(device):
    """Infinite where the student has mass and the teacher has none; no NaN in another row."""
    student, teacher, labels = logits(device)
    student[:, 3] = teacher[:, 3] = -math.inf
    student[2, 7:] = -math.inf  # the student alone
    labels[:] = 1
    options = {"temperature": T, "divergence": "reverse_kl", "reduction": "none", "alpha": 0.5}
    ours, exact = (value_and_gradient(f, student.to(dtype), teacher.to(dtype), labels, **options) for f, dtype in (
        (kd_loss, torch.float32), (reference.kd_loss, torch.float64)))  # fmt: skip
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, exact, strict=True))
    teacher[0, 5] = -math.inf
    value, gradient = value_and_gradient(kd_loss, student, teacher, labels, **options)
    assert value.isposinf().tolist() == [True] + [False] * (N - 1)
    assert gradient[1:].isfinite().all()


@pytest.mark.parametrize("module", [KDLoss, LinearKDLoss])
def test_a_module_takes_it(module):
    student, teacher, labels = logits()
    given = (student, teacher) if module is KDLoss else (student, torch.randn(9, V), teacher, torch.randn(9, V))
    labels %= 9
    loss = {KDLoss: kd_loss, LinearKDLoss: linear_kd_loss}[module]
    assert torch.equal(module(divergence="reverse_kl")(*given, labels), loss(*given, labels, divergence="reverse_kl"))
    assert not torch.allclose(module()(*given, labels), loss(*given, labels, divergence="reverse_kl"))
    assert repr(module(divergence="reverse_kl")) == f"{module.__name__}(divergence='reverse_kl')"


def test_options_go_through_the_arguments_of_an_operator_and_come_back():
    objective = Objective(LogitMap(0.5), LogitMap(2.0, 30.0), 2.5, "reverse_kl")
    options = KDOptions(V, True, False, torch.float64, False, True, objective)
    assert operators.unpacked(*operators.packed(options)) == options
    assert len(operators.packed(options)) == operators.KD_ARGUMENTS
