"""The command `fused-kd`, also `python -m fused_kd`."""

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from . import bench, check, distill, interruption, plan, streams
from .help import HelpFormatter

DESCRIPTION = "Fused knowledge-distillation loss for language models with large vocabularies."
EPILOG = """\
examples:

  fused-kd plan --vocab-size 128256 --student-hidden 2048 --teacher-hidden 4096
  fused-kd check --quick

`fused-kd COMMAND --help` has the options and examples of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    The code is 0 for success, 1 for a check that failed, 2 for wrong use or something missing, 130 after Ctrl-C, and 143
    after SIGTERM.
    """
    with streams.lasting() as failures:
        try:
            code = _run(arguments)
        except KeyboardInterrupt as end:
            print("fused-kd: interrupted", file=sys.stderr)
            code = interruption.exit_code(end)
    return code or (2 if failures else 0)


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    return int(options.run(options))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-kd", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fused_kd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (plan, check, bench, distill):
        command.add_parser(commands)
    return parser
