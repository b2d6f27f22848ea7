"""The operators of `operators.py` for CPU tensors: blocks of rows that stay in cache, no [N, V] array but the gradient.

A block of rows goes through the whole formula before the next block is touched.  So memory is read once per sweep, as in
the kernels.  Intermediate results live in three or four buffers of the size of a block.  Exponentials are taken in base 2,
which PyTorch computes faster on a CPU than base e.

A block holds only rows that count.  A long run of such rows is read and written in place.  Scattered rows are gathered into
the buffers, and their gradients are scattered back.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import statistics as stats
from ..divergences import DIVERGENCES, Coefficient, Objective
from ..divergences import coefficients as coefficients_of
from ..logit_map import LogitMap
from ..rows import as_rows
from ..scaling import scaled

# Elements per block.  Three buffers of this size take 12 MB in float32, which a last-level cache holds, and an elementary
# operation on one of them takes far longer than its overhead.
BLOCK_ELEMENTS = 2**20

# Elements that are gathered at a time.  They fit a core's own cache, since gathering adds passes over the buffers.  A run
# of at least so many elements is a block of its own.
GATHERED_ELEMENTS = 2**17

LOG2_E = math.log2(math.e)

# PyTorch cuts an elementwise operation into equal shares for its threads, of at least SHARE_ELEMENTS each.  Within a share
# it takes two vectors of 512 bits at a time: VECTOR_ELEMENTS of float32.
SHARE_ELEMENTS = 2**15
VECTOR_ELEMENTS = 32


def row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    counted: Tensor,  # [N], bool; a row that is not counted is not read
    dtype: torch.dtype,
    need_ce: bool,
    objective: Objective,
) -> Tensor:  # [1, 6, N]: one part, since no row is split
    """Return the statistics of each row."""
    kind, temperature = DIVERGENCES[objective.divergence], objective.temperature
    result = stats.identity(counted.numel(), dtype)
    buffers = _buffers(student, dtype, count=4 if kind.is_over_student else 3)
    block_statistics = stats.identity(buffers.shape[1], dtype)
    for rows in _blocks(counted, buffers.shape[1], student, teacher):
        n = _length(rows)
        u, p, v, *others = buffers[:, :n]
        q = others[0] if others else p  # forward KL no longer needs p when it takes q
        out = block_statistics[:, :n]
        z = _load(student, rows, objective.student_map, u)
        torch.amax(z, 1, out=out[stats.M_S])
        torch.sub(z, out[stats.M_S, :, None], out=u)
        if teacher is None:
            out[stats.D_1] = _sum(_exponential(u, 1.0, out=p))
            result[:, rows] = out
            continue
        _exponential(u, temperature, out=p)
        out[stats.D_T] = _sum(p)
        if need_ce:
            out[stats.D_1] = _sum(_exponential_at_1(u, p, temperature, out=v))
        y = _load(teacher, rows, objective.teacher_map, v)
        torch.amax(y, 1, out=out[stats.M_T])
        torch.sub(y, out[stats.M_T, :, None], out=v)
        _exponential(v, temperature, out=q)
        out[stats.E] = _sum(q)
        mass, difference, spare = kind.term(u, v, p, q)
        c = _sum(torch.mul(mass, difference, out=spare))
        if c.isnan().any():  # masked tokens: a column without mass adds nothing, even if its difference is infinite
            c = _sum(torch.mul(mass, difference.masked_fill_(mass == 0, 0.0), out=spare))
        out[stats.C] = c / stats.UNIT
        if c.isinf().any():  # mass where the other distribution has none, or an overflow outside the unit
            u = _load(student, rows, objective.student_map, u).div(stats.UNIT) - out[stats.M_S, :, None] / stats.UNIT
            v = _load(teacher, rows, objective.teacher_map, v).div(stats.UNIT) - out[stats.M_T, :, None] / stats.UNIT
            mass, difference, _ = kind.term(u, v, p, q)
            out[stats.C] = _sum(difference.masked_fill_(mass == 0, 0.0).mul_(mass))
        result[:, rows] = out
    return result[None]


def logit_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    labels: Tensor | None,  # [N]; None: no CE
    coefficients: Tensor,  # [7, N]; a row whose A, B, C and W are 0 is not read
    gradient: Tensor,  # [outer, inner, V], written; may be the student
    teacher_gradient: Tensor | None,  # [outer', inner', V], written; may be the teacher
    objective: Objective,
) -> None:
    """Write the gradients of both models' logits; the teacher's only if there is memory for it."""
    kind, temperature = DIVERGENCES[objective.divergence], objective.temperature
    counted = (coefficients[Coefficient.A : Coefficient.R] != 0).any(0)
    gradient, teacher_gradient = as_rows(gradient), None if teacher_gradient is None else as_rows(teacher_gradient)
    for written in (gradient, teacher_gradient):
        if written is not None:
            for rows in _blocks(~counted, counted.numel(), written):
                _zero(written, rows)

    need_difference = teacher is not None and (teacher_gradient is not None or kind.is_over_student)
    buffers = _buffers(student, coefficients.dtype, count=4 if need_difference else 3)
    for rows in _blocks(counted, buffers.shape[1], student, teacher, gradient, teacher_gradient):
        block_coefficients = coefficients[:, rows] if isinstance(rows, slice) else coefficients.index_select(1, rows)
        m_s, m_t, A, B, C, W, R = block_coefficients[:, :, None]  # [rows, 1] each
        u, p, v, *others = buffers[:, : _length(rows)]
        torch.sub(_load(student, rows, objective.student_map, u), m_s, out=u)
        if teacher is None:
            result = _exponential(u, 1.0, out=p).mul_(A)
        else:
            _exponential(u, temperature, out=p)
            torch.sub(_load(teacher, rows, objective.teacher_map, v), m_t, out=v)
            difference = torch.sub(v, u, out=others[0]) if others else None
            joins_ce = temperature == 1 and not kind.is_over_student  # both terms are multiples of e^u
            separate_ce = labels is not None and not joins_ce
            at_1 = _exponential_at_1(u, p, temperature, out=u) if separate_ce else None
            q = _exponential(v, temperature, out=v)
            p_coefficient = B + A if labels is not None and joins_ce else B
            result = kind.student_gradient(p, q, difference, p_coefficient, C, R, temperature)
            if at_1 is not None:
                result.addcmul_(at_1, A)
        if labels is not None:
            # A label that names no class is clamped: the weights of its row are NaN, and so is the whole gradient.
            label = labels[rows].long().clamp(0, result.shape[1] - 1)
            result.scatter_add_(1, label[:, None], -W)
        _multiply_by_slope(result, student, rows, objective.student_map, buffer=u)
        _write(gradient, rows, result)
        if teacher is not None and teacher_gradient is not None:
            result = kind.teacher_gradient(p, q, difference, B, C, R, temperature)
            _multiply_by_slope(result, teacher, rows, objective.teacher_map, buffer=u)
            _write(teacher_gradient, rows, result)


def statistics_and_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    labels: Tensor | None,  # [N]; None: no CE
    ce_weight: Tensor,  # [N], float64
    divergence_weight: Tensor,  # [N]; a row with both weights 0 is not read
    gradient: Tensor,  # [outer, inner, V], written; may be the student
    launch: object,  # not used: the launch of the kernel that does the same on a GPU
    objective: Objective,
) -> Tensor:  # [6, N]
    """Write the gradient and return the statistics, by both sweeps."""
    counted = torch.logical_or(ce_weight, divergence_weight)
    dtype = stats.statistics_dtype(student, teacher)
    statistics = row_statistics(student, teacher, counted, dtype, labels is not None, objective)[0]
    row_coefficients = coefficients_of(
        statistics, None if labels is None else ce_weight, None if teacher is None else divergence_weight,
        objective, teacher_grad=False,
    )  # fmt: skip
    logit_gradient(student, teacher, labels, row_coefficients, gradient, None, objective)
    return statistics


def scale_(
    tensor: Tensor,  # any shape
    factor: Tensor,  # a scalar
) -> None:
    """Multiply in place."""
    if factor != 1:
        scaled([tensor], factor, [tensor.dtype], in_place=True)


def _exponential(u: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Return e^{u / T}.  Equal values of u give equal bits, whatever their positions."""
    return _exp2_(torch.mul(u, LOG2_E / temperature, out=out))


