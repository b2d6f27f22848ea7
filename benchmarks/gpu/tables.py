"""The record as readable tables."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from fused_kd.testing.words import spaced

from .stages import STAGES


def findings(outcome: dict[str, Any]) -> list[str]:
    """List what is wrong in a stage's results."""
    return [f"{_name(result)}: {result['finding']}" for result in outcome["results"] if result.get("finding")]


def wrong(record: dict[str, Any]) -> list[str]:
    """List what is wrong in a run: results, and stages that did not come to their end."""
    found = []
    for name, outcome in record["stages"].items():
        found += [f"{name}: {finding}" for finding in findings(outcome)]
        if outcome["status"] != "done":
            found.append(f"{name}: {outcome['status']}" + f"\n{outcome.get('printed', '')}".rstrip())
    return found


def missed(record: dict[str, Any]) -> Iterator[str]:
    """List targets that are missed; in a rehearsal times mean nothing."""
    if record["rehearsal"]:
        return
    for name, outcome in record["stages"].items():
        for result in outcome["results"]:
            value = _value(result)
            if "target" in result and value is not None and value > result["target"]:
                yield f"{name}: {_name(result)}: {value:.2f}, target {result['target']:g}"


def _value(result: dict[str, Any]) -> float | None:
    for key in (result.get("judged"), "times_the_floor", "times_the_products", "bytes_per_pair"):
        if key in result:
            return float(result[key])
    return None


def _name(result: dict[str, Any]) -> str:
    keys = ("suite", "case", "check", "subject", "plan", "head", "vocabulary", "temperature", "figure", "from")
    return ", ".join(f"{key} {result[key]}" if key in keys[5:] else str(result[key]) for key in keys if key in result)


def show(console: Console, record: dict[str, Any]) -> None:
    for stage in STAGES:
        outcome = record["stages"].get(stage.name)
        if outcome is not None and outcome["results"]:
            console.print(TABLES[stage.name](f"{stage.title} ({outcome['status']})", outcome["results"]))
    for line in missed(record):
        console.print(f"MISSED {line}", markup=False, highlight=False, soft_wrap=True)
    found = wrong(record)
    for line in found:
        console.print(f"WRONG {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(found)} findings in {record['seconds']:.0f} s", markup=False, highlight=False)


