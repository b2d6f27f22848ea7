"""Errors that the user can correct, reported in one line."""

import importlib
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Ends the command with this message on stderr and exit code 2."""


def reporting(command: str, packages: Sequence[str], extra: str, work: Callable[[], int]) -> int:
    """Run a command's work, which needs these packages of an extra, and return its exit code; 2 for a `UserError`."""
    try:
        for package in packages:
            _require(package, extra)
        return work()
    except UserError as error:
        print(f"fused-kd {command}: {error}", file=sys.stderr)
        return 2


def _require(package: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f'the package {package} is missing: pip install "fused_kd[{extra}]"') from error
