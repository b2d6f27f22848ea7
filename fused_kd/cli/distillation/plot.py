"""The picture: loss, divergence and CE against steps, and where the time of a step goes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..outputs import written_beside
from .report import Run
from .training import LOSS_PARTS, PARTS

# A broad pale line below, a thin dark one on top: both are seen where they coincide.
STYLES = {
    "fused": {"color": "tab:orange", "linewidth": 4.0, "alpha": 0.5},
    "eager": {"color": "black", "linewidth": 1.0, "linestyle": "--"},
}
PART_COLORS = ("0.85", "0.7", "tab:orange", "tab:red", "0.55", "0.4")


def draw(path: Path, runs: dict[str, Run], temperature: float, divergence: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = (
        ("loss", "loss (nats)", "Loss"),
        ("divergence", f"{divergence} at T = {temperature:g} (nats)", "Divergence of the teacher, training batches"),
        ("ce", "cross-entropy (nats)", "Cross-entropy of the student, training batches"),
    )
    for panel, (curve, label, title) in zip(axes.flat, panels, strict=False):
        for name, run in runs.items():
            values = run.history.curves()[curve]
            panel.plot(range(1, len(values) + 1), values, label=f"{name} loss", **STYLES[name])
        panel.set(xlabel="step", ylabel=label, title=title)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    _draw_time(axes.flat[3], runs)
    before, after = runs["fused"].before, runs["fused"].after
    figure.suptitle(
        f"Held-out text: KL to the teacher {before.kl:.3g} → {after.kl:.3g} nats, perplexity {before.perplexity:.4g} → "
        f"{after.perplexity:.4g} (teacher {before.teacher_perplexity:.4g})"
    )
    with written_beside(path) as place:
        figure.savefig(place, dpi=130, format="png")
    plt.close(figure)


def _draw_time(panel: Axes, runs: dict[str, Run]) -> None:
    """Draw one bar per run, from the parts of a step in their order."""
    names = list(runs)[::-1]  # the first run's bar on top
    seconds = {name: run.seconds() for name, run in runs.items()}
    left = dict.fromkeys(names, 0.0)
    for part, color in zip(PARTS, PART_COLORS, strict=True):
        widths = [1000 * seconds[name][part] for name in names]
        hatch = "//" if part in LOSS_PARTS else None
        panel.barh(
            names, widths, 0.5, left=list(left.values()), color=color, hatch=hatch, edgecolor="white", label=part
        )
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    panel.set(xlabel="ms per step, median", title="Where a step's time goes")
    panel.set_ylim(-0.6, len(names) + 0.3)
    panel.legend(ncols=3, loc="upper center", fontsize="small")
