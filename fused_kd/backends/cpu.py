"""The operators of `ops.py` for CPU tensors: blocks of rows that stay in cache, no [N, V] array besides the gradient.

A block of rows is taken through the whole formula before the next one is touched, so memory is read once a sweep, as in
the kernels; what lies between two elementary operations lives in three block-sized buffers.  Exponentials are taken in
base 2, which PyTorch vectorises best on a CPU (0.15 ns an element on two cores against 0.42 ns for exp).

A block holds rows that count, and only those.  A long run of them is read and written where it is; rows that others lie
between are gathered into the buffers, as many as these hold, and their gradients scattered.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import statistics as stats
from ..logit_map import IDENTITY_MAP, LogitMap
from ..rows import as_rows
from ..scaling import scaled

# Elements of a block: its three buffers take 12 MB in float32, within a last-level cache, and an elementary operation on
# it takes 50 us, far more than its overhead.  Two cores, N = 256, V = 128 256, T = 3: both sweeps take 102 ms with 2^18,
# 83 ms with 2^19, 74 ms with 2^20.
BLOCK_ELEMENTS = 2**20

# Elements that are gathered at a time: fewer, which a core's own cache holds, since gathering adds passes over the buffers.
# A run of rows that has as many is a block by itself.
GATHERED_ELEMENTS = 2**17

LOG2_E = math.log2(math.e)

# How PyTorch cuts an elementwise operation: equal shares for the threads, but of so many elements at least, and within a
# share two vectors of 512 bits at a time.
SHARE_ELEMENTS = 2**15
VECTOR_ELEMENTS = 32


def row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read
    temperature: float,
    need_ce: bool,
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
) -> Tensor:  # [1, 6, N]: every row whole
    counted = (ce_weight != 0) | (kl_weight != 0)
    result = stats.identity(ce_weight.numel(), ce_weight.dtype)
    buffers = _buffers(student, ce_weight.dtype)
    of_block = stats.identity(buffers.shape[1], ce_weight.dtype)
    for rows in _blocks(counted, buffers.shape[1], student, teacher):
        n = _length(rows)
        u, q, v = buffers[:, :n]
        out = of_block[:, :n]
        z = _load(student, rows, student_map, u)
        torch.amax(z, 1, out=out[stats.M_S])
        torch.sub(z, out[stats.M_S, :, None], out=u)
        if teacher is None:
            out[stats.D_1] = _sum(_exponential(u, 1.0, out=q))
            result[:, rows] = out
            continue
        at_T = _exponential(u, temperature, out=q)
        out[stats.D_T] = _sum(at_T)
        if need_ce:
            out[stats.D_1] = _sum(_exponential_at_1(u, at_T, temperature, out=v))
        y = _load(teacher, rows, teacher_map, v)
        torch.amax(y, 1, out=out[stats.M_T])
        torch.sub(y, out[stats.M_T, :, None], out=v)
        _exponential(v, temperature, out=q)
        out[stats.E] = _sum(q)
        difference = v.sub_(u)
        c = _sum(torch.mul(q, difference, out=u))
        if c.isnan().any():  # masked tokens: without teacher mass an infinite difference counts for nothing
            c = _sum(torch.mul(q, difference.masked_fill_(q == 0, 0.0), out=u))
        out[stats.C] = c / stats.UNIT
        if c.isinf().any():  # teacher mass where the student has none, or logits further apart than float32 reaches
            u = _load(student, rows, student_map, u).div(stats.UNIT) - out[stats.M_S, :, None] / stats.UNIT
            v = _load(teacher, rows, teacher_map, v).div(stats.UNIT) - out[stats.M_T, :, None] / stats.UNIT
            out[stats.C] = _sum(v.sub_(u).masked_fill_(q == 0, 0.0).mul_(q))
        result[:, rows] = out
    return result[None]


def logit_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    labels: Tensor | None,  # [N]; None leaves out the cross-entropy
    statistics: Tensor,  # [6, N]
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read
    temperature: float,
    gradient: Tensor,  # [outer, inner, V], written; may be the student
    teacher_gradient: Tensor | None = None,  # [outer', inner', V], written; may be the teacher
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
) -> None:
    counted = (ce_weight != 0) | (kl_weight != 0)
    gradient, teacher_gradient = as_rows(gradient), None if teacher_gradient is None else as_rows(teacher_gradient)
    for written in (gradient, teacher_gradient):
        if written is not None:
            for rows in _blocks(~counted, counted.numel(), written):
                _zero(written, rows)

    m_s, d_1, d_T, m_t, e, c = statistics  # [N] each, as what follows
    w_kl = kl_weight / temperature
    p_1_scale, p_T_scale, q_scale, mean_log_ratio = (
        ce_weight / d_1,
        w_kl / d_T,
        w_kl / e,
        c / e * (stats.UNIT / temperature),
    )
    if temperature == 1:
        p_T_scale = p_T_scale + p_1_scale if labels is not None else p_T_scale
    of_rows = torch.stack([m_s, m_t, p_1_scale, p_T_scale, q_scale, mean_log_ratio, -ce_weight], 1)  # [N, 7]
    buffers = _buffers(student, statistics.dtype, count=3 if teacher_gradient is None else 4)
    for rows in _blocks(counted, buffers.shape[1], student, teacher, gradient, teacher_gradient):
        block = of_rows[rows] if isinstance(rows, slice) else of_rows.index_select(0, rows)
        m_s, m_t, p_1_scale, p_T_scale, q_scale, mean_log_ratio, minus_ce_weight = block.split(1, 1)  # [rows, 1] each
        u, result, q, *spare = buffers[:, : _length(rows)]
        torch.sub(_load(student, rows, student_map, u), m_s, out=u)
        if teacher is None:
            _exponential(u, 1.0, out=result).mul_(p_1_scale)
        else:
            at_T = _exponential(u, temperature, out=result)
            torch.sub(_load(teacher, rows, teacher_map, q), m_t, out=q)
            if teacher_gradient is not None:
                torch.sub(q, u, out=spare[0])
            separate_ce = labels is not None and temperature != 1
            at_1 = _exponential_at_1(u, at_T, temperature, out=u) if separate_ce else None
            result.mul_(p_T_scale)
            result.addcmul_(_exponential(q, temperature, out=q), q_scale, value=-1)
            if at_1 is not None:
                result.addcmul_(at_1, p_1_scale)
        if labels is not None:
            # The weights of a row whose label names no class are NaN, and so are its gradients, wherever it is written.
            label = labels[rows].long().clamp(0, result.shape[1] - 1)
            result.scatter_add_(1, label[:, None], minus_ce_weight)
        _multiply_by_slope(result, student, rows, student_map, buffer=u)
        _write(gradient, rows, result)
        if teacher is not None and teacher_gradient is not None:
            # The log-ratio less KL, which is its mean: the logarithms of the normalisers cancel.  Without teacher mass it
            # counts for nothing, also where it is infinite or inf - inf (masked tokens).
            (log_ratio,) = spare
            log_ratio.div_(temperature).sub_(mean_log_ratio).masked_fill_(q == 0, 0.0)
            result = log_ratio.mul_(q).mul_(q_scale)
            _multiply_by_slope(result, teacher, rows, teacher_map, buffer=u)
            _write(teacher_gradient, rows, result)


def statistics_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """Float32, or float64 if an input is float64."""
    return (
        torch.float64 if torch.float64 in (student.dtype, None if teacher is None else teacher.dtype) else torch.float32
    )


def loss_and_gradient(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows
    labels: Tensor | None,  # [N]; None leaves out the cross-entropy
    ce_weight: Tensor,  # [N], float64
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read
    temperature: float,
    gradient: Tensor,  # [outer, inner, V], written; may be the student
    student_map: LogitMap = IDENTITY_MAP,
    teacher_map: LogitMap = IDENTITY_MAP,
) -> Tensor:  # [6, N]
    """Both sweeps; what one launch gives on a GPU."""
    dtype = statistics_dtype(student, teacher)
    counted = (ce_weight != 0).to(dtype), (kl_weight != 0).to(dtype)
    maps = student_map, teacher_map
    statistics = row_statistics(student, teacher, *counted, temperature, labels is not None, *maps)[0]
    weights = ce_weight.to(dtype), kl_weight.to(dtype)
    logit_gradient(student, teacher, labels, statistics, *weights, temperature, gradient, None, *maps)
    return statistics


def scale_(
    tensor: Tensor,  # any shape
    factor: Tensor,  # a scalar
) -> None:
    if factor != 1:
        scaled([tensor], factor, [tensor.dtype], in_place=True)


def _exponential(u: Tensor, temperature: float, out: Tensor) -> Tensor:
    """e^{u / T}; of a value the same bits wherever it stands."""
    return _exp2_(torch.mul(u, LOG2_E / temperature, out=out))


def _exp2_(block: Tensor) -> Tensor:
    """In place, by whole vectors only.

    What a thread's share has beyond its last whole vector goes to a scalar exp2, which rounds one value in about fifty
    otherwise: results would depend on the number of threads and on a row's place.  So a part that threads can share in
    whole vectors is left to them, and the rest is padded.
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
    """Of each row, on one thread each: a single row PyTorch would cut into as many parts as there are threads."""
    return block.sum(1) if block.shape[0] > 1 else block.expand(2, -1).sum(1)[:1]