def _table(title: str, headings: tuple[str, ...], rows: Iterator[tuple[str, ...]], words: int = 1) -> Table:
    """A table whose first columns are words, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def milliseconds(result: dict[str, Any], key: str = "seconds") -> str:
    if key not in result:
        return ""
    text = f"{1000 * result[key]:.3f}"
    return f"{text} ± {500 * (result['high'] - result['low']):.3f}" if key == "seconds" and "low" in result else text


def _number(result: dict[str, Any], key: str, form: str = "{:.2f}") -> str:
    return form.format(result[key]) if result.get(key) is not None else ""


def words(result: dict[str, Any]) -> str:
    """Return the first line of what is wrong, or of why there is no figure."""
    return str(result.get("finding") or result.get("reason") or "").partition("\n")[0]


def _machine(title: str, results: list[dict[str, Any]]) -> Table:
    def rows() -> Iterator[tuple[str, ...]]:
        for result in results:
            figures = {key: value for key, value in result.items() if key != "figure"}
            yield result["figure"], ", ".join(f"{key} {_short(value)}" for key, value in figures.items())

    return _table(title, ("figure", ""), rows(), words=2)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _right(title: str, results: list[dict[str, Any]]) -> Table:
    def rows() -> Iterator[tuple[str, ...]]:
        for suite in dict.fromkeys(result["suite"] for result in results):
            of_suite = [result for result in results if result["suite"] == suite and "reason" not in result]
            wrong = [result for result in of_suite if result.get("finding")]
            epsilons = [e for result in of_suite for e in result.get("epsilons", {}).values()]
            worst = [f"{max(epsilons):.1f} float32 epsilons"] if epsilons else [
                f"loss {max((r['loss'] for r in of_suite if 'loss' in r), default=0):.1e}, "
                f"gradient {max((r['gradient'] for r in of_suite if 'gradient' in r), default=0):.1e}"
            ]  # fmt: skip
            yield suite, str(len(of_suite)), str(len(wrong)), *worst

    return _table(title, ("", "cases", "wrong", "worst error"), rows())


def _fast(title: str, results: list[dict[str, Any]]) -> Table:
    rows = (
        (
            f"{r['subject']}", r.get("computes", ""), words(r), spaced(r["vocabulary"]), f"{r['temperature']:g}",
            milliseconds(r), milliseconds(r, "host_seconds"), _number(r, "times_the_floor"),
            _number({"x": r["bytes_per_second"] / 1e12} if "bytes_per_second" in r else {}, "x"),
            _number(r, "gradient_error", "{:.1e}"),
        )
        for r in results if "subject" in r
    )  # fmt: skip
    headings = ("", "computes", "", "V", "T", "ms", "host ms", "of floor", "TB/s of floor", "gradient error")
    return _table(title, headings, rows, words=3)


def _l2(title: str, results: list[dict[str, Any]]) -> Table:
    rows = (
        (
            r.get("plan", ""), ", ".join(r.get("kernels", ())), words(r),
            spaced(r["vocabulary"]) if "vocabulary" in r else "", _number(r, "bytes_per_pair"),
            _number(r, "read_per_pair"), milliseconds(r),
        )
        for r in results
    )  # fmt: skip
    return _table(title, ("plan", "kernels", "", "V", "bytes per pair", "read", "ms"), rows, words=3)


def _hidden(title: str, results: list[dict[str, Any]]) -> Table:
    rows = (
        (
            r["subject"], r.get("computes", ""), r.get("head", ""), words(r), spaced(r["vocabulary"]), milliseconds(r),
            milliseconds(r, "host_seconds"), milliseconds(r, "modelled_seconds"), _number(r, "times_the_products"),
            _number(r, "times_the_default"), _chunks(r), _megabytes(r, "peak_bytes"), _megabytes(r, "planned_bytes"),
            _number(r, "gradient_error", "{:.1e}"),
        )
        for r in results
    )  # fmt: skip
    headings = (
        "", "computes", "head", "", "V", "ms", "host ms", "modelled ms", "of products", "of default", "C / M", "peak MB",
        "planned MB", "gradient error",
    )  # fmt: skip
    return _table(title, headings, rows, words=4)


def _chunks(result: dict[str, Any]) -> str:
    return f"{result['chunk_rows']} / {result['gradient_rows']}" if "chunk_rows" in result else ""


def _megabytes(result: dict[str, Any], key: str) -> str:
    return f"{result[key] / 1e6:.0f}" if key in result else ""


def _models(title: str, results: list[dict[str, Any]]) -> Table:
    rows = (
        (
            r["models"], r["subject"], words(r), spaced(r["rows"]), spaced(r["vocabulary"]), milliseconds(r),
            _megabytes(r, "peak_bytes"), _number(r, "loss", "{:.5f}"), _number(r, "loss_difference", "{:.1e}"),
            _number(r, "gradient_difference", "{:.1e}"),
        )
        for r in results
    )  # fmt: skip
    headings = ("", "", "", "N", "V", "ms", "peak MB", "loss", "of it off the first", "gradient off the first")
    return _table(title, headings, rows, words=3)


def _plans(title: str, results: list[dict[str, Any]]) -> Table:
    """List the planned launch and the three fastest others, for each vocabulary."""

    def rows() -> Iterator[tuple[str, ...]]:
        for vocabulary in dict.fromkeys(result["vocabulary"] for result in results):
            of_size = [r for r in results if r["vocabulary"] == vocabulary and "seconds" in r]
            planned = [r for r in of_size if r["plan"] == "auto"]
            for r in [*planned, *sorted((r for r in of_size if r not in planned), key=lambda r: r["seconds"])[:3]]:
                ratio = f"{r['seconds'] / planned[0]['seconds']:.3f}" if planned else ""
                yield spaced(vocabulary), r["plan"] + _launch(r), milliseconds(r), ratio

    return _table(title, ("V", "plan", "ms", "of planned"), rows(), words=2)


def _launch(result: dict[str, Any]) -> str:
    if "launch" not in result:
        return ""
    launch = result["launch"]
    form = f"programs={launch['splits']}" if launch["splits"] else f"cluster={launch['ctas']}"
    return f" ({form},warps={launch['num_warps']},columns={launch['columns']})"


def _safe(title: str, results: list[dict[str, Any]]) -> Table:
    def rows() -> Iterator[tuple[str, ...]]:
        for r in results:
            figures = {
                key: r[key] for key in ("vocabulary", "same", "errors", "passed", "failed", "skipped") if key in r
            }
            yield r["check"], ", ".join(f"{key} {value}" for key, value in figures.items()), words(r)

    return _table(title, ("check", "", ""), rows(), words=3)


def _launches(title: str, results: list[dict[str, Any]]) -> Table:
    def rows() -> Iterator[tuple[str, ...]]:
        for r in results:
            by_name: dict[str, list[float]] = {}
            for event in r["events"]:
                by_name.setdefault(event["name"], []).append(event["microseconds"])
            yield r["from"], f"all, V = {spaced(r['vocabulary'])}", str(r["count"]), f"{r['microseconds']:.1f}"
            longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
            for name, times in longest[:8]:
                yield r["from"], name[:80], str(len(times)), f"{sum(times):.1f}"

    return _table(title, ("from", "launched", "times", "microseconds"), rows(), words=2)


TABLES = {
    "machine": _machine, "right": _right, "fast": _fast, "l2": _l2, "hidden": _hidden, "models": _models,
    "plans": _plans, "safe": _safe, "launches": _launches,
}  # fmt: skip
