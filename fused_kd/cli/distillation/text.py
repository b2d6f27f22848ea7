"""Text to batches of token ids."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import UserError

HELD_OUT = 0.1  # the last part of the text


def read(path: Path | None) -> str:
    """The file's text, by default the English text of Python's own help topics."""
    if path is None:
        return "\n\n".join(pydoc_data.topics.topics.values())
    if not path.is_file():
        raise UserError(f"no such text file: {path}")
    return path.read_text()


def sequences(text: str, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """(training, held-out) token ids, `[sequences, length]` each, from contiguous parts of the text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = len(ids) // length
    held_out = max(1, round(HELD_OUT * count))
    if count - held_out < 1:
        raise UserError(f"the text has {len(ids)} tokens: expected at least {2 * length}, two sequences of {length}")
    rows = ids[: count * length].view(count, length)
    return rows[:-held_out], rows[-held_out:]


def next_tokens(ids: Tensor) -> Tensor:
    """The labels of a batch: the ids shifted left; the last position has none.  The logits stay whole, uncopied."""
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    return labels
