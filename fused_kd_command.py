"""Starts the command `fused-kd`.  PyTorch takes seconds to import: Ctrl-C then is no traceback either."""

import sys


def main() -> int:
    try:
        from fused_kd.cli import main as command
    except KeyboardInterrupt:
        print("fused-kd: interrupted", file=sys.stderr)
        return 130
    return command()
