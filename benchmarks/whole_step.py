"""The modelled time of a whole step of kd_loss on GPUs that are not here: all launches, beside the floor.

    FUSED_KD_SIMULATOR=folder python -m benchmarks.whole_step --json benchmarks/results/whole_step.json

A step of 8 192 rows of bfloat16 logits, T = 2, CE and KL, is: the weights of the rows, zeros for the counters, the sweep,
the losses, the upstream gradient that the autograd engine makes, and `scale`.  Kernels whose work depends on the rows alone
run whole on the simulator, from cold caches; `one_launch.py` says how the sweep is extrapolated.  What PyTorch fills counts
with its bytes.  Every launch costs 3 microseconds besides, one after another, as if no launch hid behind the kernel before
it.  The launches are those that `gate/steps.py` counts, or this fails.

A step is modelled plain, and with everything that weighs rows: shift, token weights, alpha per row, num_items and parts.
The floor is that of `modelled.py`, and the model is as good as it says there.

Exit code: 0, also if there is no simulator; with --check 1 if a target is missed.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_kd import statistics as stats
from fused_kd.divergences import Objective
from fused_kd.rows import RowOptions
from fused_kd.testing.problems import TEMPERATURE
from fused_kd.testing.words import spaced

from . import one_launch
from .gate import steps
from .simulated.simulator import load, report

ROWS = 8192
SEQUENCES = 8  # with a shift
LAUNCH = 3.0  # microseconds
TARGETS = {("h100", 32_000): 1.15, ("h100", 128_256): 1.10}  # times the floor
SWEEPS = {"whole_kernel", "shared_kernel"}


class Launch(NamedTuple):
    name: str
    microseconds: float  # without the launch's own cost
    bound: str  # the resource that binds


def on_rows(simulated: Any, everything: bool, V: int) -> list[Launch]:
    """Run the kernels of a step besides its sweep, and return them."""
    from fused_kd.backends import triton as kernels

    N = ROWS
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::10] = -100
    token_weights, alpha, num_items = torch.rand(N, generator=generator), torch.full((N,), 0.5), torch.tensor(N)
    given = (token_weights, alpha, num_items) if everything else (None, None, None)
    sequence = N // SEQUENCES if everything else 0
    options = RowOptions(N, sequence, V, -100, True, 0.5, None, TEMPERATURE)
    objective = Objective(temperature=TEMPERATURE)
    statistics, counter = torch.ones(stats.COUNT, N), torch.zeros(1, 32, dtype=torch.int32)
    gradient = torch.empty(1, N, V, dtype=torch.bfloat16)  # an upstream gradient of 1 leaves it untouched
    simulated.flush_l2()
    weights, _ = kernels.row_weights(labels, *given, labels, options)
    simulated.flush_l2()
    kernels.row_losses(statistics, weights, counter, True, True, True, everything, torch.float32, objective)
    simulated.flush_l2()
    kernels.scale_(gradient, [torch.ones(())], gradient)
    estimates = [launch.estimate() for launch in simulated.launches]
    return [Launch(estimate.kernel, estimate.kernel_us, estimate.bound) for estimate in estimates]


def modelled(simulator: Any, chip: str, V: int, everything: bool) -> dict[str, Any]:
    sweep = one_launch.modelled(simulator, one_launch.Target(chip, V, ROWS, 0, 0), TEMPERATURE)
    counted = steps.launched(lambda: steps.from_logits(ROWS, everything=everything))
    with simulator.device(chip) as simulated:
        launches = on_rows(simulated, everything, V)
        made = simulated.launches[0].chip
    names = Counter(launch.name for launch in launches)
    assert counted.kernels.keys() - names.keys() <= SWEEPS
    assert counted.kernels.total() == len(launches) + 1
    assert counted.operators == {"zeros": 1, steps.ENGINE: 1}
    bandwidth = made.hbm_gbs * made.hbm_fraction * 1e3  # bytes per microsecond
    counters = (ROWS + 2) * 128
    launches += [
        Launch("the sweep", 1e6 * sweep["modelled_seconds"], next(iter(sweep["bounds"]))),
        Launch("zeros", counters / bandwidth, "dram"),
        Launch(steps.ENGINE, 0.0, "launch"),
    ]
    floor = 6 * ROWS * V / bandwidth
    microseconds = sum(launch.microseconds + LAUNCH for launch in launches)
    return {
        "chip": chip, "vocab_size": V, "rows": ROWS, "options": "everything" if everything else "plain",
        "plan": sweep["plan"], "launches": [launch._asdict() for launch in launches],
        "microseconds": microseconds, "floor_microseconds": floor, "times_the_floor": microseconds / floor,
        "target": TARGETS.get((chip, V)),
    }  # fmt: skip


def meets(result: dict[str, Any]) -> bool:
    """Return whether the figures meet the targets, compared as they are printed: the targets have as many digits."""
    return result["target"] is None or round(result["times_the_floor"], 2) <= result["target"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    simulator = load(parser)
    if simulator is None:
        return 0
    work = [(*shape, everything) for shape in TARGETS for everything in (False, True)]
    results = [modelled(simulator, *item) for item in track(work, "simulating", console=Console(stderr=True))]
    report("benchmarks.whole_step", results, table(results), options.json, width=190)
    return int(options.check and not all(map(meets, results)))


def table(results: list[dict[str, Any]]) -> Table:
    title = f"MODELLED, not measured: a step of kd_loss, bfloat16, N = {ROWS}, T = {TEMPERATURE:g}; microseconds"
    table = Table(title=f"{title} without the {LAUNCH:g} per launch", title_justify="left")
    for heading in ("chip", "V", "options"):
        table.add_column(heading)
    names = [launch["name"] for launch in results[0]["launches"]]
    for heading in (*names, "step", "of floor", "target"):
        table.add_column(heading, justify="right")
    for r in results:
        cells = [f"{launch['microseconds']:.1f}" for launch in r["launches"]]
        total = f"{r['microseconds']:.0f}", f"{r['times_the_floor']:.3f}", f"{r['target']:.2f}"
        table.add_row(r["chip"], spaced(r["vocab_size"]), r["options"], *cells, *total)
    return table


if __name__ == "__main__":
    sys.exit(main())