def _exponential_at_1(u: Tensor, at_T: Tensor, temperature: float, out: Tensor) -> Tensor:
    """e^u, given e^{u/T}: itself for T = 1, its square for T = 2."""
    if temperature == 1:
        return at_T
    if temperature == 2:
        return torch.mul(at_T, at_T, out=out)
    return _exponential(u, 1.0, out=out)


def _buffers(like: Tensor, dtype: torch.dtype, count: int = 3) -> Tensor:
    """`[count, rows, V]`: buffers of a block's size."""
    outer, inner, vocabulary = like.shape
    rows = BLOCK_ELEMENTS // vocabulary
    return torch.empty(count, max(1, min(rows, outer * inner)), vocabulary, dtype=dtype)


def _blocks(
    counted: Tensor,  # [N], bool
    size: int,
    *tensors: Tensor | None,  # [outer, inner, V], the first one given
) -> Iterator[slice | Tensor]:
    """The rows that count, at most `size` at a time: part of a long run, in one outer index, or the numbers of others."""
    given = [tensor for tensor in tensors if tensor is not None]
    inner = [tensor.shape[1] for tensor in given if tensor.shape[0] > 1]
    gathered = min(size, max(1, GATHERED_ELEMENTS // given[0].shape[2]))
    others = None
    if not counted.any():
        return
    if not inner and counted.all():
        runs = [(0, counted.numel())]
    elif min(inner, default=gathered) < gathered:  # which cuts the longest run short
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
    """(first, end) of the runs of so many rows that count, and the numbers of the others that do."""
    flags, lengths = torch.unique_consecutive(counted, return_counts=True)
    is_long = flags & (lengths >= shortest)
    ends = lengths.cumsum(0)
    runs = zip((ends - lengths)[is_long].tolist(), ends[is_long].tolist(), strict=True)
    return list(runs), (flags & ~is_long).repeat_interleave(lengths).nonzero().flatten()


def _length(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def _view(tensor: Tensor, rows: slice) -> Tensor:
    """Rows of an `[outer, inner, V]` tensor, which share an outer index."""
    outer, start = divmod(rows.start, tensor.shape[1])
    return tensor[outer, start : start + rows.stop - rows.start]


def _places(tensor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # [places, V], [rows]
    """A matrix that has the rows of an `[outer, inner, V]` tensor among its own, and where some of them are in it.

    Row o inner + i begins o s_o + i s_i elements after the first one.  All of these are multiples of both strides' common
    divisor, which is the matrix's stride; nothing between the tensor's rows is touched.
    """
    outer, inner, vocabulary = tensor.shape
    if outer == 1:
        return tensor[0], rows
    s_o, s_i, s_v = tensor.stride()
    stride = math.gcd(s_o, s_i) or 1  # both 0: one row, expanded
    matrix = tensor.as_strided((((outer - 1) * s_o + (inner - 1) * s_i) // stride + 1, vocabulary), (stride, s_v))
    return matrix, (rows // inner * s_o + rows % inner * s_i) // stride


def _read(tensor: Tensor, rows: slice | Tensor, buffer: Tensor) -> Tensor:
    """Rows in the tensor's dtype: where they are, or gathered; into the buffer if that has the dtype."""
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
    """The logits of rows in the buffer's dtype: the rows themselves, or gathered, converted, mapped into the buffer."""
    x = _read(tensor, rows, buffer)
    if logit_map.is_identity:
        return x if x.dtype == buffer.dtype else buffer.copy_(x)
    z = buffer.copy_(x).mul_(logit_map.scale)
    return z.div_(logit_map.softcap).tanh_().mul_(logit_map.softcap) if logit_map.is_capped else z


def _multiply_by_slope(
    gradient: Tensor, tensor: Tensor, rows: slice | Tensor, logit_map: LogitMap, buffer: Tensor
) -> None:
    """Turn the gradient for the logits, in place, into the one for the output of the head, the tensor."""
    if logit_map.is_identity:
        return
    gradient.mul_(logit_map.scale)
    if logit_map.is_capped:
        t = buffer.copy_(_read(tensor, rows, buffer)).mul_(logit_map.scale / logit_map.softcap).tanh_()
        gradient.addcmul_(gradient, t.square_(), value=-1)
