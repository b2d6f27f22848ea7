"""The results as tables for the terminal."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.table import Table

from ...testing.peers import OURS
from ...testing.problems import WORDS
from ...testing.words import spaced
from .measure import Spread
from .suite import Result

INPUTS = {"logits": "from logits (kd_loss)", "hidden": "from hidden states (linear_kd_loss)"}


def by_shape(results: Iterable[Result]) -> Iterator[list[Result]]:
    def shape(result: Result) -> tuple[Any, ...]:
        sizes = result.vocab_size, result.rows
        return result.inputs, result.group, *sizes, result.shape, result.dtype, result.divergence

    for _, group in groupby(sorted(results, key=shape), key=shape):
        yield list(group)


def title(result: Result) -> str:
    heads = f", H = {result.student_hidden} / {result.teacher_hidden}" if result.inputs == "hidden" else ""
    sizes = f"N = {result.rows}, V = {spaced(result.vocab_size)}{heads}, {result.dtype}"
    return f"{result.shape}, {INPUTS[result.inputs]}{of_divergence(result.divergence)}: {sizes}"


def of_divergence(divergence: str) -> str:
    return "" if divergence == "forward_kl" else f", {divergence}"


def time_table(results: list[Result], copy_bandwidth: float) -> Table:
    """Make the table of one shape, fastest first; peers that compute less than the loss come last."""
    table = Table(title=title(results[0]), title_justify="left")
    for heading in ("", "computes", "forward", "backward", "both, ms", "times ours", "memory, MB"):
        table.add_column(heading, justify="left" if heading in ("", "computes") else "right", no_wrap=heading == "")
    extra = [
        ("bandwidth", "floor / copy", "{:.0%}"),
        ("launches", "launches", "{:d}"),
        ("joules", "J per step", "{:.2f}"),
    ]
    extra = [column for column in extra if any(getattr(result, column[0]) is not None for result in results)]
    for _, heading, _ in extra:
        table.add_column(heading, justify="right")
    ours = next((result.both for result in results if result.peer == OURS), None)
    measured = [result for result in results if result.both is not None]
    for result in sorted(measured, key=lambda r: (not r.computes.startswith("CE + "), r.both.median)):  # type: ignore[union-attr]
        assert result.both is not None
        assert result.peak_bytes is not None
        cells = [milliseconds(result.forward), milliseconds(result.backward), milliseconds(result.both, spread=True)]
        cells.append(f"{result.both.median / ours.median:.2f}" if ours else "")
        cells.append(f"{result.peak_bytes / 1e6:.1f}")
        for field, _, form in extra:
            value = getattr(result, field)
            if field == "bandwidth" and value is not None:
                value = value / copy_bandwidth if computes_all(result) else None
            cells.append("" if value is None else form.format(value))
        table.add_row(
            result.peer, result.computes + wrong(result), *cells, style="bold" if result.peer == OURS else None
        )
    return table


def computes_all(result: Result) -> bool:
    return result.computes.partition(", T = ")[0] in (f"CE + {WORDS[result.divergence]}", "CE + soft CE")


def wrong(result: Result) -> str:
    if result.agrees is not False:
        return ""
    return f" WRONG: value off by {result.value_error:.1e}, gradient by {result.gradient_error:.1e}"


def milliseconds(seconds: Spread | None, *, spread: bool = False) -> str:
    """Write the median, and half the distance of the quartiles."""
    if seconds is None:
        return ""
    digits = 0 if seconds.median >= 0.1 else 1 if seconds.median >= 0.01 else 3
    text = f"{1000 * seconds.median:.{digits}f}"
    return text + f" ± {500 * (seconds.high - seconds.low):.{digits}f}" if spread else text


def skipped(results: Iterable[Result]) -> dict[str, list[str]]:
    """Return the peers that did not run, by the reason."""
    reasons: dict[str, dict[str, None]] = {}
    for result in results:
        if result.reason is not None:
            reasons.setdefault(result.reason, {})[result.peer] = None
    return {reason: list(names) for reason, names in reasons.items()}
