"""The command `fused-kd`, also `python -m fused_kd`."""

import argparse
from collections.abc import Sequence

from ..version import __version__
from . import bench, check, distill, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0 done, 1 a check failed, 2 wrong use or something missing."""
    parser = argparse.ArgumentParser(
        prog="fused-kd",
        description="Fused knowledge-distillation loss for language models with large vocabularies.",
    )
    parser.add_argument("--version", action="version", version=f"fused_kd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (check, bench, plan, distill):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))
