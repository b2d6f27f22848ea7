"""How the one-launch kernel (`loss_and_gradient.py`) is launched, so that the rows in flight stay in L2.

A row is read from memory by its first sweep and from L2 by its second, unless too much was touched in between: the pairs
of all rows in flight, and what of their gradients was written since, at most all of them again.  Of the nominal L2 half is
counted on: the caches of the A100, H100 and B200 are two partitions, and data that both read is kept in both.

Rows in flight are the programs that are resident, over the programs a row; registers decide how many are resident.
"""

import functools
import math
from typing import NamedTuple

L2_SHARE = 0.5
# What L2 has to hold may be a little over that share: it is an upper bound, and a step less is a program's work less,
# against what it does once.
SLACK = 1.05
L1_SAVES = 0.8  # on an H100 41 rows of 513 KB, half of them in L1, hit in 26 MB
RESIDENT = 32  # programs that a multiprocessor holds, whatever their size
# Of `OneLaunch.work`: on an H100, T = 3, instructions take longer than memory from 1.6 on.
ENOUGH = 1.6
FILLED = 0.5  # the share of the programs that a device can hold that keep its memory busy
ONCE = 2.0  # tiles that the start of a program, or of a cluster, and its reductions are worth
SHARED_ONCE, SHARED_OF_ROW = 0.6, 4.0  # the same of a program that shares a row, and of a row's merge


class Shape(NamedTuple):
    """Threads and columns of a program, and the registers per thread that Triton 3.8 compiles it to (T = 2 and 3, bf16).

    The fewest, in steps of 8: with more a multiprocessor holds fewer programs, and fewer rows are in flight.
    """

    num_warps: int
    columns: int  # K, of bfloat16
    registers: int

    @property
    def accesses(self) -> int:
        """Of 16 bytes each, by which a thread loads its columns."""
        return self.columns // 8

    def columns_of(self, itemsize: int) -> int:
        """K of elements of so many bytes, in as many accesses."""
        return 16 * self.accesses // itemsize


# One program a row.  With two loads in flight of each input a thread where a multiprocessor has twice the bandwidth of an
# H100's: a B200, T = 3, V = 8 192, takes 1.34 of the floor's time, with one 1.93.
WHOLE = tuple(Shape(num_warps, 8, 48) for num_warps in (1, 2, 4, 8))
WHOLE_DEEP = tuple(Shape(num_warps, 16, 64) for num_warps in (1, 2, 4))
CLUSTER = Shape(8, 8, 48)  # of each of its blocks
CTAS = (2, 4, 8, 16)
# Two loads in flight of each input a thread, and those of the next tile; the tuple moves to new maxima half as often.  And
# 2 warps reduce in half of one instruction a pair less than 4.  Modelled for an H100, T = 3, V = 32 001 / 50 304 / 262 144:
# 1.04 / 1.01 / 1.03 of the floor's time; as 8 warps and 8 columns 1.38 / 1.14 / 1.03.
SHARED = Shape(2, 16, 64)


class Device(NamedTuple):
    processors: int
    l2_bytes: int
    clusters: bool  # whether the cluster form is launched; sm_90 and later have clusters
    warp_size: int = 32
    registers: int = 65536  # of a multiprocessor, of 4 bytes and one thread
    threads: int = 2048  # resident on a multiprocessor
    l1_bytes: int = 0  # of a multiprocessor, as far as it is counted on
    whole: tuple[Shape, ...] = WHOLE
    shared: Shape = SHARED


MIB = 2**20
DEVICES = {
    "A100": Device(108, 40 * MIB, False),
    "H100": Device(132, 50 * MIB, True, l1_bytes=192 * 1024),
    "H200": Device(132, 50 * MIB, True, l1_bytes=192 * 1024),
    # Modelled, V = 128 256: as a cluster 1.9 of the floor's time, shared 1.3.
    "B200": Device(148, 126 * MIB, False, whole=WHOLE_DEEP),
    "L40S": Device(142, 96 * MIB, False, threads=1536),
    "RTX 4090": Device(128, 72 * MIB, False, threads=1536),
    # Its cache is the one behind its L2s.
    "MI300X": Device(304, 256 * MIB, False, warp_size=64, registers=131072, shared=SHARED._replace(registers=80)),
}


class OneLaunch(NamedTuple):
    ctas: int  # blocks of a cluster
    num_warps: int  # of a block
    warp_size: int
    columns: int  # K, columns a thread
    splits: int  # S, programs a row that merge through global memory; 0: one program a row, a cluster
    columns_per_split: int  # a multiple of lanes * columns, but for what the last split lacks
    rows_in_flight: int
    bytes_in_flight: int  # what L2 has to hold for the second sweep to hit
    hits: bool  # whether it does, by half of its nominal capacity
    accesses: int = 1  # of 16 bytes each, by which a thread loads its columns
    work: float = 0.0  # an estimate: instructions over those of the columns alone, times what few rows leave idle

    @property
    def lanes(self) -> int:
        return self.ctas * self.num_warps * self.warp_size

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's; see `launch.Launch.options`."""
        return {"num_warps": self.num_warps, "num_ctas": self.ctas, "enable_fp_fusion": True}


