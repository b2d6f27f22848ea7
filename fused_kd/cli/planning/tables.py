"""The tables and the record of `fused-kd plan`."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from ...devices import DEVICES, cards
from ...launch import is_faster
from ...testing import record as records
from ...testing.words import dtype_name, spaced
from ..layout import console, print_table, say
from . import paths
from .paths import Array, Ledger, LossStep

GB = 10**9
HEADINGS = {paths.LEAN: "lean mode"}  # narrower than the path, for the tables
# A path as the reader would write it, if it differs.
WRITTEN = {paths.IN_PLACE: "kd_loss with inplace_backward=True", paths.LEAN: 'linear_kd_loss with memory="lean"'}


def print_plan(step: LossStep, reserved: int, notes: list[str], arrays: bool) -> None:
    """Print the step, its memory and the cards, and last the advice; with `arrays`, all details before them."""
    out = console(114, highlight=False)
    ledgers = paths.ledgers(step)
    say(
        f"{spaced(step.tokens)} tokens, V = {spaced(step.vocab_size)}, H_s = {spaced(step.student_hidden)}, "
        f"H_t = {spaced(step.teacher_hidden)}, {dtype_name(step.dtype)}, {'trained' if step.trained else 'frozen'} head; "
        "planned, not measured"
    )
    say(
        f"linear_kd_loss is planned for {_device(step)}; the cards below, each for its own GPU."
        if step.device
        else "linear_kd_loss is planned for a CPU; the cards below, each for its GPU."
    )
    for note in notes:
        say(note)
    out.print()
    if arrays:
        for path, ledger in ledgers.items():
            print_table(out, _arrays(path, ledger))
        if step.device:
            print_table(out, _times(step))
        for line in _details(step):
            say(line)
        out.print()
    for table in (_memory(step, ledgers), _cards(step, ledgers, reserved)):
        print_table(out, table)
    say(advice(step, reserved))


def _table(title: str, *headings: str) -> Table:
    """Make a table with words in the first column and figures, aligned right, in the others."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _headings(of_paths: Iterable[str]) -> list[str]:
    return [HEADINGS.get(path, path) for path in of_paths]


def _memory(step: LossStep, ledgers: dict[str, Ledger]) -> Table:
    table = _table("Memory of the loss step", "at its peak", *_headings(ledgers))
    table.columns[0].no_wrap = True
    inputs = dict(step.inputs)
    table.add_row("head weights", *[_size(inputs.pop("head weights"))] * len(ledgers))
    table.add_row("other inputs", *[_size(sum(inputs.values()))] * len(ledgers))
    for row, is_gradient in (("gradients", True), ("other arrays", False)):
        sizes = [
            sum(array.bytes for array in ledger.at_peak if (array.last is None) == is_gradient)
            for ledger in ledgers.values()
        ]
        table.add_row(row, *map(_size, sizes))
    table.add_row("in all", *(_size(paths.needed_bytes(step, ledger)) for ledger in ledgers.values()), style="bold")
    return table


class Card(NamedTuple):
    """A card and the step as it is planned for it."""

    gigabytes: int
    name: str
    step: LossStep

    @property
    def bytes(self) -> int:
        return self.gigabytes * GB

    def fits(self, reserved: int) -> dict[str, bool]:
        """Return for each path whether the step fits beside `reserved` bytes."""
        free = self.bytes - reserved
        return {
            path: paths.needed_bytes(self.step, ledger) <= free for path, ledger in paths.ledgers(self.step).items()
        }

    def most_tokens(self, reserved: int) -> dict[str, int]:
        """Return for each path how many tokens would fit."""
        free = self.bytes - reserved
        return {path: paths.most_tokens(self.step, path, free) for path in paths.ledgers(self.step)}


def _all_cards(step: LossStep) -> list[Card]:
    return [Card(size, name, step._replace(device=name, card_bytes=size * GB)) for size, name in cards()]


def _cards(step: LossStep, ledgers: dict[str, Ledger], reserved: int) -> Table:
    others = f" beside {_size(reserved)} of other things" if reserved else ""
    table = _table(f"Does it fit on a card{others}, and how many tokens would", "", *_headings(ledgers))
    table.columns[0].no_wrap = True
    for card in _all_cards(step):
        fits, most = card.fits(reserved), card.most_tokens(reserved)
        cells = [f"{'yes' if fits[path] else 'no'} {_tokens(most[path])}" if most[path] else "no" for path in ledgers]
        table.add_row(f"{card.gigabytes} GB: {card.name}", *cells)
    return table


def saved_by_lean(step: LossStep, reserved: int) -> list[str]:
    """Return the cards that the step fits on in lean mode and not as it is by default."""
    return [
        f"{card.name} ({card.gigabytes} GB)"
        for card in _all_cards(step)
        if (fits := card.fits(reserved))[paths.LEAN] and not fits[paths.LINEAR]
    ]


