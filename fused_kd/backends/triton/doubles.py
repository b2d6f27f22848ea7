"""float64 arguments of kernels.  Triton would pass a Python float as float32, so its bits are passed as an int64."""

import struct

import triton
import triton.language as tl


def bits_of(number: float) -> int:
    """Return the bits of a float64 as a signed integer of 64 bits."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


@triton.jit
def double_of(bits):
    """Return the float64 that `bits_of` encodes."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
