"""Text to token blocks: a contiguous part to train on, the rest held out, and the order of the batches."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

PACKAGED_TEXT = "pydoc_data.topics"
HELD_OUT_SHARE = 0.1  # of the text, its end
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Blocks:
    train: Tensor  # [blocks, sequence], int64
    held_out: Tensor  # [blocks, sequence], int64


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
    sequence: int,  # tokens of a block
    held_out_tokens: int,  # at most
    vocabulary: int,
    device: torch.device,
) -> Blocks:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    end = ids.numel() - max(sequence, int(HELD_OUT_SHARE * ids.numel()))
    if end < sequence:
        raise UserError(
            f"--text: {ids.numel()} tokens are too few; --sequence-length {sequence} needs at least {2 * sequence}"
        )
    if int(ids.max()) >= vocabulary:
        raise UserError(f"the text has token {int(ids.max())}, and the vocabulary ends at {vocabulary - 1}")
    train, held_out = ids[:end], ids[end:][: max(sequence, held_out_tokens)]
    return Blocks(
        *(part[: part.numel() // sequence * sequence].view(-1, sequence).to(device) for part in (train, held_out))
    )


def batch_order(
    blocks: int,
    steps: int,
    batch: int,
    seed: int,
) -> Tensor:  # [steps, batch], which blocks a step takes
    """Every block once, in random order, then every block again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // blocks)
    order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)


def next_tokens(tokens: Tensor) -> Tensor:
    """Labels `[batch, sequence]`: the next token, and none for the last position.

    The labels are shifted, not the logits: `logits[:, :-1]` would ask some losses for a copy.
    """
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    return labels
