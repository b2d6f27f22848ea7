"""The regression gate: what fails it and what does not, that it counts what is launched, its record, its exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")
regression: Any = pytest.importorskip("benchmarks.regression")
from benchmarks.compiled.variants import all_variants  # noqa: E402
from benchmarks.gate import compiled, memory, steps, times  # noqa: E402
from benchmarks.gate.comparison import BETTER, GONE, NEW, OK, WORSE, compare  # noqa: E402
from benchmarks.gate.figures import KINDS  # noqa: E402
from benchmarks.gate.record import FILE, Record  # noqa: E402
from fused_kd import kd_loss, sweep  # noqa: E402
from fused_kd.heads import head, lean  # noqa: E402
from fused_kd.testing.launches import fake_gpu  # noqa: E402

# --- the comparison


@pytest.mark.parametrize(
    ("kind", "recorded", "now", "verdict"),
    [
        ("instructions a pair", 20.0, 21.0, OK),
        ("instructions a pair", 20.0, 21.1, WORSE),
        ("instructions a pair", 20.0, 19.1, OK),
        ("instructions a pair", 20.0, 19.0, BETTER),
        ("registers", 40, 43, WORSE),
        ("MUFU a pair", 2.25, 2.26, WORSE),
        ("spill", 0, 0, OK),
        ("spill", 0, 4, WORSE),
        ("other launches", 64, 65, WORSE),
        ("other launches", 64, 63, BETTER),
        ("operations", 7, 8, WORSE),
        ("operations", 9, 9, WORSE),  # than the ceiling, whatever is recorded
        ("operations per chunk", 7, 7, WORSE),
        ("live bytes", 1_000_000, 1_009_999, OK),
        ("live bytes", 1_000_000, 1_010_001, WORSE),
        ("time, fused / eager", 0.8, 1.59, OK),
        ("time from logits, fused / eager", 0.3, 0.61, WORSE),
        ("time from logits, fused / eager", 0.8, 1.01, WORSE),  # than eager, whatever is recorded
        ("projections", None, 3, NEW),
        ("projections", 3, None, GONE),
    ],
)
def test_verdicts(kind: str, recorded: float | None, now: float | None, verdict: str):
    before, after = ({} if value is None else {kind: {"a step": value}} for value in (recorded, now))
    (found,) = compare(before, after)
    assert found.verdict == verdict
    assert found.fails == (verdict in (WORSE, NEW, GONE))


def test_compiled_code_of_another_triton_is_compared_loosely():
    recorded = {"instructions a pair": {"kernel": 20.0}, "MUFU a pair": {"kernel": 2.0}, "live bytes": {"step": 100.0}}

    def verdicts(instructions: float, mufu: float, live: float) -> list[str]:
        now = dict(zip(recorded, ({"kernel": instructions}, {"kernel": mufu}, {"step": live}), strict=True))
        return [found.verdict for found in compare(recorded, now, other_triton=True)]

    assert verdicts(22.3, 2.0, 100) == [OK, OK, OK]
    assert verdicts(22.5, 2.1, 102) == [WORSE, WORSE, WORSE]
    assert verdicts(10.0, 1.0, 50) == [OK, OK, BETTER]


def test_compiled_code_is_recorded_by_release_of_triton(tmp_path: Path):
    record = Record(tmp_path / "record.json")
    assert record.triton("3.9") == "3.9"
    for triton, value in (("3.9", 9.0), ("3.10", 10.0)):
        record.update({"spill": {"kernel": value}}, {}, triton)
    again = Record(tmp_path / "record.json")
    nearest = {"3.8": "3.9", "3.9": "3.9", "3.10": "3.10", "3.11": "3.10", "4.0": "3.10"}
    assert {triton: again.triton(triton) for triton in nearest} == nearest
    assert again.of({"compiled"}, "3.11") == {"spill": {"kernel": 10.0}}
    assert again.of({"memory"}, "3.11") == {}


def test_everything_is_recorded():
    record = Record(FILE)
    assert set(record.figures) == {kind for kind, rules in KINDS.items() if rules.group != "compiled"}
    assert {"3.6", "3.8", "3.9"} <= set(record.compiled)
    variants = [variant for variant in all_variants() if compiled.is_kept(variant)]
    for figures in record.compiled.values():
        assert set(figures) == {kind for kind, rules in KINDS.items() if rules.group == "compiled"}
        assert {len(of_kind) for of_kind in figures.values()} == {len(variants)}
        assert not any(figures["spill"].values())
    bounded = {kind: values for kind, values in record.figures.items() if "operations" in kind}
    assert all(value <= KINDS[kind].ceiling for kind, values in bounded.items() for value in values.values())
    assert set(record.versions) == {"python", "fused_kd", "torch", "triton", "numpy"}


# --- what is measured


def test_what_launches_and_what_does_not():
    with fake_gpu() as launches:
        x = torch.randn(4, 6)
        with launches:
            x.T[1:].view(-1, 4).unsqueeze(0).expand(2, 5, 4).detach()
            torch.empty_like(x).new_empty(3)
            x[:, 6:] = 0
            assert launches.operators.total() == 0
            x.contiguous()  # it is
            x.T.contiguous()
            torch.where(x == 0, 1.0, x)  # the constant is written to the device first
            x[:2] = x[2:]
    assert launches.operators == {"clone": 1, "eq": 1, "scalar_tensor": 1, "where": 1, "copy_": 1}


def test_an_operator_more_is_seen(monkeypatch: pytest.MonkeyPatch):
    before = steps.launched(lambda: steps.from_logits(64))
    _one_clone_more(monkeypatch)
    after = steps.launched(lambda: steps.from_logits(64))
    kernels = ("row_weights_kernel", "whole_kernel", "row_losses_kernel", "scale_kernel")
    assert before.kernels == after.kernels == dict.fromkeys(kernels, 1)
    assert after.operators - before.operators == {"clone": 1}


def _one_clone_more(monkeypatch: pytest.MonkeyPatch) -> None:
    new_statistics = sweep.new_statistics
    monkeypatch.setattr(sweep, "new_statistics", lambda *arguments: new_statistics(*arguments).clone())


@pytest.mark.parametrize("everything", [False, True])
def test_a_step_has_one_launch_per_stage(everything: bool):
    """The weights of the rows, zeros for counters, sweep, losses and `scale`, however the rows are weighed."""
    one = steps.launched(lambda: steps.from_logits(64, everything=everything))
    assert one.kernels.total() == 4
    assert one.operators == {"zeros": 1, steps.ENGINE: 1}
    heads = steps.launched(lambda: steps.from_hidden_states(2, (True, True), everything=everything))
    names = ("row_weights", "copy_counted", "row_losses")
    assert heads.kernels == {**{f"{name}_kernel": 1 for name in names}, "shared_kernel": 2, "scale_kernel": 2}
    # The weight's gradient, summed over two groups, is rounded once.
    assert heads.operators == {"zeros": 1, "mm": 6, "addmm": 2, "_to_copy": 1, steps.ENGINE: 1}


def test_a_launch_more_in_backward_is_seen(monkeypatch: pytest.MonkeyPatch):
    scale = sweep.scale

    def twice(*arguments):
        scale(*arguments)
        scale(*arguments)

    monkeypatch.setattr(sweep, "scale", twice)
    assert steps.launched(lambda: steps.from_logits(64)).kernels["scale_kernel"] == 2


def test_nothing_stays_patched():
    with fake_gpu():
        pass
    logits = torch.randn(4, 9, requires_grad=True)
    kd_loss(logits, torch.randn(4, 9), torch.arange(4)).backward()
    assert logits.grad is not None
    assert type(logits.grad) is torch.Tensor


def test_a_chunk_projected_twice_is_seen(monkeypatch: pytest.MonkeyPatch):
    """The unit is a projection of the student; the teacher's takes two.  Tokens that do not count take none."""
    expected = {
        "trained head": 5,
        "trained head, teacher_grad": 9,
        "frozen head": 4,
        "loss only": 3,
        'reduction="none"': 8,
        "trained head, as many ignored": 5,
        "trained head, lean": 8,
    }
    expected = {f"linear_kd_loss, {name}": count for name, count in expected.items()}
    assert steps.multiplications() == {"projections": expected}
    project = head.project

    def twice(*arguments, **options):
        project(*arguments, **options)
        project(*arguments, **options)

    for module in (head, lean):
        monkeypatch.setattr(module, "project", twice)
    spent = steps.multiplications()["projections"]
    assert {name: spent[name] - count for name, count in expected.items()} == {
        name: 6 if name.endswith(('"none"', "lean")) else 3 for name in expected
    }


