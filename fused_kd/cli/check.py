"""`fused-kd check`: the errors of the loss and of eager PyTorch on this machine, against a float64 oracle."""

import argparse
import os
import warnings
from dataclasses import asdict
from typing import Any

from ..testing import interpreter
from .arguments import new_file
from .errors import UserError, reporting
from .help import HelpFormatter
from .interruption import interruptible

DESCRIPTION = """\
Says whether the loss is right on this machine: compares loss and gradient with the same formula in float64, over a table of
shapes up to V = 262 144, dtypes, temperatures, alphas, kinds of logits, ignored and weighted rows.  Every divergence has a
table: forward KL all combinations, the others a moderate set.

An error may be twice that of eager PyTorch in float32 on the same inputs (from hidden states: with heads in the same
dtype), or one float32 epsilon, 1.2e-7, if that is more.  16-bit gradients of kd_loss must be the exact ones, correctly
rounded, but for a unit in the last place on at most 1% of elements.  A NaN where float64 has none fails.

Ctrl-C or SIGTERM leaves the configuration at hand; those before it are printed and written.  A second one ends at once.
"""
EPILOG = """\
Exit code: 0 if every configuration passes, 1 if one fails, 2 for wrong use, a backend that cannot run here or a file that
cannot be written, 130 after Ctrl-C, 143 after SIGTERM.

examples:

  fused-kd check --quick
  fused-kd check --backend interpreter --loss linear --quick
"""

BACKENDS = ("auto", "cuda", "cpu", "interpreter")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="say whether loss and gradient are right on this machine, measured against float64",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="cuda: the compiled kernels; cpu: the CPU operators; interpreter: the kernels in Python, on CPU tensors; "
        "auto: cuda where there is a device, else cpu (default: auto)",
    )
    parser.add_argument(
        "--loss",
        choices=("both", "logits", "linear"),
        default="both",
        help="logits: kd_loss; linear: linear_kd_loss, from hidden states (default: both)",
    )
    parser.add_argument("--quick", action="store_true", help="one configuration in 17")
    parser.add_argument("--verbose", action="store_true", help="a line for every configuration, not for every group")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every figure to FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return reporting("check", ("rich",), "cli", lambda: _check(options))


def _check(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import track

    backend = options.backend
    if backend == "auto":
        backend = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "cuda" and not torch.cuda.is_available():
        raise UserError("--backend cuda: PyTorch sees no CUDA device here; cpu and interpreter can run")
    if backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        interpreter.hasten()
    else:
        os.environ.pop("TRITON_INTERPRET", None)

    from ..testing import accuracy, linear_accuracy
    from .layout import console, print_table, say

    device = torch.device("cuda" if backend == "cuda" else "cpu")
    suites = {"logits": accuracy, "linear": linear_accuracy}
    work = [
        (suite, case)
        for name, suite in suites.items()
        if options.loss in ("both", name)
        for case in suite.cases(options.quick)  # type: ignore[attr-defined]
    ]
    measured: list[Any] = []
    with interruptible() as interruption:
        for suite, case in track(work, f"{len(work)} configurations on {backend}", console=Console(stderr=True)):
            if interruption:
                break
            with interruption.may_leave():
                measured.append((case, suite.measure(case, device)))  # type: ignore[attr-defined]
    if measured:
        for divergence in dict.fromkeys(case.divergence for case, _ in measured):
            of = [(case, errors) for case, errors in measured if case.divergence == divergence]
            print_table(console(160), _table(of, f"{backend}, {divergence}", options.verbose))
    failed = [(case, failures) for case, errors in measured if (failures := _failures(case, errors))]
    for case, failures in failed:
        say(f"FAILED {case}: {'; '.join(failures)}", hanging="  ")
    if options.json:
        from .outputs import write_json

        write_json(options.json, _record(measured, backend) | {"interrupted": bool(interruption)})
    say(_finding(measured, len(failed), len(work), backend))
    return interruption.exit_code or (1 if failed else 0)


def _finding(measured: list[Any], failed: int, planned: int, backend: str) -> str:
    """Say in a sentence what was found."""
    from ..testing.words import spaced

    count = spaced(len(measured))
    if len(measured) < planned:
        count += f" of {spaced(planned)}"
    if not measured:
        return f"Nothing was checked: the command was interrupted in the first of {spaced(planned)} configurations."
    start = f"Interrupted after {count} configurations: " if len(measured) < planned else ""
    if failed:
        return f"{start}{spaced(failed)} of {spaced(len(measured))} configurations are WRONG on {backend}, as listed above."
    share, name, case = max(
        ((share, name, case) for case, errors in measured for name, share in _shares(case, errors).items()),
        key=lambda found: found[0],
    )
    everything = f"{start}so far all" if start else f"All {count} configurations"
    return (
        f"{everything} are within their bounds on {backend}: the largest error is {share:.0%} of its bound, "
        f"that of the {name}: {case}."
    )


def _shares(case: Any, errors: Any) -> dict[str, float]:
    return errors.shares(case.has_right_values)  # type: ignore[no-any-return]


def _failures(case: Any, errors: Any) -> list[str]:
    return errors.failures(case.has_right_values)  # type: ignore[no-any-return]


def _table(measured: list[Any], where: str, verbose: bool) -> Any:
    from rich.table import Table

    from ..testing import accuracy

    table = Table(title=f"Errors against float64 on {where}" + ("" if verbose else ", the worst of each group"))
    options = ["T, alpha, logits, rows, reduction, launch"] * verbose
    for heading in ("N", "V", "student / teacher", *options):
        table.add_column(heading, justify="right" if len(heading) == 1 else "left")
    for heading in ("loss error", "of bound", "gradient error", "of bound", ""):
        table.add_column(heading, justify="right")
    for (rows, vocabulary, dtypes), group in accuracy.by_group(measured):
        for part in [[pair] for pair in group] if verbose else [group]:
            loss, gradient = (max(part, key=lambda pair: _shares(*pair)[name]) for name in ("loss", "gradient"))
            table.add_row(
                str(rows), str(vocabulary), dtypes, *[", ".join(map(str, part[0][0].options))] * verbose,
                f"{loss[1].loss:.1e}", f"{_shares(*loss)['loss']:.0%}",
                f"{gradient[1].gradient:.1e}", f"{_shares(*gradient)['gradient']:.0%}",
                "FAILED" if any(_failures(*pair) for pair in part) else "ok",
            )  # fmt: skip
    return table


def _record(measured: list[Any], backend: str) -> dict[str, Any]:
    import torch

    from ..testing import record

    return {
        "command": "fused-kd check",
        "backend": backend,
        "versions": record.versions(),
        "machine": record.machine(torch.device("cuda" if backend == "cuda" else "cpu")),
        "configurations": [
            {
                **asdict(case),
                "divergence": str(case.divergence),
                **asdict(errors),
                "failures": _failures(case, errors),
            }
            for case, errors in measured
        ],
    }
