"""The launches of `compiled_kernels.py`: options of a launch, and few cases in which every pair of them meets."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..compiled.variants import DIVERGENCES, MAPS, TEMPERATURES, TERMS

Option = tuple[str, object]  # a field of `Case` and its value
ROWS = 6  # N; divisible by 2 and 3, for two ways to cut it into outer and inner


class Placement(NamedTuple):
    """The placement of `[outer, inner, V]` logits in memory; what is between rows belongs to nobody."""

    outer: int = 1
    multiple: int = 1  # of which strides are
    gap: int = 0  # elements at least between a row and the next
    outer_gap: int = 0  # and between the last row of an outer index and the next
    start: int = 0  # elements before the first row
    transposed: bool = False  # columns lie apart, rows are neighbours

    def strides(self, vocabulary: int) -> tuple[int, int, int]:
        inner = ROWS // self.outer
        if self.transposed:
            return inner * vocabulary, 1, inner + self.gap
        row = -(-(vocabulary + self.gap) // self.multiple) * self.multiple
        return inner * row + self.outer_gap, row, 1


ALIGNED = Placement(multiple=16, gap=1)
ODD = Placement(gap=3, start=3)
TRANSPOSED = Placement(transposed=True, gap=2)
LAYOUTS = {  # of student and teacher
    "dense": (Placement(), Placement()),
    "padded": (ALIGNED, ALIGNED),
    "odd": (ODD, ODD),
    "mixed": (ALIGNED, ODD),
    "transposed": (TRANSPOSED, TRANSPOSED),
    "nested": (ALIGNED._replace(outer=2, outer_gap=32), ALIGNED._replace(outer=3, outer_gap=16)),
}


@dataclass(frozen=True)
class Case:
    """Statistics and gradient, in two launches or in a single pass."""

    dtypes: str
    temperature: float
    terms: str
    student_map: str
    teacher_map: str
    layout: str
    vocabulary: int
    splits: int
    form: str
    gradients: str
    labels: str
    logits: str
    divergence: str

    @property
    def name(self) -> str:
        return (
            f"{self.dtypes} T={self.temperature:g} {self.terms} maps {self.student_map}/{self.teacher_map} {self.layout} "
            f"V={self.vocabulary} splits={self.splits} {self.form} gradients: {self.gradients} "
            f"{self.labels} {self.logits} {self.divergence}"
        )

    @property
    def options(self) -> tuple[Option, ...]:
        return tuple(vars(self).items())


OPTIONS: dict[str, tuple] = {
    "dtypes": ("bf16/bf16", "fp16/fp16", "fp32/fp32", "bf16/fp32", "fp32/bf16", "fp16/bf16"),
    "temperature": TEMPERATURES,
    "terms": tuple(TERMS),
    "student_map": MAPS,
    "teacher_map": MAPS,
    "layout": tuple(LAYOUTS),
    # One column, a part of a tile, whole tiles (of 1024 columns in 16 bits, of 512 in float32), those and a part of which
    # the compiler knows that it is a multiple of 16, and one of which it knows nothing.
    "vocabulary": (1, 611, 2048, 2608, 2611),
    "splits": (1, 3),  # of fewer tiles than splits the last splits have no columns
    # The last two are a single pass: one program or cluster per row, or `splits` programs.
    "form": ("two launches", "whole", "programs"),
    "gradients": ("student", "student in place", "both", "both in place"),
    "labels": ("i64", "i32"),
    "logits": ("finite", "masked"),  # masked: some columns are minus infinity
    "divergence": DIVERGENCES,
}


def possible(options: dict[str, object]) -> bool:
    """Return whether options, not necessarily all of them, can meet in a launch."""
    teacher_gradient = str(options.get("gradients")).startswith("both")
    divergence = options.get("divergence")
    without_teacher = options.get("terms") == "ce" and (
        teacher_gradient or options.get("teacher_map", "identity") != "identity" or divergence == "reverse_kl"
    )
    # A softcap makes minus infinity finite again: mass where the other distribution has none, an infinite divergence.
    averaged, other = ("student", "teacher") if divergence == "reverse_kl" else ("teacher", "student")
    finite_again = options.get(f"{averaged}_map") == "softcap" != options.get(f"{other}_map", "softcap")
    infinite = options.get("logits") == "masked" and divergence is not None and finite_again
    in_one_launch = options.get("form", "two launches") != "two launches"
    return not (without_teacher or infinite or (in_one_launch and teacher_gradient))


def groups(size: int) -> Iterator[tuple[Option, ...]]:
    """Every `size` options that can meet."""
    for names in itertools.combinations(OPTIONS, size):
        for values in itertools.product(*(OPTIONS[name] for name in names)):
            if possible(dict(zip(names, values, strict=True))):
                yield tuple(zip(names, values, strict=True))


def covering_cases(size: int) -> list[Case]:
    """Few cases, so that any `size` options that can meet do so in one of them; the same cases at every call.

    Greedy: of some completions of the first group that is missing, the one in which most missing groups meet.
    """
    chooser = random.Random(0)
    missing = dict.fromkeys(groups(size))
    found = []
    while missing:
        first = next(iter(missing))
        candidates = [_completed(dict(first), chooser) for _ in range(30)]
        case, met = max(
            ((case, [g for g in itertools.combinations(case.options, size) if g in missing]) for case in candidates),
            key=lambda pair: len(pair[1]),
        )
        for group in met:
            del missing[group]
        found.append(case)
    return found


def _completed(options: dict, chooser: random.Random) -> Case:
    for name in chooser.sample(list(OPTIONS), len(OPTIONS)):
        if name not in options:
            options[name] = chooser.choice([v for v in OPTIONS[name] if possible({**options, name: v})])
    return Case(**options)
