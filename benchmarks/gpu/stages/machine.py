"""The machine: what is installed, how fast it copies, how fast it multiplies."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from fused_kd.testing import record

from ..context import Context
from ..timing import Timing, timed

TOOLS = ("ncu", "compute-sanitizer", "nvidia-smi")
PACKAGES = ("transformers", "liger-kernel", "fla-core", "cut-cross-entropy", "trl", "orda-kernel")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def results(context: Context) -> Iterator[dict[str, Any]]:
    properties = torch.cuda.get_device_properties(0)
    yield {
        "figure": "device",
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "nvidia-smi": nvidia_smi(),
    }
    tools = {tool: shutil.which(tool) for tool in TOOLS}
    yield {"figure": "installed", "cuda": torch.version.cuda, "tools": tools, **record.versions(*PACKAGES)}
    copy = copy_timing(context)
    yield {"figure": "copy", "bytes_per_second": 2 * context.sizes.copy_bytes / copy.seconds, **copy._asdict()}
    size = context.sizes.matrix
    a, b = (torch.randn(size, size, device=context.device).to(context.sizes.dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = timed({"mm": lambda: torch.mm(a, b, out=out)}, context.sizes.batches, context.sizes.rounds)["mm"]
    yield {"figure": "matrix product", "flops_per_second": 2 * size**3 / product.seconds, **product._asdict()}


def nvidia_smi() -> str:
    """Return what the driver says of the device and its clocks, or why it says nothing."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def copy_timing(context: Context) -> Timing:
    source = torch.randint(0, 255, (context.sizes.copy_bytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return timed({"copy": lambda: target.copy_(source)}, context.sizes.batches, context.sizes.rounds)["copy"]


def copy_bandwidth(context: Context) -> float:
    """Measure the bytes per second that a copy reads and writes."""
    return 2 * context.sizes.copy_bytes / copy_timing(context).seconds
