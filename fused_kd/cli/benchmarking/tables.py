"""The results as tables for a person."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.table import Table

from ..words import spaced
from .measure import Spread
from .peers import OURS
from .suite import Result

INPUTS = {"logits": "from logits (kd_loss)", "hidden": "from hidden states (linear_kd_loss)"}


def by_shape(results: Iterable[Result]) -> Iterator[list[Result]]:
    def shape(result: Result) -> tuple[Any, ...]:
        return result.inputs, result.group, result.vocab_size, result.rows, result.shape, result.dtype

    for _, group in groupby(sorted(results, key=shape), key=shape):
        yield list(group)


def title(result: Result) -> str:
    heads = f", H = {result.student_hidden} / {result.teacher_hidden}" if result.inputs == "hidden" else ""
    sizes = f"N = {result.rows}, V = {spaced(result.vocab_size)}{heads}, {result.dtype}"
    return f"{result.shape}, {INPUTS[result.inputs]}: {sizes}"


def time_table(results: list[Result], copy_bandwidth: float) -> Table:
    """Of the results of one shape, fastest first; what computes less than the loss is set apart."""
    table = Table(title=title(results[0]), title_justify="left")
    for heading in ("", "computes", "forward", "backward", "both, ms", "times ours", "memory, MB", "floor/copy"):
        table.add_column(heading, justify="left" if heading in ("", "computes") else "right", no_wrap=heading == "")
    extra = [("launches", "launches", "{:d}"), ("joules", "J a step", "{:.2f}")]
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
        cells.append(f"{result.bandwidth / copy_bandwidth:.0%}" if result.bandwidth and computes_all(result) else "")
        for field, _, form in extra:
            value = getattr(result, field)
            cells.append("" if value is None else form.format(value))
        table.add_row(
            result.peer, result.computes + wrong(result), *cells, style="bold" if result.peer == OURS else None
        )
    return table


def computes_all(result: Result) -> bool:
    return result.computes.startswith(("CE + KL", "CE + soft CE"))


def wrong(result: Result) -> str:
    if result.agrees is not False:
        return ""
    return f" WRONG: value off by {result.value_error:.1e}, gradient by {result.gradient_error:.1e}"


def milliseconds(seconds: Spread | None, *, spread: bool = False) -> str:
    """The median, and half the distance of the quartiles."""
    if seconds is None:
        return ""
    digits = 0 if seconds.median >= 0.1 else 1 if seconds.median >= 0.01 else 3
    text = f"{1000 * seconds.median:.{digits}f}"
    return text + f" ± {500 * (seconds.high - seconds.low):.{digits}f}" if spread else text


def skipped(results: Iterable[Result]) -> dict[str, list[str]]:
    """Peers that did not run, by the reason."""
    reasons: dict[str, dict[str, None]] = {}
    for result in results:
        if result.reason is not None:
            reasons.setdefault(result.reason, {})[result.peer] = None
    return {reason: list(names) for reason, names in reasons.items()}


def compiled_table(profiles: list[dict[str, Any]]) -> Table:
    """Of what the kernels' machine code does for a pair; no GPU is needed to know it."""
    table = Table(title="The kernels as compiled, bfloat16, T = 2: a pair is one (student, teacher) element")
    table.title_justify = "left"
    for heading in ("kernel", "target"):
        table.add_column(heading)
    for heading in ("instructions", "MUFU", "bytes", "registers", "spilled", "resident warps"):
        table.add_column(heading, justify="right")
    for profile in profiles:
        table.add_row(
            profile["kernel"], profile["target"], f"{profile['instructions']:.1f}", f"{profile['mufu']:.2f}",
            f"{profile['bytes']:.2f}", str(profile["registers"]), str(profile["spill"]),
            str(profile["resident_warps"]),
        )  # fmt: skip
    return table
