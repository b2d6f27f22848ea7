"""The simulator of GPUs, which is no part of the project: an environment variable names its folder."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_kd.testing import record

MODULE = "simgpu"
FOLDER = "FUSED_KD_SIMULATOR"  # the environment variable


def is_there(parser: argparse.ArgumentParser) -> bool:
    """Return whether it can be imported, here and in processes that are started.  A folder without it is wrong use."""
    folder = os.environ.get(FOLDER)
    if not folder:
        print(f"skipped: {FOLDER} names no simulator")
        return False
    sys.path.append(folder)
    if importlib.util.find_spec(MODULE) is None:
        parser.error(f"{FOLDER}: no module {MODULE} in {folder}")
    return True


def load(parser: argparse.ArgumentParser) -> ModuleType | None:
    return importlib.import_module(MODULE) if is_there(parser) else None


def report(
    command: str,
    results: list[dict[str, Any]],
    table: Table,
    file: Path | None,
    width: int,  # of the table in a log, in characters
    packages: tuple[str, ...] = (),  # whose versions are recorded beside the usual ones
) -> None:
    """Print the results of a command as a table, and write them to the file."""
    Console(width=None if sys.stdout.isatty() else width).print(table)
    if file:
        record.write_json(file, {"command": command, "versions": record.versions(*packages), "results": results})
