"""Writes the performance sections of README.md and docs/performance.md from the records under benchmarks/results/.

    python -m benchmarks.gpu                 # on a GPU: gpu.json
    fused-kd bench --json benchmarks/results/cpu.json --output docs/measured
    python -m benchmarks.static_profile --kernel row_statistics --kernel logit_gradient \
        --variant "bf16/bf16 T=2 ce+kl dense identity" --json benchmarks/results/compiled.json
    python -m benchmarks.readme
    python -m benchmarks.readme --check    # exit code 1 where a section is not what the records say

compiled.json belongs to the kernels as they are; cpu.json, which they do not touch, may be older.  modelled.json,
one_launch.json, whole_step.json and regression.json (the modules of `benchmarks` with these names) are needed too, and
one_launch-divergences.json (`benchmarks.one_launch --divergences`).  gpu.json may be missing.
"""

import argparse
import itertools
import json
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fused_kd.testing import peers
from fused_kd.testing.words import spaced

from .gpu import model, report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "measured"
Result = dict[str, Any]  # of `fused-kd bench`, for one peer at one shape
BEGIN, END = "<!-- written by benchmarks.readme: begin -->", "<!-- end -->"


def section() -> str:
    """Return the README's section: what was measured on a GPU, where there is a record."""
    run = gpu_run()
    lines = [*report.summary(run)] if run is not None else ["No run on a GPU is recorded yet."]
    return "\n".join((BEGIN, "", *lines, "", END))


def performance() -> str:
    """Return the section of docs/performance.md: what was measured on GPU and CPU, the compiled code, the model."""
    lines: list[str] = []
    run = gpu_run()
    if run is None:
        lines += ["**No run on a GPU is recorded yet**: what follows was measured on a CPU, compiled or modelled.", ""]
    else:
        compared = model.comparisons(run, _read("modelled"), _one_launch(run))
        lines += ["## Measured on a GPU", "", *report.everything(run, compared), ""]
    lines += ["## Measured on a CPU", "", *_measured(_read("cpu")), ""]
    lines += [
        "## Compiled and modelled, not measured",
        "",
        *_compiled(_read("compiled")),
        "",
        *_operations(_read("regression")),
        "",
        *_whole_step(_read("whole_step")),
        "",
        *_modelled(_read("modelled")),
        "",
        *_divergences(_read("one_launch-divergences")),
    ]
    return "\n".join((BEGIN, "", *lines, "", END))


def gpu_run() -> dict[str, Any] | None:
    """Return the record of a run on a GPU, if there is one; the figures of a rehearsal mean nothing."""
    run = _read("gpu") if (RESULTS / "gpu.json").exists() else None
    return None if run is None or run["rehearsal"] else run


def _one_launch(run: dict[str, Any]) -> dict[str, Any]:
    """Return the record that was modelled with the Triton of the run, or the usual one."""
    installed: dict[str, Any] = next((r for r in model.results(run, "machine") if r["figure"] == "installed"), {})
    release = ".".join(str(installed.get("triton")).split(".")[:2])
    name = f"one_launch-triton-{release}"
    return _read(name if (RESULTS / f"{name}.json").exists() else "one_launch")


def _read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def _measured(record: dict[str, Any]) -> Iterator[str]:
    results, machine, versions = record["results"], record["machine"], record["versions"]
    device = f"a CPU ({machine['processor']}, {machine['torch_threads']} threads)"
    installed = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    yield f"Measured on {device}, in one run, peers in turns; {installed}."
    yield "`fused-kd bench --json` wrote `benchmarks/results/cpu.json`."
    for inputs, function in (("logits", "`kd_loss`"), ("hidden", "`linear_kd_loss`")):
        of_models = [r for r in results if r["group"] == "models" and r["inputs"] == inputs]
        yield ""
        yield f"{function}, forward and backward, T = 2: milliseconds (and times ours); memory beyond inputs and gradients."
        yield ""
        yield from _table(of_models)
    reasons: dict[str, dict[str, None]] = {}
    for result in results:
        if result["reason"] is not None:
            reasons.setdefault(result["reason"], {})[result["peer"]] = None
    if reasons:
        yield ""
        yield "Not measured here: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."
    yield ""
    yield "Read the pictures' left ends too: on a CPU fixed costs show, and eager PyTorch is faster below some 300 000"
    yield "logits (N V), `torch.compile` below a few million.  From hidden states most of the time is the products', which"
    yield "all have in common; what differs there is memory."
    yield ""
    for size in ("V", "N"):
        if (PICTURES / f"growing-{size}.png").exists():
            yield f"![Time and memory against {size}, ours and peers](measured/growing-{size}.png)"


