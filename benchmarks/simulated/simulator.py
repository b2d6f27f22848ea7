"""The simulator of GPUs, which is no part of the project: an environment variable names its folder."""

import argparse
import importlib.util
import os
import sys
from types import ModuleType

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
