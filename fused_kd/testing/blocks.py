"""Sizes for the blocks of CPU operators, products and scaling, chosen by a test."""

from contextlib import AbstractContextManager

from .. import scaling
from ..backends import cpu
from ..heads import products
from .replacing import replaced


def blocks_of(elements: int, *, gathered: int | None = None) -> AbstractContextManager[None]:
    """Work in blocks of `elements` elements, and gather blocks of `gathered` elements."""
    sizes = [(cpu, "BLOCK_ELEMENTS"), (products, "SLAB_ELEMENTS"), (scaling, "BLOCK_ELEMENTS")]
    replacements = [(module, name, elements) for module, name in sizes]
    if gathered is not None:
        replacements.append((cpu, "GATHERED_ELEMENTS", gathered))
    return replaced(replacements)
