"""The file of recorded figures: those of compiled code once for every Triton that they were recorded with."""

import json
from pathlib import Path
from typing import Any

from fused_kd.testing.record import versions, write_json

from .figures import KINDS, Figures

FILE = Path(__file__).parents[1] / "results" / "regression.json"
Operators = dict[str, dict[str, float]]  # a step -> how often it calls which of PyTorch's operators


class Record:
    def __init__(self, file: Path) -> None:
        self.file = file
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.versions: dict[str, str | None] = content.get("versions", {})
        self.figures: Figures = content.get("figures", {})
        self.operators: Operators = content.get("operators", {})
        self.compiled: dict[str, Figures] = content.get("compiled", {})

    def triton(self, wanted: str) -> str:
        """Return that release, or the nearest before it, or the first there is."""
        releases = sorted(self.compiled, key=_numbers)
        before = [release for release in releases if _numbers(release) <= _numbers(wanted)]
        return before[-1] if before else (*releases, wanted)[0]

    def of(self, groups: set[str], triton: str) -> Figures:
        everything = self.figures | self.compiled.get(self.triton(triton), {})
        return {kind: values for kind, values in everything.items() if kind in KINDS and KINDS[kind].group in groups}

    def update(self, figures: Figures, operators: Operators, triton: str) -> None:
        """Record what was measured; the rest stays."""
        for kind, values in figures.items():
            of_kind = self.compiled.setdefault(triton, {}) if KINDS[kind].group == "compiled" else self.figures
            of_kind[kind] = values
        self.operators |= operators
        if any(KINDS[kind].group != "compiled" for kind in figures):  # compiled code has its Triton beside it
            self.versions = versions()
        names = ("versions", "figures", "operators", "compiled")
        write_json(self.file, {name: getattr(self, name) for name in names})


def release(version: str) -> str:
    """Major and minor: "3.8" of "3.8.0"."""
    return ".".join(version.split(".")[:2])


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
