"""The comparison of figures with the recorded ones: those within their limits, and advice on the others."""

from collections.abc import Iterator
from typing import NamedTuple

from .figures import KINDS, Figures

OK, BETTER, WORSE, NEW, GONE = "ok", "better: --update", "WORSE", "NEW: --update", "GONE: --update"


class Comparison(NamedTuple):
    kind: str
    name: str
    recorded: float | None
    now: float | None
    limit: float | None  # at most
    verdict: str

    @property
    def fails(self) -> bool:
        return self.verdict in (WORSE, NEW, GONE)


def compare(
    recorded: Figures,
    now: Figures,
    other_triton: bool = False,  # compiled code is recorded of another Triton, so that it says little
) -> Iterator[Comparison]:
    for kind in KINDS:
        before, after = recorded.get(kind, {}), now.get(kind, {})
        for name in dict.fromkeys([*before, *after]):
            other = other_triton and KINDS[kind].group == "compiled"
            yield _comparison(kind, name, before.get(name), after.get(name), other)


def _comparison(kind: str, name: str, recorded: float | None, now: float | None, other_triton: bool) -> Comparison:
    if recorded is None:
        return Comparison(kind, name, recorded, now, None, NEW)
    rules = KINDS[kind]
    factor = 1 + (rules.other_triton if other_triton else rules.slack)
    limit = min(recorded * factor, rules.ceiling)
    if now is None:
        return Comparison(kind, name, recorded, now, limit, GONE)
    verdict = WORSE if now > limit else BETTER if now < recorded / factor and not other_triton else OK
    return Comparison(kind, name, recorded, now, limit, verdict)
