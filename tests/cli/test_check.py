"""`fused-kd check`: what it prints, its exit codes, and that it can fail."""

import collections
import dataclasses
import functools
import json
import re
import subprocess
import sys

import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, reference
from fused_kd.backends import triton as kernels
from fused_kd.cli import check, main
from fused_kd.divergences import JSD
from fused_kd.launching import ONE, TWO
from fused_kd.testing import accuracy, launching, linear_accuracy


def quick_check(file, capsys, *options):
    assert main(["check", "--backend", "cpu", "--quick", "--json", str(file), *options]) == 0
    found = json.loads(file.read_text())["configurations"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"All {len(found)} configurations are within their bounds on cpu: the largest error is ")
    shares = [c["loss"] / max(2 * c["loss_eager"], 2**-23) for c in found]
    assert int(re.search(r"is (\d+)% of its bound", last)[1]) >= int(100 * max(shares))
    assert all(0 < c["gradient"] < 0.1 and c["failures"] == [] for c in found)
    return len(found)


@pytest.mark.slow
def test_quick_check_passes_and_writes_every_figure(tmp_path, capsys):
    """Two cores: 50 s."""
    assert quick_check(tmp_path / "check.json", capsys) == 108


def test_a_check_of_one_loss_passes_and_writes_every_figure(tmp_path, capsys):
    few = [case for case in accuracy.cases(quick=True) if case.rows == 33][:4]
    with accuracy.checking(few):
        assert quick_check(tmp_path / "check.json", capsys, "--loss", "logits") == 4


def test_the_table_has_what_it_promises():
    cases = accuracy.cases()
    for field, values in {
        "temperature": accuracy.TEMPERATURES, "alpha": accuracy.ALPHAS, "logits": accuracy.LOGITS,
        "counted": accuracy.ROWS, "reduction": ["mean", "sum", "none"], "vocabulary": [151_936, 262_144],
        "launch": [ONE, TWO],
    }.items():  # fmt: skip
        assert set(values) <= {getattr(case, field) for case in cases}
    assert len({(c.alpha, c.counted, c.temperature) for c in cases if c.divergence == accuracy.FORWARD_KL}) == 45
    linear = [case for case in linear_accuracy.cases() if case.divergence == accuracy.FORWARD_KL]
    for pair in (("alpha", "counted"), ("alpha", "temperature"), ("counted", "temperature"), ("alpha", "reduction")):
        assert len({tuple(getattr(case, field) for field in pair) for case in linear}) == 9, pair


def test_every_divergence_has_moderately_many_cases():
    for suite, count in ((accuracy, 27), (linear_accuracy, 18)):
        for quick in (False, True):
            found = collections.Counter(case.divergence for case in suite.cases(quick))
            assert set(found) == {accuracy.FORWARD_KL, *accuracy.OTHERS}
            assert quick or {found[divergence] for divergence in accuracy.OTHERS} == {count}
        cases = [case for case in suite.cases() if case.divergence == accuracy.OTHERS[0]]
        for field in ("counted", "reduction", "temperature", "logits", "launch", "student_dtype"):
            assert len({getattr(case, field) for case in cases}) > 1, field
        assert len({case.seed for case in suite.cases()}) == len(suite.cases())
    assert {divergence.name for divergence in (accuracy.FORWARD_KL, *accuracy.OTHERS)} == set(reference.DIVERGENCES)


@pytest.mark.parametrize("divergence", accuracy.OTHERS, ids=str)
@pytest.mark.parametrize("suite", [accuracy, linear_accuracy])
def test_check_fails_for_another_divergence(suite, divergence):
    loss = kd_loss if suite is accuracy else linear_kd_loss
    case = next(c for c in suite.cases() if c.divergence == divergence and c.rows == 33)
    assert suite.measure(case, torch.device("cpu")).failures(case.has_right_values) == []
    for other in (JSD(0.4), accuracy.FORWARD_KL):
        wrong = lambda *a, other=other, **k: loss(*a, **k | {"divergence": other})  # noqa: E731
        assert suite.measure(case, torch.device("cpu"), wrong).failures(case.has_right_values) != []


