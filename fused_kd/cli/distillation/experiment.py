"""A distillation from beginning to end: load, train, evaluate, compare, report, save."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...output import KDLossOutput
from .. import arguments, record
from . import data, heads, models, plot, report
from .comparison import compare
from .training import Settings, evaluate, train

CUDA_REFRESH = 10  # steps between two looks at the loss, each of which makes the host wait for the device


def distill(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    begin = time.perf_counter()
    console, progress_console = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    device, dtype = arguments.device(options.device), getattr(torch, options.dtype)
    text, output = data.read_text(options.text), arguments.folder(options.output)

    progress_console.print("Loading the models")
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
    split_teacher, split_student = (heads.split(model.to(device), blocks.train[:1]) for model in (teacher, student))
    if options.loss == "linear":
        heads.check_split(split_student, split_teacher)
    settings = Settings(
        alpha=options.alpha,
        temperature=options.temperature,
        vocabulary=vocabulary,
        steps=options.steps,
        batch=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        dtype=dtype,
        device=device,
    )
    facts: dict[str, Any] = {
        "teacher_parameters": models.parameters(teacher),
        "student_parameters": models.parameters(student),
        "student_layers_from_teacher": layers,
        "vocabulary": vocabulary,
        "block_opening": data.names(tokenizer, blocks.opening),
        "train_tokens": blocks.train.shape[0] * blocks.text_tokens,
        "held_out_tokens": blocks.held_out.shape[0] * blocks.text_tokens,
    }
    console.print(report.summary(settings, options.loss, options.sequence_length, facts), markup=False, highlight=False)

    losses = {"fused": heads.LOSSES[options.loss]}
    if options.compare == "eager":
        losses["eager"] = heads.LOSSES["eager"]
    runs: dict[str, report.Run] = {}
    for name, loss in losses.items():
        if runs:  # the same start again
            student, _ = models.make_student(options.student, teacher, options.student_layers)
            split_student = heads.split(student.to(device), blocks.train[:1])
        before = evaluate(split_teacher, split_student, blocks, loss, settings)
        with _progress(f"Training, {name} loss", settings, progress_console) as on_step:
            history = train(split_teacher, split_student, blocks, loss, settings, on_step)
        runs[name] = report.Run(before, evaluate(split_teacher, split_student, blocks, loss, settings), history)
        if name == "fused":
            student.save_pretrained(output / "student")
            tokenizer.save_pretrained(output / "student")

    comparisons = compare(runs["fused"].history, runs["eager"].history, dtype) if "eager" in runs else []
    console.print(report.held_out_table(runs, facts["held_out_tokens"]))
    console.print(report.cost_table(runs))
    if comparisons:
        console.print(report.verdict(comparisons), markup=False, highlight=False)
    plot.draw(output / "curves.png", runs, settings.temperature)
    seconds = time.perf_counter() - begin
    record.write_json(
        output / "report.json",
        {
            "command": "fused-kd distill",
            "options": {key: value for key, value in vars(options).items() if key != "run"},
            "settings": asdict(settings),
            "versions": record.versions("transformers", "gguf"),
            "machine": record.machine(device),
            **facts,
            "seconds": seconds,
            "runs": {name: report.run_record(run) for name, run in runs.items()},
            "comparisons": [asdict(comparison) | {"within": comparison.within} for comparison in comparisons],
        },
    )
    console.print(
        f"{output}/ has student/, curves.png and report.json; {seconds:.0f} s in all", markup=False, highlight=False
    )
    if any(run.history.diverged() for run in runs.values()):
        print("fused-kd distill: training diverged, its loss is not finite; try a smaller --lr", file=sys.stderr)
        return 1
    return 0 if all(comparison.within for comparison in comparisons) else 1


@contextlib.contextmanager
def _progress(title: str, settings: Settings, console: Console) -> Iterator[Any]:
    """A progress bar; gives the function that moves it on after a step."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    refresh = CUDA_REFRESH if settings.device.type == "cuda" else 1
    with bar:
        task = bar.add_task(title, total=settings.steps, values="")

        def on_step(done: int, result: KDLossOutput) -> None:
            if done % refresh == 0 or done == settings.steps:
                parts = zip(("loss", "KL", "CE"), result, strict=True)
                values = "  ".join(f"{name} {float(part.detach()):.3f}" for name, part in parts if part is not None)
                bar.update(task, completed=done, values=values)

        yield on_step
