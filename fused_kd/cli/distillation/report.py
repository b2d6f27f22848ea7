"""The results of a distillation: tables for the terminal, and a record of every figure for the JSON file."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from ...testing.words import spaced
from .comparison import Comparison
from .training import LOSS_PARTS, PARTS, Evaluation, History, Settings

LOSS_INPUTS = {"linear": "hidden states", "logits": "logits"}
WARMUP_STEPS = 2  # not counted in medians: first allocations, on a GPU compilation


@dataclass(frozen=True)
class Run:
    """One training, with one loss."""

    before: Evaluation
    after: Evaluation
    history: History

    @classmethod
    def of_record(cls, record: dict[str, dict[str, Any]]) -> "Run":
        """Make the run of its `dataclasses.asdict`."""
        return cls(Evaluation(**record["before"]), Evaluation(**record["after"]), History(**record["history"]))

    @property
    def steps(self) -> int:
        return len(self.history.loss)

    def seconds(self) -> dict[str, float]:
        """Return the median of each part of a step, and their sums: "step" of all parts, "loss" of those of the loss."""
        steps = self.history.seconds[WARMUP_STEPS:] or self.history.seconds
        parts = {part: median(step[part] for step in steps) for part in PARTS}
        return {**parts, "step": sum(parts.values()), "loss": sum(parts[part] for part in LOSS_PARTS)}


def summary(settings: Settings, loss: str, sequence: int, facts: dict[str, Any]) -> str:
    layers = facts["student_layers_from_teacher"]
    origin = f", layers {' '.join(map(str, layers))} of the teacher" if layers else ""
    opening = facts["block_opening"]
    blocks = f", in blocks that begin with {' '.join(opening)}" if opening else ""
    text = sequence - len(opening)
    epochs = settings.steps * settings.batch * text / facts["train_tokens"]
    return (
        f"Teacher  {facts['teacher_parameters'] / 1e6:.1f} M parameters, vocabulary {spaced(facts['vocabulary'])}\n"
        f"Student  {facts['student_parameters'] / 1e6:.1f} M parameters{origin}\n"
        f"Text     {spaced(facts['train_tokens'])} tokens to train on, {spaced(facts['held_out_tokens'])} held out"
        f"{blocks}\n"
        f"Training {settings.steps} steps of {settings.batch} x {sequence} tokens ({epochs:.2g} epochs) on "
        f"{settings.device}, alpha {settings.alpha:g}, T {settings.temperature:g}, {settings.divergence}, "
        f"loss from {LOSS_INPUTS[loss]}"
    )


def held_out_table(runs: dict[str, Run], tokens: int) -> Table:
    first = next(iter(runs.values()))
    table = Table(title=f"Held-out text, {spaced(tokens)} tokens", title_justify="left")
    for heading in ("", "before", *(_heading("after", name, runs) for name in runs), "teacher"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "KL(teacher || student), nats", f"{first.before.kl:.3f}", *(f"{run.after.kl:.3f}" for run in runs.values()), ""
    )
    table.add_row(
        "perplexity", _short(first.before.perplexity), *(_short(run.after.perplexity) for run in runs.values()),
        _short(first.before.teacher_perplexity),
    )  # fmt: skip
    return table


def cost_table(runs: dict[str, Run]) -> Table:
    seconds = {name: run.seconds() for name, run in runs.items()}
    table = Table(title="A training step, medians of its parts", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(_heading("ms", name, runs), justify="right")
        table.add_column("share", justify="right")
    for part in (*PARTS, "step", "loss"):
        cells = [cell for s in seconds.values() for cell in (f"{1000 * s[part]:.1f}", f"{s[part] / s['step']:.1%}")]
        label = {"step": "whole step", "loss": "heads and loss"}.get(part, part)
        table.add_row(
            label, *cells, style="bold" if part == "loss" else None, end_section=part in ("optimiser", "loss")
        )
    for label, sizes in (
        ("peak memory of heads and loss", [run.history.loss_bytes for run in runs.values()]),
        ("  of that their result, the gradients", [run.history.gradient_bytes for run in runs.values()]),
    ):
        cells = [cell for size in sizes for cell in (f"{size / 1e6:.1f} MB", "")]
        table.add_row(label, *cells, style=None if label.startswith(" ") else "bold")
    return table


def verdict(comparisons: list[Comparison]) -> str:
    figures = ", ".join(f"{c.what} {c.difference:.1e} (bound {c.bound:.0e})" for c in comparisons)
    word = "coincide" if all(c.within for c in comparisons) else "DO NOT COINCIDE"
    return f"Fused and eager trainings {word}; largest relative differences: {figures}"


def finding(
    runs: dict[str, Run], comparisons: list[Comparison], interrupted: str | None, layers: list[int] | None
) -> str:
    """Say in a sentence what came of the training with the fused loss."""
    run = runs["fused"]
    first, last, seconds = run.before, run.after, run.seconds()
    share = seconds["loss"] / seconds["step"]
    news = [interrupted] if interrupted else []
    if any(run.history.diverged() for run in runs.values()):
        news.append("the training DIVERGED")
    if not all(comparison.within for comparison in comparisons):
        news.append("the fused and the eager training DO NOT COINCIDE")
    start = f"{', and '.join(news)}: " if news else ""
    student = f"the student of {len(layers)} layers" if layers else "the student"
    before, after, teachers = map(_short, (first.perplexity, last.perplexity, first.teacher_perplexity))
    text = (
        f"{start}{student} went from KL {first.kl:.3g} to {last.kl:.3g} nats to its teacher and from perplexity {before} "
        f"to {after}, the teacher's being {teachers}; heads and loss took {share:.0%} of a step."
    )
    return text[0].upper() + text[1:]


def run_record(run: Run) -> dict[str, Any]:
    evaluations = {
        when: {**asdict(e), "perplexity": e.perplexity, "teacher_perplexity": e.teacher_perplexity}
        for when, e in (("before", run.before), ("after", run.after))
    }
    seconds = run.seconds()
    return {
        **evaluations,
        "median_seconds": seconds,
        "loss_share_of_step": seconds["loss"] / seconds["step"],
        "loss_peak_bytes": run.history.loss_bytes,
        "loss_gradient_bytes": run.history.gradient_bytes,
        "curves": run.history.curves(),
        "seconds": run.history.seconds,
    }


def _heading(text: str, name: str, runs: dict[str, Run]) -> str:
    return f"{text}, {name}" if len(runs) > 1 else text


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e5 else f"{value:.1e}"
