"""Workers of the benchmarks: Ctrl-C ends them without a word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT

ROOT = Path(__file__).parents[2]

WORKERS = """
import os, signal, sys, time
from benchmarks.compiled.workers import in_workers
def stop():  # as from a terminal, which sends it to all
    os.kill(os.getpid(), signal.SIGINT)
def task(item):
    stop()
    if item == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(100)
    return item
if __name__ == "__main__":
    try:
        in_workers(task, range(50), 1, prepare=stop)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_ends_the_workers_without_a_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    begin = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert result.returncode == 130
    assert time.perf_counter() - begin < 100
    assert "Traceback" not in result.stderr
