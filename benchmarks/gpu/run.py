"""The run: each stage in a process of its own, its results in the record as they come."""

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fused_kd.testing import record

from . import tables
from .context import REHEARSAL, here
from .stages import STAGES, Stage

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STANDINS = Path(__file__).parent / "standins" / "bin"
KEPT = 4000  # characters of what a stage printed, where it failed
EVERY = 2.0  # seconds between two writings of the record


def run(names: Sequence[str], file: Path, seconds: float, wheels: Path | None, rehearsal: str | None) -> int:
    begin = time.monotonic()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # if the run is ended, what it printed has been seen
    console = Console(width=None if sys.stdout.isatty() else 160)
    written: dict[str, Any] = {"command": "benchmarks.gpu", "rehearsal": rehearsal, "stages": {}}
    save = functools.partial(_save, file, written)
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), wheels, rehearsal)
        for stage in (stage for stage in STAGES if stage.name in names):
            left = seconds - (time.monotonic() - begin)
            outcome = written["stages"][stage.name] = {"status": "running", "results": []}
            _run_stage(stage, min(stage.seconds, left), Path(folder), environment, outcome, save)
            written["seconds"] = time.monotonic() - begin
            save()
            counts = f"{len(outcome['results'])} results, {len(tables.findings(outcome))} findings"
            line = f"{stage.name}: {outcome['status']} in {outcome['seconds']:.0f} s, {counts}"
            console.print(line, markup=False, highlight=False)
    tables.show(console, written)
    return 1 if tables.wrong(written) else 0


def _save(file: Path, written: dict[str, Any]) -> None:
    """Write the record whole or not at all, whenever this process may be ended."""
    if file == Path(os.devnull):
        return
    beside = file.with_name(f"{file.name}.part")
    record.write_json(beside, written)
    beside.replace(file)


def _environment(folder: Path, wheels: Path | None, rehearsal: str | None) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if wheels is not None:
        target = folder / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
        subprocess.run([*command, str(target), *map(str, sorted(wheels.glob("*.whl")))], check=False)
        paths.append(str(target))
    if rehearsal is not None:
        environment |= {REHEARSAL: rehearsal, "TRITON_INTERPRET": "1", "PATH": f"{STANDINS}:{os.environ['PATH']}"}
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def _run_stage(
    stage: Stage, seconds: float, folder: Path, environment: dict[str, str], outcome: dict[str, Any], save: Any
) -> None:
    """Fill in the outcome while the stage runs, whatever becomes of its process."""
    outcome["seconds"] = 0.0
    if seconds < 1:
        outcome["status"] = "no time was left"
        return
    begin = time.monotonic()
    lines, log = folder / f"{stage.name}.jsonl", folder / f"{stage.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(stage.name, lines, seconds), env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(process, begin + seconds, lambda: save() if _read(lines, outcome) else None)
        finally:
            _end(process)
    _read(lines, outcome)
    outcome["seconds"] = time.monotonic() - begin
    outcome["status"] = "timed out" if code is None else "done" if code == 0 else f"failed with exit code {code}"
    if code != 0:
        outcome["printed"] = log.read_text(errors="replace")[-KEPT:]


def command(name: str, lines: Path, seconds: float) -> list[str]:
    """The command line of a process that calls `run_stage` with these."""
    module = [sys.executable, "-m", __package__]
    return [*module, "--stage", name, "--lines", str(lines), "--seconds", str(seconds)]


def _wait(process: "subprocess.Popen[bytes]", end: float, meanwhile: Any) -> int | None:
    """Return the exit code, or None if the process has not ended by then."""
    while time.monotonic() < end:
        try:
            return process.wait(min(EVERY, max(0.01, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            meanwhile()
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a stage's process, and those that it started, such as a profiler's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(lines: Path, outcome: dict[str, Any]) -> bool:
    """Return whether there are new results; a line that is still being written is left for the next time."""
    text = lines.read_text() if lines.exists() else ""
    results = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    is_more = len(results) > len(outcome["results"])
    outcome["results"] = results
    return is_more


def run_stage(name: str, lines: Path, seconds: float) -> None:
    """Write a line for each result of a stage, as soon as it is there; runs in the stage's own process."""
    # What is begun must end before the process is ended.
    context = here(lines.parent, 0.9 * seconds)
    module = importlib.import_module(f".stages.{name}", __package__)
    with lines.open("w") as file:
        for result in module.results(context):
            file.write(json.dumps(record.jsonable(result)) + "\n")
            file.flush()
