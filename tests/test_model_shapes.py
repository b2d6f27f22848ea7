"""A step at the vocabularies and softcaps of TinyLlama, Gemma 2 and Gemma 3, against the float64 oracle."""

from typing import NamedTuple

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, reference
from fused_kd.testing import problems
from fused_kd.testing.shapes import PAIRS, Shape

from . import heads
from .oracle import assert_matches_oracle, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"alpha": problems.ALPHA, "temperature": problems.TEMPERATURE}
LARGE = 8.0  # times the usual standard deviation of logits: 24, of which a softcap of 30 leaves little


class Case(NamedTuple):
    key: str  # of PAIRS
    softcap: float | None
    scale: float  # of logits


CASES = [Case("llama2", None, 1.0), Case("gemma2", 30.0, LARGE), Case("gemma3", None, 1.0)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_from_logits(device, case, dtype):
    shape = Shape("", "", "logits", 3, PAIRS[case.key].vocab_size, 0, 0, dtype)
    (student,), (teacher,), labels = problems.make(shape, device)
    student, teacher = student.detach() * case.scale, teacher * case.scale
    assert_matches_oracle(kd_loss, student, teacher, labels, logit_softcap=case.softcap, **OPTIONS)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_from_hidden_states(case, dtype, monkeypatch):
    """With a 32nd of the models' hidden sizes; rows in two chunks."""
    _, V, H_s, H_t = PAIRS[case.key]
    monkeypatch.setattr(heads, "H_S", H_s // 32)
    monkeypatch.setattr(heads, "H_T", H_t // 32)
    given = heads.make("cpu", dtype, shape=(8,), vocabulary=V, scale=case.scale)
    bound = 5 * 2 * (V + 256) * dtype.itemsize  # five rows per chunk
    heads.assert_matches_oracle(given, biased=False, workspace_bytes=bound, logit_softcap=case.softcap, **OPTIONS)


def test_step_at_the_heads_of_tinyllama():
    """With the models' own hidden sizes, beside eager PyTorch in float32."""
    shape = Shape("", "", "hidden", 8, *PAIRS["llama2"][1:], torch.float32)
    inputs = problems.make(shape, torch.device("cpu"))
    found = []
    for loss in (linear_kd_loss, reference.linear_kd_loss):
        value = loss(*inputs.student, *inputs.teacher, inputs.labels, **OPTIONS)
        found.append([value.detach(), *torch.autograd.grad(value, inputs.student)])
    for ours, eager in zip(*found, strict=True):
        assert relative_error(ours, eager) < 1e-5