def _table(results: list[Result]) -> Iterator[str]:
    measured = [result for result in results if result["both"] is not None]
    names = list(dict.fromkeys(result["peer"] for result in measured))
    computes = {result["peer"]: result["computes"] for result in measured}
    headings = [name if computes[name] == "CE + KL" else f"{name} ({computes[name]})" for name in names]
    yield f"| models, dtype | N | V | {' | '.join(headings)} |"
    yield "| --- | ---: | ---: |" + " ---: |" * len(names)
    key = operator.itemgetter("vocab_size", "rows", "shape", "dtype")
    for (vocabulary, rows, shape, dtype), group in itertools.groupby(sorted(measured, key=key), key=key):
        by_peer = {result["peer"]: result for result in group}
        cells = [_cell(by_peer.get(name), by_peer[peers.OURS]) for name in names]
        yield f"| {shape}, {dtype} | {rows} | {spaced(vocabulary)} | {' | '.join(cells)} |"


def _cell(result: Result | None, ours: Result) -> str:
    if result is None or result["peak_bytes"] is None:
        return "-"
    seconds, of_ours = (of["both"]["median"] for of in (result, ours))
    ratio = "" if result is ours else f" ({seconds / of_ours:.1f})"
    digits = 0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 3
    text = f"{1000 * seconds:.{digits}f}{ratio}; {result['peak_bytes'] / 1e6:.0f} MB"
    wrong = " WRONG" if result["agrees"] is False else ""
    return f"**{text}**" if result is ours else text + wrong


def _compiled(record: dict[str, Any]) -> Iterator[str]:
    yield (
        "What the kernels' machine code does for one (student, teacher) element, bfloat16, T = 2. "
        f"Read from what Triton {record['versions']['triton']} compiles; **no GPU was there, nothing of it is a time**:"
    )
    yield ""
    yield "| kernel | target | instructions | MUFU | bytes | registers | spilled | resident warps |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for p in sorted(record["variants"], key=lambda p: p["kernel"], reverse=True):
        if p["teacher_grad"] or p.get("divergence", "forward_kl") != "forward_kl":
            continue
        counts = f"{p['instructions']:.1f} | {p['kinds']['mufu']:.2f} | {p['bytes']:.1f}"
        yield f"| {p['kernel']} | {p['target']} | {counts} | {p['registers']} | {p['spill']} | {p['resident_warps']} |"


def _operations(record: dict[str, Any]) -> Iterator[str]:
    figures = record["figures"]
    yield (
        "Device operations of a step in bfloat16, forward and backward, counted on fake CUDA tensors, products included "
        "(`benchmarks.regression`): kernels, products, fills, but not the upstream gradient that PyTorch's engine makes."
    )
    yield ""
    yield "| step | operations | and per chunk |"
    yield "| --- | ---: | ---: |"
    for name, count in figures["operations"].items():
        step = name.removesuffix(", beside its chunks")
        per_chunk = figures["operations per chunk"].get(step)
        function, _, options = step.partition(", ")
        words = f"`{function}`, {options}" if options else f"`{function}`"
        yield f"| {words} | {count:g} | {'' if per_chunk is None else format(per_chunk, 'g')} |"


