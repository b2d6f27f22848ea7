"""How a kernel is launched: threads and columns of a tile, and over how many programs a row is split."""

import functools
import math
from typing import NamedTuple

import torch

from ...logit_map import LogitMap
from .tiles import CAPPED, IDENTITY, SCALED


class Launch(NamedTuple):
    lanes: int  # threads of a program; each holds a tuple of statistics
    columns: int  # K, columns a thread
    num_warps: int
    splits: int  # S, programs a row
    columns_per_split: int  # a multiple of lanes * columns, but for what the last split lacks

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's.  Fused multiply-adds are counted on, and newer versions of Triton leave them apart by default."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


class Temperature(NamedTuple):
    """What the kernels take in place of T."""

    exp2_scale: float  # log2(e) / T
    inverse: float  # 1 / T
    power: int  # T if it is 1, 2, 3 or 4, else 0: see `formulas.exponentials`


def temperature_arguments(temperature: float) -> Temperature:
    power = int(temperature) if temperature in (1, 2, 3, 4) else 0
    return Temperature(math.log2(math.e) / temperature, 1 / temperature, power)


class MapArguments(NamedTuple):
    """What the kernels take in place of a `LogitMap`: see `formulas.logits_of`."""

    factor: float
    cap: float
    kind: int  # IDENTITY, SCALED or CAPPED


def map_arguments(logit_map: LogitMap) -> MapArguments:
    if logit_map.is_capped:
        return MapArguments(logit_map.scale / logit_map.softcap, logit_map.softcap, CAPPED.value)
    return MapArguments(logit_map.scale, 1.0, (IDENTITY if logit_map.is_identity else SCALED).value)


NUM_WARPS = 4
# 40 registers a thread leave room for 12 programs of 4 warps on a multiprocessor, 48 leave room for 10.
RESIDENT_PROGRAMS = 10
MIN_TILES_PER_SPLIT = 4  # below this, starting a program and merging its tuple cost as much as its sweep


@functools.lru_cache
def _processors_and_warp_size(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "warp_size", 32)


def plan(rows: int, vocabulary: int, itemsize: int, processors: int, warp_size: int = 32) -> Launch:
    """One program a row, or several where the rows alone would not fill the chip twice.

    Args:
        rows, vocabulary: N and V.
        itemsize: bytes of an element; a thread takes 16 bytes of such.
        processors: multiprocessors of the device.
        warp_size: threads of a warp (64 on AMD's CDNA).
    """
    lanes, columns = NUM_WARPS * warp_size, 16 // itemsize
    tile = lanes * columns
    tiles = -(-vocabulary // tile)
    wanted = -(-2 * processors * RESIDENT_PROGRAMS // rows)
    splits = max(1, min(wanted, tiles // MIN_TILES_PER_SPLIT))
    columns_per_split = -(-tiles // splits) * tile
    return Launch(lanes, columns, NUM_WARPS, -(-vocabulary // columns_per_split), columns_per_split)


def is_wide(*tensors: torch.Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, as far as Triton can know: by strides that are multiples of 16."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def default_launch(student: torch.Tensor, itemsize: int) -> Launch:
    """The launch for logits `[outer, inner, V]`."""
    outer, inner, vocabulary = student.shape
    if not student.is_cuda:  # interpreted; wide tiles, since an operation costs the same in Python whatever its size
        return Launch(1024, 16 // itemsize, NUM_WARPS, 1, vocabulary)
    processors, warp_size = _processors_and_warp_size(student.device)
    return plan(max(1, outer * inner), vocabulary, itemsize, processors, warp_size)
