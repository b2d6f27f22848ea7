"""Safe: compute-sanitizer on launches of every kernel, a CUDA graph on new data, and the tests that need a GPU."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fused_kd.cli.benchmarking import problems
from fused_kd.cli.benchmarking.shapes import Shape

from ..context import Context
from ..graphs import captured
from .fast import step

TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"SUMMARY: (\d+)")
TESTS = ("tests/test_synchronisation.py", "tests/kernels", "tests/test_one_launch.py", "tests/test_determinism.py")
OUTCOME = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
GRAPH_VOCABULARIES = (1040, 32_000)  # rows of a program each, and of several


def results(context: Context) -> Iterator[dict[str, Any]]:
    yield from (replayed(context, vocabulary) for vocabulary in GRAPH_VOCABULARIES)
    yield from (checked(context, tool) for tool in TOOLS)
    yield tested(context)


def replayed(context: Context, vocabulary: int) -> dict[str, Any]:
    """A captured step gives what a step gives, of other logits, labels and ignored rows than it was captured with."""
    shape = Shape("gpu", "", "logits", context.sizes.rows // 4, vocabulary, 0, 0, torch.float32)
    inputs = problems.make(shape, context.device)
    run = step(inputs)
    graph, written = captured(run)
    with torch.no_grad():
        for logits in (*inputs.student, *inputs.teacher):
            logits.copy_(logits.flip(0) + 1)
        inputs.labels.copy_(inputs.labels.flip(0))
        inputs.labels[: shape.rows // 4] = -100
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(ours, expected) for ours, expected in zip(written, run(), strict=True))
    result = {"check": "CUDA graph", "vocabulary": vocabulary, "rows": shape.rows, "same": same}
    return result if same else {**result, "finding": "a replayed step has not the results of a step"}


def checked(context: Context, tool: str) -> dict[str, Any]:
    result: dict[str, Any] = {"check": tool}
    if shutil.which("compute-sanitizer") is None:
        return {**result, "reason": "compute-sanitizer is not installed"}
    command = [
        "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=_kernel", "--print-limit", "20",
        sys.executable, "-m", "benchmarks.gpu.child", "launches",
    ]  # fmt: skip
    # An allocation of its own for each tensor, of which the checker knows the end.
    done = _run(command, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    counts = SUMMARY.findall(done.stdout)
    if done.returncode == 0 and counts and not any(map(int, counts)):
        return {**result, "errors": 0}
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")] or done.stderr.splitlines()
    return {**result, "errors": max(map(int, counts), default=None), "finding": "\n".join(lines[:60])}


def tested(context: Context) -> dict[str, Any]:
    """pytest -m gpu; on a machine without one all of it is skipped."""
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider",
        "--numprocesses", str(context.sizes.workers), *TESTS,
    ]  # fmt: skip
    done = _run(command, {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"})
    outcomes = {name: int(count) for count, name in OUTCOME.findall(done.stdout.splitlines()[-1] if done.stdout else "")}
    result: dict[str, Any] = {"check": "pytest -m gpu", **outcomes}
    if done.returncode in (0, 5):  # 5: there are none here
        return result
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return {**result, "finding": "\n".join(failed[:60]) or (done.stdout + done.stderr)[-2000:]}


def _run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, env=environment)
