"""The compiled kernels and the tests under every supported pair of PyTorch and Triton, as a record and as a table.

Run `python -m benchmarks.versions --help` in an environment where fused_kd is installed with its extra `cli`.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fused_kd.testing.record import write_json
from fused_kd.testing.words import spaced

DESCRIPTION = """\
Makes a virtual environment for each pair of PyTorch and Triton, installs fused_kd there with its extra `test`, compiles
every variant of the kernels for every target and runs the tests.  No GPU is needed.  Each pair takes about ten minutes on
two cores, and several GB of disk where PyTorch brings its CUDA libraries.

Each pair has its entry in benchmarks/results/versions.json, so pairs can be run one at a time.  The table in
docs/versions.md is written from there.
"""
EPILOG = "Exit code: 0; 1 if a pair cannot be run, a variant breaks a bound or a test fails; 2 for wrong arguments."

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "versions.json"
DOCUMENT = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- written by benchmarks.versions: begin -->", "<!-- end -->"
HEADINGS = ("PyTorch", "Triton", "numpy", "Python", "compiled variants within their bounds", "tests")
NEWEST = "newest"


class Pair(NamedTuple):
    """Releases that PyTorch's own packages for CUDA put together."""

    torch: str
    triton: str

    @property
    def requirements(self) -> list[str]:
        releases = {"torch": self.torch, "triton": self.triton}
        return [name if release == NEWEST else f"{name}=={release}.*" for name, release in releases.items()]


# The first is the floor in pyproject.toml.
PAIRS = (Pair("2.7", "3.3"), Pair("2.9", "3.5"), Pair("2.11", "3.6"), Pair("2.13", "3.8"), Pair(NEWEST, NEWEST))


class CommandError(Exception):
    """Holds the end of what a command printed before it failed."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    releases = [pair.torch for pair in PAIRS]
    parser.add_argument("--only", action="append", choices=releases, help="only this release of PyTorch (repeatable)")
    parser.add_argument("--compile-only", action="store_true", help="do not run the tests")
    parser.add_argument("--write", action="store_true", help="write the table from the record, and run nothing")
    parser.add_argument(
        "--folder", type=Path, help="where the environments are, or are made (default: a temporary folder)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments that are made")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile or test (default: 2)")
    return parser


@contextlib.contextmanager
def environment(pair: Pair, folder: Path, keep: bool) -> Iterator[Path]:
    """The Python of an environment with this pair; one that is there already is brought up to date, and stays."""
    place = folder / f"torch-{pair.torch}"
    python = place / "bin" / "python"
    keep = keep or place.exists()
    try:
        if not python.exists():
            run([sys.executable, "-m", "venv", place])
        run([python, "-m", "pip", "install", "--quiet", "--upgrade", *pair.requirements, "--editable", f"{ROOT}[test]"])
        yield python
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def run(command: Sequence[str | Path], expected: Sequence[int] = (0,)) -> str:
    """Return what a command prints to stdout; raise `CommandError` if it exits with another code than expected."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode not in expected:
        raise CommandError("\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    return done.stdout


def compiled(python: Path, workers: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the versions in an environment, and which variants of the kernels keep their bounds there."""
    profile = [python, "-m", "benchmarks.static_profile"]
    names = run([*profile, "--list"]).split("\n")[:-1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        said = run([*profile, "--check", "--json", file, "--workers", str(workers)], expected=(0, 1))
        if not file.exists():
            raise CommandError(said)
        record = json.loads(file.read_text())
    lines = [line.partition(":")[0].split(" ", 1) for line in said.splitlines()]
    found = {word: [line[1] for line in lines if line[0] == word] for word in ("BROKEN", "FAILED")}
    broken, failed = (sorted(set(found[word])) for word in ("BROKEN", "FAILED"))
    count = len(names) - len({*broken, *failed})
    return record["versions"], {"within bounds": count, "break a bound": broken, "do not compile": failed}


def tested(python: Path, workers: int) -> dict[str, Any]:
    """Return how many tests pass and are skipped in an environment, and which fail."""
    said = run([python, "-m", "pytest", "-q", "-n", str(workers)], expected=(0, 1)).splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", said[-1])}
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in said if line.startswith(("FAILED ", "ERROR "))]
    return {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0), "failed": failed}


def entry(pair: Pair, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with environment(pair, folder, options.keep) as python:
        start = time.perf_counter()
        versions, variants = compiled(python, options.workers)
        seconds = {"compile": round(time.perf_counter() - start)}
        start = time.perf_counter()
        tests = None if options.compile_only else tested(python, options.workers)
        if tests is not None:
            seconds["tests"] = round(time.perf_counter() - start)
    return {"versions": versions, "variants": variants, "tests": tests, "seconds": seconds}


def is_right(entry: dict[str, Any]) -> bool:
    failed = entry["tests"] and entry["tests"]["failed"]
    return not (entry["variants"]["break a bound"] or entry["variants"]["do not compile"] or failed)


def rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of the table, in the order of its headings."""
    for entry in record.values():
        variants, tests, versions = entry["variants"], entry["tests"], entry["versions"]
        bad = {text: variants[text] for text in ("break a bound", "do not compile") if variants[text]}
        count = variants["within bounds"]
        total = count + len({name for names in bad.values() for name in names})
        notes = "".join(f"; {len(names)} {text}" for text, names in bad.items())
        ran = "not run"
        if tests is not None:
            ran = f"{spaced(tests['passed'])} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"
        yield (*(versions[name] for name in ("torch", "triton", "numpy", "python")), f"{count} of {total}{notes}", ran)


def section(record: dict[str, Any]) -> str:
    lines = [" | ".join(cells) for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows(record))]
    return "\n".join((BEGIN, "", *(f"| {line} |" for line in lines), "", END))


def written(text: str, record: dict[str, Any]) -> str:
    """Return the document with the table of this record."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise CommandError(f"{DOCUMENT.name}: expected the lines {BEGIN!r} and {END!r}, which enclose the table")
    return before + section(record) + after


def read() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def update(pair: Pair, found: dict[str, Any]) -> None:
    """Replace the entry of one pair; the others stay as they are recorded now."""
    record = {**read(), pair.torch: found}
    write_json(RECORD, {other.torch: record[other.torch] for other in PAIRS if other.torch in record})
    write_document()


def write_document() -> None:
    DOCUMENT.write_text(written(DOCUMENT.read_text(), read()))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console()
    right = True
    if options.write:
        write_document()
    else:
        chosen = [pair for pair in PAIRS if not options.only or pair.torch in options.only]
        with chosen_folder(options) as folder:
            for pair in chosen:
                console.print(f"PyTorch {pair.torch}, Triton {pair.triton}, in {folder} ...")
                try:
                    found = entry(pair, options, folder)
                except CommandError as error:
                    console.print(str(error), f"PyTorch {pair.torch} could not be run", sep="\n", markup=False)
                    right = False
                else:
                    update(pair, found)
                    right = right and is_right(found)
    table = Table(*HEADINGS, box=None)
    for cells in rows(read()):
        table.add_row(*cells)
    console.print(table)
    return 0 if right else 1


@contextlib.contextmanager
def chosen_folder(options: argparse.Namespace) -> Iterator[Path]:
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fused_kd-versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder.resolve()
    finally:
        if not options.folder and not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
