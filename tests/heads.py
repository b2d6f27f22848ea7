"""Heads for the tests of linear_kd_loss, and comparisons of its results with eager heads and the float64 oracle."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kd import linear_kd_loss, reference

from .oracle import EPSILON, relative_error

N, V, H_S, H_T = 14, 1237, 24, 40
# Bytes for 5 float32 tokens per chunk: three chunks, of 5, 5 and 4.  Below 4 rows per thread, of which tests of heads have
# one, BLAS sums the hidden gradient's V terms one after another, and its error, three times that of more rows, is not ours.
CHUNKED = 5 * 2 * 1280 * 4
F_S, F_T = 2 * N * V * H_S, 2 * N * V * H_T


class Given(NamedTuple):
    """The arguments in their order; `student_bias` goes by name."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> "Given":
        """Return the tensors in another dtype; the student's are leaves that require grad."""
        tensors = {name: tensor for name, tensor in self._asdict().items() if name != "labels"}
        cast = {name: tensor.detach().to(dtype).clone() for name, tensor in tensors.items()}
        for name in ("hidden", "weight", "bias"):
            cast[name].requires_grad_()
        return Given(labels=self.labels, **cast)


def make(device, dtype=torch.float32, shape=(N,), vocabulary=V, scale=1.0) -> Given:
    """Heads whose logits have a standard deviation of 3 scale."""
    head = [3 * scale * torch.randn(vocabulary, width) / width**0.5 for width in (H_S, H_T)]
    given = Given(
        torch.randn(*shape, H_S), head[0], torch.randn(*shape, H_T), head[1],
        torch.randint(vocabulary, shape), torch.randn(vocabulary),
    )  # fmt: skip
    on_device = Given(*(tensor.to(device) for tensor in given))
    return on_device.to(dtype)


def run(loss, given: Given, *, biased=True, upstream=1.0, **options) -> dict[str, Tensor]:
    """The value and every gradient; of reduction "none", with the upstream gradients 1, 2, ... times `upstream`."""
    for tensor in (given.hidden, given.weight, given.bias):
        tensor.grad = None
    value = loss(*given[:5], student_bias=given.bias if biased else None, **options)
    ramp = torch.arange(1, value.numel() + 1, device=value.device, dtype=value.dtype).reshape(value.shape)
    value.backward(upstream * ramp)
    gradients = {"hidden": given.hidden.grad, "weight": given.weight.grad, "bias": given.bias.grad if biased else None}
    return {"value": value.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def assert_matches_oracle(given: Given, floor=4 * EPSILON, **options) -> None:
    """Every result within twice the error of eager in the same dtype, or `floor`, of the float64 oracle."""
    ours = run(linear_kd_loss, given, **options)
    options.pop("workspace_bytes", None)
    eager = run(reference.linear_kd_loss, given, **options)
    options.pop("logits_dtype", None)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64), **options)
    assert ours.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert exact.norm() > 0
        bound = max(2 * relative_error(eager[name], exact), floor)
        assert relative_error(ours[name], exact) <= bound, name
