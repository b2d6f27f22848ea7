"""benchmarks/hidden_states.py on sizes that take no time: its subjects, and when it says that a promise is missed."""

import json

import pytest
import torch

from benchmarks import hidden_states, products
from fused_kd.testing import problems
from fused_kd.testing.shapes import Shape


@pytest.fixture
def tiny(monkeypatch):
    sizes = [size._replace(rows=24, vocab_size=301, hidden=16) for size in hidden_states.SIZES]
    monkeypatch.setattr(hidden_states, "SIZES", (sizes[0], sizes[-1]))


def test_run(tiny, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert hidden_states.main(["--rounds", "2", "--without-others", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    of_bfloat16 = [result for result in figures["results"] if result["dtype"] == "bfloat16"]
    assert [result["subject"] for result in of_bfloat16] == [
        "bare products", "bare products, new gradients", "bare products, frozen head", "fused_kd", "fused_kd, frozen head",
        "fused_kd, half of the rows ignored", "fused_kd, lean", "fused_kd, weight_grad_out", "fused_kd, bfloat16 logits",
    ]  # fmt: skip
    assert all(result["agrees"] for result in figures["results"] if "agrees" in result)
    assert all(len(result["seconds"]) == 2 for result in figures["results"])
    promised = {(ratio["subject"], ratio["base"]): ratio["promise"] for ratio in figures["ratios"] if ratio["promise"]}
    assert promised == {
        ("fused_kd", "bare products"): 1.08, ("fused_kd, half of the rows ignored", "fused_kd"): 0.56,
        ("fused_kd, lean", "fused_kd"): 1.6,
    }  # fmt: skip
    assert "half of the rows ignored" in capsys.readouterr().out


def test_ratios_are_of_the_shortest_times_and_of_rounds():
    size = hidden_states.SIZES[0]
    results = [
        {"subject": "bare products", "seconds": [2.0, 1.0, 4.0]},
        {"subject": "fused_kd", "seconds": [2.2, 1.2, 4.4]},
    ]
    (found,) = hidden_states.compared(size, results)
    assert (found["low"], found["median"]) == (pytest.approx(1.2), pytest.approx(1.1))
    assert hidden_states.missed(found)
    assert not hidden_states.missed(found | {"low": 1.084})


def test_a_loss_that_is_not_what_it_says_fails_the_check(tiny, monkeypatch):
    monkeypatch.setattr(hidden_states, "missed", lambda ratio: False)
    arguments = ["--rounds", "1", "--without-others", "--check"]
    assert hidden_states.main(arguments) == 0
    right = hidden_states.ours_with
    monkeypatch.setattr(hidden_states, "ours_with", lambda **options: lambda *given: 1.1 * right(**options)(*given))
    assert hidden_states.main(arguments) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_bare_products(trained):
    inputs = problems.make(Shape("", "", "hidden", 8, 32, 4, 6, torch.float32), torch.device("cpu"))
    for new_gradients in (False, True):
        with torch.profiler.profile() as profile:
            products.bare_products(inputs, trained, new_gradients=new_gradients)()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["aten::mm"] == 3 + trained
