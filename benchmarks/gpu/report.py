"""The tables of the README and of docs/performance.md, from the record of a run."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fused_kd.testing.peers import OURS
from fused_kd.testing.words import spaced

from . import tables
from .model import Comparison, results
from .stages import fast, models
from .stages.fast import TEMPERATURES
from .subjects import TEMPERATURE

WIDTH = 124  # of the pages' prose
LATE = "no time was left"  # of a subject that was not begun: the tables leave it out


def device(run: dict[str, Any]) -> str:
    """Name the device and the releases that were measured, in one sentence."""
    figures = {result["figure"]: result for result in results(run, "machine")}
    installed = figures.get("installed", {})
    names = [name for name in ("python", "torch", "triton", "cuda") if installed.get(name)]
    packages = ", ".join(f"{name} {installed[name]}" for name in names)
    copy, product = figures.get("copy", {}), figures.get("matrix product", {})
    rates = [f"a copy moves {copy['bytes_per_second'] / 1e12:.2f} TB/s"] if copy else []
    rates += [f"a bfloat16 product runs at {product['flops_per_second'] / 1e12:.0f} TFLOP/s"] if product else []
    return (
        f"Measured on one {figures['device']['name']} ({'; '.join([packages, *rates])}) by `python -m benchmarks.gpu`."
    )


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
    is_modelled = any("modelled_seconds" in r for r in found)
    if is_modelled:
        yield "The logits of C tokens exist at once, and the gradients of M tokens are multiplied at once."
        yield "The modelled time is that of `plan_chunks`."
    yield ""
    words, numbers = ["", "computes", "head"], ["V", "ms", "times its bare products", "peak MB", "planned MB"]
    if is_modelled:
        numbers += ["C / M", "modelled ms", "times `fused_kd`"]
    yield f"| {' | '.join(words + numbers)} |".replace("|  |", "| |")
    yield "| --- | --- | --- |" + " ---: |" * len(numbers)
    for r in found:
        ratio = f"{r['times_the_products']:.2f}" if "times_the_products" in r else ""
        memory = [f"{r[key] / 1e6:.0f}" if key in r else "" for key in ("peak_bytes", "planned_bytes")]
        time = f"{1000 * r['seconds']:.1f}" if "seconds" in r else _why(r)
        cells = [r["subject"], r.get("computes", ""), r["head"], spaced(r["vocabulary"]), time, ratio, *memory]
        if is_modelled:
            cells.append(f"{r['chunk_rows']} / {r['gradient_rows']}" if "chunk_rows" in r else "")
            cells.append(f"{1000 * r['modelled_seconds']:.1f}" if "modelled_seconds" in r else "")
            cells.append(f"{r['times_the_default']:.2f}" if "times_the_default" in r else "")
        yield f"| {' | '.join(cells)} |"


def at_models(run: dict[str, Any]) -> Iterator[str]:
    """Write a step at the heads of real models, ours beside eager PyTorch, and how far apart the losses are."""
    yield f"A step at the heads of models, forward and backward, bfloat16, T = {TEMPERATURE:g}; memory beyond inputs and"
    yield "gradients; the last columns compare the loss and the gradient of hidden states with those of `linear_kd_loss`."
    yield ""
    yield "| models | softcap | N | V | H | | ms | peak MB | loss off by | gradient off by |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |"
    for r in results(run, "models"):
        sizes = spaced(r["rows"]), spaced(r["vocabulary"]), f"{spaced(r['hidden'])} from {spaced(r['teacher_hidden'])}"
        time = f"{1000 * r['seconds']:.1f}" if "seconds" in r else _why(r)
        memory = f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else ""
        differences = [f"{r[key]:.0e}" if key in r else "" for key in ("loss_difference", "gradient_difference")]
        softcap = f"{r['softcap']:g}" if r["softcap"] else ""
        yield f"| {' | '.join([r['models'], softcap, *sizes, r['subject'], time, memory, *differences])} |"


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
    """Write the README's table: whole steps from logits, at the heads of models and from hidden states."""
    yield from textwrap.wrap(f"{device(run)}  {right(run)}", WIDTH, break_on_hyphens=False)
    yield ""
    usual = f"N = {spaced(results(run, 'fast')[-1]['rows'])}, bfloat16, T = {TEMPERATURE:g}"
    yield f"A whole step, {usual}: milliseconds; GB beyond inputs and gradients, < 0 where the logits are overwritten."
    yield ""
    yield "| step | `kd_loss` | `linear_kd_loss` | eager PyTorch | torch.compile | fastest other |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for vocabulary in sorted({r["vocabulary"] for r in results(run, "fast") if "subject" in r}):
        found = {r["subject"]: r for r in _measured(run, "fast") if r["vocabulary"] == vocabulary}
        step = f"from logits, V = {spaced(vocabulary)}"
        yield _whole(step, found, (OURS, None, "eager PyTorch", "torch.compile"), set(fast.OTHERS))
    for pair in dict.fromkeys(r["models"] for r in results(run, "models")):
        found = {r["subject"]: r for r in _measured(run, "models") if r["models"] == pair}
        names = (models.FROM_LOGITS, models.FROM_HIDDEN, models.EAGER, models.COMPILED)
        yield _whole(
            f"heads and loss, {pair}, V = {spaced(next(iter(found.values()))['vocabulary'])}", found, names, set()
        )
    for vocabulary in dict.fromkeys(r["vocabulary"] for r in results(run, "hidden")):
        found = {
            r["subject"]: r
            for r in _measured(run, "hidden")
            if (r["vocabulary"], r["head"]) == (vocabulary, "trained") and "computes" in r
        }
        others = {name for name, r in found.items() if not name.startswith(OURS) and r["computes"] != "products"}
        if others:
            step = f"heads and loss, H = {spaced(found[OURS]['hidden'])}, V = {spaced(vocabulary)}"
            yield _whole(step, found, (None, OURS, None, None), others)


