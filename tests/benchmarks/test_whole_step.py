"""The modelled time of a whole step: the record meets its targets, and names the launches that the gate counts."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")
whole_step: Any = pytest.importorskip("benchmarks.whole_step")
from benchmarks.gate import steps  # noqa: E402

RECORD = Path(whole_step.__file__).parent / "results" / "whole_step.json"


def test_the_record_meets_its_targets():
    results = json.loads(RECORD.read_text())["results"]
    assert {(r["chip"], r["vocab_size"]) for r in results} == whole_step.TARGETS.keys()
    assert all(map(whole_step.meets, results))


@pytest.mark.parametrize("everything", [False, True])
def test_the_record_has_the_launches_of_a_step(everything: bool):
    counted = steps.launched(lambda: steps.from_logits(whole_step.ROWS, everything=everything))
    for result in json.loads(RECORD.read_text())["results"]:
        assert len(result["launches"]) == counted.kernels.total() + counted.operators.total()


def test_without_a_simulator_nothing_is_modelled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("FUSED_KD_SIMULATOR", raising=False)
    assert whole_step.main(["--check"]) == 0
    assert "names no simulator" in capsys.readouterr().out
