"""Sizes for the blocks of CPU operators, products and scaling, chosen by a test."""

from contextlib import AbstractContextManager

import torch

from ..backends import cpu, cpu_blocks
from ..heads import products
from .replacing import replaced


def blocks_of(elements: int, *, gathered: int | None = None) -> AbstractContextManager[None]:
    """Work in blocks of `elements` elements, and gather blocks of `gathered` elements."""
    replacements = [
        (cpu_blocks, "BLOCK_ELEMENTS", max(1, elements // torch.get_num_threads())),  # per thread
        (products, "SLAB_ELEMENTS", elements),
        (cpu, "SCALED_ELEMENTS", elements),
    ]
    if gathered is not None:
        replacements.append((cpu_blocks, "GATHERED_ELEMENTS", gathered))
    return replaced(replacements)
