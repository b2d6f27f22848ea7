"""What a distillation leaves behind: the curves as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .training import Curves


def plot(runs: dict[str, Curves], path: Path, title: str) -> None:
    """Loss, KL and CE against steps, each run in its own line style."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (name, label) in zip(
        axes,
        {"loss": "loss", "kl": "KL(teacher || student) at T, nats", "ce": "cross-entropy, nats"}.items(),
        strict=True,
    ):
        for (run, curves), style in zip(runs.items(), ("-", "--"), strict=False):
            axis.plot(range(1, len(curves.loss) + 1), getattr(curves, name), style, label=run, linewidth=2)
        axis.set_xlabel("step")
        axis.set_title(label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