def _measured(run: dict[str, Any], stage: str) -> Iterator[dict[str, Any]]:
    """Give what was timed at the usual temperature, or at the only one that a subject has."""
    return (r for r in results(run, stage) if "seconds" in r and r.get("temperature") != TEMPERATURES[1])


def _whole(step: str, found: dict[str, dict[str, Any]], names: tuple[str | None, ...], others: set[str]) -> str:
    """Write a line of the README's table, with the fastest of the others."""
    cells = [_cost(found.get(name or "")) for name in names]
    others = others & set(found) - set(names)
    if others:
        fastest = min((found[name] for name in others), key=lambda r: r["seconds"])
        temperature = fastest["temperature"]
        other = "" if temperature == TEMPERATURE else f", T = {temperature:g}"
        cells.append(f"{_cost(fastest)}: {fastest['subject']} ({fastest['computes']}{other})")
    return f"| {' | '.join([step, *cells])}{'' if others else ' |'} |"


def _cost(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    memory = f"; {round(result['peak_bytes'] / 1e9, 2) or 0:.3g} GB" if "peak_bytes" in result else ""
    return f"{1000 * result['seconds']:.{1 if result['seconds'] > 0.01 else 2}f}{memory}"


def safety(run: dict[str, Any]) -> Iterator[str]:
    """Say what compute-sanitizer, the CUDA graphs and the GPU's tests found."""
    found = []
    for r in results(run, "safe"):
        if "passed" in r:
            failed = f", {r['failed']} failed" if r.get("failed") else ""
            found.append(f"`{r['check']}`: {r['passed']} passed{failed}")
        elif "errors" in r:
            found.append(f"compute-sanitizer's {r['check']}: {r['errors']} errors")
        elif "same" in r:
            kept = "the bits of" if r["same"] else "other bits than"
            found.append(f"a {r['check']} at V = {spaced(r['vocabulary'])}: {kept} a step")
        else:
            found.append(f"{r['check']}: {tables.words(r)}")
    yield from textwrap.wrap(f"{'; '.join(found)}.", WIDTH, break_on_hyphens=False)


def everything(run: dict[str, Any], compared: list[Comparison]) -> Iterator[str]:
    """Write the lines of docs/performance.md, without stages that have no results."""
    said = [device(run), right(run), run.get("note", "")]
    yield from textwrap.wrap("  ".join(filter(None, said)), WIDTH, break_on_hyphens=False)
    parts = {
        "fast": steps,
        "hidden": from_hidden_states,
        "models": at_models,
        "l2": memory_traffic,
        "launches": launched,
        "safe": safety,
    }
    for stage, lines in parts.items():
        if results(run, stage):
            yield ""
            yield from lines(run)
    if compared:
        yield ""
        yield from beside_the_model(compared)
