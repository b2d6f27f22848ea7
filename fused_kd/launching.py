"""The choice of the launch: planned for the device, or as `launching` or the environment variable FUSED_KD_PLAN asks.

Two passes take the statistics in forward and the gradient in backward.  They serve a loss without a gradient, reduction
"none" and a teacher that learns.  They also serve devices whose L2 is too small, or whose memory is about as fast as L2 (an
H200).  A CPU takes one pass.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .devices import Device, device_of_name, device_of_properties
from .launch import NUM_WARPS, Launch, SinglePass, best_single_pass, is_faster, two_passes

VARIABLE = "FUSED_KD_PLAN"
AUTO, ONE, TWO = "auto", "one-launch", "two-launches"
# Under the interpreter an operation costs the same whatever its size, so tiles are wide.  There are several programs per
# row, so that their merge is tested.
INTERPRETED_LANES, INTERPRETED_SPLITS = 1024, 2


class Asked(NamedTuple):
    """The launch and the device that one `launching` block asks for."""

    launch: str | SinglePass | None = None  # None: as the enclosing `launching`, or the variable, asks
    device: Device | None = None  # None: the device of the enclosing `launching`, or of the tensors


# The open `launching` blocks, the innermost last.  They hold for all threads, as the variable does, since PyTorch runs the
# backward passes of CUDA tensors in threads of its own.
_asked: list[Asked] = []


@contextlib.contextmanager
def launching(launch: str | None = None, *, device: str | Device | None = None) -> Iterator[None]:
    """Take the given launch instead of the one that FUSED_KD_PLAN asks for, and plan for the given device.

    `launch` is text as FUSED_KD_PLAN takes it.  `device` is a name from `devices.DEVICES`, or a `Device`, and stands in for
    the device of the tensors.  Blocks nest: an inner block overrides only the arguments that it is given.
    """
    asked = Asked(None if launch is None else _parsed(launch, "launch"), device_of_name(device))
    _asked.append(asked)
    try:
        yield
    finally:
        # By identity: another thread may have opened an equal block since.
        del _asked[next(i for i in reversed(range(len(_asked))) if _asked[i] is asked)]


def requested() -> str | SinglePass:
    """Return the launch that `launching` or the environment variable FUSED_KD_PLAN asks for.

    It is "auto", "one-launch", "two-launches" or a `SinglePass`.  The text "cluster=16,warps=8,columns=8" asks for one
    cluster of 16 blocks per row, and "programs=25,warps=8,columns=8" for 25 programs per row.
    """
    for asked in reversed(_asked):
        if asked.launch is not None:
            return asked.launch
    return _parsed_variable(os.environ.get(VARIABLE) or AUTO)


@functools.lru_cache
def _parsed_variable(text: str) -> str | SinglePass:
    return _parsed(text, VARIABLE)


def _parsed(text: str, name: str) -> str | SinglePass:
    if text in (AUTO, ONE, TWO):
        return text
    found = re.fullmatch(r"(cluster|programs)=(\d+),warps=(\d+),columns=(\d+)", text)
    if found:
        count, num_warps, columns = (int(number) for number in found.groups()[1:])
        ctas, splits = (count, 0) if found[1] == "cluster" else (1, count)
        if count and all(number.bit_count() == 1 for number in (ctas, num_warps, columns)):
            return SinglePass(ctas, num_warps, 32, columns, splits, 0, 0)
    raise ValueError(
        f"{name}: expected {AUTO}, {ONE}, {TWO}, cluster=C,warps=W,columns=K or programs=S,warps=W,columns=K, with C, W "
        f"and K powers of two, got {text!r}"
    )


def device_of(device: torch.device) -> Device | None:
    """Return the device that a launch is planned for; None for a CPU."""
    for asked in reversed(_asked):
        if asked.device is not None:
            return asked.device
    return _cuda_device(device) if device.type == "cuda" else None


@functools.lru_cache
def _cuda_device(device: torch.device) -> Device:
    return as_compiled(device_of_properties(torch.cuda.get_device_properties(device)))


def as_compiled(device: Device) -> Device:
    """Return the device, without clusters if the installed Triton cannot compile for them."""
    return device._replace(clusters=device.clusters and compiles_clusters())


def compiles_clusters() -> bool:
    """Return whether Triton compiles reductions over the blocks of a cluster.  Up to 3.7 its `PlanCTAPass` fails."""
    return triton_release() >= (3, 8)


def triton_release() -> tuple[int, int]:
    """Return the major and minor version of the installed Triton."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


