"""The command `fused-kd`, also `python -m fused_kd`."""

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from . import bench, check, distill, interruption, plan, streams
from .help import HelpFormatter


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code.

    0 is done, 1 a check that failed, 2 wrong use or something missing, 130 Ctrl-C, 143 SIGTERM.
    """
    with streams.lasting() as failures:
        try:
            code = _run(arguments)
        except KeyboardInterrupt as end:
            print("fused-kd: interrupted", file=sys.stderr)
            code = interruption.exit_code(end)
    return code or (2 if failures else 0)


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="fused-kd",
        description="Fused knowledge-distillation loss for language models with large vocabularies.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fused_kd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (check, bench, plan, distill):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))
