"""Whether a loss whose gradient is needed takes one launch or two, and with which threads: by device, or as asked.

Planned by `one_launch_plan.py`.  Two launches (statistics forward, gradient backward) are for everything else: a loss
without a gradient, row losses one by one, a teacher that learns, devices whose L2 is too small, CPUs.
"""

import functools
import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .devices import Device, OneLaunch, device_of_properties, one_launch_plan

PLAN = "FUSED_KD_PLAN"
AUTO, ONE, TWO = "auto", "one-launch", "two-launches"
MANY_ROWS = 2**20
# Interpreted, an operation costs the same whatever its size: wide tiles; and several programs a row, to test their merge.
INTERPRETED_LANES, INTERPRETED_SPLITS = 1024, 2


def requested() -> str | OneLaunch:
    """What the environment variable FUSED_KD_PLAN asks for, for experiments: one of the three words, or a launch.

    "cluster=16,warps=8,columns=8" is one program a row, of 16 blocks; "programs=25,warps=8,columns=8" is 25 programs a row.
    """
    return _parsed(os.environ.get(PLAN) or AUTO)


@functools.lru_cache
def _parsed(text: str) -> str | OneLaunch:
    if text in (AUTO, ONE, TWO):
        return text
    found = re.fullmatch(r"(cluster|programs)=(\d+),warps=(\d+),columns=(\d+)", text)
    if found:
        count, num_warps, columns = (int(number) for number in found.groups()[1:])
        ctas, splits = (count, 0) if found[1] == "cluster" else (1, count)
        if count and all(number.bit_count() == 1 for number in (ctas, num_warps, columns)):
            return OneLaunch(ctas, num_warps, 32, columns, splits, 0, 0, 0, hits=False)
    raise ValueError(
        f"{PLAN}: expected {AUTO}, {ONE}, {TWO}, cluster=C,warps=W,columns=K or programs=S,warps=W,columns=K, with C, W "
        f"and K powers of two, got {text!r}"
    )


def device_of(device: torch.device) -> Device | None:
    """What a plan is made for; None for a CPU."""
    return _cuda_device(device) if device.type == "cuda" else None


@functools.lru_cache
def _cuda_device(device: torch.device) -> Device:
    return as_compiled(device_of_properties(torch.cuda.get_device_properties(device)))


def as_compiled(device: Device) -> Device:
    """Return the device without clusters where the Triton at hand does not compile for them."""
    return device._replace(clusters=device.clusters and compiles_clusters())


def compiles_clusters() -> bool:
    """Return whether reductions over the blocks of a cluster compile; up to Triton 3.7 `PlanCTAPass` fails."""
    return triton_release() >= (3, 8)


def triton_release() -> tuple[int, int]:
    """Return major and minor of the Triton at hand."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def is_chosen(
    student: Tensor,  # [..., V'], V' >= vocab_size
    teacher: Tensor | None,
    vocab_size: int,
) -> bool:
    """By what the device's L2 holds; as asked where that is asked for."""
    asked = requested()
    device = device_of(student.device)
    if asked != AUTO or device is None:
        return asked not in (AUTO, TWO)
    return hits(device, vocab_size, [tensor.element_size() for tensor in (student, teacher) if tensor is not None])


def hits(
    device: Device,
    vocab_size: int,
    itemsizes: Sequence[int],  # bytes of a logit of the student, and of the teacher if there is one
) -> bool:
    """Whether the second sweep finds in L2 what the first one has read, of any number of rows that lie anyhow."""
    read, largest = sum(itemsizes), max(itemsizes)
    return one_launch_plan(MANY_ROWS, vocab_size, read, itemsizes[0], device, wide=False, itemsize=largest).hits


def default_one_launch(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V]
    gradient: Tensor,  # [outer, inner, V]; may be the student
    wide: bool,  # rows start at multiples of 16 bytes
    clusters: bool = True,  # whether a cluster may be planned
) -> OneLaunch:
    """As planned for the device, or as asked for."""
    outer, inner, vocabulary = student.shape
    rows = max(1, outer * inner)
    read = [tensor.element_size() for tensor in (student, teacher) if tensor is not None]
    itemsize = max(*read, gradient.element_size())
    device, asked = device_of(student.device), requested()
    if isinstance(asked, OneLaunch):
        return _covering(
            asked._replace(warp_size=32 if device is None else device.warp_size), vocabulary, rows, itemsize
        )
    if device is None:
        columns, splits = 16 // itemsize, INTERPRETED_SPLITS
        lanes = min(INTERPRETED_LANES, max(32, 1 << (vocabulary // (splits * columns)).bit_length()))
        launch = OneLaunch(1, lanes // 32, 32, columns, splits, 0, 0, 0, hits=False)
        return _covering(launch, vocabulary, rows, itemsize)
    written = 0 if _same_memory(gradient, student) else gradient.element_size()
    device = device._replace(clusters=device.clusters and clusters)
    return one_launch_plan(rows, vocabulary, sum(read), written, device, wide, itemsize)


def _covering(launch: OneLaunch, vocabulary: int, rows: int, itemsize: int) -> OneLaunch:
    """With as many columns for a program as cover the vocabulary, and a thread's loaded by 16 bytes."""
    launch = launch._replace(accesses=max(1, launch.columns * itemsize // 16))
    if launch.splits == 0:
        return launch._replace(columns_per_split=vocabulary, rows_in_flight=rows)
    tile = launch.lanes * launch.columns
    columns_per_split = -(-vocabulary // (launch.splits * tile)) * tile
    splits = -(-vocabulary // columns_per_split)
    return launch._replace(splits=splits, columns_per_split=columns_per_split, rows_in_flight=rows)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Also of tensors that have none (fake ones)."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
