"""The float64 oracle, and errors against it."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_kd import reference
from fused_kd.testing.accuracy import EPSILON, relative_error


def value_and_gradient(
    loss: Callable[..., Tensor], student: Tensor, *arguments: Tensor, upstream: float = 1.0, **options: object
) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, *arguments, **options)
    value.backward(torch.full_like(value, upstream))
    assert student.grad is not None
    return value.detach(), student.grad


def assert_matches_oracle(
    loss: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *arguments: Tensor,
    upstream: float = 1.0,
    terms: Tensor | None = None,
    **options,
) -> None:
    """Value and gradient within twice eager float32's error, or four float32 epsilons, of the float64 oracle.

    The epsilons are the gradient's, or, where terms cancel in it, those of the norm of the terms: of a small difference of
    large numbers nothing computed in float32 knows more.
    """
    value, gradient = value_and_gradient(loss, student, teacher, *arguments, upstream=upstream, **options)
    (eager_value, eager_gradient), (oracle_value, oracle_gradient) = (
        value_and_gradient(
            reference.kd_loss, student.to(dtype), teacher.to(dtype), *arguments, upstream=upstream, **options
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert oracle_gradient.norm() > 0
    assert relative_error(value, oracle_value) <= max(2 * relative_error(eager_value, oracle_value), 4 * EPSILON)
    rounding = torch.finfo(student.dtype).eps if student.dtype.itemsize == 2 else 4 * EPSILON
    if terms is not None:
        rounding = max(rounding, 4 * EPSILON * float(terms / oracle_gradient.norm()))
    assert relative_error(gradient, oracle_gradient) <= max(
        2 * relative_error(eager_gradient, oracle_gradient), rounding
    )
