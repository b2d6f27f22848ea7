"""The context of a stage: a device, the sizes that it runs at, the time that it has."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from fused_kd.testing.shapes import PAIRS, Pair

REHEARSAL = "FUSED_KD_REHEARSAL"  # environment variable: RIGHT, or WRONG for kernels whose gradient is off
RIGHT, WRONG = "right", "wrong"


class Sizes(NamedTuple):
    """Sizes of a GPU's run, or of a rehearsal."""

    rows: int  # N, tokens
    vocabularies: tuple[int, ...]  # V, the most telling first
    judged: tuple[int, ...]  # V at which a step has a target
    short: tuple[int, ...]  # V of rows that a program takes whole
    hidden: int  # H, of student and teacher
    hidden_vocabularies: tuple[int, ...]
    models: tuple[Pair, ...]  # whose heads are measured
    chunk_rows: tuple[int, ...]  # tokens of a chunk of hidden states
    programs: tuple[int, ...]  # programs per row that are tried
    programs_of: tuple[tuple[int, int], ...]  # warps and columns per thread, of such a program
    graphs: tuple[int, ...]  # V of steps that are captured; rows of one program each, and of several
    copy_bytes: int
    matrix: int  # rows and columns of a square matrix
    dtype: torch.dtype
    batches: int  # times that a step is timed
    rounds: int  # steps in a row, each time
    workers: int  # processes that compile, or check
    checked: int  # launches under compute-sanitizer, at most


GPU = Sizes(
    rows=8192, vocabularies=(128_256, 151_936, 32_000, 262_144), judged=(128_256, 151_936), short=(4096, 8192, 16_384),
    hidden=4096,
    hidden_vocabularies=(128_256, 151_936), models=tuple(PAIRS[key] for key in ("llama2", "gemma2", "gemma3")),
    chunk_rows=(512, 1024, 2048, 8192),
    programs=(16, 32, 64), programs_of=((2, 16), (2, 8), (4, 16), (8, 16)),
    graphs=(1040, 32_000), copy_bytes=2**31, matrix=8192, dtype=torch.bfloat16, batches=3, rounds=5,
    workers=max(2, min(14, (os.cpu_count() or 2) - 2)), checked=100,
)  # fmt: skip
REHEARSED = Sizes(
    rows=4, vocabularies=(1040, 611), judged=(1040,), short=(304,), hidden=16, hidden_vocabularies=(304,),
    models=tuple(PAIRS[key]._replace(vocab_size=304, student_hidden=16, teacher_hidden=24) for key in ("llama2", "gemma2")),
    chunk_rows=(2,), programs=(2,), programs_of=((4, 8),), graphs=(1040,), copy_bytes=2**12, matrix=16,
    dtype=torch.bfloat16, batches=1, rounds=2, workers=2, checked=2,
)  # fmt: skip


class Context(NamedTuple):
    device: torch.device
    sizes: Sizes
    folder: Path  # for files of the stage
    end: float  # of its time, by `time.monotonic`

    def has(self, seconds: float) -> bool:
        """Return whether more than so many seconds are left."""
        return seconds < self.left()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()


def is_rehearsal() -> bool:
    return bool(os.environ.get(REHEARSAL))


def prepare() -> None:
    """Make this process fit to run a stage: in a rehearsal, stand-ins take the place of what is not here."""
    if is_rehearsal():
        from .standins import install

        install(wrong=os.environ[REHEARSAL] == WRONG)


def here(folder: Path, seconds: float) -> Context:
    """Return the context of a stage that starts in this process."""
    prepare()
    device, sizes = (torch.device("cpu"), REHEARSED) if is_rehearsal() else (torch.device("cuda"), GPU)
    return Context(device, sizes, folder, time.monotonic() + seconds)
