"""The modelled time of the one-launch kernel on GPUs that are not here, by a simulator, beside its targets.

    FUSED_KD_SIMULATOR=folder python -m benchmarks.one_launch --json benchmarks/results/one_launch.json

`results/one_launch-divergences.json` is what `--divergences` models: all divergences at one shape.
`results/one_launch-triton-3.6.json` is the same with Triton 3.6, whose plans have no clusters.

The kernel is launched as planned for 8 192 rows of bfloat16 logits.  In the form of whole rows four rows run, and the
simulator extrapolates, as in `modelled.py`.  In the shared form programs read again what other programs have read.  So
enough rows run for their programs to fill the chip three times, and the figures of that launch are scaled to 8 192 rows.
They include its last programs, which leave part of the chip idle.  The model is good for ratios between such kernels on one
chip, not for times.  The floor is that of `modelled.py`.

Columns of the table:
  form       one program per row, the blocks of a cluster, or the programs per row; warps, and columns per thread
  in flight  rows in flight, as planned and as the registers of the compiled kernel allow
  of floor   modelled time over the floor's time
  bounds     the model's three most used resources, each over the floor's time
  instr      machine instructions per pair, estimated from the PTX instructions that were executed

Exit code: 0, also if there is no simulator; with --check 1 if a target is missed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_kd.testing.words import spaced

from .simulated.simulator import load, report

ROWS = 8192
TEMPERATURES = (2.0, 3.0)
WHOLE_ROWS = 4  # the simulator extrapolates from so many
FILLED = 3  # times that the programs that run fill the chip
MOST_ROWS = 512


class Target(NamedTuple):
    chip: str
    vocab_size: int
    rows: int
    bytes_a_pair: float
    times_the_floor: float
    divergence: str = "forward_kl"


TARGETS = (
    Target("h100", 1000, ROWS, 6.4, 1.25),
    *(Target("h100", V, ROWS, 6.4, 1.15) for V in (32_000, 50_257, 100_352, 128_256, 151_936, 262_144)),
    *(Target("h100", 128_256, N, 10.0, 1.6) for N in (64, 512)),
    *(Target("a100", V, ROWS, 7.0, 1.25) for V in (1000, 32_000, 50_257, 128_256)),
    *(Target("b200", V, ROWS, 6.4, 1.35) for V in (128_256, 262_144)),
)
# The divergences of two sweeps are bound by instructions, not by memory.  Those of a mixture miss their goals, and mixed KL
# its own.
DIVERGENCES = tuple(
    Target("h100", 128_256, ROWS, 6.4, times, name)
    for name, times in (
        ("forward_kl", 1.15), ("reverse_kl", 1.15), ("mixed_kl", 1.15), ("tvd", 1.3), ("jsd", 1.6), ("skew_kl", 1.6),
        ("skew_reverse_kl", 1.6),
    )
)  # fmt: skip


def modelled(simulator: Any, target: Target, temperature: float) -> dict[str, Any]:
    from fused_kd import statistics as stats
    from fused_kd.backends import triton as kernels
    from fused_kd.devices import DEVICES
    from fused_kd.divergences import Objective, divergence_of
    from fused_kd.launch import best_single_pass
    from fused_kd.launching import as_compiled

    wide = target.vocab_size % 16 == 0  # as `is_wide` finds the rows below
    device = as_compiled(DEVICES[target.chip.upper()])
    objective = Objective(temperature=temperature, divergence=target.divergence)
    sweeps = divergence_of(objective).sweeps
    planned = best_single_pass(target.rows, target.vocab_size, 4, 2, device, wide, sweeps=sweeps)
    is_whole = planned.launch.splits == 0
    fill = max(1, FILLED * planned.rows_in_flight)
    rows = min(target.rows, WHOLE_ROWS if is_whole else min(MOST_ROWS, fill))
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(1, rows, target.vocab_size, generator=generator)).bfloat16() for _ in range(2))
    labels = torch.randint(target.vocab_size, (rows,), generator=generator)
    weights, gradient = torch.ones(3, rows, dtype=torch.float64), torch.empty_like(student)
    statistics = torch.empty(stats.COUNT, rows)
    with simulator.device(target.chip) as simulated:
        kernels.statistics_and_gradient(
            student, teacher, labels, weights, statistics, gradient, None, planned.launch, objective, False
        )
        launch = simulated.launches[-1]
        estimate = simulated.extrapolate(launch, rows=target.rows) if is_whole else launch.estimate()
    chip = launch.chip
    modelled_rows = target.rows if is_whole else rows
    pairs = modelled_rows * target.vocab_size
    floor = 6 * pairs / (chip.hbm_gbs * 1e3 * chip.hbm_fraction)  # microseconds
    bounds = {name: time / floor for name, time in sorted(estimate.bounds.items(), key=lambda item: -item[1])}
    resident = launch.occupancy.ctas * chip.sms
    return {
        **target._asdict(), "temperature": temperature, "target_bytes_a_pair": target.bytes_a_pair,
        "target_times_the_floor": target.times_the_floor,
        "plan": {**planned.launch._asdict(), "rows_in_flight": planned.rows_in_flight},
        "rows_run": rows, "rows_modelled": modelled_rows,
        "rows_in_flight": min(target.rows, resident / (planned.launch.splits or planned.launch.ctas)),
        "registers": launch.registers, "spilled": launch.spill_bytes,
        "bytes_a_pair": estimate.dram_bytes / pairs, "times_the_floor": estimate.kernel_us / floor,
        "modelled_seconds": estimate.kernel_us / 1e6 * target.rows / modelled_rows,
        "bounds": bounds,
        "instructions_a_pair": 32 * sum(launch.instr.values()) / (rows * target.vocab_size),
        "ptx_instructions_a_pair": 32 * sum(launch.ptx.values()) / (rows * target.vocab_size),
    }  # fmt: skip


def meets(result: dict[str, Any]) -> bool:
    """Return whether the figures meet the targets, compared as they are printed: the targets have as many digits."""
    return (
        round(result["bytes_a_pair"], 1) <= result["target_bytes_a_pair"]
        and round(result["times_the_floor"], 2) <= result["target_times_the_floor"]
        and result["spilled"] == 0
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chips = sorted({target.chip for target in TARGETS})
    parser.add_argument("--chip", action="append", choices=chips, help=f"repeatable (default: {' '.join(chips)})")
    parser.add_argument(
        "--divergences", action="store_true", help="all divergences at T = 2, instead of forward KL in all shapes"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    simulator = load(parser)
    if simulator is None:
        return 0
    targets, temperatures = (DIVERGENCES, TEMPERATURES[:1]) if options.divergences else (TARGETS, TEMPERATURES)
    targets = tuple(target for target in targets if target.chip in (options.chip or chips))
    work = [(target, temperature) for target in targets for temperature in temperatures]
    results = [modelled(simulator, *item) for item in track(work, "simulating", console=Console(stderr=True))]
    report("benchmarks.one_launch", results, table(results), options.json, width=190)
    return int(options.check and not all(map(meets, results)))


def table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="MODELLED, not measured: bfloat16, one launch, loss and gradient", title_justify="left")
    for heading in (
        "chip",
        "divergence",
        "V",
        "N",
        "T",
        "form",
        "rows run",
        "in flight",
        "regs",
        "bytes a pair",
        "of floor",
    ):
        table.add_column(
            heading, justify="left" if heading in ("chip", "divergence", "form") else "right", no_wrap=True
        )
    for heading in ("target", "met", "bounds", "instr (PTX)"):
        table.add_column(heading, no_wrap=True)
    for r in results:
        plan = r["plan"]
        one = "one program" if plan["ctas"] == 1 else f"cluster of {plan['ctas']}"
        what = f"{plan['splits']} programs" if plan["splits"] else one
        table.add_row(
            r["chip"], r["divergence"], spaced(r["vocab_size"]), spaced(r["rows"]), f"{r['temperature']:g}",
            f"{what}, {plan['num_warps']} warps, K = {plan['columns']}", str(r["rows_run"]),
            f"{plan['rows_in_flight']}, {r['rows_in_flight']:.0f}",
            f"{r['registers']}" + (f" (spills {r['spilled']})" if r["spilled"] else ""),
            f"{r['bytes_a_pair']:.2f}", f"{r['times_the_floor']:.2f}",
            f"{r['target_bytes_a_pair']:g}, {r['target_times_the_floor']:g}", "yes" if meets(r) else "no",
            ", ".join(f"{name} {share:.2f}" for name, share in list(r["bounds"].items())[:3]),
            f"{r['instructions_a_pair']:.1f} ({r['ptx_instructions_a_pair']:.1f})",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
