"""The student's entropy among the parts: against its definition, in both losses."""

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss

from .oracle import relative_error

N, V, H_S, H_T = 6, 203, 8, 6
pytestmark = pytest.mark.usefixtures("one_thread")


def logits(device):
    student, teacher = (3 * torch.randn(2, N, V)).to(device)
    return student, teacher, torch.randint(V, (N,), device=device)


def entropy(student, temperature):
    p = (student.double() / temperature).softmax(-1)
    return -torch.where(p > 0, p * p.log(), 0.0).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("teacher_is_there", [True, False])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl", "jsd"])
def test_of_rows(device, temperature, teacher_is_there, divergence):
    student, teacher, labels = logits(device)
    student[:, 4:9] = -torch.inf
    teacher[:, 4:9] = -torch.inf
    student[2, 50:] = -torch.inf if divergence == "jsd" else student[2, 50:]
    labels.fill_(20)
    output = kd_loss(
        student.requires_grad_(), teacher if teacher_is_there else None, labels, temperature=temperature,
        reduction="none", divergence=divergence, alpha=0.5 if teacher_is_there else 0.0, return_parts=True,
    )  # fmt: skip
    assert not output.entropy.requires_grad
    assert relative_error(output.entropy, entropy(student.detach(), temperature)) < 1e-6
    assert output.loss.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_is_reduced_as_the_loss(device, reduction):
    student, teacher, labels = logits(device)
    labels[1] = -100
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 1.0], device=device)
    student[1], student[2] = torch.nan, torch.nan
    counted = [0, 3, 4, 5]
    expected = weights[counted] * entropy(student[counted], 2.0)
    for num_items, divisor in ((None, weights[counted].sum()), (40, 40)):
        if reduction == "sum" and num_items:
            continue
        found = kd_loss(
            student, teacher, labels, temperature=2.0, token_weights=weights, num_items=num_items, reduction=reduction,
            return_parts=True,
        )  # fmt: skip
        assert relative_error(found.entropy, expected.sum() / (divisor if reduction == "mean" else 1)) < 1e-6


def test_of_one_hot_and_uniform_students(device):
    student, teacher, _ = logits(device)
    student[0] = -torch.inf
    student[0, 7] = 0.0
    student[1] = -1e4
    student[1, 7] = 1e4
    student[2] = 5.0
    found = kd_loss(student, teacher, alpha=1.0, reduction="none", divergence="jsd", return_parts=True).entropy
    assert found[:2].tolist() == [0.0, 0.0]
    assert relative_error(found[2], torch.tensor(V).double().log()) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 5.0, "logit_scale": 0.5}, {"vocab_size": V - 3}])
def test_from_hidden_states(device, reduction, options):
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, device=device) for shape in ((N, H_S), (V, H_S), (N, H_T), (V, H_T))
    )
    labels = torch.randint(V - 3, (N,), device=device)
    output = linear_kd_loss(
        hidden.requires_grad_(), weight, teacher_hidden, teacher_weight, labels, temperature=2.0, reduction=reduction,
        divergence="skew_kl", workspace_bytes=4 * 2 * 4 * 256, return_parts=True, **options,
    )  # fmt: skip
    student = (hidden.detach().double() @ weight.double().T)[:, : options.get("vocab_size")]
    if "logit_softcap" in options:
        student = 5 * torch.tanh(0.5 * student / 5)
    expected = entropy(student, 2.0)
    assert relative_error(output.entropy, expected if reduction == "none" else expected.mean()) < 1e-6


def test_is_computed_without_a_gradient_and_by_no_other_call():
    student, teacher, labels = logits("cpu")
    with torch.no_grad():
        found = kd_loss(student, teacher, labels, return_parts=True)
    assert found._fields == ("loss", "ce", "divergence", "entropy")
    assert relative_error(found.entropy, entropy(student, 1.0).mean()) < 1e-6
    assert isinstance(kd_loss(student, teacher, labels), torch.Tensor)
