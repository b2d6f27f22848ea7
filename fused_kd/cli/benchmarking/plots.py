"""Time and memory of a step against V and N, ours and the peers', on log axes."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, StrMethodFormatter

from ...testing.peers import OURS
from ...testing.problems import WORDS
from ...testing.shapes import INPUTS
from ..outputs import written_beside
from .suite import Result
from .tables import of_divergence

AXES = {"V": ("vocab_size", "vocabulary V"), "N": ("rows", "tokens N")}
COLOURS = ("tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
MARKERS = "sD^vP*"


def draw(folder: Path, results: list[Result], where: str) -> list[Path]:
    """Draw one picture per swept size, kind of inputs and divergence: time and memory side by side."""
    written = []
    for inputs, group, divergence in itertools.product(INPUTS, AXES, WORDS):
        drawn = inputs, group, divergence
        points = [r for r in results if (r.inputs, r.group, r.divergence) == drawn and r.both is not None]
        if points:
            source = "" if inputs == "logits" else "-from-hidden-states"
            path = folder / f"growing-{group}{source}{of_divergence(divergence).replace(', ', '-')}.png"
            _draw(path, points, group, where)
            written.append(path)
    return written


def _draw(path: Path, points: list[Result], group: str, where: str) -> None:
    field, label = AXES[group]
    first = points[0]
    fixed = f"N = {first.rows}" if group == "V" else f"V = {first.vocab_size}"
    source = (
        "logits" if first.inputs == "logits" else f"hidden states of {first.student_hidden} / {first.teacher_hidden}"
    )
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(
        f"Distillation loss from {source}, forward and backward, {first.dtype}, {fixed}"
        f"{of_divergence(first.divergence)}\n{where}"
    )
    _panel(axes[0], points, field, "time of a step, ms", lambda r: 1000 * r.both.median)
    _panel(axes[1], points, field, "memory beyond inputs and gradients, MB", lambda r: (r.peak_bytes or 0) / 1e6)
    for axis in axes:
        axis.set_xlabel(label)
    axes[0].legend(frameon=False)
    with written_beside(path) as place:
        figure.savefig(place, dpi=120, format="png")
    plt.close(figure)


def _panel(axis, points, field, label, value):  # type: ignore[no-untyped-def]
    peers = list(dict.fromkeys(point.peer for point in points))
    others = iter(zip(COLOURS, MARKERS, strict=True))
    for peer in sorted(peers, key=lambda name: name != OURS):
        line = sorted((getattr(p, field), value(p), p.computes) for p in points if p.peer == peer)
        style = {"color": "tab:blue", "marker": "o", "linewidth": 3, "zorder": 3}
        if peer != OURS:
            colour, marker = next(others, ("black", "x"))
            style = {"color": colour, "marker": marker, "linewidth": 1.5}
        axis.plot([x for x, *_ in line], [y for _, y, _ in line], label=f"{peer} ({line[0][2]})", **style)
    axis.set(xscale="log", yscale="log", ylabel=label, title=label)
    axis.set_xticks(sorted({getattr(point, field) for point in points}))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(alpha=0.3, which="both")
