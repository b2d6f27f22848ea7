"""Proves and measures the package on a GPU, in eight minutes; or rehearses that on a machine without one."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .run import RESULTS, ROOT, run, run_stage
from .stages import STAGES, TOTAL_SECONDS

DESCRIPTION = """\
Runs from a checkout, with nothing installed but PyTorch, Triton and rich.  Stages, each in a process of its own and with
a time limit of its own:

"""
EPILOG = """\
Results are written as JSON after every stage, and while one runs.  Peers (liger-kernel, fla-core, cut-cross-entropy, trl,
orda-kernel) are measured where they are installed or in the folder of --wheels; else they are named as missing.  A target
that is missed is printed, and does not fail.

Exit code: 0; 1 if a result is wrong, or a stage did not come to its end; 2 for wrong arguments, or without a GPU.
"""


def parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {stage.name:10}{stage.title}; {stage.seconds:.0f} s" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=DESCRIPTION + stages, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME", help="only these stages")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"the record (default: {RESULTS.relative_to(ROOT)}; of a rehearsal none)",
    )
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help=f"of all stages (default: {TOTAL_SECONDS:.0f})"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of peers, unpacked for this run alone")
    rehearsal = parser.add_mutually_exclusive_group()
    rehearsal.add_argument(
        "--rehearse", action="store_true",
        help="every stage without a GPU: small shapes, kernels in Triton's interpreter, stand-ins for CUDA and its tools",
    )  # fmt: skip
    rehearsal.add_argument(
        "--rehearse-wrong",
        action="store_true",
        help="a rehearsal with a wrong kernel, which the second stage must find",
    )
    # The arguments of a stage's own process.
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.stage:
        run_stage(options.stage, options.lines, options.seconds)
        return 0
    if options.wheels and not options.wheels.is_dir():
        parser().error(f"--wheels: expected a folder of wheels, got {options.wheels}")
    rehearsal = "right" if options.rehearse else "wrong" if options.rehearse_wrong else None
    if rehearsal is None and not torch.cuda.is_available():
        print("no GPU is here: expected a CUDA device; --rehearse runs every stage without one", file=sys.stderr)
        return 2
    file = options.json or (Path(os.devnull) if rehearsal else RESULTS)
    return run(options.stages, file, options.seconds, options.wheels, rehearsal)


if __name__ == "__main__":
    sys.exit(main())
