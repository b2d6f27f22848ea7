"""The table of versions: what is run, how an entry is read and recorded, and that the table is the record's."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich")
versions: Any = pytest.importorskip("benchmarks.versions")

VERSIONS = {"python": "3.12.1", "fused_kd": "0.1.0", "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.2"}
NAMES = [
    "row_statistics sm_90 bf16/bf16 T=1",
    "logit_gradient sm_80 fp32/fp32 T=2",
    "cluster sm_90 T=1",
    "whole sm_80 T=2",
]


def test_the_document_says_what_the_record_says():
    assert versions.DOCUMENT.read_text() == versions.written(versions.DOCUMENT.read_text(), versions.read())


def test_the_floor_is_the_first_pair():
    project = (versions.ROOT / "pyproject.toml").read_text()
    floor = {name: re.search(rf'"{name}>=([\d.]+)', project)[1] for name in ("torch", "triton")}
    assert (floor["torch"], floor["triton"]) == versions.PAIRS[0]


class Commands:
    """Stands in for `subprocess.run`: keeps what is run, and answers as the commands would."""

    def __init__(self, compiled: str = "", tests: str = "7 passed in 1s", code: int = 0) -> None:
        self.compiled, self.tests, self.code = compiled, tests, code
        self.ran: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.ran.append(command)
        assert "PYTHONPATH" not in options["env"]
        stdout, code = "", 0
        if command[1:3] == ["-m", "venv"]:
            python = Path(command[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        elif "--list" in command:
            stdout = "".join(f"{name}\n" for name in NAMES)
        elif "--check" in command:
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"versions": VERSIONS}))
            stdout, code = self.compiled, int(bool(self.compiled))
        elif "pytest" in command:
            stdout, code = self.tests, self.code
        return SimpleNamespace(stdout=stdout, stderr="", returncode=code)

    def of(self, word: str) -> list[list[str]]:
        return [command for command in self.ran if word in command]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """No command is run, and record and document are copies."""
    monkeypatch.setattr(versions, "RECORD", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "DOCUMENT", tmp_path / "versions.md")
    versions.DOCUMENT.write_text(f"before\n{versions.BEGIN}\nold\n{versions.END}\nafter\n")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    commands = Commands()
    monkeypatch.setattr(subprocess, "run", commands)
    return commands


def test_each_pair_is_installed_compiled_tested_and_recorded(commands: Commands, tmp_path: Path):
    assert versions.main(["--folder", str(tmp_path), "--workers", "3"]) == 0
    installed = [[word for word in command if word.startswith(("torch", "triton"))] for command in commands.of("pip")]
    assert installed[0] == ["torch==2.7.*", "triton==3.3.*"]
    assert installed[-1] == ["torch", "triton"]
    assert len(installed) == len(commands.of("--check")) == len(commands.of("pytest")) == len(versions.PAIRS)
    assert all(command[-1] == "3" for command in commands.of("--check") + commands.of("pytest"))
    assert list(versions.read()) == [pair.torch for pair in versions.PAIRS]
    rows = [line for line in versions.DOCUMENT.read_text().splitlines() if line.startswith("| 2.11.0 ")]
    assert rows == ["| 2.11.0 | 3.6.0 | 2.5.2 | 3.12.1 | 4 of 4 | 7 passed, 0 skipped, 0 failed |"] * len(
        versions.PAIRS
    )
    assert str(tmp_path) not in versions.RECORD.read_text() + versions.DOCUMENT.read_text()


def test_what_breaks_is_named(commands: Commands, tmp_path: Path):
    commands.compiled = (
        f"a table\nFAILED {NAMES[2]}: RuntimeError: PassManager: failed\nBROKEN {NAMES[0]}: 80 registers, not 64\n"
        f"BROKEN {NAMES[0]}: 30 instructions, not 27\n"
    )
    commands.tests = (
        "FAILED tests/test_a.py::test_b[x y] - assert 1 == 2\nERROR tests/test_c.py::test_d\n"
        "1 failed, 1200 passed, 3 skipped, 1 error in 9s"
    )
    commands.code = 1
    assert versions.main(["--folder", str(tmp_path), "--only", "2.11"]) == 1
    entry = versions.read()["2.11"]
    assert entry["variants"] == {"within bounds": 2, "break a bound": [NAMES[0]], "do not compile": [NAMES[2]]}
    assert entry["tests"] == {
        "passed": 1200, "skipped": 3, "failed": ["tests/test_a.py::test_b[x y]", "tests/test_c.py::test_d"]
    }  # fmt: skip
    assert "| 2 of 4; 1 break a bound; 1 do not compile | 1 200 passed, 3 skipped, 2 failed |" in (
        versions.DOCUMENT.read_text()
    )


def test_an_entry_takes_the_place_of_its_own_alone(commands: Commands, tmp_path: Path):
    for release in ("2.13", "2.7"):
        assert versions.main(["--folder", str(tmp_path), "--only", release]) == 0
    first = versions.read()
    assert list(first) == ["2.7", "2.13"]
    commands.ran.clear()
    assert versions.main(["--folder", str(tmp_path), "--only", "2.13", "--compile-only"]) == 0
    assert not commands.of("pytest")
    assert versions.read()["2.7"] == first["2.7"]
    assert versions.read()["2.13"]["tests"] is None
    assert "| not run |" in versions.DOCUMENT.read_text()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_an_environment_is_kept_if_asked_for_or_if_it_was_there(commands: Commands, tmp_path: Path, keep, there):
    place = tmp_path / "torch-2.9"
    if there:
        commands(["python", "-m", "venv", str(place)], env={})
    commands.ran.clear()
    assert versions.main(["--folder", str(tmp_path), "--only", "2.9", *["--keep"] * keep]) == 0
    assert len(commands.of("venv")) == (not there)
    assert len(commands.of("pip")) == 1
    assert place.exists() == (keep or there)


def test_a_pair_that_cannot_be_run_leaves_the_others(commands: Commands, tmp_path: Path, capsys):
    def failing(command, **options):
        done = commands(command, **options)
        return SimpleNamespace(**{**vars(done), "returncode": 1, "stderr": "no"}) if "torch==2.9.*" in command else done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", failing)
        assert versions.main(["--folder", str(tmp_path), "--only", "2.9", "--only", "2.11"]) == 1
    assert "PyTorch 2.9 could not be run" in capsys.readouterr().out
    assert list(versions.read()) == ["2.11"]
    assert not (tmp_path / "torch-2.9").exists()


def test_the_table_is_written_from_the_record_alone(commands: Commands, tmp_path: Path):
    assert versions.main(["--folder", str(tmp_path), "--only", "2.7"]) == 0
    document = versions.DOCUMENT.read_text()
    assert document.startswith(f"before\n{versions.BEGIN}")
    assert document.endswith(f"{versions.END}\nafter\n")
    versions.DOCUMENT.write_text(document.replace("4 of 4", "5 of 5"))
    commands.ran.clear()
    assert versions.main(["--write"]) == 0
    assert versions.DOCUMENT.read_text() == document
    assert not commands.ran


def test_a_document_without_the_section_is_refused():
    for text in ("no section", f"{versions.BEGIN} without an end", f"{versions.END} {versions.BEGIN}"):
        with pytest.raises(versions.CommandError, match="expected the lines"):
            versions.written(text, {})
