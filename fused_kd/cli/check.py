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
Runs the fused loss and eager PyTorch (float32) over a table of configurations, on the same inputs, and compares loss and
gradient of both with a float64 oracle.  Shapes up to V = 262 144, dtypes, temperatures 0.5 to 10, alpha 0 to 1, flat,
peaked and heavy-tailed logits, ignored rows, weights.  A configuration passes if neither error is above twice eager's
(or one float32 epsilon, 1.2e-7), if 16-bit gradients are the oracle's, correctly rounded, but for a unit in the last
place on at most 1% of elements, and if there is no NaN where the oracle has none.  Half of the losses that can take one
launch do, whatever FUSED_KD_PLAN says; their 16-bit gradients are rounded before the upstream gradient multiplies them
and after it.  The loss from hidden states is compared with eager heads in the same dtype, in the gradients of hidden
states, weight and bias.

Ctrl-C or SIGTERM leaves the configuration at hand; those before it are printed and written.  A second one ends at once.

Exit code: 0 if every configuration passes, 1 if one fails, 2 for wrong use, a backend that cannot run here or a file that
cannot be written, 130 after Ctrl-C, 143 after SIGTERM.
"""

BACKENDS = ("auto", "cuda", "cpu", "interpreter")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="compare loss and gradient with eager PyTorch and a float64 oracle on this machine",
        description=DESCRIPTION,
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
    from .layout import console, print_table

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
        print_table(console(160), _table(measured, backend, options.verbose))
    failed = [(case, failures) for case, errors in measured if (failures := _failures(case, errors))]
    for case, failures in failed:
        print(f"FAILED {case}: {'; '.join(failures)}")
    end = f"; interrupted after {len(measured)} of {len(work)} configurations" if interruption else ""
    print(f"{len(measured) - len(failed)} of {len(measured)} configurations within their bounds on {backend}{end}")
    if options.json:
        from .outputs import write_json

        write_json(options.json, _record(measured, backend) | {"interrupted": bool(interruption)})
    return interruption.exit_code or (1 if failed else 0)


def _failures(case: Any, errors: Any) -> list[str]:
    return errors.failures(case.has_right_values)  # type: ignore[no-any-return]


def _table(measured: list[Any], backend: str, verbose: bool) -> Any:
    from rich.table import Table

    from ..testing import accuracy

    table = Table(title=f"Errors against float64 on {backend}" + ("" if verbose else ", the worst of each group"))
    for heading in ("N", "V", "student / teacher", "T, alpha, logits, rows, reduction, launch" if verbose else "cases"):
        table.add_column(heading, justify="left" if "/" in heading else "right")
    for heading in ("loss error", "eager's", "ratio", "gradient error", "eager's", "ratio", "misrounded", ""):
        table.add_column(heading, justify="right")
    for (rows, vocabulary, dtypes), group in accuracy.by_group(measured):
        for part in [[pair] for pair in group] if verbose else [group]:
            has_right_values = part[0][0].has_right_values
            loss = max((errors for _, errors in part), key=lambda e: e.loss_ratio)
            gradient = max((e for _, e in part), key=lambda e: e.misrounded if has_right_values else e.gradient_ratio)
            case = part[0][0]
            table.add_row(
                str(rows), str(vocabulary), dtypes,
                ", ".join(map(str, case.options)) if verbose else str(len(part)),
                f"{loss.loss:.1e}", f"{loss.loss_eager:.1e}", f"{loss.loss_ratio:.2f}",
                f"{gradient.gradient:.1e}", f"{gradient.gradient_eager:.1e}",
                "" if has_right_values else f"{gradient.gradient_ratio:.2f}",
                f"{gradient.misrounded:.2%}" if has_right_values else "",
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
                **asdict(errors),
                "failures": _failures(case, errors),
            }
            for case, errors in measured
        ],
    }
