"""A divergence that a user defines, with `elements` alone, wherever PyTorch switches autograd off."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fused_kd import kd_loss
from fused_kd.divergences import Divergence


@dataclass(frozen=True)
class Hellinger(Divergence):
    """sum (sqrt p - sqrt q)^2."""

    name: ClassVar[str] = "hellinger"

    def elements(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_p / 2).exp() - (log_q / 2).exp()).square()


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_loss(student, teacher, alpha=1.0, divergence=Hellinger())


def definition(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.softmax(-1), teacher.softmax(-1)
    return (p.sqrt() - q.sqrt()).square().sum(-1).mean()


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_under_a_compiler(how: str):
    student, teacher = torch.randn(2, 5, 30)
    student.requires_grad_()
    values = torch.compile(loss, backend=how, fullgraph=True)(student, teacher), definition(student, teacher)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))


def test_in_inference_mode():
    student, teacher = torch.randn(2, 5, 30)
    expected = definition(student, teacher)
    with torch.inference_mode():
        torch.testing.assert_close(loss(student, teacher), expected)


def test_under_transforms():
    student, teacher = torch.randn(2, 3, 5, 30)
    expected = torch.stack([definition(z, y) for z, y in zip(student, teacher, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(student, teacher), expected)
    leaf = student[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(definition(leaf, teacher[0]), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student[0], teacher[0]), gradient)
