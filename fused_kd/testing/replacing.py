"""Contexts that replace attributes of modules.  The other modules of this folder use them for their test settings."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(replacements: Iterable[tuple[Any, str, object]]) -> Iterator[None]:
    """Replace attributes of modules, each given as (module, name, value)."""
    replacements = list(replacements)
    before = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for replacement in replacements:
            setattr(*replacement)
        yield
    finally:
        for original in before:
            setattr(*original)


def replaced_in(module: str, **values: object) -> contextlib.AbstractContextManager[None]:
    """Replace values of one module, which is given by its name."""
    return replaced((sys.modules[module], name, value) for name, value in values.items())
