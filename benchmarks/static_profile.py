"""Registers, spills and the instruction mix of every compiled variant of the kernels, with no GPU.

Run `python -m benchmarks.static_profile --help` in an environment where fused_kd is installed with its extra `cli`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from fused_kd.devices import DEVICES
from fused_kd.testing import record

from .compiled.bounds import Violation, one_launch_violations, row_violations, violations
from .compiled.profile import OneLaunchFigures, Profile, Resources
from .compiled.rows import CALLS, RowVariant, measure, row_variants
from .compiled.variants import (
    KERNELS,
    ONE_LAUNCH,
    TARGETS,
    Variant,
    all_variants,
    figures,
    launch_shape,
    one_launch_variants,
)
from .compiled.workers import in_workers

DESCRIPTION = """\
Compiles every variant of the Triton kernels (dtypes, temperatures, terms of the loss, memory layouts, softcap or scale)
for sm_80, sm_90, sm_100 and gfx942, and counts what the machine code of each main loop does for one pair, a pair being
one (student, teacher) element.  No GPU is needed: Triton's wheel holds compilers and disassemblers.

Columns of the table, counts per pair:
  regs, spill, shared   registers per thread, bytes spilled, bytes of shared memory per program
  warps                 resident on a multiprocessor (compute unit) at these registers
  flight                KB of loads that these warps have outstanding at most, if all of them wait for memory
  instr                 instructions that a warp issues; of them:
  mufu, fma, alu, conv  special functions; float32 arithmetic; compares, selects, integers; conversions and unpacking
  B, load, store        bytes of global memory; bytes of the narrowest access
  sync                  barriers, shuffles, shared and local memory

