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


@triton.jit
def log1p(x):
    """Return log(1 + x) of float64, to a few units in the last place however small x is.

    The rounding of w = 1 + x is undone by the factor x / (w - 1), whose denominator is exact.
    """
    w = 1.0 + x
    return tl.where(w == 1, x, tl.log(w) * (x / tl.where(w == 1, 1.0, w - 1.0)))
