"""The operators of `ops.py` for CPU tensors: blocks of rows that stay in cache, no [N, V] array besides the gradient.

A block of rows is taken through the whole formula before the next one is touched, so memory is read once a sweep, as in
the kernels; what lies between two elementary operations lives in three block-sized buffers.  Exponentials are taken in
base 2, which PyTorch vectorises best on a CPU (0.15 ns an element on two cores against 0.42 ns for exp).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import statistics as stats
from .logit_map import IDENTITY_MAP, LogitMap
from .scaling import scaled

# Elements of a block: its three buffers take 12 MB in float32, within a last-level cache, and an elementary operation on
# it takes 50 us, far more than its overhead.  Two cores, N = 256, V = 128 256, T = 3: both sweeps take 102 ms with 2^18,
# 83 ms with 2^19, 74 ms with 2^20.
BLOCK_ELEMENTS = 2**20

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
    result = stats.identity(ce_weight.numel(), ce_weight.dtype)
    buffers = _buffers(student, ce_weight.dtype)
    for first, last in _blocks((ce_weight != 0) | (kl_weight != 0), buffers.shape[1], student, teacher):
        out = result[:, first:last]
        u, q, v = buffers[:, : last - first]
        z = _load(student, first, last, student_map, u)
        torch.amax(z, 1, out=out[stats.M_S])
        torch.sub(z, out[stats.M_S, :, None], out=u)
        if teacher is None:
            out[stats.D_1] = _sum(_exponential(u, 1.0, out=q))
            continue
        at_T = _exponential(u, temperature, out=q)
        out[stats.D_T] = _sum(at_T)
        if need_ce:
            out[stats.D_1] = _sum(_exponential_at_1(u, at_T, temperature, out=v))
        y = _load(teacher, first, last, teacher_map, v)
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
            u = _load(student, first, last, student_map, u).div(stats.UNIT) - out[stats.M_S, :, None] / stats.UNIT
            v = _load(teacher, first, last, teacher_map, v).div(stats.UNIT) - out[stats.M_T, :, None] / stats.UNIT
            out[stats.C] = _sum(v.sub_(u).masked_fill_(q == 0, 0.0).mul_(q))
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
    for written in (gradient, teacher_gradient):
        if written is not None:
            for first, last in _blocks(~counted, counted.numel(), written):
                _rows(written, first, last).zero_()

    m_s, d_1, d_T, m_t, e, c = statistics.unsqueeze(-1)  # [N, 1] each, as what follows
    w_ce, w_kl = ce_weight[:, None], kl_weight[:, None] / temperature
    p_1_scale, p_T_scale, q_scale, mean_log_ratio = w_ce / d_1, w_kl / d_T, w_kl / e, c / e * (stats.UNIT / temperature)
    if temperature == 1:
        p_T_scale = p_T_scale + p_1_scale if labels is not None else p_T_scale
    buffers = _buffers(student, statistics.dtype, count=3 if teacher_gradient is None else 4)
    for first, last in _blocks(counted, buffers.shape[1], student, teacher, gradient, teacher_gradient):
        rows = slice(first, last)
        u, result, q, *spare = buffers[:, : last - first]
        torch.sub(_load(student, first, last, student_map, u), m_s[rows], out=u)
        if teacher is None:
            _exponential(u, 1.0, out=result).mul_(p_1_scale[rows])
        else:
            at_T = _exponential(u, temperature, out=result)
            torch.sub(_load(teacher, first, last, teacher_map, q), m_t[rows], out=q)
            if teacher_gradient is not None:
                torch.sub(q, u, out=spare[0])
            separate_ce = labels is not None and temperature != 1
            at_1 = _exponential_at_1(u, at_T, temperature, out=u) if separate_ce else None
            result.mul_(p_T_scale[rows])
            result.addcmul_(_exponential(q, temperature, out=q), q_scale[rows], value=-1)
            if at_1 is not None:
                result.addcmul_(at_1, p_1_scale[rows])
        if labels is not None:
            # The weights of a row whose label names no class are NaN, and so are its gradients, wherever it is written.
            result.scatter_add_(1, labels[rows, None].long().clamp(0, result.shape[1] - 1), -w_ce[rows])
        _multiply_by_slope(result, _rows(student, first, last), student_map, buffer=u)
        _rows(gradient, first, last).copy_(result)
        if teacher is not None and teacher_gradient is not None:
            # The log-ratio less KL, which is its mean: the logarithms of the normalisers cancel.  Without teacher mass it
            # counts for nothing, also where it is infinite or inf - inf (masked tokens).
            (log_ratio,) = spare
            log_ratio.div_(temperature).sub_(mean_log_ratio[rows]).masked_fill_(q == 0, 0.0)
            result = log_ratio.mul_(q).mul_(q_scale[rows])
            _multiply_by_slope(result, _rows(teacher, first, last), teacher_map, buffer=u)
            _rows(teacher_gradient, first, last).copy_(result)


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


def _blocks(counted: Tensor, rows: int, *tensors: Tensor | None) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of at most `rows` counted rows, none of which crosses an outer index of a tensor."""
    inner = [tensor.shape[1] for tensor in tensors if tensor is not None]
    flags, lengths = torch.unique_consecutive(counted, return_counts=True)
    first = 0
    for flag, length in zip(flags.tolist(), lengths.tolist(), strict=True):
        end = first + length
        while flag and first < end:
            last = min(first + rows, end, *(first - first % i + i for i in inner))
            yield first, last
            first = last
        first = end


def _rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Rows first to last of an `[outer, inner, V]` tensor, as a view; they share an outer index."""
    outer, start = divmod(first, tensor.shape[1])
    return tensor[outer, start : start + last - first]


def _load(tensor: Tensor, first: int, last: int, logit_map: LogitMap, buffer: Tensor) -> Tensor:
    """The logits of the rows in the buffer's dtype: the rows themselves, or converted and mapped into the buffer."""
    rows = _rows(tensor, first, last)
    if logit_map.is_identity:
        return rows if rows.dtype == buffer.dtype else buffer.copy_(rows)
    z = buffer.copy_(rows).mul_(logit_map.scale)
    return z.div_(logit_map.softcap).tanh_().mul_(logit_map.softcap) if logit_map.is_capped else z


def _multiply_by_slope(gradient: Tensor, x: Tensor, logit_map: LogitMap, buffer: Tensor) -> None:
    """In place: the gradient with respect to the logits becomes the one with respect to the head's output x."""
    if logit_map.is_identity:
        return
    gradient.mul_(logit_map.scale)
    if logit_map.is_capped:
        t = buffer.copy_(x).mul_(logit_map.scale / logit_map.softcap).tanh_()
        gradient.addcmul_(gradient, t.square_(), value=-1)
