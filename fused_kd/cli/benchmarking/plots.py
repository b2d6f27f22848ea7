"""Time and memory of a step against V and N, ours and the peers', on log axes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, StrMethodFormatter

from .peers import OURS
from .suite import Result

AXES = {"V": ("vocab_size", "vocabulary V"), "N": ("rows", "tokens N")}
COLOURS = ("tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
MARKERS = "sD^vP*"


def draw(folder: Path, results: list[Result], where: str) -> list[Path]:
    """One picture a swept size: time and memory side by side."""
    written = []
    for group, (field, label) in AXES.items():
        points = [r for r in results if r.group == group and r.both is not None]
        if not points:
            continue
        fixed = f"N = {points[0].rows}" if group == "V" else f"V = {points[0].vocab_size}"
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        figure.suptitle(f"Distillation loss from logits, forward and backward, {points[0].dtype}, {fixed}\n{where}")
        _panel(axes[0], points, field, "time of a step, ms", lambda r: 1000 * r.both.median)  # type: ignore[union-attr]
        _panel(axes[1], points, field, "memory beyond inputs and gradient, MB", lambda r: (r.peak_bytes or 0) / 1e6)
        for axis in axes:
            axis.set_xlabel(label)
        axes[0].legend(frameon=False)
        path = folder / f"growing-{group}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


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
