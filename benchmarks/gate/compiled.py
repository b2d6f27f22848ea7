"""Figures of the kernels' machine code: bfloat16, both terms, dense rows, every target."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..compiled.profile import Profile
from ..compiled.variants import DIVERGENCES, Variant, all_variants, measure
from ..compiled.workers import in_workers
from .figures import Figures


def is_kept(variant: Variant) -> bool:
    usual = (variant.terms, variant.layout, variant.logit_map) == ("ce+kl", "dense", "identity")
    usual = usual and variant.divergence == DIVERGENCES[0] and not variant.entropy
    return usual and variant.dtypes == "bf16/bf16" and variant.temperature_name in ("1", "2", "other")


def compile_all(workers: int) -> Figures:
    """Compile and profile the kept variants; one that does not compile is named, and its figures are missing."""
    results = in_workers(measure, [variant for variant in all_variants() if is_kept(variant)], workers)
    for variant, result in results.items():
        if isinstance(result, BaseException):
            print(f"FAILED {variant.name}: {type(result).__name__}: {result}")
    return _figures((v, r.as_dict()) for v, r in results.items() if isinstance(r, Profile))


def from_profile(file: Path) -> Figures:
    """Read the figures of the variants that `static_profile.py --json` wrote."""
    fields = Variant.__dataclass_fields__
    entries = json.loads(file.read_text())["variants"]
    variants = [(Variant(**{name: entry[name] for name in fields if name in entry}), entry) for entry in entries]
    return _figures((variant, entry) for variant, entry in variants if is_kept(variant))


def triton_of(file: Path) -> str:
    return json.loads(file.read_text())["versions"]["triton"]


def _figures(profiles: Iterable[tuple[Variant, Mapping[str, Any]]]) -> Figures:
    figures: Figures = {}
    for variant, profile in profiles:
        name = (
            f"{variant.kernel} {variant.target} T={variant.temperature_name}" + " teacher_grad" * variant.teacher_grad
        )
        for kind, value in (
            ("instructions a pair", profile["instructions"]),
            ("MUFU a pair", profile["kinds"]["mufu"]),
            ("bytes a pair", profile["bytes"]),
            ("registers", profile["registers"]),
            ("spill", profile["spill"]),
        ):
            figures.setdefault(kind, {})[name] = value
    return figures