@pytest.mark.parametrize("inplace", [False, True])
def test_a_copy_of_the_logits_is_seen(inplace: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "LOGITS", (64, 4096))

    def peak() -> int:
        return memory._beyond(*memory._from_logits(torch.float32, inplace), inplace)

    def copying(logits: torch.Tensor, *arguments: torch.Tensor, **options: Any) -> Any:
        return kd_loss(logits * 1, *arguments, **options)

    before = peak()
    monkeypatch.setattr(memory, "kd_loss", copying)
    assert abs(peak() - before - 64 * 4096 * 4) < 10_000


def test_times_are_of_peers_that_agree():
    def fused(x: torch.Tensor, alpha: float, temperature: float) -> torch.Tensor:
        return (x * x).sum()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return sum((x * x / 50).sum() for _ in range(50))

    x = torch.randn(100)
    assert times._ratio(fused, eager, [x], gradients=1, rounds=5) < 0.5
    with pytest.raises(AssertionError, match="not close"):
        times._ratio(fused, lambda x: 2 * eager(x), [x], gradients=1, rounds=5)


def entry(**changes: Any) -> dict[str, Any]:
    """As `static_profile.py --json` writes a variant."""
    variant = {"kernel": "row_statistics", "target": "sm_90", "student": "bf16", "teacher": "bf16", "temperature": 2.5}
    variant |= {"terms": "ce+kl", "layout": "dense", "logit_map": "identity", "teacher_grad": False}
    figures = {"instructions": 24.75, "kinds": {"mufu": 3.375, "fma": 1}, "bytes": 4.0, "registers": 40, "spill": 0}
    return variant | figures | changes