def test_a_table_per_divergence(tmp_path, capsys):
    few = [c for c in accuracy.cases() if c.rows == 33 and c.logits == "flat" and c.student_dtype == torch.float32]
    few = [next(c for c in few if c.divergence == divergence) for divergence in (accuracy.FORWARD_KL, JSD(), JSD(0.1))]
    with accuracy.checking(few):
        assert main(["check", "--backend", "cpu", "--loss", "logits", "--json", str(tmp_path / "json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for divergence in ("ForwardKL()", "JSD(beta=0.5)", "JSD(beta=0.1)"):
        assert f"Errors against float64 on cpu, {divergence}, the worst of each group" in out
    found = json.loads((tmp_path / "json").read_text())["configurations"]
    assert [each["divergence"] for each in found] == ["ForwardKL()", "JSD(beta=0.5)", "JSD(beta=0.1)"]


WRONG = {
    "no gradient": lambda z, *a, **k: kd_loss(z, *a, **k).detach() + 0 * z.sum(),
    "T^2 in the value only": lambda z, *a, temperature, **k: (
        kd_loss(z, *a, temperature=temperature, **k).detach()
        + (lambda loss: (loss - loss.detach()) / temperature**2)(kd_loss(z, *a, temperature=temperature, **k))
    ),
    "0.1% too large": lambda *a, **k: 1.001 * kd_loss(*a, **k),
    "NaN": lambda *a, **k: kd_loss(*a, **k) * torch.nan,
}


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("launch", [ONE, TWO])
def test_check_fails_for_a_wrong_loss(mistake, dtype, launch):
    case = next(
        c for c in CASES
        if (c.student_dtype, c.launch) == (dtype, launch) and c.temperature == 4.0 and c.alpha == 0.3 and c.rows == 33
    )  # fmt: skip
    assert failures_of(case) == []
    assert failures_of(case, WRONG[mistake]) != []


@pytest.mark.parametrize("launch", [ONE, TWO])
def test_how_often_a_gradient_is_rounded_is_checked(launch):
    """In one launch before and after the upstream gradient multiplies it, in two launches after it alone."""
    case = next(
        c
        for c in CASES
        if c.student_dtype == torch.bfloat16 and c.launch == launch and c.reduction == "mean" and c.rows == 33
    )
    assert failures_of(case) == []

    def otherwise(*arguments, **options):
        with launching(TWO if launch == ONE else ONE):
            return kd_loss(*arguments, **options)

    assert "not the oracle's, rounded" in failures_of(case, otherwise)[0]


CASES = accuracy.cases()


def failures_of(case, loss=kd_loss):
    return accuracy.measure(case, torch.device("cpu"), loss).failures(case.has_right_values)


LINEAR_WRONG = {
    "no weight gradient": lambda h, w, *a, **k: linear_kd_loss(h, w.detach(), *a, **k) + 0 * w.sum(),
    "5% too large": lambda *a, **k: 1.05 * linear_kd_loss(*a, **k),
    "NaN": lambda *a, **k: linear_kd_loss(*a, **k) * torch.nan,
}


@pytest.mark.parametrize("mistake", LINEAR_WRONG)
@pytest.mark.parametrize("dtype", linear_accuracy.DTYPES)
def test_check_fails_for_a_wrong_linear_loss(mistake, dtype):
    case = next(c for c in linear_accuracy.cases() if c.student_dtype == dtype and c.alpha == 0.3 and c.rows == 33)
    assert linear_accuracy.measure(case, torch.device("cpu")).failures(False) == []
    assert linear_accuracy.measure(case, torch.device("cpu"), LINEAR_WRONG[mistake]).failures(False) != []


def test_a_failed_configuration_gives_exit_code_1(capsys):
    wrong = functools.partial(accuracy.measure, loss=WRONG["0.1% too large"])
    with accuracy.checking([c for c in CASES if c.rows == 129][:2], wrong):
        assert main(["check", "--backend", "cpu", "--loss", "logits", "--verbose"]) == 1
    out = capsys.readouterr().out
    assert "FAILED [129, 1023]" in out
    assert out.endswith("\n2 of 2 configurations are WRONG on cpu, as listed above.\n")


def test_the_last_sentence_says_what_was_found():
    case = CASES[0]
    errors = accuracy.Errors(
        loss=1e-7, loss_eager=1e-7, gradient=1.5e-7, gradient_eager=1e-7, misrounded=0.0, nan=False, off=False
    )
    whole = check._finding([(case, errors)], 0, 1, "cpu")
    bound = f"the largest error is 75% of its bound, that of the gradient: {case}."
    assert whole == f"All 1 configurations are within their bounds on cpu: {bound}"
    assert check._finding([(case, errors)], 0, 1140, "cpu") == (
        f"Interrupted after 1 of 1 140 configurations: so far all are within their bounds on cpu: {bound}"
    )
    assert check._finding([(case, errors)], 1, 1140, "cpu") == (
        "Interrupted after 1 of 1 140 configurations: 1 of 1 configurations are WRONG on cpu, as listed above."
    )
    assert check._finding([], 0, 1140, "cpu") == (
        "Nothing was checked: the command was interrupted in the first of 1 140 configurations."
    )
    unknown = dataclasses.replace(errors, loss=float("nan"), nan=True)
    assert unknown.shares(False) == {"loss": float("inf"), "gradient": pytest.approx(0.75)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_that_cannot_run_gives_exit_code_2(capsys):
    assert main(["check", "--backend", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_interpreter_runs_the_kernels_on_cpu_tensors(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # what it was comes back
    swept = []
    kernel = kernels.row_statistics
    monkeypatch.setattr(kernels, "row_statistics", lambda *a, **k: swept.append(a) or kernel(*a, **k))
    with accuracy.checking([c for c in CASES if c.rows == 33][:1]):
        assert main(["check", "--backend", "interpreter", "--loss", "logits"]) == 0
        assert "All 1 configurations are within their bounds on interpreter: " in capsys.readouterr().out
        assert swept
        swept.clear()
        assert main(["check", "--backend", "cpu", "--loss", "logits"]) == 0
        assert not swept


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["check"]) == 2
    assert 'the package rich is missing: pip install "fused_kd[cli]"' in capsys.readouterr().err


def test_module_and_help():
    result = subprocess.run([sys.executable, "-m", "fused_kd", "check", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--backend" in result.stdout
