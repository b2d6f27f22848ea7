"""The sentence that says what a run of `fused-kd bench` found."""

from collections.abc import Iterable, Iterator

from ...testing.peers import OURS
from .comparison import differ
from .suite import Result
from .tables import by_shape, computes_all

FUNCTIONS = {"logits": "kd_loss", "hidden": "linear_kd_loss"}
EAGER = "eager PyTorch"
Shape = tuple[Result, list[Result]]  # ours, and the right peers that compute both terms


def finding(results: list[Result], done: int, planned: int) -> str:
    """Say how ours compares with eager PyTorch, and which peers are clearly faster; `done` of `planned` were measured."""
    if not done:
        return f"Nothing was measured: the command was interrupted in the first of {planned} configurations."
    start = f"Interrupted after {done} of {planned} configurations: " if done < planned else ""
    ours = [result for result in results if result.peer == OURS]
    wrong = [result for result in ours if result.agrees is False]
    if wrong:
        functions = " and ".join(sorted({FUNCTIONS[result.inputs] for result in wrong}))
        count = f"{len(wrong)} of {len(ours)} configurations"
        return f"{start}{functions} is WRONG in {count}, marked above."
    shapes = list(_shapes(results))
    compared = ", ".join(text for inputs in FUNCTIONS if (text := _beside_eager(inputs, shapes)))
    faster: dict[str, int] = {}
    for mine, others in shapes:
        for other in others:
            if differ(mine.both, other.both) and other.both.median < mine.both.median:  # type: ignore[arg-type, union-attr]
                name = other.peer.replace(",", "")
                faster[name] = faster.get(name, 0) + 1
    named = ", ".join(f"{peer} in {count}" for peer, count in sorted(faster.items(), key=lambda item: -item[1]))
    where = f"{len(shapes)} configuration{'s' * (len(shapes) > 1)}"
    rest = (
        f"clearly faster than ours: {named} of {where}" if named else f"nothing is clearly faster than ours in {where}"
    )
    return f"{start}{compared or 'eager PyTorch did not run'}; {rest}."


def _shapes(results: Iterable[Result]) -> Iterator[Shape]:
    for group in by_shape(results):
        measured = [result for result in group if result.both and result.agrees is not False and computes_all(result)]
        for mine in (result for result in measured if result.peer == OURS):
            yield mine, [result for result in measured if result.peer != OURS]


def _beside_eager(inputs: str, shapes: Iterable[Shape]) -> str:
    pairs = [
        (mine, other) for mine, others in shapes for other in others if mine.inputs == inputs and other.peer == EAGER
    ]
    if not pairs:
        return ""
    speeds = [other.both.median / mine.both.median for mine, other in pairs]  # type: ignore[union-attr]
    shares = [mine.peak_bytes / other.peak_bytes for mine, other in pairs if mine.peak_bytes and other.peak_bytes]
    memory = f" with {_range(shares, '{:.0%}')} of its memory" if shares else ""
    return f"{FUNCTIONS[inputs]} is {_range(speeds, '{:.2g}')} times as fast as {EAGER}{memory}"


def _range(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