Of the kernels in one launch a second table has the registers beside those that rows in flight are planned by, and the
shuffles in all loops over a row.  Of the kernels on a few numbers per row a third table has the resources alone.
"""
NAMES = ("kernel", "target", "dtypes", "T", "terms", "layout", "map", "divergence", "gradients")
COUNTS = ("instr", "mufu", "fma", "alu", "conv", "B", "load", "store", "sync")
NUMBERS = ("regs", "spill", "shared", "warps", "flight", *COUNTS)
AnyVariant = TypeVar("AnyVariant", Variant, RowVariant)
EPILOG = "Exit code: 0; 1 if a variant does not compile or, with --check, breaks a bound; 2 for wrong arguments."


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", action="append", choices=sorted({device.target for device in DEVICES.values()}),
        help=f"only this target (repeatable; default: {' '.join(TARGETS)})",
    )  # fmt: skip
    parser.add_argument(
        "--kernel",
        action="append",
        choices=(*KERNELS, *ONE_LAUNCH, *dict.fromkeys(kernel for kernel, _ in CALLS)),
        help="only this kernel (repeatable)",
    )
    parser.add_argument(
        "--variant", action="append", metavar="WORDS", help='only variants with these words, as in "bf16/bf16 T=2"'
    )
    parser.add_argument("--list", action="store_true", help="print the names of the variants and stop")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is broken, and say which")
    parser.add_argument("--listing", action="store_true", help="print the main loops, line by line, and write them too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: 2)")
    return parser


def chosen_variants(options: argparse.Namespace, variants: Iterable[AnyVariant]) -> list[AnyVariant]:
    def chosen(variant: AnyVariant) -> bool:
        words = variant.name.split()
        return (
            (not options.target or variant.target in options.target)
            and (not options.kernel or variant.kernel in options.kernel)
            and (not options.variant or any(set(wanted.split()) <= set(words) for wanted in options.variant))
        )

    return [variant for variant in variants if chosen(variant)]


def table(profiles: dict[Variant, Profile]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in NAMES:
        table.add_column(name, no_wrap=True)
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for variant, profile in profiles.items():
        table.add_row(*_row(variant, profile))
    return table


def _row(v: Variant, p: Profile) -> Iterator[str]:
    yield from (v.kernel, v.target, v.dtypes, v.temperature_name, v.terms, v.layout, v.logit_map, v.divergence_name)
    yield "-" if v.kernel != "logit_gradient" else "both" if v.teacher_grad else "student"
    yield from map(str, (p.registers, p.spill, p.shared, p.resident_warps))
    yield f"{p.kilobytes_in_flight:.0f}"
    yield from (f"{value:.2f}" for value in (p.instructions, *(p.kinds[k] for k in ("mufu", "fma", "alu", "convert"))))
    yield f"{p.bytes:.2f}"
    yield from (str(p.load_width), str(p.store_width or "-"))
    yield f"{sum(p.kinds[kind] for kind in ('barrier', 'shuffle', 'shared', 'local')):.2f}"


def table_of_one_launch(found: dict[Variant, OneLaunchFigures]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("form", "target", "T", "divergence", "regs", "planned", "spill", "shared", "warps", "shuffles"):
        table.add_column(name, no_wrap=True)
    for v, r in found.items():
        counts = (r.registers, launch_shape(v).registers, r.spill, r.shared, r.resident_warps, r.shuffles)
        table.add_row(v.kernel, v.target, v.temperature_name, v.divergence_name, *map(str, counts))
    return table


def table_of_rows(found: dict[RowVariant, Resources]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("kernel", "target", "call", "regs", "spill", "shared", "warps"):
        table.add_column(name, no_wrap=True)
    for v, r in found.items():
        table.add_row(v.kernel, v.target, v.call, *map(str, (r.registers, r.spill, r.shared, r.resident_warps)))
    return table


def write_json(path: Path, profiles: dict[Variant, Profile], failures: Iterable[str], listing: bool) -> None:
    entries = [
        {**vars(variant), **profile.as_dict(), "violations": [str(v) for v in violations(variant, profile)]}
        for variant, profile in profiles.items()
    ]
    for entry in entries if not listing else ():
        del entry["listing"]
    record.write_json(path, {"versions": record.versions(), "variants": entries, "failures": list(failures)})


def broken_bounds(
    profiles: dict[Variant, Profile],
    in_one_launch: dict[Variant, OneLaunchFigures],
    of_rows: dict[RowVariant, Resources],
) -> Iterator[tuple[Variant | RowVariant, Violation]]:
    for variant, profile in profiles.items():
        yield from ((variant, violation) for violation in violations(variant, profile))
    for variant, found in in_one_launch.items():
        yield from ((variant, violation) for violation in one_launch_violations(variant, found))
    for row_variant, resources in of_rows.items():
        yield from ((row_variant, violation) for violation in row_violations(resources))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    variants = chosen_variants(options, all_variants(options.target or TARGETS))
    of_one_launch = chosen_variants(options, one_launch_variants(options.target or TARGETS))
    of_rows = chosen_variants(options, row_variants(options.target or TARGETS))
    if not (variants or of_one_launch or of_rows):
        parser().error("no variant has all of these; see --list")
    if options.list:
        print("\n".join(variant.name for variant in (*variants, *of_one_launch, *of_rows)))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a log has no width to fit
    found = in_workers(measure, of_rows, options.workers) if of_rows else {}
    results = in_workers(figures, variants + of_one_launch, options.workers) if variants or of_one_launch else {}
    profiles = {variant: result for variant, result in results.items() if isinstance(result, Profile)}
    in_one_launch = {variant: result for variant, result in results.items() if isinstance(result, OneLaunchFigures)}
    resources = {variant: result for variant, result in found.items() if isinstance(result, Resources)}
    failures = [
        f"{v.name}: {type(r).__name__}: {r}"
        for v, r in (*results.items(), *found.items())
        if isinstance(r, BaseException)
    ]
    if profiles:
        console.print(table(profiles))
    if in_one_launch:
        console.print(table_of_one_launch(in_one_launch))
    if resources:
        console.print(table_of_rows(resources))
    if options.listing:
        for variant, profile in profiles.items():
            print("", variant.name, *profile.listing, sep="\n")
    if options.json:
        write_json(options.json, profiles, failures, options.listing)
    for failure in failures:
        print(f"FAILED {failure}")
    broken = list(broken_bounds(profiles, in_one_launch, resources)) if options.check else []
    for variant, violation in broken:
        print(f"BROKEN {variant.name}: {violation}")
    if options.check and not broken and not failures:
        print(f"{len(profiles) + len(in_one_launch) + len(resources)} variants keep their bounds")
    return 1 if failures or broken else 0


if __name__ == "__main__":
    sys.exit(main())
