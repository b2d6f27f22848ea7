"""`fused-kd bench`: the cost of the loss on this machine, beside the losses that a user could take instead."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from . import arguments
from .arguments import new_file, positive
from .errors import UserError, reporting
from .help import HelpFormatter
from .interruption import Interruption, interruptible

DESCRIPTION = """\
Measures time and memory of a training step of the loss on this machine, forward, backward and both, beside what a user
would take instead: eager PyTorch, torch.compile of it, and where they are installed (extra "bench") Liger-Kernel,
torchtune, flash-linear-attention and Cut Cross-Entropy; TRL, orda-kernel and speculators too, if you install them.  Each
is first compared, in float64, with what it says it computes; what cannot run here is listed with the reason.

Shapes are those of models that are distilled into one another, with as many tokens as suit the device, then sweeps over V
and N, which are drawn.  Times are medians, and half the distance of the quartiles; memory is the peak beyond inputs and
gradients; "floor / copy" is the time of reading both logits and writing the gradient at the bandwidth of a copy, as a share
of the time of the step.

Ctrl-C or SIGTERM leaves the shape at hand; those before it are printed, drawn and written.  A second one ends at once.
"""
EPILOG = """\
Exit code: 0 done, 1 if the loss of fused_kd is wrong, 2 for wrong use, something missing or a file that cannot
be written, 130 after Ctrl-C, 143 after SIGTERM.

examples:

  fused-kd bench --pairs smollm2 --part models --seconds 1
  fused-kd bench --json bench.json
"""

PACKAGES = ("rich", "matplotlib")
DISTRIBUTIONS = (
    "liger-kernel", "torchtune", "fla-core", "cut-cross-entropy", "trl", "orda-kernel", "speculators",
)  # fmt: skip


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure time and memory of the loss beside eager PyTorch, torch.compile and other libraries",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of logits, hidden states and weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--pairs", nargs="+", metavar="PAIR", default=[],
        help="models to take the sizes of, by family: llama2, smollm2, llama3, qwen2.5, gemma2, gemma3 (default: all from "
        "logits; from hidden states all on a GPU, the small ones on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--divergence", nargs="+", metavar="NAME", default=["forward_kl"],
        help="divergences of the loss: forward_kl, reverse_kl, mixed_kl, jsd, skew_kl, skew_reverse_kl, tvd (default: "
        "forward_kl)",
    )  # fmt: skip
    parser.add_argument(
        "--part", choices=("all", "models", "sweeps"), default="all",
        help="models: the shapes of models; sweeps: growing V and N (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive, default=6.0, help="of timed runs per shape, about; more is less noise (default: 6)"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("benchmarked"), help="where plots go")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a file of --json; say what moved beyond noise")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return reporting("bench", PACKAGES, "bench", lambda: _bench(options))


def _bench(options: argparse.Namespace) -> int:
    import torch

    from ..testing import problems, record, shapes
    from .benchmarking import comparison, finding, measure, plots, tables
    from .layout import console, print_table, say
    from .outputs import write_json

    begin = time.perf_counter()
    device = arguments.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    arguments.known("--pairs", options.pairs, shapes.PAIRS)
    arguments.known("--divergence", options.divergence, problems.WORDS)
    before = _read(options.compare) if options.compare else None
    arguments.folder(options.output)
    work: list[shapes.Shape] = []
    if options.part in ("all", "models"):
        work += shapes.model_shapes(device, dtype, tuple(options.pairs))
    if options.part in ("all", "sweeps"):
        work += shapes.sweep_shapes(device, dtype)
    tasks = [(shape, divergence) for shape in work for divergence in dict.fromkeys(options.divergence)]

    out = console(150)
    machine = record.machine(device)
    where = machine["gpu"] or f"{machine['processor']}, {machine['torch_threads']} threads"
    results: list[Any] = []
    with interruptible() as interruption:
        copy = measure.copy_bandwidth(device)
        say(f"{where}; a copy moves {copy / 1e9:.1f} GB/s")
        done = _measure(tasks, device, options.seconds, results, interruption)
    for group in tables.by_shape(results):
        if any(result.both for result in group):
            print_table(out, tables.time_table(group, copy))
    for reason, names in tables.skipped(results).items():
        say(f"Left out, {reason}: {'; '.join(names)}", hanging="  ")
    if before is not None:
        found, compared = comparison.changes(before, results)
        if found:
            print_table(out, comparison.table(found))
        say(f"Beyond noise, {len(found)} of {compared} figures moved since {options.compare}")
    if options.json:
        figures = {
            "command": "fused-kd bench",
            "options": {key: value for key, value in vars(options).items() if key not in ("run", "json", "output")},
            "versions": record.versions(*DISTRIBUTIONS),
            "machine": machine,
            "copy_bytes_a_second": copy,
            "seconds": time.perf_counter() - begin,
            "interrupted": bool(interruption),
            "results": [result.as_dict() for result in results],
        }
        write_json(options.json, figures)
    pictures = plots.draw(options.output, results, where)
    drawn = f"; drawn: {', '.join(map(str, pictures))}" if pictures else ""
    say(f"{time.perf_counter() - begin:.0f} s in all{drawn}", hanging="  ")
    say(finding.finding(results, done, len(tasks)))
    wrong = any(result.agrees is False and result.peer == "fused_kd" for result in results)
    return interruption.exit_code or (1 if wrong else 0)


def _measure(
    tasks: list[tuple[Any, str]],  # shapes and divergences
    device: Any,
    seconds: float,
    results: list[Any],
    interruption: Interruption,
) -> int:
    """Append the results of each task, and return the number of tasks that were measured."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .benchmarking import suite, tables

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    done = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(tasks))
        for shape, divergence in tasks:
            if interruption:
                break
            progress.update(task, description=shape.label + tables.of_divergence(divergence))
            with interruption.may_leave():
                results += suite.measured(shape, device, seconds, divergence)
                done += 1
            progress.advance(task)
    return done


def _read(path: Path) -> list[Any]:
    from .benchmarking import suite

    try:
        return [suite.from_dict(result) for result in json.loads(path.read_text())["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--compare: expected a file that --json wrote, got {path}: {error}") from error
