"""The examples run as their docstrings say, and show what they are there to show.

A file that is added is run at once: it must print losses that go down, unless `SHOWN` has what else it shows.
"""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.py"))
NEEDED = ("transformers", "lightning", "peft")  # each by the examples that import it
LONGEST = 80  # lines, this one not reached
SECONDS = 100  # for processes of its own


def command(file: Path) -> list[str]:
    """Return the first command of an example's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    found = re.search(r"^ {4}(\S.*)$", docstring, re.MULTILINE)
    assert found is not None, "expected a docstring with an indented command"
    return shlex.split(found[1])


def output_of(file: Path, monkeypatch, capsys) -> str:
    """Run an example: here, which spares the imports, or in the processes that its command starts."""
    program, *arguments = command(file)
    if program == "python":
        assert arguments[0] == f"examples/{file.name}"
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out
    assert (program, arguments[-1]) == ("torchrun", f"examples/{file.name}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    done = subprocess.run(torchrun, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_go_down(printed: str) -> None:
    losses = [float(number) for number in re.findall(r"^step \d+: loss (\S+)", printed, re.MULTILINE)]
    assert len(losses) >= 10
    assert sum(losses[-3:]) / 3 < 0.99 * losses[0]


def accumulated_gradients_are_those_of_one_batch(printed: str) -> None:
    losses_go_down(printed)
    off = {name: float(off) for name, off in re.findall(r"(.*): gradients off those of one batch by (\S+)", printed)}
    assert off["num_items"] < 1e-5
    assert off["the mean of four means"] > 0.01


def both_students_learn(printed: str) -> None:
    losses_go_down(printed)
    found = re.findall(r"cross-entropies (\S+) and (\S+), divergence (\S+)\)", printed)
    (first, second, _), *_, (first_end, second_end, _) = (map(float, numbers) for numbers in found)
    assert first_end < 0.9 * first
    assert second_end < 0.9 * second


def memory_is_spared(printed: str) -> None:
    losses_go_down(printed)
    frozen, trained = map(float, re.findall(r"(\S+) MB", printed))
    assert 0 < frozen < 0.7 * trained


def the_adapter_and_the_quantised_head_are_in_the_loss(printed: str) -> None:
    losses_go_down(printed)
    (off,) = re.findall(r"own logits by (\S+)", printed)
    assert float(off) < (1e-3 if torch.cuda.is_available() else 1e-5)  # a GPU may multiply in TF32


def losses_agree_and_memory_is_less(printed: str) -> None:
    rows = re.findall(r"^(\S.*?) +(linear_kd_loss|heads, kd_loss|heads, eager) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    assert len(rows) == 9
    rounding = 1e-2 if torch.cuda.is_available() else 2e-5  # a GPU's are in bfloat16
    for i in range(0, 9, 3):
        (_, _, *hidden), (_, _, *logits), (_, name, *eager) = rows[i : i + 3]
        assert name == "heads, eager"
        for loss, _, memory in (hidden, logits):
            assert float(loss) == pytest.approx(float(eager[0]), rel=rounding)
            assert float(memory) < 0.9 * float(eager[2])


SHOWN = {
    "gradient_accumulation": accumulated_gradients_are_those_of_one_batch,
    "lora_frozen_head": memory_is_spared,
    "lora_on_the_head": the_adapter_and_the_quantised_head_are_in_the_loss,
    "model_shapes": losses_agree_and_memory_is_less,
    "mutual_learning": both_students_learn,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore", "error:.*takes the teacher as a constant")  # those of other packages; our own
def test_example_runs_and_shows_what_it_says(file, monkeypatch, capsys, one_thread):
    text = file.read_text()
    for package in NEEDED:
        if re.search(rf"^(import|from) {package}\b", text, re.MULTILINE) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if command(file)[0] == "torchrun" and not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    SHOWN.get(file.stem, losses_go_down)(output_of(file, monkeypatch, capsys))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_is_short_and_in_the_documentation(file):
    assert len(file.read_text().splitlines()) < LONGEST
    assert f"`{file.name}`" in (ROOT / "docs" / "examples.md").read_text()


def test_nothing_is_shown_of_an_example_that_is_gone():
    assert SHOWN.keys() <= {file.stem for file in FILES}
