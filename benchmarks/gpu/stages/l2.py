"""L2: bytes of device memory that each kernel moves, counted by ncu.

That a loss in one launch takes three passes over memory depends on its second reading, which has to hit L2.  One process
runs a step at each vocabulary, in one launch and in two, while ncu counts the kernels' traffic.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ..context import Context

KERNELS = ("whole_kernel", "shared_kernel", "row_statistics_kernel", "logit_gradient_kernel")
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
TARGET = 6.4  # bytes per pair of logits in one launch; 6 is the floor


def results(context: Context) -> Iterator[dict[str, Any]]:
    if shutil.which("ncu") is None:
        yield {"reason": "ncu is not installed"}
        return
    log, steps = context.folder / "ncu.csv", context.folder / "steps.jsonl"
    command = [
        "ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--target-processes", "all",
        "--kernel-name-base", "function", "--kernel-name", f"regex:^({'|'.join(KERNELS)})$",
        "--metrics", ",".join((READ, WRITTEN, TIME)), "--log-file", str(log),
        sys.executable, "-m", "benchmarks.gpu.child", "steps", str(steps),
        "--rows", str(context.sizes.rows), "--vocabularies", *map(str, context.sizes.vocabularies),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=context.left())
        code, said = done.returncode, (done.stderr or done.stdout)[-500:]
    except subprocess.TimeoutExpired:
        code, said = None, "it did not come to its end in time"
    launched = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    counted = list(kernels(log.read_text())) if log.exists() else []
    yield from matched(launched, counted)
    if code != 0 or not counted or len(counted) != sum(step["kernels"] for step in launched):
        yield {"reason": f"ncu: exit code {code}, {len(counted)} kernels counted: {said}"}


def matched(launched: list[dict[str, Any]], counted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Give each step the kernels that are its own, in the order in which both were launched."""
    left = iter(counted)
    for step in launched:
        own = [kernel for _, kernel in zip(range(step["kernels"]), left, strict=False)]
        if len(own) < step["kernels"]:
            return
        pairs = step["rows"] * step["vocabulary"]
        moved = sum(kernel[READ] + kernel[WRITTEN] for kernel in own)
        yield {
            "vocabulary": step["vocabulary"], "rows": step["rows"], "plan": step["plan"],
            "kernels": [kernel["kernel"] for kernel in own], "bytes_per_pair": moved / pairs,
            "read_per_pair": sum(kernel[READ] for kernel in own) / pairs,
            "seconds": sum(kernel[TIME] for kernel in own) / 1e9,
            **({"target": TARGET} if len(own) == 1 else {}),
        }  # fmt: skip


def kernels(text: str) -> Iterator[dict[str, Any]]:
    """Read the kernels of a CSV log of ncu, in the order of their launch, with their metrics in base units."""
    begin = text.find('"ID"')
    by_id: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(text[begin:])) if begin >= 0 else ():
        if (row.get("Metric Name") or "") in (READ, WRITTEN, TIME):
            kernel = by_id.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    yield from (kernel for kernel in by_id.values() if {READ, WRITTEN, TIME} <= kernel.keys())