def single_pass(
    student: Tensor,  # [outer, inner, V'], V' >= V
    teacher: Tensor | None,  # [outer', inner', V]
    vocab_size: int | None = None,  # V; None: V'
    *,
    in_place: bool,  # the gradient overwrites the student
    clusters: bool = True,  # whether a cluster may be planned
    sweeps: int = 1,  # sweeps of statistics that the divergence takes
    always: bool = False,  # whether a single pass is taken even where two passes are faster
) -> SinglePass | None:
    """Return the launch of a single pass, as planned for the device or as asked for; None for two passes."""
    asked, device = requested(), device_of(student.device)
    if asked == TWO or (asked == AUTO and device is None and not always):
        return None
    outer, inner, columns = student.shape
    rows, vocabulary = max(1, outer * inner), vocab_size or columns
    read = [tensor.element_size() for tensor in (student, teacher) if tensor is not None]
    if asked == AUTO and not always and device is not None and not is_faster(device, vocabulary, read, sweeps):
        return None
    if isinstance(asked, SinglePass) or device is None:
        # Under Triton's interpreter a bfloat16 gradient is written in float32; see `roundable`.
        itemsize = max(*read, 4 if device is None and student.dtype == torch.bfloat16 else 0)
        if not isinstance(asked, SinglePass):
            per_thread, splits = 16 // itemsize, INTERPRETED_SPLITS
            lanes = min(INTERPRETED_LANES, max(32, 1 << (vocabulary // (splits * per_thread)).bit_length()))
            asked = SinglePass(1, lanes // 32, 32, per_thread, splits, 0, 0)
        warp_size = 32 if device is None else device.warp_size
        return _covering(asked._replace(warp_size=warp_size), vocabulary, itemsize)
    written = 0 if in_place else student.element_size()
    aligned = in_place or columns % 16 == 0  # the rows of a new gradient
    wide = aligned and is_wide(*(tensor for tensor in (student, teacher) if tensor is not None))
    device = device._replace(clusters=device.clusters and clusters)
    return best_single_pass(rows, vocabulary, sum(read), written, device, wide, max(read), sweeps).launch


def is_wide(*tensors: Tensor) -> bool:
    """Return whether Triton can know that every row starts at a multiple of 16 bytes.

    Triton specialises on strides that are multiples of 16 elements.
    """
    try:
        return all(
            tensor.stride(-1) == 1
            and (isinstance(tensor, FakeTensor) or tensor.data_ptr() % 16 == 0)
            and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
            for tensor in tensors
        )
    except RuntimeError:  # a tensor under a transform of torch.func has no address
        return False


def _covering(launch: SinglePass, vocabulary: int, itemsize: int) -> SinglePass:
    """Return the launch with programs that cover the vocabulary, and loads of 16 bytes."""
    accesses = max(1, launch.columns * itemsize // 16)
    if launch.splits == 0:
        return launch._replace(columns_per_split=vocabulary, accesses=accesses)
    tile = launch.lanes * launch.columns
    columns_per_split = -(-vocabulary // (launch.splits * tile)) * tile
    splits = -(-vocabulary // columns_per_split)
    return launch._replace(splits=splits, columns_per_split=columns_per_split, accesses=accesses)


def default_launch(student: Tensor, itemsize: int) -> Launch:
    """Return the launch of a kernel of two passes for logits `[outer, inner, V]`."""
    outer, inner, vocabulary = student.shape
    if not student.is_cuda:  # interpreted: wide tiles, see INTERPRETED_LANES
        return Launch(1024, 16 // itemsize, NUM_WARPS, 1, vocabulary)
    device = _cuda_device(student.device)
    return two_passes(max(1, outer * inner), vocabulary, itemsize, device.processors, device.warp_size)