def _times(step: LossStep) -> Table:
    plans = {paths.LINEAR: step.chunks, paths.LEAN: step.slabs}
    table = _table(f"Modelled time on {_device(step)}, forward and backward, in ms", "", *_headings(plans))
    for part in dict.fromkeys(part for plan in plans.values() for part in plan.seconds):
        table.add_row(part, *(_milliseconds(plan.seconds.get(part, 0.0)) for plan in plans.values()))
    table.add_row("in all", *(_milliseconds(plan.modelled_seconds) for plan in plans.values()), style="bold")
    return table


def _milliseconds(seconds: float) -> str:
    return _three_digits(1000 * seconds) if seconds else "0"


def _device(step: LossStep) -> str:
    name = step.device or "CPU"
    return f"an {name}" if name[0] in "AHLMR" else f"a {name}"


def _arrays(path: str, ledger: Ledger) -> Table:
    title = f"{path}, array by array; the peak comes in: {_operation(ledger, ledger.peak)}"
    table = _table(title, "array", "size", "from", "to the end of", "at peak")
    for column in table.columns[2:]:
        column.justify = "left"
    for array in ledger.arrays:
        to = "(stays)" if array.last is None else _operation(ledger, array.last)
        at_peak = "yes" if array.is_alive(ledger.peak) else ""
        table.add_row(array.name, _size(array.bytes), _operation(ledger, array.first), to, at_peak)
    return table


def _details(step: LossStep) -> list[str]:
    chunks, slabs, passes = step.chunks, step.slabs, step.logits_bytes
    products = ", ".join(f"{count} of the {side}" for side, count in step.products.items())
    flops = step.flops
    return [
        f"linear_kd_loss: {_chunks(step)}, gradients multiplied for {spaced(chunks.gradient_rows)} tokens at once, in "
        f"buffers of {_size(chunks.workspace_bytes)}.  Lean: {spaced(slabs.slabs)} slabs of {spaced(slabs.slab_columns)} "
        f"columns, in buffers of {_size(slabs.workspace_bytes)}.",
        f"Products of the heads, on every path but lean, which projects twice: {products}, 2 N V H each: "
        f"{_flops(sum(flops.values()))} ({_flops(flops['student'])} + {_flops(flops['teacher'])}).",
        f"Traffic of the loss from logits: the floor is 3 U = {_size(3 * passes)}, both logits read, the gradient written "
        f"(U = {step.dtype.itemsize} N V bytes).  kd_loss has 5 U = {_size(5 * passes)} in two launches, 3 U in one, which "
        f"it takes {_one_launch(step)}.",
        "Eager and kd_loss are planned as a function that projects, takes the loss and returns it.  Variables that hold "
        f"logits through backward cost up to {_size(passes)} each.",
        "Left out: a few hundred bytes per token, on a CPU blocks of 64 MB at most, CUDA's context and workspaces (about "
        "0.5 GB), fragments.",
    ]  # fmt: skip


def _chunks(step: LossStep) -> str:
    count, rows = step.chunks.chunks, step.chunks.chunk_rows
    return f"{spaced(count)} chunk{'s' * (count > 1)} of {spaced(rows)} token{'s' * (rows > 1)}"


