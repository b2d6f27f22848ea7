"""Safe: a CUDA graph on new data, the tests that need a GPU, and compute-sanitizer on launches of every kernel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fused_kd.testing import problems
from fused_kd.testing.shapes import Shape

from ..context import Context
from ..graphs import captured
from .fast import step
from .l2 import KERNELS as SWEEPS

KERNELS = (*SWEEPS, "scale_kernel")
TOOLS = ("memcheck", "racecheck")
SHARE = 0.4  # of the time that is left, for one tool
SUMMARY = re.compile(r"SUMMARY: (\d+)")
TEST_PACKAGES = ("pytest", "xdist", "hypothesis")
TESTS = ("tests/test_synchronisation.py", "tests/kernels", "tests/test_one_launch.py", "tests/test_determinism.py")
OUTCOME = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def results(context: Context) -> Iterator[dict[str, Any]]:
    yield from (replayed(context, vocabulary) for vocabulary in context.sizes.graphs)
    yield tested(context)
    yield from (checked(context, tool) for tool in TOOLS)


def replayed(context: Context, vocabulary: int) -> dict[str, Any]:
    """Compare a captured step with a step, on other logits, labels and ignored rows than it was captured with."""
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
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    for kernel in KERNELS:
        command += ["--kernel-name", f"kns={kernel}"]
    command += [sys.executable, "-m", "benchmarks.gpu.child", "launches"]
    # Without PyTorch's cache each tensor is an allocation, of which the checker knows the end.
    done = _run(command, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, SHARE * context.left())
    if done is None:
        return {**result, "reason": "it did not come to its end in time"}
    counts = SUMMARY.findall(done.stdout)
    if done.returncode == 0 and counts and not any(map(int, counts)):
        return {**result, "errors": 0}
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")][:60]
    said += done.stderr.splitlines()[-20:]  # why the program itself ended, if it did
    return {**result, "errors": max(map(int, counts), default=None), "finding": "\n".join(said)}


def tested(context: Context) -> dict[str, Any]:
    """Run the tests that need a GPU; in a rehearsal all of them are skipped."""
    missing = [package for package in TEST_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        return {"check": "pytest -m gpu", "reason": f"not installed: {', '.join(missing)}"}
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider",
        "--numprocesses", str(context.sizes.workers), *TESTS,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = _run(command, environment, context.left())
    if done is None:
        return {"check": "pytest -m gpu", "reason": "it did not come to its end in time"}
    outcomes = {
        name: int(count) for count, name in OUTCOME.findall(done.stdout.splitlines()[-1] if done.stdout else "")
    }
    result: dict[str, Any] = {"check": "pytest -m gpu", **outcomes}
    if done.returncode in (0, 5):  # 5: there are none here
        return result
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    why = [line[:200] for line in lines if line.startswith("E  ")]
    return {**result, "finding": "\n".join([*failed[:60], *why[:40]]) or (done.stdout + done.stderr)[-2000:]}


def _run(command: list[str], environment: dict[str, str], seconds: float) -> "subprocess.CompletedProcess[str] | None":
    """Return the finished process, or None if it takes longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