def _whole_step(record: dict[str, Any]) -> Iterator[str]:
    results = record["results"]
    yield (
        f"**Modelled, not measured**: a whole step of `kd_loss`, bfloat16, N = {results[0]['rows']}, T = 2, all launches "
        "one after another with 3 microseconds for each (`benchmarks.whole_step`).  With everything: shift, token weights, "
        "alpha per row, `num_items` and the parts."
    )
    yield ""
    yield "| modelled chip | V | options | microseconds | of the sweep | times the floor |"
    yield "| --- | ---: | --- | ---: | ---: | ---: |"
    for r in results:
        sweep = next(launch["microseconds"] for launch in r["launches"] if launch["name"] == "the sweep")
        yield (
            f"| {r['chip'].upper()}, modelled | {spaced(r['vocab_size'])} | {r['options']} | {r['microseconds']:.0f} | "
            f"{sweep:.0f} | {r['times_the_floor']:.2f} |"
        )


def _modelled(record: dict[str, Any]) -> Iterator[str]:
    results = [result for result in record["results"] if "modelled_seconds" in result]
    yield (
        "**Modelled, not measured**: what a simulator's model of three GPUs says of the compiled kernels, forward and "
        f"backward, bfloat16, N = {results[0]['rows']}, T = 2 (`benchmarks.modelled`; products of heads left out).  The "
        "floor is the time of reading both logits and writing the gradient once.  Good for ratios on a chip, not for times."
    )
    yield ""
    yield "| modelled chip | V | kernels | computes | bytes a pair | modelled ms | times the floor | times ours |"
    yield "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |"
    ours = {(r["chip"], r["vocab_size"]): r["modelled_seconds"] for r in results if r["peer"] == peers.OURS}
    for r in results:
        ratio = r["modelled_seconds"] / ours[r["chip"], r["vocab_size"]]
        yield (
            f"| {r['chip'].upper()}, modelled | {spaced(r['vocab_size'])} | {r['peer']} | {r['computes']} | "
            f"{r['bytes_a_pair']:.1f} | {1000 * r['modelled_seconds']:.2f} | {r['times_the_floor']:.2f} | {ratio:.2f} |"
        )


def _divergences(record: dict[str, Any]) -> Iterator[str]:
    results = record["results"]
    first = results[0]
    yield (
        f"**Modelled, not measured**: CE and each divergence in one launch on an {first['chip'].upper()}, forward and "
        f"backward, bfloat16, N = {first['rows']}, V = {spaced(first['vocab_size'])}, T = {first['temperature']:g} "
        "(`benchmarks.one_launch --divergences`).  Instructions are those of all sweeps.  Bound by: the model's most used "
        "resource, and its time over the floor's."
    )
    yield ""
    yield (
        "| divergence | programs per row, warps, columns of a thread | bytes a pair | modelled ms | times the floor | "
        "goal | instructions a pair | registers | bound by |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for r in results:
        plan, (bound, share) = r["plan"], next(iter(r["bounds"].items()))
        programs = plan["splits"] or (f"cluster of {plan['ctas']}" if plan["ctas"] > 1 else 1)
        yield (
            f"| `{r['divergence']}` | {programs}, {plan['num_warps']}, {plan['columns']} | {r['bytes_a_pair']:.1f} | "
            f"{1000 * r['modelled_seconds']:.2f} | {r['times_the_floor']:.2f} | {r['target_times_the_floor']:.2f} | "
            f"{r['instructions_a_pair']:.0f} | {r['registers']} | {bound} {share:.2f} |"
        )


SECTIONS: dict[Path, Callable[[], str]] = {README: section, PERFORMANCE: performance}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a section is out of date")
    options = parser.parse_args(arguments)
    return max(_write(file, text(), options.check) for file, text in SECTIONS.items())


def _write(file: Path, section: str, check: bool) -> int:
    text = file.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        print(f"{file.name}: expected the lines {BEGIN!r} and {END!r}, which enclose the section", file=sys.stderr)
        return 2
    new = before + section + after
    if check:
        if new != text:
            print(f"{file.name} is not what benchmarks/results/ says: run python -m benchmarks.readme", file=sys.stderr)
        return int(new != text)
    file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
