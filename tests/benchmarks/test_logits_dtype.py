"""benchmarks/logits_dtype.py on a small vocabulary: what its errors are errors of, and the promise."""

import json

import pytest
import torch

from benchmarks import logits_dtype
from fused_kd.testing.accuracy import relative_error


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(logits_dtype, "V", 1009)
    monkeypatch.setattr(logits_dtype, "PACKAGED", {})


def test_float32_logits_are_as_good_as_exact_ones(tmp_path):
    file = tmp_path / "errors.json"
    assert logits_dtype.main(["--check", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert {(result["logits"], result["loss"]) for result in results} == {
        (kind, loss) for kind in logits_dtype.KINDS for loss in logits_dtype.LOSSES
    } - logits_dtype.SATURATED
    by_case = {(result["logits"], result["loss"]): result for result in results}
    near = by_case["near the teacher's", "JSD"]
    assert near["bfloat16 logits"]["weight"] > 10 * near["float32 logits"]["weight"]


def test_exact_logits():
    heads = logits_dtype._rounded(logits_dtype.synthetic("peaked"))
    options = {"divergence": "forward_kl", "alpha": 0.5, "temperature": 2.0}
    exact, rounded = logits_dtype.of_exact_logits(heads, options)
    leaves = heads.hidden.double().requires_grad_(), heads.weight.double().requires_grad_()
    given = *leaves, *(tensor.double() for tensor in heads[2:4])
    value = logits_dtype.linear_kd_loss(*given, heads.labels, **options)
    for found, expected in zip(exact, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert {gradient.dtype for gradient in rounded} == {torch.bfloat16}
    assert all(relative_error(*pair) < 4e-3 for pair in zip(rounded, exact, strict=True))


def test_a_missed_promise():
    result = {
        "exact logits": {"hidden states": 1.0, "weight": 2.0},
        "float32 logits": {"hidden states": 1.2, "weight": 2.0},
    }
    assert not logits_dtype.missed(result)
    result["float32 logits"]["weight"] = 2.5
    assert logits_dtype.missed(result)