def _exp2_(block: Tensor) -> Tensor:
    """Replace each x by 2^x, computed in whole vectors only.

    PyTorch gives the elements beyond the last whole vector of a thread's share to a scalar exp2, which rounds one value in
    about fifty differently.  Then results would depend on the number of threads and on the position of a row.  So the
    threads get a part that they can share in whole vectors, and the rest is padded to whole vectors.
    """
    flat, n = block.view(-1), block.numel()
    shares = min(torch.get_num_threads(), -(-n // SHARE_ELEMENTS))
    whole = max(n - n % (VECTOR_ELEMENTS * shares), (shares - 1) * SHARE_ELEMENTS)
    flat[:whole].exp2_()
    if whole < n:
        rest = flat[whole:]
        rest.copy_(torch.nn.functional.pad(rest, (0, -rest.numel() % VECTOR_ELEMENTS)).exp2_()[: rest.numel()])
    return block


def _sum(block: Tensor) -> Tensor:  # [rows]
    """Return the sum of each row, taken by one thread.  PyTorch would share a single row among its threads."""
    return block.sum(1) if block.shape[0] > 1 else block.expand(2, -1).sum(1)[:1]


def _exponential_at_1(u: Tensor, at_T: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Return e^u, given e^{u/T}: for T = 1 the same tensor, for T = 2 its square."""
    if temperature == 1:
        return at_T
    if temperature == 2:
        return torch.mul(at_T, at_T, out=out)
    return _exponential(u, 1.0, out=out)


def _buffers(like: Tensor, dtype: torch.dtype, count: int = 3) -> Tensor:
    """Return buffers of a block's size, `[count, rows, V]`."""
    outer, inner, vocabulary = like.shape
    rows = BLOCK_ELEMENTS // vocabulary
    return torch.empty(count, max(1, min(rows, outer * inner)), vocabulary, dtype=dtype)


def _blocks(
    counted: Tensor,  # [N], bool
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
    others = None
    if not counted.any():
        return
    if not inner and counted.all():
        runs = [(0, counted.numel())]
    elif min(inner, default=gathered) < gathered:  # outer indices are so short that no run can be long
        runs, others = [], counted.nonzero().flatten()
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


def _length(rows: slice | Tensor) -> int:
    """Return the number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def _view(tensor: Tensor, rows: slice) -> Tensor:
    """Return a view of rows of an `[outer, inner, V]` tensor that share an outer index."""
    outer, start = divmod(rows.start, tensor.shape[1])
    return tensor[outer, start : start + rows.stop - rows.start]


def _places(tensor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # [places, V], [rows]
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
    return matrix, (rows // inner * s_o + rows % inner * s_i) // stride


def _read(tensor: Tensor, rows: slice | Tensor, buffer: Tensor) -> Tensor:
    """Return rows in the tensor's dtype: a view of a run, or gathered rows, in the buffer if that has the dtype."""
    if isinstance(rows, slice):
        return _view(tensor, rows)
    matrix, places = _places(tensor, rows)
    if matrix.dtype == buffer.dtype:
        return torch.index_select(matrix, 0, places, out=buffer)
    return matrix.index_select(0, places)


def _write(tensor: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        _view(tensor, rows).copy_(values)
    else:
        matrix, places = _places(tensor, rows)
        matrix.index_copy_(0, places, values.to(matrix.dtype))


def _zero(tensor: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        _view(tensor, rows).zero_()
    else:
        matrix, places = _places(tensor, rows)
        matrix.index_fill_(0, places, 0)


def _load(tensor: Tensor, rows: slice | Tensor, logit_map: LogitMap, buffer: Tensor) -> Tensor:
    """Return the logits of rows in the buffer's dtype: a view if possible, otherwise gathered, converted or mapped."""
    x = _read(tensor, rows, buffer)
    if logit_map.is_identity:
        return x if x.dtype == buffer.dtype else buffer.copy_(x)
    z = buffer.copy_(x).mul_(logit_map.scale)
    return z.div_(logit_map.softcap).tanh_().mul_(logit_map.softcap) if logit_map.is_capped else z


def _multiply_by_slope(
    gradient: Tensor, tensor: Tensor, rows: slice | Tensor, logit_map: LogitMap, buffer: Tensor
) -> None:
    """Turn the gradient of the logits, in place, into the gradient of the head's output, which the tensor holds."""
    if logit_map.is_identity:
        return
    gradient.mul_(logit_map.scale)
    if logit_map.is_capped:
        t = buffer.copy_(_read(tensor, rows, buffer)).mul_(logit_map.scale / logit_map.softcap).tanh_()
        gradient.addcmul_(gradient, t.square_(), value=-1)
