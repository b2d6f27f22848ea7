"""Records of figures as JSON, with the versions and the machine that they were measured with."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(jsonable(record), indent=1, allow_nan=False) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions(*more: str) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for a package that is not installed."""
    packages = ("fused_kd", "torch", "triton", "numpy", *more)
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def jsonable(value: Any) -> Any:
    """Return the value with NaN and infinity replaced by None, and objects that JSON lacks by their text."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)


def _processor() -> str:
    """Return the CPU's name; platform.processor() is empty on many Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
