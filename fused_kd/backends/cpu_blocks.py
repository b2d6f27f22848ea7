"""Blocks of rows for the CPU operators: which rows a block holds, how they are read and written, and its buffers.

A block holds only rows that count.  A long run of such rows is read and written in place.  Scattered rows are gathered into
the buffers, and their gradients are scattered back.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..logit_map import LogitMap

# Elements per block and thread, unless two rows have more: threads share a sum over columns row by row.  An operation on a
# buffer of this size takes longer than its overhead, and the buffers of a block stay in cache.
BLOCK_ELEMENTS = 2**17

# Elements that are gathered at a time.  A run of at least so many elements is a block of its own.
GATHERED_ELEMENTS = 2**17

# PyTorch cuts an elementwise operation into equal shares for its threads, of at least SHARE_ELEMENTS each.  Within a share
# it takes two vectors of 512 bits at a time: VECTOR_ELEMENTS of float32.
SHARE_ELEMENTS = 2**15
VECTOR_ELEMENTS = 32


class Buffers:
    """Memory for the intermediate results of a block, each `[rows, V]`.

    The memory of each is padded to whole vectors of every thread's share, since PyTorch gives the elements beyond the last
    whole vector of a share to a scalar exp2, which rounds one value in about fifty differently.  Then results would depend
    on the number of threads and on the position of a row.
    """

    def __init__(self, count: int, vocabulary: int, dtype: torch.dtype) -> None:
        self._count, self._vocabulary, self._rows = count, vocabulary, 0
        self._memory = torch.empty(0, dtype=dtype)
        self._each: tuple[Tensor, ...] = ()
        self._padded: tuple[Tensor, ...] = ()

    def resize(self, rows: int) -> tuple[Tensor, ...]:
        """Return the buffers for that many rows."""
        if rows != self._rows:
            size, count = rows * self._vocabulary, self._count
            padded = _padded(size)
            if count * padded > self._memory.numel():
                self._memory = self._memory.new_empty(count * padded)
            buffers = self._memory[: count * padded].view(count, padded)
            exact = buffers if padded == size else buffers[:, :size]
            self._rows, self._each = rows, exact.view(count, rows, self._vocabulary).unbind()
            self._padded = self._each if padded == size else buffers.unbind()
        return self._each

    def apply(self, method: str, buffer: Tensor) -> Tensor:
        """Apply a method of tensors, such as "exp2_", to one of the buffers, and return it.

        Equal values give equal bits, whatever their positions.
        """
        index = next(i for i, each in enumerate(self._each) if each is buffer)
        getattr(self._padded[index], method)()
        return buffer


def _padded(elements: int) -> int:
    """Return the number of elements, rounded up, that threads share in whole vectors."""
    vectors = VECTOR_ELEMENTS * max(1, min(torch.get_num_threads(), -(-elements // SHARE_ELEMENTS)))
    return -(-elements // vectors) * vectors


def block_rows(
    rows: int,
    vocabulary: int,
) -> int:
    """Return the rows per block: blocks of nearly equal size, of at least two rows if there are two."""
    most = max(2, torch.get_num_threads() * BLOCK_ELEMENTS // max(1, vocabulary))
    return -(-rows // -(-rows // most)) if rows else 1


def blocks_of_rows(
    counted: Tensor | None,  # [N], bool; None: every row counts
    size: int,
    *tensors: Tensor | None,  # [outer, inner, V]; the first is not None
) -> Iterator[slice | Tensor]:
    """Yield the rows that count, at most `size` at a time.

    A slice is part of a long run, and lies within one outer index of every tensor.  A tensor holds the numbers of scattered
    rows.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    inner = [tensor.shape[1] for tensor in given if tensor.shape[0] > 1]
    gathered = min(size, max(1, GATHERED_ELEMENTS // given[0].shape[2]))
    N, others = given[0].shape[0] * given[0].shape[1], None
    if counted is not None and not counted.any():
        return
    if min(inner, default=gathered) < gathered:  # outer indices are so short that no run can be long
        runs, others = [], torch.arange(N) if counted is None else counted.nonzero().flatten()
    elif counted is None or counted.all():
        runs = [(0, N)]
    else:
        runs, others = _long_runs(counted, gathered)
    for first, end in runs:
        while first < end:
            last = min(first + size, end, *(first - first % i + i for i in inner))
            yield slice(first, last)
            first = last
    if others is not None and others.numel():
        yield from others.split(gathered)


def _long_runs(counted: Tensor, shortest: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Return (first, end) of each run of at least `shortest` rows that count, and the numbers of all other rows that do."""
    flags, lengths = torch.unique_consecutive(counted, return_counts=True)
    is_long = flags & (lengths >= shortest)
    ends = lengths.cumsum(0)
    runs = zip((ends - lengths)[is_long].tolist(), ends[is_long].tolist(), strict=True)
    return list(runs), (flags & ~is_long).repeat_interleave(lengths).nonzero().flatten()


def length(rows: slice | Tensor) -> int:
    """Return the number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def of_rows(per_row: Tensor, rows: slice | Tensor, dim: int = 0) -> Tensor:
    """Return the part of a block of a tensor that has all rows in that dimension; a view for a run."""
    if not isinstance(rows, slice):
        return per_row.index_select(dim, rows)
    size = rows.stop - rows.start
    return per_row if size == per_row.shape[dim] else per_row.narrow(dim, rows.start, size)


def view(tensor: Tensor, rows: slice) -> Tensor:
    """Return a view of rows of an `[outer, inner, V]` tensor that share an outer index."""
    outer, start = divmod(rows.start, tensor.shape[1])
    return of_rows(tensor[outer], slice(start, start + rows.stop - rows.start))


def places(tensor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # [places, V], [rows]
    """Return a matrix that contains the rows of an `[outer, inner, V]` tensor, and the positions of the given rows in it.

    Row number o inner + i begins o s_o + i s_i elements after row 0.  Each of these offsets is a multiple of the greatest
    common divisor of s_o and s_i, which is the stride of the matrix.  Memory between the tensor's rows is not touched.
    """
    outer, inner, vocabulary = tensor.shape
    if outer == 1:
        return tensor[0], rows
    s_o, s_i, s_v = tensor.stride()
    stride = math.gcd(s_o, s_i) or 1  # both 0: one row, expanded
    matrix = tensor.as_strided((((outer - 1) * s_o + (inner - 1) * s_i) // stride + 1, vocabulary), (stride, s_v))
    return matrix, torch.add(rows * (s_i // stride), rows // inner, alpha=(s_o - inner * s_i) // stride)


def read(tensor: Tensor, rows: slice | Tensor, buffer: Tensor) -> Tensor:
    """Return rows in the tensor's dtype: a view of a run, or gathered rows, in the buffer if that has the dtype."""
    if isinstance(rows, slice):
        return view(tensor, rows)
    matrix, found = places(tensor, rows)
    if matrix.dtype == buffer.dtype:
        return torch.index_select(matrix, 0, found, out=buffer)
    return matrix.index_select(0, found)


def write(tensor: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        view(tensor, rows).copy_(values)
    else:
        matrix, found = places(tensor, rows)
        matrix.index_copy_(0, found, values.to(matrix.dtype))


def zero(tensor: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        view(tensor, rows).zero_()
    else:
        matrix, found = places(tensor, rows)
        matrix.index_fill_(0, found, 0)


def load(tensor: Tensor, rows: slice | Tensor, logit_map: LogitMap, buffer: Tensor) -> Tensor:
    """Return the logits of rows in the buffer's dtype: a view if possible, otherwise gathered, converted or mapped."""
    x = read(tensor, rows, buffer)
    if logit_map.is_identity:
        return x if x.dtype == buffer.dtype else buffer.copy_(x)
    z = buffer.copy_(x).mul_(logit_map.scale)
    return z.div_(logit_map.softcap).tanh_().mul_(logit_map.softcap) if logit_map.is_capped else z


def multiply_by_slope(
    gradient: Tensor, tensor: Tensor, rows: slice | Tensor, logit_map: LogitMap, buffer: Tensor
) -> None:
    """Turn the gradient of the logits, in place, into the gradient of the head's output, which the tensor holds."""
    if logit_map.is_identity:
        return
    gradient.mul_(logit_map.scale)
    if logit_map.is_capped:
        t = buffer.copy_(read(tensor, rows, buffer)).mul_(logit_map.scale / logit_map.softcap).tanh_()
        gradient.addcmul_(gradient, t.square_(), value=-1)
