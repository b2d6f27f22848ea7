"""CPU times, memory and errors of linear_kd_loss beside its bare products and its peers, in one run.

    python -m benchmarks.hidden_states --json benchmarks/results/hidden_states.json

A step is forward and backward, CE and KL at T = 2, with as many threads as PyTorch takes.  Its bare products are those that
no step can do without, each in one call: four with a trained head, three with a frozen one.  They write to memory that is
there already.  A step returns new gradients, so there is a second figure of products whose gradients are allocated.  All
subjects of a shape take turns.  A ratio is that of the shortest times of both, and beside it the median of the rounds'
ratios; the machine should be idle.

Memory is the most that PyTorch's allocator holds at once, beyond inputs and gradients.  Errors are norm-relative, of the
worst gradient of a small problem against float64.

Exit code: 0; with --check 1 if a promise is missed or a loss is not what it says it is.
"""

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fused_kd.testing import agreement, peers, problems, record, steps
from fused_kd.testing.peers import OURS, Peer, ours_with
from fused_kd.testing.problems import TEMPERATURE, Inputs
from fused_kd.testing.shapes import Shape
from fused_kd.testing.words import dtype_name, spaced

from .products import bare_products

CPU = torch.device("cpu")
PRODUCTS, NEW_GRADIENTS, FROZEN_PRODUCTS = "bare products", "bare products, new gradients", "bare products, frozen head"
FROZEN, HALF = f"{OURS}, frozen head", f"{OURS}, half of the rows ignored"
LEAN, MAIN_GRAD, ROUNDED = f"{OURS}, lean", f"{OURS}, weight_grad_out", f"{OURS}, bfloat16 logits"
OTHERS = (
    "TRL chunked divergence", "Liger chunked JSD, beta = 0", "orda-kernel", "torchtune, chunked", "torch.compile",
    "eager PyTorch",
)  # fmt: skip
PACKAGES = ("trl", "liger_kernel", "orda_kernel", "torchtune")


class Size(NamedTuple):
    """One shape, teacher as wide as the student, and how many times its bare products a step takes at most."""

    name: str
    dtype: torch.dtype
    rows: int
    vocab_size: int
    hidden: int
    promise: float | None

    @property
    def shape(self) -> Shape:
        return Shape("cpu", self.name, "hidden", self.rows, self.vocab_size, self.hidden, self.hidden, self.dtype)


class Ratio(NamedTuple):
    subject: str
    base: str
    promise: float | None = None  # at most


SIZES = (
    Size("SmolLM2 135M", torch.float32, 1024, 49_152, 576, 1.08),
    Size("Gemma 3 270M", torch.float32, 512, 262_144, 640, 1.04),
    Size("SmolLM2 135M", torch.bfloat16, 1024, 49_152, 576, None),
)


def ratios(size: Size) -> list[Ratio]:
    return [
        Ratio(OURS, PRODUCTS, size.promise),
        Ratio(OURS, NEW_GRADIENTS),
        Ratio(FROZEN, FROZEN_PRODUCTS),
        Ratio(HALF, OURS, 0.56),
        Ratio(LEAN, OURS, 1.6),
        Ratio(MAIN_GRAD, PRODUCTS),
        *([Ratio(OURS, ROUNDED)] if size.dtype != torch.float32 else []),
        *(Ratio(name, OURS) for name in OTHERS),
    ]


class Subject(NamedTuple):
    """A timed subject; a loss that is measured has a step, and bare products have none."""

    run: Callable[[], object]
    step: steps.Step | None
    described: dict[str, Any]


def subjects(size: Size, others: bool) -> dict[str, Subject | str]:
    """Return the subjects by their names; a string is the reason why one is missing."""
    shape = size.shape
    inputs = problems.make(shape, CPU)
    found: dict[str, Subject | str] = {
        PRODUCTS: Subject(bare_products(inputs, True), None, {}),
        NEW_GRADIENTS: Subject(bare_products(inputs, True, new_gradients=True), None, {}),
        FROZEN_PRODUCTS: Subject(bare_products(inputs, False), None, {}),
    }
    hidden, weight = inputs.student
    wanted = [
        (_ours(OURS), inputs),
        (_ours(FROZEN), inputs._replace(student=(hidden, weight.detach()))),
        (_ours(HALF), problems.half_ignored(inputs)),
        (_ours(LEAN, memory="lean"), inputs),
        (Peer(MAIN_GRAD, "hidden", peers.into_main_grad), inputs),
    ]
    if size.dtype != torch.float32:
        wanted.append((_ours(ROUNDED, logits_dtype=size.dtype), inputs))
    by_name = {peer.name: peer for peer in peers.of(shape)}
    if others:
        wanted += [(by_name[name], inputs) for name in OTHERS]
    for peer, own in wanted:
        found[peer.name] = peer.missing(CPU) or _subject(peer, shape, own)
    return found


