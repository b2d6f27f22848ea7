"""How the one-launch kernel (`loss_and_gradient.py`) is launched, so that the rows in flight stay in L2.

A row is read from memory by its first sweep and from L2 by its second, unless too much was touched in between: the pairs
of all rows in flight, and what of their gradients was written since, at most all of them again.  Of the nominal L2 half is
counted on: the caches of the A100, H100 and B200 are two partitions, and data that both read is kept in both.

Rows in flight are the programs that are resident, over the programs a row; registers decide how many are resident.
"""

import math
from typing import NamedTuple

L2_SHARE = 0.5
# A cluster's blocks sweep the same columns twice, and find part of them in L1 where it holds what is in flight on the
# multiprocessor: on an H100 41 rows of 513 KB hit in 26 MB.
L1_BYTES, L1_SAVES = 192 * 1024, 0.8
MAX_CTAS = 16
MIN_TILES = 3  # of a program, or a block of a cluster: below, reductions and starts cost as much as the sweeps


class Shape(NamedTuple):
    """Of a program, and the most registers a thread that it compiles to (T = 2 and 3, bf16)."""

    num_warps: int
    columns: int  # K
    registers: int


CLUSTER = Shape(8, 8, 48)
SHARED = Shape(8, 8, 48)
# Two loads in flight of each input a thread, and those of the next tile; the tuple moves to new maxima half as often.
# Where instructions bind most (B200, 37 to 38 a pair): 2 warps reduce in half of one less than 4.
SHARED_DEEP = Shape(2, 16, 72)


class Device(NamedTuple):
    processors: int
    l2_bytes: int
    clusters: bool  # whether the cluster form is launched; sm_90 and later have clusters
    warp_size: int = 32
    registers: int = 65536  # of a multiprocessor, of 4 bytes and one thread
    threads: int = 2048  # resident on a multiprocessor
    shared: Shape = SHARED_DEEP  # the better one by the simulator's model, for the form of that name


MIB = 2**20
DEVICES = {
    "A100": Device(108, 40 * MIB, False),
    "H100": Device(132, 50 * MIB, True, shared=SHARED),
    "H200": Device(132, 50 * MIB, True, shared=SHARED),
    # Modelled, V = 128 256: as a cluster 1.9 of the floor's time, shared 1.3.
    "B200": Device(148, 126 * MIB, False, shared=SHARED_DEEP._replace(registers=64)),
    "L40S": Device(142, 96 * MIB, False, threads=1536),
    "RTX 4090": Device(128, 72 * MIB, False, threads=1536),
    "MI300X": Device(  # its cache is the one behind its L2s
        304, 256 * MIB, False, warp_size=64, registers=131072, shared=SHARED_DEEP._replace(registers=96)
    ),
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
    return max(1, min(device.threads // threads, device.registers // of_warp // shape.num_warps))


def one_launch_plan(
    rows: int,
    vocabulary: int,
    read_itemsize: int,  # bytes of a pair of logits
    written_itemsize: int,  # bytes of an element of the gradient; 0 if it takes the student's place
    device: Device,
    wide: bool = True,  # rows start at multiples of 16 bytes
    itemsize: int = 2,  # bytes of an element of a thread's widest tensor, which takes 16 bytes of it at once
) -> OneLaunch:
    """A cluster a row where 8 warps a block keep few enough rows in flight, else enough programs a row that they are few.

    Modelled for an H100, T = 2 and 3, both take 1.00 to 1.05 of the floor's time.  The cluster needs no memory and nobody
    waits; but it is of at most 16 blocks, which at V above 150 000 leaves too many rows in flight.
    """
    l2 = L2_SHARE * device.l2_bytes
    pair = vocabulary * read_itemsize
    swept = vocabulary * (read_itemsize + written_itemsize)
    scale = 2 / itemsize  # K columns of 16 bytes

    if device.clusters and wide:
        columns = max(1, int(CLUSTER.columns * scale))
        tiles = vocabulary / (CLUSTER.num_warps * device.warp_size * columns)
        ctas = min(MAX_CTAS, 2 ** max(0, math.floor(math.log2(max(1.0, tiles / MIN_TILES)))))
        resident = max(1, device.processors * resident_programs(device, CLUSTER) // ctas)
        in_flight = min(rows, resident)
        in_l1 = pair / ctas * resident_programs(device, CLUSTER) <= L1_BYTES
        size = int(in_flight * (max(pair, L1_SAVES * swept) if in_l1 else swept))
        if size <= l2:
            return OneLaunch(
                ctas, CLUSTER.num_warps, device.warp_size, columns, 0, vocabulary, in_flight, size, hits=True
            )

    shape = device.shared
    columns = max(1, int(shape.columns * scale))
    tile = shape.num_warps * device.warp_size * columns
    tiles = -(-vocabulary // tile)
    resident = device.processors * resident_programs(device, shape)
    fitting = max(1, int(l2 // swept))
    splits = min(tiles, -(-resident // fitting))
    # A little over the share of L2 rather than a tile less: whatever a program does once counts against its tiles.
    tiles_per_split = int(tiles / splits + 0.1)
    splits = -(-tiles // tiles_per_split)
    in_flight = min(rows, round(resident / splits))
    size = in_flight * swept
    return OneLaunch(
        1, shape.num_warps, device.warp_size, columns, splits, tiles_per_split * tile, in_flight, size, size <= 1.1 * l2,
        accesses=max(1, columns * itemsize // 16),
    )  # fmt: skip


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
