"""A record of figures for a JSON file, with what they were measured on."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .outputs import written_beside


def write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(jsonable(record), indent=1, allow_nan=False) + "\n"
    with written_beside(path) as place:
        place.write_text(text)


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions(*more: str) -> dict[str, str | None]:
    """Of Python and of packages, null where one is not installed."""
    packages = ("fused_kd", "torch", "triton", "numpy", *more)
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _processor() -> str:
    """The CPU's name; platform.processor() is empty on many a Linux."""
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


def jsonable(value: Any) -> Any:
    """With null for NaN and infinity, which JSON has not, and text for what else it has not."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int | str) else str(value)
