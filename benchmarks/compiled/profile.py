"""Figures of one compiled variant, and what the readers of both instruction sets share."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("mufu", "fma", "alu", "convert", "load", "store", "shared", "local", "shuffle", "barrier", "control")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; which of `KINDS` it is was decided by the reader of its instruction set."""

    text: str
    kind: str
    bytes: int = 0  # that a thread moves between registers and global memory


@dataclass(frozen=True)
class Loop:
    """The main loop: the innermost one that loads logits and takes exponentials."""

    body: tuple[Instruction, ...]
    columns: int  # by which an iteration advances, in all threads together
    bytes_in_flight: int  # most that a thread has requested and not yet used

    def counts(self) -> Counter[str]:
        return Counter(instruction.kind for instruction in self.body)

    def widths(self, kind: str) -> list[int]:
        return [instruction.bytes for instruction in self.body if instruction.kind == kind]


@dataclass(frozen=True)
class Resources:
    registers: int  # per thread
    spill: int  # bytes of stack per thread, or registers that the compiler says it spilled
    shared: int  # bytes per program
    resident_warps: int  # a multiprocessor (compute unit) holds at these registers and this shared memory


@dataclass(frozen=True)
class OneLaunchFigures(Resources):
    """Figures of a kernel with several loops over a row."""

    shuffles: int  # in all of these loops


@dataclass(frozen=True)
class Profile:
    """Figures of a variant.  A pair is one (student, teacher) element; instructions are those that a warp issues."""

    registers: int
    spill: int
    shared: int
    resident_warps: int
    kilobytes_in_flight: float  # loads that a multiprocessor's resident warps have outstanding at most
    columns: int  # K, neighbouring columns per thread
    pairs: int  # a thread's pairs in one iteration of the main loop: K, or a multiple where it is unrolled
    instructions: float  # per pair, and so are the kinds
    kinds: dict[str, float]
    bytes: float  # of global memory, per pair
    load_width: int  # bytes of the narrowest load of the loop
    store_width: int  # 0 where the loop stores nothing
    listing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile(resources: Resources, loop: Loop, lanes: int, columns: int, warp_size: int) -> Profile:
    """Per-pair figures of a loop over tiles of `lanes` threads with `columns` columns each."""
    if loop.columns % (lanes * columns):
        raise ValueError(f"an iteration covers {loop.columns} columns, which is not whole tiles of {lanes} x {columns}")
    pairs = loop.columns // lanes
    counts = loop.counts()
    return Profile(
        **vars(resources),
        kilobytes_in_flight=resources.resident_warps * warp_size * loop.bytes_in_flight / 1024,
        columns=columns,
        pairs=pairs,
        instructions=len(loop.body) / pairs,
        kinds={kind: counts[kind] / pairs for kind in KINDS},
        bytes=sum(loop.widths("load") + loop.widths("store")) / pairs,
        load_width=min(loop.widths("load")),
        store_width=min(loop.widths("store"), default=0),
        listing=tuple(instruction.text for instruction in loop.body),
    )


def main_loop_body(code: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> tuple[Instruction, ...]:
    """Return the main loop among all (first, last index) of a kernel; the unrolled one, not its remainder."""
    bodies = loops_over_a_row(code, loops)
    candidates = [body for body in bodies if any(instruction.kind == "load" for instruction in body)]
    if not candidates:
        raise ValueError(f"none of {len(bodies)} innermost loops with exponentials has loads")
    return tuple(max(candidates, key=lambda body: sum(i.bytes for i in body if i.kind == "load")))


def loops_over_a_row(code: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> list[Sequence[Instruction]]:
    """Return the innermost loops that take exponentials, among all (first, last index) of a kernel."""
    bodies = [code[first : last + 1] for first, last in loops if not _has_inner_loop((first, last), loops)]
    return [body for body in bodies if any(instruction.kind == "mufu" for instruction in body)]


def shuffles(code: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> int:
    bodies = loops_over_a_row(code, loops)
    if not bodies:
        raise ValueError("no loop takes exponentials")
    return sum(instruction.kind == "shuffle" for body in bodies for instruction in body)


def _has_inner_loop(loop: tuple[int, int], loops: Sequence[tuple[int, int]]) -> bool:
    return any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
