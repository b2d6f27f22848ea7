"""The types of calls: `mypy` checks this file, and the tests run it."""

import torch
from torch import Tensor
from typing_extensions import assert_type

from fused_kd import KDLossOutput, kd_loss, linear_kd_loss, reference

LOGITS, HIDDEN, WEIGHT = torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(5, 3)
LABELS = torch.zeros(2, dtype=torch.int64)


def test_a_loss_is_a_tensor() -> None:
    assert_type(kd_loss(LOGITS, LOGITS, LABELS, temperature=2.0), Tensor)
    assert_type(kd_loss(LOGITS, None, LABELS, alpha=0.0, return_parts=False), Tensor)
    assert_type(linear_kd_loss(HIDDEN, WEIGHT, HIDDEN, WEIGHT, LABELS, alpha=torch.ones(2)), Tensor)
    assert_type(reference.kd_loss(LOGITS, LOGITS, LABELS), Tensor)
    assert_type(reference.linear_kd_loss(HIDDEN, WEIGHT, HIDDEN, WEIGHT, LABELS), Tensor)


def test_a_loss_with_parts_is_a_named_tuple() -> None:
    assert_type(kd_loss(LOGITS, LOGITS, LABELS, return_parts=True), KDLossOutput)
    assert_type(linear_kd_loss(HIDDEN, WEIGHT, HIDDEN, WEIGHT, LABELS, return_parts=True), KDLossOutput)
    assert_type(reference.kd_loss(LOGITS, LOGITS, LABELS, return_parts=True), KDLossOutput)
    output = linear_kd_loss(HIDDEN, WEIGHT, None, None, LABELS, alpha=0.0, return_parts=True)
    assert output._fields == ("loss", "ce", "divergence", "entropy")
    assert_type(output.divergence, Tensor | None)
    assert output.divergence is None


def test_a_loss_with_a_flag_is_either() -> None:
    for return_parts in (False, True):
        found = kd_loss(LOGITS, LOGITS, LABELS, return_parts=return_parts)
        assert_type(found, Tensor | KDLossOutput)
        assert isinstance(found, KDLossOutput) == return_parts
