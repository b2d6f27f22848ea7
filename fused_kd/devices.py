"""The table of devices: the properties of a GPU from which launches, memory and machine code are planned and judged."""

import re
from typing import NamedTuple

# Two passes take as long as memory needs for 10 bytes per pair.  Programs that share a row are bound by instructions: they
# take the same number of a multiprocessor's cycles per pair on any memory (docs/performance.md).  So sharing pays where the
# nominal bandwidth is below this many bytes per cycle and multiprocessor.  An A100 and an H100 have 13, an H200 has 18, a
# B200 27.
SHARING_BYTES = 16.0


class Shape(NamedTuple):
    """The warps and columns of a program, and the registers per thread that it needs.

    The registers are those of Triton 3.8 in bfloat16 at T = 2 and 3, rounded up to a multiple of 8
    (`python -m benchmarks.static_profile`).  With more registers a multiprocessor would hold fewer programs, so that fewer
    rows would be in flight.
    """

    num_warps: int
    columns: int  # K, columns per thread, of bfloat16
    registers: int

    @property
    def accesses(self) -> int:
        """Return the number of loads of 16 bytes in which a thread takes its columns."""
        return self.columns // 8

    def columns_of(self, itemsize: int) -> int:
        """Return K for elements of `itemsize` bytes, with the same number of loads."""
        return 16 * self.accesses // itemsize


# One program per row.  A thread has one load of each input in flight.  It has two where the bandwidth per multiprocessor is
# twice that of an H100 (WHOLE_DEEP).
WHOLE = tuple(Shape(num_warps, 8, 48) for num_warps in (1, 2, 4, 8))
WHOLE_DEEP = tuple(Shape(num_warps, 16, 64) for num_warps in (1, 2, 4))
CLUSTER = Shape(8, 8, 48)  # each block of a cluster
CTAS = (2, 4, 8, 16)
# Several programs per row.  A thread has two loads of each input in flight, and those of the next tile.  With 16 columns
# per thread the tuple moves to new maxima half as often as with 8, and 2 warps reduce in fewer instructions than 4.
# `python -m benchmarks.one_launch` models the times.
SHARED = Shape(2, 16, 64)

# The same with two sweeps of statistics.  A program does more once per slice, so slices are longer: fewer threads are
# resident, and each has more columns.  One warp needs no barrier to reduce.
SHARED_TWO_SWEEPS = Shape(1, 32, 128)


class Device(NamedTuple):
    """A GPU as far as launches, memory and machine code depend on it."""

    processors: int  # multiprocessors
    l2_bytes: int
    clusters: bool  # whether clusters are launched; sm_90 and later have them
    warp_size: int = 32
    registers: int = 65536  # registers of 4 bytes per multiprocessor
    threads: int = 2048  # resident threads per multiprocessor
    l1_bytes: int = 0  # L1 per multiprocessor, as far as it is counted on
    sharing: bool = True  # whether programs that share rows are faster than two passes; see SHARING_BYTES
    whole: tuple[Shape, ...] = WHOLE
    shared: Shape = SHARED
    shared_two_sweeps: Shape = SHARED_TWO_SWEEPS
    target: str = ""  # Triton's compilation target, such as sm_90 or gfx942
    shared_bytes: int = 102_400  # shared memory per multiprocessor
    memory_gb: tuple[int, ...] = ()  # nominal memory of the cards with this GPU


KIB, MIB = 2**10, 2**20
DEVICES = {
    "A100": Device(108, 40 * MIB, False, target="sm_80", shared_bytes=164 * KIB, memory_gb=(40, 80)),
    "H100": Device(132, 50 * MIB, True, l1_bytes=192 * KIB, target="sm_90", shared_bytes=228 * KIB, memory_gb=(80,)),
    # The device reports 60 MiB of L2.  Counted as 50, the second sweep hits: docs/performance.md has the bytes per pair.
    "H200": Device(
        132, 50 * MIB, True, l1_bytes=192 * KIB, sharing=False,
        target="sm_90", shared_bytes=228 * KIB, memory_gb=(141,),
    ),
    # Clusters are not used: `python -m benchmarks.one_launch` models them as slower than programs that share rows.
    "B200": Device(
        148, 126 * MIB, False, whole=WHOLE_DEEP, sharing=False,
        target="sm_100", shared_bytes=228 * KIB, memory_gb=(192,),
    ),
    "L40S": Device(142, 96 * MIB, False, threads=1536, target="sm_89", memory_gb=(48,)),
    "RTX 4090": Device(128, 72 * MIB, False, threads=1536, target="sm_89", memory_gb=(24,)),
    "L4": Device(58, 48 * MIB, False, threads=1536, target="sm_89", memory_gb=(24,)),
    # The L2 bytes are those of the cache behind the L2 caches of the dies (Infinity Cache).
    "MI300X": Device(
        304, 256 * MIB, False, warp_size=64, registers=131072, shared=SHARED._replace(registers=80),
        shared_two_sweeps=Shape(1, 16, 128),  # with 32 columns the compiler spills
        target="gfx942", shared_bytes=64 * KIB, memory_gb=(192,),
    ),
}  # fmt: skip


def cards() -> dict[int, str]:
    """Return a dictionary from the memory of a card, in GB, to the names of the known devices that have it."""
    sizes = sorted({size for device in DEVICES.values() for size in device.memory_gb})
    return {size: ", ".join(name for name, device in DEVICES.items() if size in device.memory_gb) for size in sizes}


def device_of_target(target: str) -> Device:
    """Return the first known device with that compilation target; for an unknown target, a device with usual figures."""
    is_amd = target.startswith("gfx")
    registers, warp_size = (131072, 64) if is_amd else (65536, 32)
    usual = Device(108, 4 * MIB, False, warp_size, registers, threads=1536, target=target)
    return next((device for device in DEVICES.values() if device.target == target), usual)


def device_of_properties(properties: object) -> Device:
    """Return the device that PyTorch's properties describe, with usual figures if it is not in the table.

    The number of multiprocessors is always the device's own, since variants share a name (PCIe cards, MIG slices).
    """
    processors = properties.multi_processor_count  # type: ignore[attr-defined]
    l2_bytes = getattr(properties, "L2_cache_size", 0)
    for name, known in DEVICES.items():
        if re.search(rf"{name}(?!\w)", properties.name):  # type: ignore[attr-defined]  # "L4" must not match an L40
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
        sharing=_bytes_per_cycle(properties) < SHARING_BYTES,
    )


def _bytes_per_cycle(properties: object) -> float:
    """Return the nominal memory bandwidth in bytes per cycle and multiprocessor; 0 if PyTorch does not say."""
    memory_clock, clock = (getattr(properties, name, 0) for name in ("memory_clock_rate", "clock_rate"))
    width = getattr(properties, "memory_bus_width", 0) / 8
    return 2 * memory_clock * width / (clock * properties.multi_processor_count) if clock else 0.0  # type: ignore[attr-defined]
