"""A distillation from beginning to end: load, train, evaluate, compare, report, save."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...integrations import huggingface
from ...options import KDLossOutput
from ...testing import record
from .. import arguments, layout
from ..errors import UserError
from ..interruption import Interruption, interruptible
from ..outputs import write_json
from . import data, models, plot, report
from .checkpoint import NAME as CHECKPOINT
from .checkpoint import Checkpoint, made_with
from .comparison import compare
from .training import Evaluation, Settings, Training, evaluate

STUDENT, CURVES, REPORT = "student", "curves.png", "report.json"  # in the output folder
CUDA_REFRESH = 10  # steps between two looks at the loss, each of which makes the host wait for the device


class Prepared(NamedTuple):
    """The start that every training of the experiment shares."""

    settings: Settings
    teacher: huggingface.SplitModel
    tokenizer: Any
    blocks: data.Blocks
    student: Callable[[], huggingface.SplitModel]  # the same one anew at each call
    losses: dict[str, huggingface.Loss]
    facts: dict[str, Any]


def distill(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    begin = time.perf_counter()
    console, progress_console = layout.console(120), Console(stderr=True)
    device = arguments.device(options.device)
    text, output = data.read_text(options.text), arguments.folder(options.output)
    _check_outputs(output, {"--teacher": options.teacher, "--student": options.student})
    checkpoint = Checkpoint(output, made_with(options, text, device), getattr(options, "checkpoint_every", None))
    kept = None
    if getattr(options, "resume", False):
        kept = checkpoint.read()
    else:
        checkpoint.check_absent()

    progress_console.print("Loading the models")
    prepared = _prepare(options, text, device)
    settings, facts = prepared.settings, prepared.facts
    for line in report.summary(settings, options.loss, options.sequence_length, facts).splitlines():
        layout.say(line, hanging=" " * 9)
    with interruptible() as interruption:
        runs = _train_all(prepared, output, checkpoint, kept, interruption, progress_console)
        done, steps = sum(run.steps for run in runs.values()), settings.steps * len(prepared.losses)
        interrupted = f"interrupted after {done} of {steps} steps" if done < steps else None
        comparing = "eager" in runs and not interrupted
        comparisons = compare(runs["fused"].history, runs["eager"].history, settings.dtype) if comparing else []
        layout.print_table(console, report.held_out_table(runs, facts["held_out_tokens"]))
        layout.print_table(console, report.cost_table(runs))
        if comparisons:
            layout.say(report.verdict(comparisons))
        plot.draw(output / CURVES, runs, settings.temperature, settings.divergence)
        seconds = time.perf_counter() - begin
        write_json(
            output / REPORT,
            {
                "command": "fused-kd distill",
                "options": {key: value for key, value in vars(options).items() if key != "run"},
                "settings": asdict(settings),
                "versions": record.versions("transformers", "gguf"),
                "machine": record.machine(device),
                **facts,
                "interrupted": interrupted,
                "seconds": seconds,  # since it began, or was last gone on with
                "runs": {name: report.run_record(run) for name, run in runs.items()},
                "comparisons": [asdict(comparison) | {"within": comparison.within} for comparison in comparisons],
            },
        )
    layout.say(f"{output}/ has {STUDENT}/, {CURVES} and {REPORT}; {seconds:.0f} s in all")
    diverged = any(run.history.diverged() for run in runs.values())
    if interrupted:
        go_on = "; the same command with --resume goes on" if checkpoint.path.exists() else ""
        print(f"fused-kd distill: {interrupted}{go_on}", file=sys.stderr)
    else:
        checkpoint.remove()
        if diverged:
            print("fused-kd distill: training diverged, its loss is not finite; try a smaller --lr", file=sys.stderr)
    layout.say(report.finding(runs, comparisons, interrupted, facts["student_layers_from_teacher"]))
    if interrupted:
        return interruption.exit_code
    return 1 if diverged or not all(comparison.within for comparison in comparisons) else 0


def _check_outputs(output: Path, inputs: dict[str, str]) -> None:
    """Refuse an output folder where an output could not take its place, or would replace anything but an earlier output."""
    for name in (CURVES, REPORT, CHECKPOINT):
        if (output / name).is_dir():
            raise UserError(f"--output: {output / name} is a folder; expected a file there, or nothing")
    student = output / STUDENT
    if not student.exists():
        return
    if not student.is_dir():
        raise UserError(f"--output: {student} is no folder; expected one there, or nothing")
    if any(student.iterdir()) and not (student / "config.json").exists():
        raise UserError(f"--output: {student} holds other files; expected a student there, or nothing")
    for option, source in inputs.items():
        if student.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise UserError(f"--output: {student} is {option}; expected another folder")


def _prepare(options: argparse.Namespace, text: str, device: torch.device) -> Prepared:
    dtype = getattr(torch, options.dtype)
    teacher = models.load_model(options.teacher, dtype).requires_grad_(False).to(device)
    tokenizer = models.load_tokenizer(options.teacher)
    if options.student != models.FROM_TEACHER:
        models.check_same_tokens(tokenizer, options.student)
    student, layers = models.make_student(options.student, teacher, options.student_layers)
    vocabulary = models.vocabulary(teacher, student, tokenizer, getattr(options, "vocab_size", None))
    for name, model in (("teacher", teacher), ("student", student)):
        models.check_length(name, model, options.sequence_length)
    blocks = data.token_blocks(
        text,
        tokenizer,
        sequence=options.sequence_length,
        held_out_tokens=options.held_out_tokens,
        vocabulary=vocabulary,
        device=device,
    )
    if options.batch_size > blocks.train.shape[0]:
        raise UserError(
            f"--batch-size: the text has {blocks.train.shape[0]} blocks of {options.sequence_length} tokens to train on, "
            f"got {options.batch_size}"
        )
    split_teacher, split_student = (
        huggingface.split(model.to(device), blocks.train[:1]) for model in (teacher, student)
    )
    for name, model in (("student", split_student), ("teacher", split_teacher)):
        if options.loss == "linear" and model.head is None:
            raise UserError(
                f"--loss linear: the {name}'s logits are not an output head of its last hidden states; use --loss logits"
            )
    if options.loss == "linear" and split_student.head is not None:
        try:
            split_student.train()  # an adapter may have dropout
            huggingface.student_arguments(split_student.head)
        except ValueError as error:
            raise UserError(f"--loss linear: {error}; use --loss logits") from error
    settings = Settings(
        alpha=options.alpha,
        temperature=options.temperature,
        divergence=options.divergence,
        vocabulary=vocabulary,
        steps=options.steps,
        batch=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        dtype=dtype,
        device=device,
    )
    facts = {
        "teacher_parameters": models.parameters(teacher),
        "student_parameters": models.parameters(student),
        "student_layers_from_teacher": layers,
        "vocabulary": vocabulary,
        "block_opening": data.names(tokenizer, blocks.opening),
        "train_tokens": blocks.train.shape[0] * blocks.text_tokens,
        "held_out_tokens": blocks.held_out.shape[0] * blocks.text_tokens,
    }
    losses = {"fused": huggingface.LOSSES[options.loss]}
    if options.compare == "eager":
        losses["eager"] = huggingface.LOSSES["eager"]
    first = [split_student]

    def anew() -> huggingface.SplitModel:
        if first:
            return first.pop()
        student, _ = models.make_student(options.student, teacher, options.student_layers)
        return huggingface.split(student.to(device), blocks.train[:1])

    return Prepared(settings, split_teacher, tokenizer, blocks, anew, losses, facts)


def _train_all(
    prepared: Prepared,
    output: Path,
    checkpoint: Checkpoint,
    kept: dict[str, Any] | None,  # what the checkpoint has, if it is gone on with
    interruption: Interruption,
    console: Console,
) -> dict[str, report.Run]:
    """Train with each loss, until an interruption; save the student of the fused one."""
    runs = {name: report.Run.of_record(run) for name, run in kept["runs"].items()} if kept else {}
    for name in [name for name in prepared.losses if name not in runs]:
        student, last = prepared.student(), name == [*prepared.losses][-1]
        place = (prepared.teacher, student, prepared.blocks, prepared.losses[name], prepared.settings)
        before = Evaluation(**kept["before"]) if kept else evaluate(*place)
        training = Training(*place)
        if kept:
            checkpoint.restore(training, kept["training"])
            kept = None

        def keep(training: Training = training, before: Evaluation = before) -> None:
            finished = {name: asdict(run) for name, run in runs.items()}
            try:
                checkpoint.write({"runs": finished, "before": asdict(before), "training": training.state()})
            except UserError as error:  # the training is worth more
                console.print(f"fused-kd distill: {error}", markup=False, highlight=False)

        with _progress(f"Training, {name} loss", training, console) as on_step:
            while training.done < prepared.settings.steps and not (interruption and training.done):
                result = training.step()
                on_step(training.done, result)
                if checkpoint.due(training.done):
                    keep()
        if interruption or not last:
            keep()
        if name == "fused":
            models.save(student.model, prepared.tokenizer, output / STUDENT)
        runs[name] = report.Run(before, evaluate(*place), training.history())
        if interruption:
            break
    return runs


@contextlib.contextmanager
def _progress(title: str, training: Training, console: Console) -> Iterator[Callable[[int, KDLossOutput], None]]:
    """Show a progress bar; give the function that moves it on after a step: (steps done, values on the device)."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    steps = training.settings.steps
    refresh = CUDA_REFRESH if training.settings.device.type == "cuda" else 1
    with bar:
        task = bar.add_task(title, total=steps, completed=training.done, values="")

        def on_step(done: int, result: KDLossOutput) -> None:
            if done % refresh == 0 or done == steps:
                parts = zip(("loss", "CE", "divergence", "entropy"), result, strict=True)
                values = "  ".join(f"{name} {float(part.detach()):.3f}" for name, part in parts if part is not None)
                bar.update(task, completed=done, values=values)

        yield on_step
