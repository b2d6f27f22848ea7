"""A reader that goes away ends the printing, not the run: no traceback, and the exit code is that of the work."""

import io
import json
import sys

import pytest

from fused_kd.cli import main, streams

from .processes import ENVIRONMENT, run, shell

SIZES = ["--vocab-size", "300", "--student-hidden", "8", "--teacher-hidden", "9"]
MANY = """
import sys
from fused_kd.cli import plan, main
def print_much(options):
    for number in range(100_000):
        print(number)
    print("the end", file=sys.stderr)
    return 1
plan.run = print_much
sys.exit(main(["plan"]))
"""


def test_a_reader_that_goes_away_does_not_end_the_work():
    result = run("bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-c", MANY)
    assert (result.stdout, result.stderr, result.returncode) == ("0\n", "the end\n", 1)


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ('"$@" | head -1; exit ${PIPESTATUS[0]}', "8 192 tokens, V = 300"),
        ('"$@" | true; exit ${PIPESTATUS[0]}', ""),
        ('"$@" >&-', ""),
        ('"$@" >&- 2>&- <&-', ""),
    ],
)
def test_plan_without_a_reader_writes_its_file(script, printed, tmp_path):
    result = shell(script, "plan", *SIZES, "--json", str(tmp_path / "plan.json"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(printed)
    assert json.loads((tmp_path / "plan.json").read_text())["command"] == "fused-kd plan"


@pytest.mark.parametrize("script", ['"$@" | true; exit ${PIPESTATUS[0]}', '"$@" >&-'])
def test_help_without_a_reader(script):
    result = shell(script, "check", "--help")
    assert (result.returncode, result.stderr) == (0, "")


def test_an_error_that_nobody_reads_has_its_exit_code():
    result = shell('"$@" 2>&-', "plan", *SIZES, "--json", "/proc/x")
    assert (result.returncode, result.stdout) == (2, "")


def test_a_full_disk_is_one_line_and_the_work_is_done(tmp_path):
    result = shell('"$@" >/dev/full', "plan", *SIZES, "--json", str(tmp_path / "plan.json"))
    assert (result.returncode, result.stderr) == (2, "fused-kd: cannot write to stdout: No space left on device\n")
    assert (tmp_path / "plan.json").is_file()


def test_an_unbuffered_stream_lasts_too():
    script = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    result = run("bash", "-c", script, "bash", sys.executable, "-u", "-c", MANY)
    assert (result.stdout, result.stderr, result.returncode) == ("0\n", "the end\n", 1)


def test_streams_keep_their_descriptor_encoding_and_errors():
    script = """
import sys
from fused_kd.cli.streams import lasting
def properties():
    return [(s.fileno(), s.isatty(), s.encoding, s.errors, s.line_buffering) for s in (sys.stdout, sys.stderr)]
before, out = properties(), sys.stdout
with lasting():
    assert sys.stdout is not out
    assert properties() == before
    print("ä")
assert sys.stdout is out
"""
    result = run(sys.executable, "-c", script, env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1:replace"}, text=False)
    assert (result.stdout, result.stderr) == ("ä\n".encode("latin-1"), b"")


def test_other_streams_are_left_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with streams.lasting() as failures:
        assert sys.stdout is stream
    assert failures == []


def test_a_bug_stays_a_traceback(monkeypatch):
    def run(options):
        raise MemoryError

    monkeypatch.setattr("fused_kd.cli.plan.run", run)
    with pytest.raises(MemoryError):
        main(["plan"])


def test_a_stream_without_the_letters_shows_their_numbers():
    script = """
import sys
from fused_kd.cli.streams import lasting
with lasting():
    print("1.5 ± 0.1")
"""
    result = run(sys.executable, "-c", script, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (result.stdout, result.stderr) == ("1.5 \\xb1 0.1\n", "")
