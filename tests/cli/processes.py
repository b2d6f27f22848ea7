"""The command in a process of its own."""

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "fused_kd"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"OMP_NUM_THREADS": "1"}


def run(*command, **options):
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300} | options
    return subprocess.run(command, **options)


def shell(script, *arguments):
    """`"$@"` is the command `fused-kd` with the arguments."""
    return run("bash", "-c", script, "bash", *COMMAND, *arguments)
