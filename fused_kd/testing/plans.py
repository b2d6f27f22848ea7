"""Chunks and groups of chosen lengths for `linear_kd_loss`, whatever its plan would be."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from ..heads import operator
from ..heads.chunks import Plan
from ..heads.sweep import planned
from .replacing import replaced


@contextlib.contextmanager
def in_chunks(
    chunk_rows: int,  # C
    gradient_rows: int | None = None,  # M, a multiple of C; None: C
) -> Iterator[None]:
    """Run `linear_kd_loss` in chunks of C tokens whose gradients are multiplied M tokens at a time."""

    def in_their_place(hidden: Any, *arguments: Any) -> Plan:
        rows = max(1, hidden.shape[0])
        sizes = min(rows, chunk_rows), min(rows, gradient_rows or chunk_rows)
        plan = planned(hidden, *arguments)
        return dataclasses.replace(
            plan, chunk_rows=sizes[0], gradient_rows=sizes[1], chunks=-(-hidden.shape[0] // sizes[0])
        )

    with replaced([(operator, "planned", in_their_place)]):
        yield
