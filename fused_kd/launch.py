"""The launches of all kernels: threads and columns per program, and programs per row, planned from device and shape.

A single pass reads each row from memory in its first sweep.  Its second sweep finds the row in L2 if L2 holds the pairs of
all rows in flight and their gradients.  The plan counts on half of the nominal L2: the caches of the A100, H100 and B200
have two partitions, and keep data that both partitions read in both of them.

The number of rows in flight is the number of resident programs divided by the programs per row.  Registers decide how many
programs are resident.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from .devices import CLUSTER, CTAS, Device, Shape

L2_SHARE = 0.5
# The bytes in flight may exceed that share a little, since they are an upper bound, and a larger number of programs per row
# costs time: each program has less to sweep, and the same start and merge.
SLACK = 1.05
L1_SAVES = 0.8  # share of the bytes in flight that L2 still has to hold if L1 holds the pairs
RESIDENT = 32  # most programs that a multiprocessor holds, whatever their size
ENOUGH = 1.6  # a launch with at most this `Candidate.work` is bound by memory, not by instructions
FILLED = 0.5  # share of a device's resident programs that suffices to keep its memory busy
# Costs, each in the time of one tile.
ONCE = 2.0  # cost of the start of a program or cluster, and of its reductions
SHARED_ONCE, SHARED_OF_ROW = 0.6, 4.0  # cost of the start of a program that shares a row, and of its row's merge


NUM_WARPS = 4  # warps per program of two passes
# With 48 registers per thread, 10 programs of 4 warps fit on a multiprocessor.
RESIDENT_PROGRAMS = 10
MIN_TILES_PER_SPLIT = 4  # with fewer tiles, starting a program and merging its tuple would cost as much as its sweep
MANY_ROWS = 2**20  # enough rows to fill any device


class Launch(NamedTuple):
    """The launch of a kernel of two passes."""

    lanes: int  # threads per program; each thread holds one tuple of statistics
    columns: int  # K, columns per thread
    num_warps: int
    splits: int  # S, programs per row
    columns_per_split: int  # a multiple of lanes * columns; the last split may have fewer

    @property
    def options(self) -> dict[str, int | bool]:
        """Return Triton's options.  The kernels rely on fused multiply-adds, which new releases must be asked for."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def two_passes(rows: int, vocabulary: int, itemsize: int, processors: int, warp_size: int = 32) -> Launch:
    """Return a launch with one program per row, or with several if the rows are too few to fill the chip twice.

    Args:
        rows, vocabulary: N and V.
        itemsize: bytes per element.  A thread takes 16 bytes at a time.
        processors: the number of multiprocessors of the device.
        warp_size: threads per warp (64 on AMD's CDNA).
    """
    lanes, columns = NUM_WARPS * warp_size, 16 // itemsize
    tile = lanes * columns
    tiles = -(-vocabulary // tile)
    wanted = -(-2 * processors * RESIDENT_PROGRAMS // rows)
    splits = max(1, min(wanted, tiles // MIN_TILES_PER_SPLIT))
    columns_per_split = -(-tiles // splits) * tile
    return Launch(lanes, columns, NUM_WARPS, -(-vocabulary // columns_per_split), columns_per_split)


class SinglePass(NamedTuple):
    """The launch of a single pass: threads, columns and programs of the kernel that gives statistics and gradient."""

    ctas: int  # blocks per cluster
    num_warps: int  # warps per block
    warp_size: int
    columns: int  # K, columns per thread
    splits: int  # S, programs per row that merge through global memory; 0: one program or one cluster per row
    columns_per_split: int  # a multiple of lanes * columns; the last split may have fewer
    accesses: int  # loads of 16 bytes in which a thread takes its columns

    @property
    def lanes(self) -> int:
        """Return the threads per program, in all blocks of its cluster."""
        return self.ctas * self.num_warps * self.warp_size

    @property
    def options(self) -> dict[str, int | bool]:
        """Return Triton's options; see `Launch.options`."""
        return {"num_warps": self.num_warps, "num_ctas": self.ctas, "enable_fp_fusion": True}


class Candidate(NamedTuple):
    """A launch of a single pass, and the estimates by which it is chosen."""

    launch: SinglePass
    rows_in_flight: int
    bytes_in_flight: int  # bytes that L2 has to hold for the second sweep to hit it
    hits: bool  # whether the share of L2 that is counted on holds them
    work: float  # estimated instructions, over those of the columns alone; multiplied up if few rows leave the device idle


def resident_programs(device: Device, shape: Shape) -> int:
    """Return the number of blocks of that shape that a multiprocessor holds."""
    threads = shape.num_warps * device.warp_size
    registers_per_warp = -(-shape.registers * device.warp_size // 256) * 256  # a warp gets a multiple of 256 registers
    return max(1, min(RESIDENT, device.threads // threads, device.registers // registers_per_warp // shape.num_warps))


class Row(NamedTuple):
    """The sizes of one row of logits."""

    vocabulary: int
    pair_bytes: int  # bytes read: the logits of student and teacher
    swept_bytes: int  # bytes read and written
    itemsize: int  # bytes per element of the widest tensor


@functools.lru_cache
def best_single_pass(
    rows: int,
    vocabulary: int,
    read_itemsize: int,  # bytes per pair of logits
    written_itemsize: int,  # bytes per element of the gradient; 0 if it overwrites the student
    device: Device,
    wide: bool = True,  # whether rows start at multiples of 16 bytes
    itemsize: int = 2,  # bytes per element of the widest tensor, of which a thread takes 16 bytes at once
    sweeps: int = 1,  # sweeps of statistics that the divergence takes
) -> Candidate:
    """Return the best launch of a single pass: one program or cluster per row, or several programs per row.

    A program or cluster of a whole row needs no global memory for its merge and waits for no other program.  So the first
    such launch is taken whose bytes in flight fit L2 and whose work is at most ENOUGH.  Programs of whole rows put too
    many bytes in flight if rows are long; above V = 150 000 so do clusters of 16 blocks.  The last tile takes as long with
    few columns as with all, so a program of few tiles may take longer than several programs per row.

    Clusters take one sweep of statistics: Triton 3.8 cannot compile the longer kernel for them (`PlanCTAPass` fails).
    """
    row = Row(vocabulary, vocabulary * read_itemsize, vocabulary * (read_itemsize + written_itemsize), itemsize)
    plans = [_of_whole_rows(rows, row, device, shape, 1) for shape in device.whole]
    if device.clusters and wide and sweeps == 1:
        plans += [_of_whole_rows(rows, row, device, CLUSTER, ctas) for ctas in CTAS]
    shared = _of_shared_rows(rows, row, device, device.shared if sweeps == 1 else device.shared_two_sweeps)
    hitting = [plan for plan in (*plans, shared) if plan.hits]
    enough = [plan for plan in hitting if plan.work <= ENOUGH]
    return (enough or sorted(hitting, key=lambda plan: plan.work) or [shared])[0]


def _of_whole_rows(rows: int, row: Row, device: Device, shape: Shape, ctas: int) -> Candidate:
    """Return the launch with one program per row, or one cluster of several blocks."""
    columns, resident = shape.columns_of(row.itemsize), resident_programs(device, shape)
    tiles = row.vocabulary / (ctas * shape.num_warps * device.warp_size * columns)
    in_flight = min(rows, max(1, device.processors * resident // ctas))
    idle = _idle(device.processors * resident, rows * ctas)
    # A thread sweeps the same columns twice.  If L1 holds the pairs in flight on a multiprocessor, part of the second sweep
    # hits L1.
    in_l1 = row.pair_bytes / ctas * resident <= device.l1_bytes
    size = int(in_flight * (max(row.pair_bytes, L1_SAVES * row.swept_bytes) if in_l1 else row.swept_bytes))
    launch = SinglePass(ctas, shape.num_warps, device.warp_size, columns, 0, row.vocabulary, shape.accesses)
    return Candidate(launch, in_flight, size, _hits(size, device), idle * (math.ceil(tiles) + ONCE) / tiles)


def _of_shared_rows(rows: int, row: Row, device: Device, shape: Shape) -> Candidate:
    """Return the launch with the fewest programs per row that keep the rows in flight within L2 and fill the device."""
    columns, resident = shape.columns_of(row.itemsize), device.processors * resident_programs(device, shape)
    tile = shape.num_warps * device.warp_size * columns
    tiles = -(-row.vocabulary // tile)
    splits = math.ceil(max(resident * row.swept_bytes / (SLACK * L2_SHARE * device.l2_bytes), FILLED * resident / rows))
    # The tiles per program are rounded down, so that there are at least `splits` programs per row.
    tiles_per_split = tiles if splits == 1 else max(1, -(-tiles // (splits - 1)) - 1)
    splits = -(-tiles // tiles_per_split)
    in_flight = min(rows, max(1, resident // splits))
    size = in_flight * row.swept_bytes
    launch = SinglePass(1, shape.num_warps, device.warp_size, columns, splits, tiles_per_split * tile, shape.accesses)
    work = _idle(resident, rows * splits) * (tiles + SHARED_ONCE * splits + SHARED_OF_ROW) * tile / row.vocabulary
    return Candidate(launch, in_flight, size, _hits(size, device), work)


def _idle(resident: int, programs: int) -> float:
    """Return the factor by which too few programs slow the device down."""
    return max(1.0, FILLED * resident / programs)


def _hits(size: int, device: Device) -> bool:
    """Return whether L2 holds so many bytes in flight."""
    return size <= SLACK * L2_SHARE * device.l2_bytes


def is_faster(
    device: Device,
    vocab_size: int,
    itemsizes: Sequence[int],  # bytes per logit of the student, and of the teacher if there is one
    sweeps: int = 1,  # sweeps of statistics that the divergence takes
) -> bool:
    """Return whether a single pass is faster than two, for any number of rows and any strides.

    Its second sweep has to hit L2.  If programs have to share rows, the device must be one where that pays.
    """
    read, largest = sum(itemsizes), max(itemsizes)
    found = best_single_pass(MANY_ROWS, vocab_size, read, itemsizes[0], device, False, largest, sweeps)
    return found.hits and (found.launch.splits == 0 or device.sharing)
