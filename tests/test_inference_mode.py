"""Tensors made under `torch.inference_mode()`, which PyTorch does not save for a backward pass."""

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss

N, V, H_S, H_T = 6, 300, 8, 12
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def from_logits(**options):
    student = torch.randn(N, V)
    rest = {"teacher_logits": torch.randn(N, V), "labels": torch.randint(V, (N,))}
    return kd_loss, {"student_logits": student}, rest | options


def from_hidden(frozen=(), **options):
    given = {
        "student_hidden": torch.randn(N, H_S), "student_weight": torch.randn(V, H_S), "student_bias": torch.randn(V),
        "teacher_hidden": torch.randn(N, H_T), "teacher_weight": torch.randn(V, H_T), "teacher_bias": torch.randn(V),
        "labels": torch.randint(V, (N,)),
    }  # fmt: skip
    trained = {name: given.pop(name) for name in list(given)[:3] if name not in frozen}
    return linear_kd_loss, trained, given | options


def run(loss, trained, rest):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in trained.items()}
    value = loss(**leaves, **rest)
    value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves.values())]


def assert_taken_as_they_are(loss, trained, rest, device):
    trained = {name: tensor.to(device) for name, tensor in trained.items()}
    rest = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in rest.items()}
    expected = run(loss, trained, rest)
    with torch.inference_mode():
        made = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in rest.items()}
    before = {name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)}
    assert all(made[name].is_inference() for name in before)
    found = run(loss, trained, made)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found, expected, strict=True))
    assert all(torch.equal(made[name], value) for name, value in before.items())


@reductions
@pytest.mark.parametrize("weighted", [False, True])
def test_teacher_and_labels_from_logits(device, reduction, weighted):
    options = {"token_weights": torch.rand(N).double(), "alpha": torch.rand(N)} if weighted else {}
    assert_taken_as_they_are(*from_logits(reduction=reduction, temperature=3.0, **options), device)


def test_teacher_logits_of_another_shape_in_memory(device):
    loss, trained, rest = from_logits(reduction="none")
    rest["teacher_logits"] = torch.randn(N, 2 * V)[:, ::2]
    assert_taken_as_they_are(loss, trained, rest, device)


@reductions
@pytest.mark.parametrize("frozen", [(), ("student_weight", "student_bias")])
@pytest.mark.parametrize("weighted", [False, True])
def test_teacher_and_labels_from_hidden_states(device, reduction, frozen, weighted):
    options = {"token_weights": torch.rand(N), "num_items": torch.tensor(7.0) if reduction == "mean" else None}
    given = from_hidden(frozen, reduction=reduction, temperature=2.0, **(options if weighted else {}))
    assert_taken_as_they_are(*given, device)


def test_a_student_in_inference_mode_too(device):
    for loss, trained, rest in (from_logits(reduction="none"), from_hidden(reduction="none")):
        tensors = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in (trained | rest).items()
        }
        expected = loss(**tensors)
        with torch.inference_mode():
            assert torch.equal(loss(**tensors), expected)
        made = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}
        assert torch.equal(loss(**made), expected)