def test_figures_of_a_profile(tmp_path: Path):
    file = tmp_path / "profile.json"
    left_out = [entry(terms="ce"), entry(layout="odd"), entry(temperature=4.0), entry(teacher="fp32")]
    variants = [entry(), entry(temperature=2.0, registers=48), *left_out]
    file.write_text(json.dumps({"versions": {"triton": "3.8.0"}, "variants": variants}))
    name = "row_statistics sm_90 T="
    assert compiled.from_profile(file) == {
        "instructions a pair": {f"{name}other": 24.75, f"{name}2": 24.75},
        "MUFU a pair": {f"{name}other": 3.375, f"{name}2": 3.375},
        "bytes a pair": {f"{name}other": 4.0, f"{name}2": 4.0},
        "registers": {f"{name}other": 40, f"{name}2": 48},
        "spill": {f"{name}other": 0, f"{name}2": 0},
    }
    assert compiled.triton_of(file) == "3.8.0"


# --- the command line


def test_record_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profile, record, results = (tmp_path / name for name in ("profile.json", "record.json", "results.json"))
    record_of = ["--record", str(record), "--profile", str(profile), "--only", "compiled"]

    def write_profile(*variants: dict[str, Any]) -> None:
        profile.write_text(json.dumps({"versions": {"triton": "3.8.0"}, "variants": variants}))

    write_profile(entry())
    assert regression.main(["--update", *record_of]) == 0
    assert regression.main(["--check", *record_of]) == 0
    assert "5 figures: 0 fail, 0 better" in capsys.readouterr().out

    write_profile(entry(instructions=30.0, bytes=2.0), entry(temperature=2.0))
    assert regression.main([*record_of, "--json", str(results)]) == 1
    out = capsys.readouterr().out
    assert "10 figures: 6 fail, 1 better" in out
    assert "--update" in out.splitlines()[-1]
    verdicts = [figure["verdict"] for figure in json.loads(results.read_text())["figures"]]
    assert verdicts == [WORSE, NEW, OK, NEW, BETTER, NEW, OK, NEW, OK, NEW]

    assert regression.main(["--update", *record_of]) == 0
    write_profile(entry(instructions=30.0, bytes=2.0))
    assert regression.main(record_of) == 1
    assert "GONE" in capsys.readouterr().out


def test_launches_that_are_more_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = tmp_path / "record.json"
    monkeypatch.setattr(steps, "LINEAR", {})
    arguments = ["--record", str(record), "--only", "launches"]
    assert regression.main([*arguments, "--update"]) == 0
    assert regression.main(arguments) == 0
    _one_clone_more(monkeypatch)
    assert regression.main(arguments) == 1
    assert "kd_loss: clone +1" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "arguments", [["--only", "moods"], ["--check", "--update"], ["--profile", "none.json"], ["--record", "none.json"]]
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        regression.main(arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err