def _ours(name: str, **options: Any) -> Peer:
    return Peer(name, "hidden", functools.partial(ours_with, **options))


def _subject(peer: Peer, shape: Shape, inputs: Inputs) -> Subject:
    step, agreed = agreement.prepared(peer, shape, [inputs], CPU)

    def run() -> None:
        step.prepare("both")
        step.run("both")

    described = {"computes": peer.computes, "gradient_error": agreed.gradient_error, "agrees": agreed.agrees}
    return Subject(run, step, described)


def measure(size: Size, rounds: int, others: bool) -> list[dict[str, Any]]:
    """Return a record for each subject: its time in each round, its memory, its error."""
    found = subjects(size, others)
    seconds: dict[str, list[float]] = {name: [] for name, subject in found.items() if isinstance(subject, Subject)}
    for turn in range(rounds + 1):  # the first does not count
        for name, times in seconds.items():
            run = found[name].run  # type: ignore[union-attr]
            gc.collect()
            begin = time.perf_counter()
            run()
            if turn:
                times.append(time.perf_counter() - begin)
    given = {**size._asdict(), "dtype": dtype_name(size.dtype)}
    results = []
    for name, subject in found.items():
        if isinstance(subject, str):
            results.append({**given, "subject": name, "reason": subject})
            continue
        result = {**given, "subject": name, **subject.described, "seconds": seconds[name]}
        if subject.step is not None:
            result["bytes_beyond"] = steps.peak_beyond(subject.step, CPU)
        results.append(result)
    return results


def compared(size: Size, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratios of a shape's times."""
    times = {result["subject"]: result["seconds"] for result in results if "seconds" in result}
    return [
        {
            "name": size.name, "dtype": dtype_name(size.dtype), **ratio._asdict(),
            "low": min(times[ratio.subject]) / min(times[ratio.base]),
            "median": median(a / b for a, b in zip(times[ratio.subject], times[ratio.base], strict=True)),
        }
        for ratio in ratios(size) if times.keys() >= {ratio.subject, ratio.base}
    ]  # fmt: skip


def missed(ratio: dict[str, Any]) -> bool:
    """Return whether a promise is missed, compared as it is printed."""
    return ratio["promise"] is not None and round(ratio["low"], 2) > ratio["promise"]


def table_of_steps(size: Size, results: Sequence[dict[str, Any]]) -> Table:
    title = f"{size.name}: N = {spaced(size.rows)}, V = {spaced(size.vocab_size)}, H = {size.hidden}"
    table = Table(title=f"{title}, {dtype_name(size.dtype)}", title_justify="left")
    for i, heading in enumerate(("", "computes", "low ms", "median ms", "MB beyond", "gradient error")):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for r in results:
        if "reason" in r:
            table.add_row(r["subject"], r["reason"])
            continue
        memory = f"{r['bytes_beyond'] / 1e6:.0f}" if "bytes_beyond" in r else ""
        error = f"{r['gradient_error']:.1e}" + ("" if r["agrees"] else " WRONG") if "gradient_error" in r else ""
        times = f"{1e3 * min(r['seconds']):.0f}", f"{1e3 * median(r['seconds']):.0f}"
        table.add_row(r["subject"], r.get("computes", ""), *times, memory, error)
    return table


def table_of_ratios(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Ratios of times", title_justify="left")
    for i, heading in enumerate(("shape", "time of", "divided by that of", "low", "median", "promised")):
        table.add_column(heading, justify="left" if i < 3 else "right")
    for r in found:
        promise = "" if r["promise"] is None else f"{r['promise']:g}" + " MISSED" * missed(r)
        table.add_row(
            f"{r['name']}, {r['dtype']}", r["subject"], r["base"], f"{r['low']:.2f}", f"{r['median']:.2f}", promise
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each subject that are timed (default: 7)")
    parser.add_argument("--without-others", action="store_true", help="only this package and its bare products")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise is missed")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130)
    results: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for size in SIZES:
        of_size = measure(size, options.rounds, not options.without_others)
        console.print(table_of_steps(size, of_size))
        results += of_size
        found += compared(size, of_size)
        torch._dynamo.reset()
    console.print(table_of_ratios(found))
    if options.json:
        content = {
            "versions": record.versions(*PACKAGES), "machine": record.machine(CPU), "temperature": TEMPERATURE,
            "results": results, "ratios": found,
        }  # fmt: skip
        record.write_json(options.json, content)
    wrong = any(map(missed, found)) or not all(result.get("agrees", True) for result in results)
    return int(options.check and wrong)


if __name__ == "__main__":
    sys.exit(main())
