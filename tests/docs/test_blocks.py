"""Every block of code on every page runs as a reader would run it.

The `python` blocks of a page share their names and run from top to bottom; `given` has the names that they start with.  A
block with `>>>` must print what it shows.  Each line of an `sh` block is a command, which must succeed; a `text` block
straight below must be what they print, where a line `...` stands for any lines.  `toml` and `yaml` must parse.

Sybil would do the same in as many lines.  It makes a test of each block, and pytest-xdist, which the README's own command
starts, would hand the blocks of a page to different processes, which share no names.
"""

import difflib
import doctest
import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .pages import DOCS, PAGES, README, ROOT, Block, PageError, blocks_of, name_of

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

# Commands that do not run here: a pattern of the whole line, and what runs it instead.
ELSEWHERE = {
    "pip install *": ".ci/run installs the package and its extras; a test installs nothing",
    "pytest *": ".ci/run runs the tests",
    "fused-kd check --quick": ".ci/run runs it with --backend interpreter",
    "fused-kd bench *": "tests/cli/test_bench.py runs the command at tiny shapes",
    "fused-kd distill *": "tests/cli/test_distill.py runs the command with tiny models",
    "python -m benchmarks.static_profile --check *": ".ci/run runs it for all variants, in minutes",
    "python -m benchmarks.regression --check": ".ci/run runs it",
    "python -m benchmarks.gpu": "it needs a GPU; .ci/run rehearses it without one",
}
SECONDS = 120  # for one line


def model(width: int) -> Any:
    """Return a tiny model with random weights; the one of width 16, the student, has tied embeddings."""
    torch.manual_seed(width)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=width == 16,
        )
    )  # fmt: skip


def given(learning_rate: float = 0.1) -> dict[str, Any]:
    """Return the names that a page's Python starts with."""
    student, teacher = model(16), model(32)
    torch.manual_seed(0)
    input_ids = torch.randint(300, (2, 7))
    optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate)
    return {
        "__name__": "__main__", "torch": torch, "student": student, "teacher": teacher,
        "input_ids": input_ids, "labels": input_ids, "optimizer": optimizer,
    }  # fmt: skip


def run_python(page: Path, block: Block, names: dict[str, Any]) -> None:
    """Run a block under the page's name and the block's lines, so that tracebacks and `inspect` find them."""
    if ">>>" in block.text:
        run_doctest(page, block, names)
        return
    try:
        exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
    except Exception as error:
        inner, line = error.__traceback__, getattr(error, "lineno", None) or block.line  # a SyntaxError's own line
        while inner is not None:
            line = inner.tb_lineno if inner.tb_frame.f_code.co_filename == str(page) else line
            inner = inner.tb_next
        raise PageError(page, line, f"{type(error).__name__}: {error}") from error


def run_doctest(page: Path, block: Block, names: dict[str, Any]) -> None:
    examples = doctest.DocTestParser().get_doctest(block.text, {}, name_of(page), str(page), block.line - 1)
    examples.globs = names
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(
        examples, out=said.append, clear_globs=False
    )
    if failed:
        raise PageError(page, block.line, "".join(said))


def commands_of(block: Block) -> list[tuple[int, str]]:
    """Return the commands of a block with the numbers of their lines.  A backslash at the end joins two lines."""
    joined = block.text.replace("\\\n", "\\\0")  # the count of lines stays
    found, number = [], block.line
    for line in joined.splitlines():
        command = line.replace("\\\0", "").strip()
        if command and not command.startswith("#"):
            found.append((number, command))
        number += 1 + line.count("\0")
    return found


def where_else(command: str) -> str | None:
    """Return the pattern of the commands that do not run here and match, or None."""
    return next((pattern for pattern in ELSEWHERE if fnmatch.fnmatchcase(command, pattern)), None)