def resident_programs(device: Device, shape: Shape) -> int:
    """Blocks of that shape that a multiprocessor holds; registers are dealt out to warps by 256."""
    threads = shape.num_warps * device.warp_size
    of_warp = -(-shape.registers * device.warp_size // 256) * 256
    return max(1, min(RESIDENT, device.threads // threads, device.registers // of_warp // shape.num_warps))


class Row(NamedTuple):
    vocabulary: int
    pair_bytes: int  # read
    swept_bytes: int  # read and written
    itemsize: int  # of a thread's widest tensor


@functools.lru_cache  # 15 microseconds, twice a loss
def one_launch_plan(
    rows: int,
    vocabulary: int,
    read_itemsize: int,  # bytes of a pair of logits
    written_itemsize: int,  # bytes of an element of the gradient; 0 if it takes the student's place
    device: Device,
    wide: bool = True,  # rows start at multiples of 16 bytes
    itemsize: int = 2,  # bytes of an element of a thread's widest tensor, which takes 16 bytes of it at once
) -> OneLaunch:
    """One program a row, or one cluster, if that is in L2 and has little to do but its columns; else several programs.

    Modelled for an H100, T = 3, V from 8 192 on, each takes 1.00 to 1.05 of the floor's time where it is planned.  A
    program or cluster needs no memory and waits for nobody.  But programs of whole rows are too many rows in flight where
    these are long, and so are clusters of 16 blocks at V above 150 000.  And its last tile takes as long with few columns
    as with all: where blocks of a cluster have 3.1 tiles, at V = 50 304 and 100 352, it is 1.30 of that time.
    """
    row = Row(vocabulary, vocabulary * read_itemsize, vocabulary * (read_itemsize + written_itemsize), itemsize)
    plans = [_of_whole_rows(rows, row, device, shape, 1) for shape in device.whole]
    if device.clusters and wide:
        plans += [_of_whole_rows(rows, row, device, CLUSTER, ctas) for ctas in CTAS]
    shared = _of_shared_rows(rows, row, device)
    hitting = [plan for plan in (*plans, shared) if plan.hits]
    enough = [plan for plan in hitting if plan.work <= ENOUGH]
    return (enough or sorted(hitting, key=lambda plan: plan.work) or [shared])[0]


def _of_whole_rows(rows: int, row: Row, device: Device, shape: Shape, ctas: int) -> OneLaunch:
    """A program, or a cluster of several blocks, for each row."""
    columns, resident = shape.columns_of(row.itemsize), resident_programs(device, shape)
    tiles = row.vocabulary / (ctas * shape.num_warps * device.warp_size * columns)
    in_flight = min(rows, max(1, device.processors * resident // ctas))
    idle = _idle(device.processors * resident, rows * ctas)
    # Its threads sweep the same columns twice, and find part of them in L1 where that holds the pairs in flight there.
    in_l1 = row.pair_bytes / ctas * resident <= device.l1_bytes
    size = int(in_flight * (max(row.pair_bytes, L1_SAVES * row.swept_bytes) if in_l1 else row.swept_bytes))
    return OneLaunch(
        ctas, shape.num_warps, device.warp_size, columns, 0, row.vocabulary, in_flight, size, _hits(size, device),
        accesses=shape.accesses, work=idle * (math.ceil(tiles) + ONCE) / tiles,
    )  # fmt: skip


def _of_shared_rows(rows: int, row: Row, device: Device) -> OneLaunch:
    """As few programs a row as leave few enough rows in flight, and fill the device."""
    shape = device.shared
    columns, resident = shape.columns_of(row.itemsize), device.processors * resident_programs(device, shape)
    tile = shape.num_warps * device.warp_size * columns
    tiles = -(-row.vocabulary // tile)
    splits = math.ceil(max(resident * row.swept_bytes / (SLACK * L2_SHARE * device.l2_bytes), FILLED * resident / rows))
    # The most whole tiles a program that make at least so many programs.
    tiles_per_split = tiles if splits == 1 else max(1, -(-tiles // (splits - 1)) - 1)
    splits = -(-tiles // tiles_per_split)
    in_flight = min(rows, max(1, resident // splits))
    size = in_flight * row.swept_bytes
    return OneLaunch(
        1, shape.num_warps, device.warp_size, columns, splits, tiles_per_split * tile, in_flight, size,
        _hits(size, device), accesses=shape.accesses,
        work=_idle(resident, rows * splits) * (tiles + SHARED_ONCE * splits + SHARED_OF_ROW) * tile / row.vocabulary,
    )  # fmt: skip


def _idle(resident: int, programs: int) -> float:
    return max(1.0, FILLED * resident / programs)


def _hits(size: int, device: Device) -> bool:
    return size <= SLACK * L2_SHARE * device.l2_bytes


def device_of_properties(properties: object) -> Device:
    """The processors are always the device's own: there are variants of one name (PCIe cards, MIG slices)."""
    processors = properties.multi_processor_count  # type: ignore[attr-defined]
    l2_bytes = getattr(properties, "L2_cache_size", 0)
    for name, known in DEVICES.items():
        if name in properties.name:  # type: ignore[attr-defined]
            share = min(1.0, processors / known.processors)  # a slice of a device has a slice of its cache
            return known._replace(
                processors=processors, l2_bytes=min(known.l2_bytes, l2_bytes or int(share * known.l2_bytes))
            )
    is_amd = getattr(properties, "gcnArchName", "") != ""
    return Device(
        processors,
        l2_bytes or 4 * MIB,
        clusters=not is_amd and properties.major == 9,  # type: ignore[attr-defined]
        warp_size=getattr(properties, "warp_size", 32),
        registers=131072 if is_amd else 65536,
        threads=getattr(properties, "max_threads_per_multi_processor", 1536),
    )
