"""A run of the compiled kernels without a GPU, on a simulator of GPU instructions, with every check that it has.

Run `python -m benchmarks.compiled_kernels --help` in an environment where fused_kd is installed with its extra `cli`.
"""

import argparse
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from .compiled.workers import in_workers, interpreted
from .simulated import simulator
from .simulated.cases import Case, covering_cases

if TYPE_CHECKING:
    from .simulated.launches import Difference, Outcome
    from .simulated.rows import RowCase

CHIPS = ("a100", "h100", "h200", "b200")
DEFAULT_CHIPS = ("a100", "h100", "b200")

AnyCase = TypeVar("AnyCase", "Case", "RowCase")

DESCRIPTION = f"""\
Launches both Triton kernels as compiled for each chip, on a simulator that executes their PTX on the CPU, and reports
accesses out of bounds, races, reads of memory that nothing has written, of rows that do not count or of what lies between
rows, writes beyond a gradient's rows, results that are not those of Triton's interpreter or of the formula in float64, and
a single pass that has other bits than two launches.
Any two of the options (dtypes, temperature, terms, maps of the logits, memory layout, size, splits of a row, which
gradients and where they are written, labels, masked logits) meet in at least one launch.  The kernels on a few numbers
per row are launched too, twice each, beside the CPU operators.

{simulator.FOLDER} names the folder of the simulator, a module `{simulator.MODULE}` with `device(chip, check_races=,
check_init=, cache_model=)`, a context in which launches with CPU tensors are simulated, and whose `poison(tensor)` marks
memory that may not be read.  Without it nothing is run.

Columns of the table:
  cases          in each of which one row of six counts for nothing, and two for one term of the loss
  epsilons from  the largest difference from the interpreter, or float64, in float32 epsilons: of any of a row's
                 statistics; of any row of a gradient, norm-relative, where in 16 bits a unit in the last place is free
  not as         the largest share of 16-bit elements that are that unit off
"""
EPILOG = "Exit code: 0, also where there is no simulator; 1 for a finding; 2 for wrong arguments."


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--chip", action="append", choices=CHIPS, help=f"repeatable (default: {' '.join(DEFAULT_CHIPS)})"
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="few launches: every option in one, no matter with which")
    extent.add_argument("--thorough", action="store_true", help="any three options meet in a launch (half an hour)")
    parser.add_argument("--case", metavar="WORDS", help='only cases with these words, as in "fp32/fp32 T=2"')
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    return parser


def chosen_cases(options: argparse.Namespace, cases: Iterable[AnyCase]) -> list[AnyCase]:
    wanted = set((options.case or "").split())
    return [case for case in cases if wanted <= set(case.name.split())]


def run(cases: Sequence[Case], chips: Sequence[str], workers: int) -> "dict[tuple[Case, str], Outcome | BaseException]":
    from .simulated import launches  # imports Triton, which a worker may only after it is prepared

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = in_workers(
            functools.partial(launches.interpret, folder), cases, workers, prepare=interpreted, doing="interpreting"
        )
        launched = [(case, chip) for case in cases for chip in chips]
        outcomes = in_workers(functools.partial(launches.simulate, folder), launched, workers, doing="simulating")
    # The interpreter checks nothing: what a kernel does out of bounds may end its process.
    return outcomes | {(case, "interpreter"): error for case, error in expected.items() if error is not None}


def run_rows(
    cases: "Sequence[RowCase]", chips: Sequence[str], workers: int
) -> "dict[tuple[RowCase, str], Outcome | BaseException]":
    from .simulated import rows

    launched = list(itertools.product(cases, chips))
    return in_workers(rows.simulate, launched, workers, doing="simulating") if launched else {}


def findings(outcome: "Outcome | BaseException") -> Sequence[str]:
    if isinstance(outcome, BaseException):
        return [f"{type(outcome).__name__}: {outcome}"]
    return outcome.findings


def table(outcomes: "dict[tuple[Case, str], Outcome | BaseException]", chips: Sequence[str]) -> Table:
    """The largest differences on each chip."""
    from .simulated.launches import AGAINST, RESULTS

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("chip", "result"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", *(f"{figure} {against}" for against in AGAINST for figure in ("epsilons from", "not as"))):
        table.add_column(name, justify="right", no_wrap=True)
    for chip, result in itertools.product(chips, RESULTS):
        found = {against: _differences(outcomes, chip, result, against) for against in AGAINST}
        if cases := len(found[AGAINST[0]]):
            figures = [
                (f"{max(d.epsilons for d in ds):.2f}", f"{max(d.misrounded for d in ds):.3%}") for ds in found.values()
            ]
            table.add_row(chip, result, str(cases), *itertools.chain(*figures))
    return table


def _differences(
    outcomes: "dict[tuple[Case, str], Outcome | BaseException]", chip: str, result: str, against: str
) -> "list[Difference]":
    return [
        difference
        for (_, on), outcome in outcomes.items()
        if on == chip and not isinstance(outcome, BaseException)
        for difference in outcome.differences
        if (difference.result, difference.against) == (result, against)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    chips = options.chip or DEFAULT_CHIPS
    from .simulated.rows import CASES  # imports Triton

    cases = chosen_cases(options, covering_cases(1 if options.quick else 3 if options.thorough else 2))
    row_cases = chosen_cases(options, CASES)
    if not (cases or row_cases):
        parser().error("no case has all of these words; see --list")
    if options.list:
        print("\n".join(case.name for case in (*cases, *row_cases)))
        return 0
    if not simulator.is_there(parser()):
        return 0
    outcomes = run(cases, chips, options.workers) if cases else {}
    of_rows = run_rows(row_cases, chips, options.workers)
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # a log has no width to fit
    if outcomes:
        console.print(table(outcomes, chips))
    found = {(chip, case.name): findings(outcome) for (case, chip), outcome in (*outcomes.items(), *of_rows.items())}
    for (chip, name), of_case in found.items():
        for finding in of_case:
            print(f"FINDING {chip} {name}: {finding}")
    with_findings = sum(map(bool, found.values()))
    launches = len(chips) * (sum(1 + (case.form == "two launches") for case in cases) + 2 * len(row_cases))
    print(f"{len(cases) + len(row_cases)} cases on {', '.join(chips)}: {launches} launches, {with_findings} findings")
    return 1 if with_findings else 0


if __name__ == "__main__":
    sys.exit(main())
