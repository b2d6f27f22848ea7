"""The modelled time of our kernels and of others' on GPUs that are not here, by a simulator.

    FUSED_KD_SIMULATOR=folder python -m benchmarks.modelled --json benchmarks/results/modelled.json

The compiled kernels run on a few rows of bfloat16 logits, T = 2, forward and backward.  The simulator counts the bytes that
they move and the instructions that they issue, and its model of the chip extrapolates to 8 192 rows (`one_launch.py` says
how for ours).  The model is good for ratios between such kernels on one chip, not for times.  It grants half of the nominal
L2 capacity.  The floor is the time of reading both logits and writing the gradient once at the chip's achievable bandwidth.
Products of heads are left out: a loss that projects hidden states counts with its own kernels only.

`compiled_kernels.py --help` says what the folder must hold.  Its launches must also have `kernel`, `n_ctas` and the
arguments of its `extrapolate`.
Exit code: 0, also if there is no simulator.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_kd.testing import peers, problems, shapes
from fused_kd.testing.problems import TEMPERATURE
from fused_kd.testing.words import spaced

from . import one_launch
from .simulated.simulator import load, report

CHIPS = ("a100", "h100", "b200")
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
TWO_LAUNCHES = f"{peers.OURS}, two launches"  # for what one launch is not for, such as row losses one by one
# Rows that run: the simulator wants four programs a launch, and flash-linear-attention cuts hidden states into 8 chunks.
ROWS, MODELLED_ROWS = {"logits": 4, "hidden": 32}, 8192
# Scales finished gradients by the upstream gradient, which is 1: then it reads nothing else.
AFTER = ("elementwise_mul_kernel",)
OTHERS = ("Liger CE + TVD", "Liger CE", "fla fused KL")


def two_launches(logits: problems.Inputs) -> None:
    """Take the loss in two launches, planned for the modelled number of rows on the chip at hand."""
    from fused_kd import statistics as stats
    from fused_kd.backends import triton as kernels
    from fused_kd.divergences import Objective
    from fused_kd.launch import two_passes

    (student,), (teacher,), labels = logits
    student, teacher = student.detach()[None], teacher[None]
    weights = torch.ones(3, *labels.shape, dtype=torch.float64)
    statistics, gradient = torch.empty(stats.COUNT, *labels.shape), torch.empty_like(student)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    launch = two_passes(MODELLED_ROWS, student.shape[-1], student.element_size(), processors)
    objective = Objective(temperature=TEMPERATURE)
    kernels.row_statistics(student, teacher, labels, weights, statistics, None, objective, False, launch)
    kernels.logit_gradient(student, teacher, labels, statistics, weights, None, gradient, None, objective, launch)


def of_peer(peer: peers.Peer) -> Callable[[problems.Inputs], None]:
    loss = peer.build()
    return lambda inputs: loss(inputs, peer.temperature or TEMPERATURE).backward()  # type: ignore[no-untyped-call]


def subjects() -> dict[str, tuple[str, str, Callable[[problems.Inputs], None]]]:
    """Return what each subject computes, and from which inputs, by name."""
    found = {TWO_LAUNCHES: ("CE + KL", "logits", two_launches)}
    for peer in peers.PEERS:
        if peer.name in OTHERS and peer.missing(torch.device("cuda")) is None:
            found[peer.name] = peer.computes, peer.inputs, of_peer(peer)
    return found


def modelled(simulator: Any, chip: str, V: int, inputs: str, run: Callable[[problems.Inputs], None]) -> dict[str, Any]:
    rows = ROWS[inputs]
    shape = shapes.Shape("", "", inputs, rows, V, 32, 32, torch.bfloat16)
    given = problems.make(shape, torch.device("cpu"))
    with simulator.device(chip) as device:
        run(given)
        launches = [launch for launch in device.launches if launch.kernel not in AFTER]
        estimates = [device.extrapolate(launch, rows=MODELLED_ROWS * launch.n_ctas // rows) for launch in launches]
        made = launches[0].chip
    pairs = MODELLED_ROWS * V
    floor = 6 * pairs / (made.hbm_gbs * 1e9 * made.hbm_fraction)
    seconds = sum(estimate.kernel_us for estimate in estimates) / 1e6
    return {
        "launches": len(estimates),
        "bytes_a_pair": sum(estimate.dram_bytes for estimate in estimates) / pairs,
        "modelled_seconds": seconds,
        "times_the_floor": seconds / floor,
        "bound_by": [estimate.bound for estimate in estimates],
    }


def in_one_launch(simulator: Any, chip: str, V: int) -> dict[str, Any]:
    """Model kd_loss in one launch, as it runs if the gradient is needed."""
    figures = one_launch.modelled(simulator, one_launch.Target(chip, V, MODELLED_ROWS, 0, 0), TEMPERATURE)
    names = ("bytes_a_pair", "modelled_seconds", "times_the_floor")
    return {"launches": 1, **{name: figures[name] for name in names}, "bound_by": [next(iter(figures["bounds"]))]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=CHIPS, help=f"repeatable (default: {' '.join(CHIPS)})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    simulator = load(parser)
    if simulator is None:
        return 0
    shapes_modelled = [(chip, V) for chip in options.chip or CHIPS for V in VOCABULARIES]
    results = []
    for chip, V in track(shapes_modelled, "simulating", console=Console(stderr=True)):
        given = {"chip": chip, "vocab_size": V, "rows": MODELLED_ROWS}
        ours = {"peer": peers.OURS, "computes": "CE + KL"}
        results.append(given | ours | in_one_launch(simulator, chip, V))
        for name, (computes, inputs, run) in subjects().items():
            subject = given | {"peer": name, "computes": computes}
            try:
                results.append(subject | modelled(simulator, chip, V, inputs, run))
            except Exception as error:  # another's kernel that the simulator has not the instructions for
                if name == TWO_LAUNCHES:
                    raise
                results.append(subject | {"reason": f"{type(error).__name__}: {error}"[:160]})
    packages = "liger-kernel", "fla-core"
    report("benchmarks.modelled", results, table(results), options.json, width=150, packages=packages)
    return 0


def table(results: list[dict[str, Any]]) -> Table:
    title = f"MODELLED, not measured: bfloat16, N = {MODELLED_ROWS}, T = {TEMPERATURE:g}, forward and backward"
    table = Table(title=title, title_justify="left")
    for heading in ("chip", "V", "", "computes", "launches", "bytes a pair", "modelled ms", "of the floor", "bound by"):
        table.add_column(heading, justify="left" if heading in ("chip", "", "computes", "bound by") else "right")
    for r in results:
        cells = ("", "", "", "", r.get("reason", ""))
        if "modelled_seconds" in r:
            cells = (
                str(r["launches"]), f"{r['bytes_a_pair']:.1f}", f"{1000 * r['modelled_seconds']:.2f}",
                f"{r['times_the_floor']:.2f}", ", ".join(dict.fromkeys(r["bound_by"])),
            )  # fmt: skip
        table.add_row(r["chip"], spaced(r["vocab_size"]), r["peer"], r["computes"], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
