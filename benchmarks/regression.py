"""The regression gate: figures that hardly depend on the machine's load, compared with the recorded ones.

Run `python -m benchmarks.regression --help` in an environment where fused_kd is installed with its extra `cli`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fused_kd.testing.record import versions, write_json

from .gate import compiled, memory, steps, times
from .gate.comparison import BETTER, OK, WORSE, Comparison, compare
from .gate.figures import GROUPS, KINDS, Figures
from .gate.record import FILE, Operators, Record, release

DESCRIPTION = """\
Measures what a change of the code can make worse on any machine, without a GPU, and compares it with what is recorded in
benchmarks/results/regression.json.

Groups of figures:
  compiled         instructions, MUFU and bytes per pair, registers and spills of both kernels (bfloat16, T = 1, 2 and any
                   other, every target); as recorded with the Triton at hand, or with the nearest release, and then loosely
  launches         of a training step on a GPU: Triton kernels, and PyTorch's operators that launch something; their sum,
                   without the engine's upstream gradient, is at most 8, and 6 more per chunk of hidden states
  multiplications  of a training step from hidden states, in projections of the student
  memory           live bytes of a training step on CPU tensors, beyond inputs and gradients
  times            on one CPU thread, as multiples of eager PyTorch's in the same process

Launches, multiplications, MUFU, bytes and spills may not be worse at all, instructions and registers by 5%, live bytes by
1%; times may double.  A figure that is better than recorded by as much is reported, and does not fail.
"""
EPILOG = "Exit code: 0; 1 if a figure is above its limit, or new, or gone; 2 for wrong arguments."


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the record (the default)")
    action.add_argument("--update", action="store_true", help="compare, then record what was measured; exit with 0")
    parser.add_argument("--only", action="append", choices=GROUPS, help="only this group (repeatable)")
    parser.add_argument("--all", action="store_true", help="show every figure of compiled code, not just what differs")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="what static_profile.py --json wrote, instead of compiling again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison to FILE")
    parser.add_argument(
        "--record", type=Path, default=FILE, metavar="FILE", help="the record, if not that of the project"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: 2)")
    return parser


def measure(groups: set[str], profile: Path | None, workers: int) -> tuple[Figures, Operators]:
    figures: Figures = {}
    operators: Operators = {}
    if "compiled" in groups:
        figures |= compiled.from_profile(profile) if profile else compiled.compile_all(workers)
    if "launches" in groups:
        launches, operators = steps.launches()
        figures |= launches
    if "multiplications" in groups:
        figures |= steps.multiplications()
    if "memory" in groups:
        figures |= memory.live_bytes()
    if "times" in groups:
        figures |= times.ratios()
    return figures, operators


def table(comparisons: Sequence[Comparison], everything: bool) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("figure", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("recorded", "now", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for c in comparisons:
        if everything or c.verdict != OK or KINDS[c.kind].group != "compiled":
            numbers = ("-" if value is None else f"{value:,.9g}" for value in (c.recorded, c.now, c.limit))
            table.add_row(c.kind, c.name, *numbers, c.verdict, style="red" if c.fails else None)
    return table


def more_operators(before: Operators, now: Operators, comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Name the operators that steps with more launches than recorded call more often."""
    for c in comparisons:
        if c.kind == "other launches" and c.verdict == WORSE:
            more = Counter(now.get(c.name, {})) - Counter(before.get(c.name, {}))
            yield f"{c.name}: " + ", ".join(f"{name} +{count:g}" for name, count in more.items())


def other_versions(record: Record, groups: set[str], triton: str) -> Iterator[str]:
    recorded, torch = record.versions.get("torch"), release(version("torch"))
    if recorded and release(recorded) != torch:
        yield f"Recorded with PyTorch {release(recorded)}, measured with {torch}, whose operators may be others."
    if "compiled" in groups and record.triton(triton) != triton:
        yield f"Compiled code is recorded with Triton {record.triton(triton)}, measured with {triton}: loose limits."


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.profile and not options.profile.is_file():
        parser().error(f"--profile: there is no file {options.profile}")
    if not options.update and not options.record.is_file():
        parser().error(f"--record: there is no file {options.record}; --update writes it")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has no width to fit
    groups, record = set(options.only or GROUPS), Record(options.record)
    triton = release(compiled.triton_of(options.profile) if options.profile else versions()["triton"] or "0")
    figures, operators = measure(groups, options.profile, options.workers)
    comparisons = list(compare(record.of(groups, triton), figures, record.triton(triton) != triton))
    shown = table(comparisons, options.all)
    if shown.row_count:
        console.print(shown)
    for line in (*other_versions(record, groups, triton), *more_operators(record.operators, operators, comparisons)):
        print(line)
    failed = sum(c.fails for c in comparisons)
    better = sum(c.verdict == BETTER for c in comparisons)
    print(f"{len(comparisons)} figures: {failed} fail, {better} better than recorded")
    if options.json:
        write_json(options.json, {"versions": versions(), "figures": [c._asdict() for c in comparisons]})
    if options.update:
        record.update(figures, operators, triton)
        print(f"recorded in {options.record}")
        return 0
    if failed:
        print("If a figure may be what it is now, record it: python -m benchmarks.regression --update")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
