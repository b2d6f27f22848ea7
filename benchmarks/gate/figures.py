"""The kinds of figures that `regression.py` keeps, and by how much one may be worse than recorded."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

Figures = dict[str, dict[str, float]]  # kind of figure -> what it is a figure of -> value; less is better


class Kind(NamedTuple):
    group: str  # what is measured together
    slack: float = 0.0  # the share of the recorded value by which one may be worse
    other_triton: float = 0.0  # that share, where the record is of another Triton than the one at hand
    ceiling: float = float("inf")  # whatever is recorded


# Between Triton 3.8 and 3.9 the same kernels differ by -10% to +5% in instructions and -27% to +20% in registers, and not
# at all in MUFU, bytes and spills.  Live bytes, launches and multiplications have been the same in every run and on every
# number of threads.  Times of two peers in one process wander with what else the machine does.
KINDS = {
    "instructions a pair": Kind("compiled", 0.05, 0.12),
    "MUFU a pair": Kind("compiled"),
    "bytes a pair": Kind("compiled"),
    "registers": Kind("compiled", 0.05, 0.3),
    "spill": Kind("compiled"),
    "Triton launches": Kind("launches"),
    "other launches": Kind("launches"),
    "operations": Kind("launches", ceiling=8),
    "operations per chunk": Kind("launches", ceiling=6),
    "projections": Kind("multiplications"),
    "live bytes": Kind("memory", 0.01),
    "time, fused / eager": Kind("times", 1.0),
    "time from logits, fused / eager": Kind("times", 1.0, ceiling=1.0),
}
GROUPS = tuple(dict.fromkeys(kind.group for kind in KINDS.values()))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
