"""The tables of the README and of docs/performance.md, from the record of a run."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fused_kd.testing.peers import OURS
from fused_kd.testing.words import spaced

from . import tables
from .model import Comparison, results
from .stages.fast import TEMPERATURES
from .subjects import TEMPERATURE

LATE = "no time was left"  # of a subject that was not begun: the tables leave it out


def device(run: dict[str, Any]) -> str:
    """Name the device and the releases that were measured, in one sentence, and what its record notes."""
    figures = {result["figure"]: result for result in results(run, "machine")}
    installed = figures.get("installed", {})
    names = [name for name in ("python", "torch", "triton", "cuda") if installed.get(name)]
    packages = ", ".join(f"{name} {installed[name]}" for name in names)
    copy, product = figures.get("copy", {}), figures.get("matrix product", {})
    rates = [f"a copy moves {copy['bytes_per_second'] / 1e12:.2f} TB/s"] if copy else []
    rates += [f"a bfloat16 product runs at {product['flops_per_second'] / 1e12:.0f} TFLOP/s"] if product else []
    said = (
        f"Measured on one {figures['device']['name']} ({'; '.join([packages, *rates])}) by `python -m benchmarks.gpu`."
    )
    return f"{said}  {run['note']}" if run.get("note") else said


def steps(run: dict[str, Any]) -> Iterator[str]:
    """Write milliseconds of a whole step of kd_loss beside its peers, and multiples of the floor."""
    found = [r for r in results(run, "fast") if "subject" in r and r.get("reason") != LATE]
    vocabularies = sorted({r["vocabulary"] for r in found})
    yield f"`kd_loss`, forward and backward, N = {spaced(found[0]['rows'])}, bfloat16: milliseconds (times the floor)."
    yield "The floor is the time of reading both logits and writing the gradient once, at the speed of a copy."
    yield ""
    yield f"| | computes | T | {' | '.join(f'V = {spaced(v)}' for v in vocabularies)} |"
    yield "| --- | --- | ---: |" + " ---: |" * len(vocabularies)
    for subject, temperature in dict.fromkeys((r["subject"], r["temperature"]) for r in found):
        of_subject = [r for r in found if (r["subject"], r["temperature"]) == (subject, temperature)]
        by_size = {r["vocabulary"]: r for r in of_subject}
        cells = [_step(by_size.get(v, {}), subject == OURS) for v in vocabularies]
        computes = next((r["computes"] for r in of_subject if "computes" in r), "")
        yield f"| {subject} | {computes} | {temperature:g} | {' | '.join(cells)} |"


def _step(result: dict[str, Any], ours: bool) -> str:
    if "seconds" not in result:
        return _why(result)
    text = f"{1000 * result['seconds']:.2f} ({result['times_the_floor']:.2f})"
    return f"**{text}**" if ours else text


def _why(result: dict[str, Any]) -> str:
    reason = tables.words(result)
    return "out of memory" if "out of memory" in reason.lower() else reason or "-"


def from_hidden_states(run: dict[str, Any]) -> Iterator[str]:
    found = [r for r in results(run, "hidden") if r.get("reason") != LATE]
    sizes = f"N = {spaced(found[0]['rows'])}, H = {spaced(found[0]['hidden'])}, bfloat16, T = {TEMPERATURE:g}"
    yield f"`linear_kd_loss`, forward and backward, {sizes}; memory beyond inputs and gradients, by PyTorch's allocator."
    yield ""
    yield "| | computes | head | V | ms | times its bare products | peak MB | planned MB |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for r in found:
        ratio = f"{r['times_the_products']:.2f}" if "times_the_products" in r else ""
        memory = [f"{r[key] / 1e6:.0f}" if key in r else "" for key in ("peak_bytes", "planned_bytes")]
        time = f"{1000 * r['seconds']:.1f}" if "seconds" in r else _why(r)
        cells = [r["subject"], r.get("computes", ""), r["head"], spaced(r["vocabulary"]), time, ratio, *memory]
        yield f"| {' | '.join(cells)} |"


def memory_traffic(run: dict[str, Any]) -> Iterator[str]:
    yield "Bytes of device memory that the kernels of a step read and write per pair of logits, by ncu (floor: 6)."
    yield ""
    yield "| V | in one launch | in two launches |"
    yield "| ---: | ---: | ---: |"
    found = [r for r in results(run, "l2") if "bytes_per_pair" in r]
    for vocabulary in sorted({r["vocabulary"] for r in found}):
        by_plan = {r["plan"]: f"{r['bytes_per_pair']:.2f}" for r in found if r["vocabulary"] == vocabulary}
        yield f"| {spaced(vocabulary)} | {by_plan.get('one-launch', '-')} | {by_plan.get('two-launches', '-')} |"


def launched(run: dict[str, Any]) -> Iterator[str]:
    yield "What one step launches, by the profiler."
    yield ""
    yield "| from | V | launches | microseconds of all | of the longest |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for r in results(run, "launches"):
        longest = max((event["microseconds"] for event in r["events"]), default=0.0)
        yield f"| {r['from']} | {spaced(r['vocabulary'])} | {r['count']} | {r['microseconds']:.0f} | {longest:.0f} |"


def beside_the_model(found: list[Comparison]) -> Iterator[str]:
    yield "What the simulator's model says of the same figures; its error is how far it is above what was measured."
    yield ""
    yield "| figure | V | T | measured | modelled | error |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for c in found:
        cells = f"{spaced(c.vocabulary)} | {c.temperature:g} | {c.measured:.2f} | {c.modelled:.2f} | {c.error:+.0%}"
        yield f"| {c.figure} | {cells} |"


def right(run: dict[str, Any]) -> str:
    """Count the results that were checked, in one sentence."""
    found = [r for r in results(run, "right") if "reason" not in r]
    wrong = sum(1 for r in found if r.get("finding"))
    counts = Counter(r["suite"] for r in found)
    of_suites = [f"{count} of `{suite}`" for suite, count in counts.items()]
    return f"Results checked: {', '.join(of_suites)}; {wrong} are wrong."


def summary(run: dict[str, Any]) -> Iterator[str]:
    """Write the README's lines: a step from logits, ours and others', at the usual temperature."""
    usual = [r for r in results(run, "fast") if r.get("temperature", TEMPERATURE) != TEMPERATURES[1]]
    yield device(run)
    yield right(run)
    yield ""
    yield from steps({"stages": {"fast": {"results": usual}}})


def everything(run: dict[str, Any], compared: list[Comparison]) -> Iterator[str]:
    """Write the lines of docs/performance.md, without stages that have no results."""
    yield device(run)
    yield right(run)
    parts = {"fast": steps, "hidden": from_hidden_states, "l2": memory_traffic, "launches": launched}
    for stage, lines in parts.items():
        if results(run, stage):
            yield ""
            yield from lines(run)
    if compared:
        yield ""
        yield from beside_the_model(compared)
