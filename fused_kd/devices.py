"""The table of devices: the properties of a GPU from which launches, memory and machine code are planned and judged."""

import re
from typing import NamedTuple

# Two passes take as long as memory needs for 10 bytes per pair.  Programs that share a row are bound by instructions: they
# take the same number of a multiprocessor's cycles per pair on any memory (docs/performance.md).  So sharing pays where the
# nominal bandwidth is below this many bytes per cycle and multiprocessor.  An A100 and an H100 have 13, an H200 has 18, a
# B200 27.
SHARING_BYTES = 16.0

# The share of a vendor's dense rate that large products reach where nobody measured: 0.74 on an H100, 0.70 on an H200.
REACHED = 0.72
# Estimates for a GPU that is not in the table: flop per cycle and multiprocessor by the major compute capability (16-bit
# dense, with float32 sums), and bytes of memory per cycle and multiprocessor.
FLOPS_16 = {7: 1024, 8: 1024, 9: 4096, 10: 8192}
FLOPS_32 = 256
BYTES = 6
CLOCK = 1_700_000  # kHz


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
    memory_bytes: int = 0  # memory of the card at hand; 0: the smallest of memory_gb
    bandwidth: float = 1e12  # nominal bytes per second
    flops_16: float = 1.5e14  # flop per second that large products reach, in bfloat16 or float16
    flops_32: float = 2e13  # the same in float32, as PyTorch multiplies by default: without TF32

    @property
    def memory(self) -> int:
        """Return the bytes of the card's memory."""
        return self.memory_bytes or min(self.memory_gb, default=24) * 10**9

    def rate(self, itemsize: int) -> float:
        """Return the flop per second that large products reach, by the bytes of an operand's element."""
        return {2: self.flops_16, 4: self.flops_32}.get(itemsize, self.flops_32 / 2)


KIB, MIB = 2**10, 2**20
# Rates of products: an H200's is measured (`benchmarks/results/gpu.json`), and an H100's was measured by others.  The rest
# are REACHED of the vendors' dense rates.
DEVICES = {
    "A100": Device(
        108, 40 * MIB, False,
        target="sm_80", shared_bytes=164 * KIB, memory_gb=(40, 80), bandwidth=2.04e12, flops_16=2.25e14, flops_32=1.4e13,
    ),
    "H100": Device(
        132, 50 * MIB, True, l1_bytes=192 * KIB,
        target="sm_90", shared_bytes=228 * KIB, memory_gb=(80,), bandwidth=3.35e12, flops_16=7.28e14, flops_32=4.8e13,
    ),
    # The device reports 60 MiB of L2.  Counted as 50, the second sweep hits: docs/performance.md has the bytes per pair.
    "H200": Device(
        132, 50 * MIB, True, l1_bytes=192 * KIB, sharing=False,
        target="sm_90", shared_bytes=228 * KIB, memory_gb=(141,), bandwidth=4.8e12, flops_16=6.96e14, flops_32=4.8e13,
    ),
    # Clusters are not used: `python -m benchmarks.one_launch` models them as slower than programs that share rows.
    "B200": Device(
        148, 126 * MIB, False, whole=WHOLE_DEEP, sharing=False,
        target="sm_100", shared_bytes=228 * KIB, memory_gb=(192,), bandwidth=8e12, flops_16=1.62e15, flops_32=5.8e13,
    ),
    "L40S": Device(
        142, 96 * MIB, False, threads=1536,
        target="sm_89", memory_gb=(48,), bandwidth=8.64e11, flops_16=2.61e14, flops_32=6.6e13,
    ),
    "RTX 4090": Device(
        128, 72 * MIB, False, threads=1536,
        target="sm_89", memory_gb=(24,), bandwidth=1.008e12, flops_16=1.19e14, flops_32=5.9e13,
    ),
    "L4": Device(
        58, 48 * MIB, False, threads=1536,
        target="sm_89", memory_gb=(24,), bandwidth=3e11, flops_16=8.7e13, flops_32=2.2e13,
    ),
    # The L2 bytes are those of the cache behind the L2 caches of the dies (Infinity Cache).
    "MI300X": Device(
        304, 256 * MIB, False, warp_size=64, registers=131072, shared=SHARED._replace(registers=80),
        shared_two_sweeps=Shape(1, 16, 128),  # with 32 columns the compiler spills
        target="gfx942", shared_bytes=64 * KIB, memory_gb=(192,), bandwidth=5.3e12, flops_16=9.4e14, flops_32=1.17e14,
    ),
}  # fmt: skip


def cards() -> list[tuple[int, str]]:
    """Return the memory, in GB, and the device's name of each known card, the smallest memory first."""
    return sorted((size, name) for name, device in DEVICES.items() for size in device.memory_gb)


def device_of_name(device: str | Device | None) -> Device | None:
    """Return the known device with that name; a `Device` and None are returned unchanged.

    Raises:
        ValueError: no device of the table has that name.
    """
    if not isinstance(device, str):
        return device
    if device not in DEVICES:
        raise ValueError(f"device: expected a Device, or one of {', '.join(DEVICES)}, got {device!r}")
    return DEVICES[device]


def device_of_target(target: str) -> Device:
    """Return the first known device with that compilation target; for an unknown target, a device with usual figures."""
    is_amd = target.startswith("gfx")
    registers, warp_size = (131072, 64) if is_amd else (65536, 32)
    usual = Device(108, 4 * MIB, False, warp_size, registers, threads=1536, target=target)
    return next((device for device in DEVICES.values() if device.target == target), usual)


def device_of_properties(properties: object) -> Device:
    """Return the device that PyTorch's properties describe, with usual figures if it is not in the table.

    The number of multiprocessors and the memory are always the device's own, since variants share a name (PCIe cards, MIG
    slices).
    """
    processors = properties.multi_processor_count  # type: ignore[attr-defined]
    l2_bytes = getattr(properties, "L2_cache_size", 0)
    memory_bytes = getattr(properties, "total_memory", 0)
    bandwidth = _bandwidth(properties)
    for name, known in DEVICES.items():
        if re.search(rf"{name}(?!\w)", properties.name):  # type: ignore[attr-defined]  # "L4" must not match an L40
            share = min(1.0, processors / known.processors)  # a slice of a device has a slice of its cache and rates
            return known._replace(
                processors=processors, l2_bytes=min(known.l2_bytes, l2_bytes or int(share * known.l2_bytes)),
                memory_bytes=memory_bytes, bandwidth=min(share * known.bandwidth, bandwidth or known.bandwidth),
                flops_16=share * known.flops_16, flops_32=share * known.flops_32,
            )  # fmt: skip
    is_amd = getattr(properties, "gcnArchName", "") != ""
    cycles = 1000 * (getattr(properties, "clock_rate", 0) or CLOCK) * processors
    return Device(
        processors,
        l2_bytes or 4 * MIB,
        clusters=not is_amd and properties.major == 9,  # type: ignore[attr-defined]
        warp_size=getattr(properties, "warp_size", 32),
        registers=131072 if is_amd else 65536,
        threads=getattr(properties, "max_threads_per_multi_processor", 1536),
        sharing=bandwidth / cycles < SHARING_BYTES,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth or BYTES * cycles,
        flops_16=REACHED * (1024 if is_amd else FLOPS_16.get(getattr(properties, "major", 0), 1024)) * cycles,
        flops_32=REACHED * FLOPS_32 * cycles,
    )


def _bandwidth(properties: object) -> float:
    """Return the nominal memory bandwidth in bytes per second; 0 if PyTorch does not say."""
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return float(2 * 1000 * clock * width / 8)