def run_shell(page: Path, block: Block, folder: Path) -> str | None:
    """Return what the commands of a block print; None if one of them does not run here."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    printed = ""
    for line, command in commands_of(block):
        if where_else(command):
            return None
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode:
            raise PageError(page, line, f"{command} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
        printed += done.stdout
    return printed


def assert_printed(page: Path, block: Block, printed: str) -> None:
    expected, got = ([line.rstrip() for line in text.strip("\n").splitlines()] for text in (block.text, printed))
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line) + r"\n" for line in expected)
    if not re.fullmatch(pattern, "".join(f"{line}\n" for line in got)):
        difference = "\n".join(difflib.unified_diff(expected, got, "the page", "the command", lineterm=""))
        raise PageError(page, block.line, f"the command prints something else:\n{difference}")


def parse(page: Path, block: Block) -> None:
    try:
        if block.language == "yaml":
            yaml.safe_load(block.text)
        elif sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.text)
    except ValueError as error:
        raise PageError(page, block.line, f"not {block.language}: {error}") from error
    except yaml.YAMLError as error:
        raise PageError(page, block.line, f"not {block.language}: {error}") from error


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page; `folder` is where its commands start, and has the repository's files."""
    names, printed = given(), None
    for block in blocks_of(page):
        if block.language == "python":
            run_python(page, block, names)
        elif block.language == "sh":
            printed = run_shell(page, block, folder)
        elif block.language == "text":
            if block.follows == "sh" and printed is not None:
                assert_printed(page, block, printed)
        elif block.language in ("toml", "yaml"):
            parse(page, block)
        else:
            raise PageError(page, block.line - 1, f"expected python, sh, text, toml or yaml, got {block.language!r}")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a checkout seems to lie, so that what a block writes there is not left behind."""
    for path in ROOT.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page: Path, checkout: Path, one_thread: None, request: pytest.FixtureRequest):
    if any("torch.distributed" in block.text for block in blocks_of(page) if block.language == "python"):
        request.getfixturevalue("process_group")
    run_page(page, checkout)


def test_commands_that_do_not_run_here_are_on_a_page():
    commands = [
        command
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "sh"
        for _, command in commands_of(block)
    ]
    found = {where_else(command) for command in commands}
    assert [pattern for pattern in ELSEWHERE if pattern not in found] == []


def test_training_steps_agree(process_group: None):
    """The README's steps, from hidden states and from logits, and the one under DDP have the same loss and gradients."""
    pages = [page for page in (README, DOCS / "several-gpus.md") if page.exists()]
    steps = [
        (page, block)
        for page in pages
        for block in blocks_of(page)
        if block.language == "python" and "loss.backward()" in block.text
        and (page == README or "DistributedDataParallel(" in block.text)
    ]  # fmt: skip
    assert len(steps) >= 3
    losses, gradients = [], []
    for page, step in steps:
        names = given(learning_rate=0.0)
        run_python(page, step, names)
        losses.append(names["loss"].item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in names["student"].parameters()]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


WRONG = {
    "an error": ("text\n\n```python\nx = 1\n\n1 / 0\n```\n", 6, "ZeroDivisionError"),
    "an error of Python's grammar": ("```python\nx = 1\nx = = 1\n```\n", 3, "SyntaxError"),
    "an error below a name of an earlier block": (
        "```python\ndef f():\n    raise KeyError\n```\n\n```python\nf()\n```\n", 3, "KeyError",
    ),
    "another result": ("```python\nx = 1\n```\n\n```python\n>>> x\n1\n>>> x + 1\n3\n```\n", 6, "Expected:\n    3"),
    "a command that fails": ("```sh\ntrue\n# why\nfalse\n```\n", 4, "false exits with 1"),
    "another output": ("```sh\nprintf 'a\\nb\\n'\n```\n\n```text\na\nc\n```\n", 6, "-c\n+b"),
    "an output that goes on": ("```sh\nprintf 'a\\nb\\n'\n```\n```text\na\n```\n", 5, "+b"),
    "no TOML": ("```toml\na = = 1\n```\n", 2, "not toml"),
    "no YAML": ("```yaml\na: [1\n```\n", 2, "not yaml"),
    "an unknown language": ("```bash\ntrue\n```\n", 1, "got 'bash'"),
    "no language": ("```\ntrue\n```\n", 1, "got ''"),
    "no end": ("```python\nx = 1\n", 1, "does not end"),
    "a fence in a block": ("```python\nx = 1\n```python\n", 3, "expected the end"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_block_fails_with_page_and_line(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if wrong == "no TOML" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    text, line, message = WRONG[wrong]
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    with pytest.raises(PageError) as caught:
        run_page(page, tmp_path)
    assert str(caught.value).startswith(f"page.md:{line}: ")
    assert message in str(caught.value)


RIGHT = {
    "the given names": "```python\nloss = student(input_ids, labels=labels).loss\nloss.backward()\noptimizer.step()\n```\n",
    "names of an earlier block": (
        "```python\nx = 1\n```\n\n```python\n>>> x\n1\n>>> y = 2\n```\n\n```python\nassert y == 2\n```\n"
    ),
    "a function whose source is read": (
        "```python\nimport inspect\n\n\ndef f():\n    return 1\n\n\nassert 'return 1' in inspect.getsource(f)\n```\n"
    ),
    "an indented block": "- text\n\n    ```python\n    if True:\n        x = 1\n    ```\n",
    "any lines": "```sh\nseq 5\n```\n\n```text\n1\n...\n4\n5\n...\n```\n",
    "a command in two lines": "```sh\nprintf \\\n  'a\\n'\n```\n\n```text\na\n```\n",
    "a text of its own": "```sh\ntrue\n```\n\nprose\n\n```text\na formula\n```\n",
}  # fmt: skip


@pytest.mark.parametrize("right", RIGHT)
def test_right_block_runs(right: str, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(RIGHT[right])
    run_page(page, tmp_path)
