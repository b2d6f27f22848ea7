"""Ctrl-C and SIGTERM: what there is is printed and written; a second one ends the command; never a traceback."""

import contextlib
import json
import signal
import threading
from signal import SIGINT, SIGTERM

import pytest

from fused_kd.cli import main
from fused_kd.cli.interruption import Interrupted, interruptible
from fused_kd.testing import accuracy

CASES = [case for case in accuracy.cases() if case.rows == 33][:5]
CODES = {SIGINT: 130, SIGTERM: 143}


@pytest.fixture(autouse=True)
def heard():
    """Signals as a command in the foreground has them, wherever the tests run."""
    before = {number: signal.getsignal(number) for number in CODES}
    signal.signal(SIGINT, signal.default_int_handler)
    signal.signal(SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_a_request_and_the_second_one_ends_the_block():
    with interruptible() as request:
        assert (bool(request), request.exit_code) == (False, 0)
        signal.raise_signal(SIGTERM)
        assert (bool(request), request.exit_code) == (True, 143)
        with pytest.raises(Interrupted):
            signal.raise_signal(SIGINT)
    assert signal.getsignal(SIGINT) is signal.default_int_handler
    assert signal.getsignal(SIGTERM) is signal.SIG_DFL


def test_a_block_may_be_left_by_the_first_signal_but_not_by_the_second():
    reached = []
    with interruptible() as request:
        with request.may_leave():
            signal.raise_signal(SIGINT)
            reached.append("the end of the block")
        reached.append("what follows")
    assert reached == ["what follows"]
    with pytest.raises(Interrupted):
        ask_twice()


def ask_twice():
    with interruptible() as request, request.may_leave():
        try:
            signal.raise_signal(SIGINT)
        finally:
            signal.raise_signal(SIGINT)


def test_signals_that_are_ignored_stay_ignored():
    signal.signal(SIGINT, signal.SIG_IGN)
    with interruptible() as request:
        signal.raise_signal(SIGINT)
        assert not request
        signal.raise_signal(SIGTERM)
        assert request.exit_code == 143
    assert signal.getsignal(SIGINT) is signal.SIG_IGN


def test_another_thread_has_no_signals_to_handle():
    found = []
    thread = threading.Thread(target=lambda: found.extend(bool(request) for request in [interruptible().__enter__()]))
    thread.start()
    thread.join()
    assert found == [False]


@pytest.fixture
def few():
    """`check` of five configurations, of which the third is sent these signals."""

    def sent(*signals):
        measure, count = accuracy.measure, []

        def measured(case, device):
            count.append(case)
            for number in signals if len(count) == 3 else ():
                signal.raise_signal(number)
            return measure(case, device)

        context.enter_context(accuracy.checking(CASES, measured))

    with contextlib.ExitStack() as context:
        yield sent


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_check_keeps_what_it_has(number, few, tmp_path, capsys):
    few(number)
    file = tmp_path / "check.json"
    assert main(["check", "--backend", "cpu", "--loss", "logits", "--json", str(file)]) == CODES[number]
    captured = capsys.readouterr()
    assert "Errors against float64 on cpu" in captured.out
    last = captured.out.splitlines()[-1]
    assert last.startswith(
        "Interrupted after 2 of 5 configurations: so far all are within their bounds on cpu: the largest"
    )
    record = json.loads(file.read_text())
    assert record["interrupted"] is True
    assert len(record["configurations"]) == 2


def test_check_that_was_not_interrupted_says_so(few, tmp_path):
    few()
    file = tmp_path / "check.json"
    assert main(["check", "--backend", "cpu", "--loss", "logits", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["interrupted"] is False


def test_a_second_signal_ends_check_at_once(tmp_path, capsys):
    def stubborn(case, device):
        try:
            signal.raise_signal(SIGINT)
        finally:
            signal.raise_signal(SIGTERM)

    file = tmp_path / "check.json"
    with accuracy.checking(CASES, stubborn):
        assert main(["check", "--backend", "cpu", "--loss", "logits", "--json", str(file)]) == 143
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "fused-kd: interrupted"
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["check", "bench", "plan", "distill"])
def test_ctrl_c_elsewhere_is_one_line(command, monkeypatch, capsys):
    def interrupted(options):
        signal.raise_signal(SIGINT)

    monkeypatch.setattr(f"fused_kd.cli.{command}.run", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr() == ("", "fused-kd: interrupted\n")


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_bench_keeps_what_it_has(number, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from fused_kd.cli.benchmarking import measure, suite

    spread = measure.Spread(1.0, 0.9, 1.1, 9)
    count = []

    def measured(shape, device, budget, divergence):
        count.append(shape)
        if len(count) == 3:
            signal.raise_signal(number)
        return [suite.Result(*shape[:-1], "float32", "fused_kd", "CE + KL", both=spread, peak_bytes=1, agrees=True)]

    monkeypatch.setattr(suite, "measured", measured)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    file, folder = tmp_path / "bench.json", tmp_path / "plots"
    arguments = ["--device", "cpu", "--part", "sweeps", "--output", str(folder), "--json", str(file)]
    assert main(["bench", *arguments]) == CODES[number]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Interrupted after 2 of 7 configurations: ")
    record = json.loads(file.read_text())
    assert record["interrupted"] is True
    assert len(record["results"]) == 2
    assert [path.name for path in folder.iterdir()] == ["growing-V.png"]
