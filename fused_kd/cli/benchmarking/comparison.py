"""Changes between two runs, beyond noise."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from ...testing.steps import PASSES
from .measure import Spread
from .suite import Result
from .tables import of_divergence

LEAST = 1.05  # a smaller change of the median is noise, however narrow the quartiles are
MEMORY_LEAST = 1.01


@dataclass(frozen=True)
class Change:
    result: Result
    figure: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")


def changes(before: Iterable[Result], after: Iterable[Result]) -> tuple[list[Change], int]:
    """Return the figures that moved, and how many were compared."""
    known = {result.key: result for result in before}
    found: list[Change] = []
    compared = 0
    for new in after:
        old = known.get(new.key)
        if old is None:
            continue
        for which in PASSES:
            a, b = getattr(old, which), getattr(new, which)
            if a is not None and b is not None:
                compared += 1
                if differ(a, b):
                    found.append(Change(new, f"{which}, ms", 1000 * a.median, 1000 * b.median))
        if old.peak_bytes is not None and new.peak_bytes is not None:
            compared += 1
            if not 1 / MEMORY_LEAST <= (new.peak_bytes + 1) / (old.peak_bytes + 1) <= MEMORY_LEAST:
                found.append(Change(new, "memory, MB", old.peak_bytes / 1e6, new.peak_bytes / 1e6))
    return found, compared


def differ(a: Spread, b: Spread) -> bool:
    """Return whether the medians differ by at least 5%, and the quartile ranges do not overlap."""
    apart = a.high < b.low or b.high < a.low
    return apart and not 1 / LEAST < b.median / a.median < LEAST


def table(found: list[Change]) -> Table:
    table = Table(title="Moved beyond noise, largest first", title_justify="left")
    for heading in ("peer", "shape", "figure"):
        table.add_column(heading)
    for heading in ("before", "now", "ratio"):
        table.add_column(heading, justify="right")
    for change in sorted(found, key=lambda c: -max(c.ratio, 1 / c.ratio if c.ratio else float("inf"))):
        result = change.result
        table.add_row(
            result.peer,
            f"{result.inputs}{of_divergence(result.divergence)}, N = {result.rows}, V = {result.vocab_size}",
            change.figure, f"{change.before:.4g}", f"{change.after:.4g}", f"{change.ratio:.2f}",
        )  # fmt: skip
    return table
