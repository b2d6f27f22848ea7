"""The README's figures are those of the records, and the scripts that make them say what they lack."""

from typing import Any

import pytest

pytest.importorskip("rich")
readme: Any = pytest.importorskip("benchmarks.readme")
modelled: Any = pytest.importorskip("benchmarks.modelled")
from benchmarks.simulated import simulator  # noqa: E402


def test_the_readme_says_what_the_records_say():
    assert readme.main(["--check"]) == 0


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A README of its own to be written."""
    file = tmp_path / "README.md"
    file.write_text(readme.README.read_text())
    monkeypatch.setattr(readme, "SECTIONS", {file: readme.section})
    return file


def test_a_figure_typed_by_hand_is_seen_and_written_over(copy, capsys):
    before = copy.read_text()
    section = before[before.index(readme.BEGIN) : before.index(readme.END)]
    copy.write_text(before.replace(section, section.replace(" GB", " MB", 1)))
    assert readme.main(["--check"]) == 1
    assert "run python -m benchmarks.readme" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert copy.read_text() == before


def test_the_rest_of_the_readme_is_left_alone(copy):
    copy.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.main([]) == 0
    text = copy.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize("text", ["no section", "{BEGIN} without an end", "{END} {BEGIN}"])
def test_a_readme_without_the_section_is_refused(copy, text, capsys):
    text = text.format(BEGIN=readme.BEGIN, END=readme.END)
    copy.write_text(text)
    assert readme.main([]) == 2
    assert copy.read_text() == text
    assert "expected the lines" in capsys.readouterr().err


def test_what_is_modelled_is_labelled_so():
    rows = [
        line for line in readme.performance().splitlines() if line.startswith("| ") and "00, " in line.split("|")[1]
    ]
    assert len(rows) >= 9
    assert all(row.split("|")[1].endswith(", modelled ") for row in rows)


def test_without_a_simulator_nothing_is_modelled(monkeypatch, capsys):
    monkeypatch.delenv(simulator.FOLDER, raising=False)
    assert modelled.main([]) == 0
    assert "names no simulator" in capsys.readouterr().out
