"""Text to token blocks: a contiguous part to train on, the rest held out, and the order of the batches."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

PACKAGED_TEXT = "pydoc_data.topics"
HELD_OUT_SHARE = 0.1  # of the text, its end
IGNORE_INDEX = -100
SAMPLE = "text"  # that a tokenizer is asked to begin


@dataclass(frozen=True)
class Blocks:
    train: Tensor  # [blocks, sequence], int64
    held_out: Tensor  # [blocks, sequence], int64
    opening: tuple[int, ...] = ()  # what every block begins with before its text, such as a BOS

    @property
    def text_tokens(self) -> int:  # of a block
        return self.train.shape[1] - len(self.opening)

    def labels(self, tokens: Tensor) -> Tensor:  # [batch, sequence] both
        """Return the next token of each position; none at the last one, nor where the next token belongs to the opening."""
        labels = next_tokens(tokens)
        labels[:, : max(0, len(self.opening) - 1)] = IGNORE_INDEX
        return labels

    @property
    def labelled(self) -> int:  # positions of a block that have a label
        return self.train.shape[1] - max(1, len(self.opening))


def read_text(source: str) -> str:
    if source == PACKAGED_TEXT:
        try:
            topics: dict[str, str] = importlib.import_module(PACKAGED_TEXT).topics
        except ModuleNotFoundError as error:
            raise UserError(f"this Python comes without {PACKAGED_TEXT}; name a file by --text") from error
        return "\n\n".join(topics.values())
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: cannot read {source}: {error}") from error


def token_blocks(
    text: str,
    tokenizer: Any,
    *,
    sequence: int,  # tokens of a block, its opening among them
    held_out_tokens: int,  # at most, of text
    vocabulary: int,
    device: torch.device,
) -> Blocks:
    """Cut a text into blocks that begin as the tokenizer begins a text; many models need their BOS."""
    opening = opening_tokens(tokenizer)
    size = sequence - len(opening)
    if size < 1:
        raise UserError(
            f"--sequence-length: every block begins with the tokenizer's {' '.join(names(tokenizer, opening))}; "
            f"expected at least {len(opening) + 1}, got {sequence}"
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    end = ids.numel() - max(size, int(HELD_OUT_SHARE * ids.numel()))
    if end < size:
        raise UserError(
            f"--text: {ids.numel()} tokens are too few; --sequence-length {sequence} needs at least {2 * size}"
        )
    largest = max(int(ids.max()), *opening, 0)
    if largest >= vocabulary:
        raise UserError(f"the text has token {largest}, and the vocabulary ends at {vocabulary - 1}")

    def blocks(part: Tensor) -> Tensor:
        texts = part[: part.numel() // size * size].view(-1, size)
        openings = torch.tensor(opening, dtype=torch.int64).expand(texts.shape[0], -1)
        return torch.cat([openings, texts], 1).to(device)

    held_out = ids[end:][: max(size, min(held_out_tokens, ids.numel()))]
    return Blocks(blocks(ids[:end]), blocks(held_out), opening)


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the tokenizer puts before a text, without those that it puts after one."""
    text = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(SAMPLE)["input_ids"]
    for begin in range(len(whole) - len(text) + 1):
        if whole[begin : begin + len(text)] == text:
            return tuple(whole[:begin])
    return ()


def names(tokenizer: Any, tokens: tuple[int, ...]) -> list[str]:
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(tokens))]


def batches(
    train: Tensor,  # [blocks, sequence]
    batch: int,
    seed: int,
) -> Iterator[Tensor]:  # [batch, sequence] each, without an end
    """Yield batches of blocks: every block once in random order, then every block again."""
    generator = torch.Generator().manual_seed(seed)
    order = train.new_empty(0)
    while True:
        while order.numel() < batch:
            order = torch.cat([order, torch.randperm(train.shape[0], generator=generator).to(train.device)])
        yield train[order[:batch]]
        order = order[batch:]


def next_tokens(tokens: Tensor) -> Tensor:
    """Labels `[batch, sequence]`: the next token, and none for the last position.

    The labels are shifted, not the logits: `logits[:, :-1]` would ask some losses for a copy.
    """
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    return labels