def advice(step: LossStep, reserved: int = 0) -> str:
    """Say in a sentence which path takes the least memory, what lean mode takes, and which cards that saves.

    If the path is not linear_kd_loss, the sentence gives the reason.
    """
    needed = {path: paths.needed_bytes(step, ledger) for path, ledger in paths.ledgers(step).items()}
    peaks = {path: _size(size) for path, size in needed.items()}
    path = paths.least_memory(step)
    others = "" if path == paths.EAGER else f" where {paths.EAGER} takes {peaks[paths.EAGER]}"
    lean = ""
    if needed[paths.LEAN] < needed[path]:
        saved = saved_by_lean(step, reserved)
        lean = f'; with memory="lean" {peaks[paths.LEAN]}{", which also fits on " + _listed(saved) if saved else ""}'
    if step.device:
        smallest = min((card for card in _all_cards(step) if card.name == step.device), key=lambda card: card.bytes)
        fits = smallest.fits(reserved)
        if fits[paths.LEAN] and not any(fits[path] for path in paths.PREFERRED):
            return (
                f"Use {WRITTEN[paths.LEAN]}: {peaks[paths.LEAN]} at the peak where {path} takes {peaks[path]}; nothing "
                f"else fits on {_device(step)} of {smallest.gigabytes} GB."
            )
    if path == paths.LINEAR:
        return f"Use linear_kd_loss: {_chunks(step)}, {peaks[path]} at the peak{others}{lean}."
    total = step.chunks.buffers.get("weight gradient, summed in float32")
    if total:
        reason = f"sums the weight gradient in float32 ({_size(total)})"
    elif _logits_dtype(step).itemsize > step.dtype.itemsize:
        reason = f"has its logits in {dtype_name(_logits_dtype(step))}"
    else:
        reason = "saves little where a chunk holds most of the tokens, and aligns its rows"
    start = paths.linear_from(step)
    from_there = f"takes the least from {spaced(start)} tokens on" if start else "more tokens do not change that"
    return (
        f"Use {WRITTEN.get(path, path)}: {peaks[path]} at the peak{others}; linear_kd_loss would take "
        f"{peaks[paths.LINEAR]}, since it {reason}, and {from_there}{lean}."
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _logits_dtype(step: LossStep) -> torch.dtype:
    """Return the dtype of a chunk's logits."""
    return step.logits_dtype or torch.promote_types(step.dtype, torch.float32)


def one_launch_devices(step: LossStep) -> list[str]:
    """Return the known devices on which one launch is the faster, if the loss takes one at all."""
    itemsizes = [step.dtype.itemsize] * 2
    return [
        name for name, device in DEVICES.items() if step.in_one_launch and is_faster(device, step.vocab_size, itemsizes)
    ]


def _one_launch(step: LossStep) -> str:
    devices = one_launch_devices(step)
    if not step.in_one_launch:
        return f"of {dtype_name(step.dtype)} logits on no device"
    return f"where that is the faster: {', '.join(devices) if devices else 'on none of the devices that are known'}"


def record(step: LossStep, reserved: int, notes: list[str]) -> dict[str, Any]:
    ledgers, chunks, slabs = paths.ledgers(step), step.chunks, step.slabs
    return {
        "command": "fused-kd plan",
        "versions": records.versions("transformers"),
        "step": {**step._asdict(), "dtype": dtype_name(step.dtype),
                 "logits_dtype": dtype_name(_logits_dtype(step))},
        "notes": notes,
        "advice": advice(step, reserved),
        "inputs": step.inputs,
        "gradients": step.gradients,
        "paths": {
            path: {
                "peak_bytes": paths.needed_bytes(step, ledger),
                "peak_bytes_beyond_inputs": ledger.peak_bytes,
                "peak_in": _operation(ledger, ledger.peak),
                "arrays": [_array(ledger, array) for array in ledger.arrays],
                "operations": [
                    {"operation": _operation(ledger, index), "bytes": held} for index, held in enumerate(ledger.held)
                ],
            }
            for path, ledger in ledgers.items()
        },
        "least_memory": {"path": paths.least_memory(step), "linear_kd_loss_from_tokens": paths.linear_from(step)},
        "chunks": {
            "chunk_rows": chunks.chunk_rows,
            "gradient_rows": chunks.gradient_rows,
            "chunks": chunks.chunks,
            "workspace_bytes": chunks.workspace_bytes,
        },
        "slabs": {
            "slab_columns": slabs.slab_columns,
            "slabs": slabs.slabs,
            "workspace_bytes": slabs.workspace_bytes,
        },
        "modelled_seconds": {paths.LINEAR: chunks.seconds, paths.LEAN: slabs.seconds},
        "products": step.products,
        "flops": step.flops,
        "traffic": {
            "floor": 3 * step.logits_bytes, "kd_loss in one launch": 3 * step.logits_bytes,
            "kd_loss in two launches": 5 * step.logits_bytes,
        },
        "one_launch_devices": one_launch_devices(step),
        "reserved_bytes": reserved,
        "saved_by_lean": saved_by_lean(step, reserved),
        "cards": [
            {
                "bytes": card.bytes,
                "name": card.name,
                "fits": card.fits(reserved),
                "most_tokens": card.most_tokens(reserved),
                "modelled_seconds": {
                    paths.LINEAR: card.step.chunks.modelled_seconds, paths.LEAN: card.step.slabs.modelled_seconds
                },
            }
            for card in _all_cards(step)
        ],
    }  # fmt: skip


def _array(ledger: Ledger, array: Array) -> dict[str, Any]:
    return {
        "name": array.name,
        "bytes": array.bytes,
        "from": _operation(ledger, array.first),
        "to": None if array.last is None else _operation(ledger, array.last),
        "at_peak": array.is_alive(ledger.peak),
    }


def _operation(ledger: Ledger, index: int) -> str:
    operation = ledger.operations[index]
    return f"backward: {operation.name}" if operation.backward else operation.name


def _size(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{_three_digits(size / unit)} {name}"
    return f"{size} B" if size else "0"


def _tokens(tokens: int) -> str:
    """Return a number of tokens in two digits or three, rounded down, such as 784, 3.1k and 51k."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            tenths = 10 * tokens // unit
            return f"{tenths // 10}{name}" if tenths >= 100 else f"{tenths / 10}{name}"
    return str(tokens)


def _flops(flops: int) -> str:
    unit, name = (10**12, "Tflop") if flops >= 10**12 else (10**9, "Gflop")
    return f"{_three_digits(flops / unit)} {name}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
