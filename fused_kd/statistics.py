"""Row statistics: the numbers that hold everything the loss needs to know about a set of columns, and their merge.

Let z and y be the logits of student and teacher and T the temperature.  For any set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}        d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}    c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT
    label = z of the row's label, or 0 if the label is not among the columns

This is the c of forward KL.  Reverse KL exchanges student and teacher:

    c   = sum e^{(z - m_s)/T} ((z - m_s) - (y - m_t)) / UNIT

The unit keeps c finite.  Logits reach 3.4e38 in size, so the difference of two of them may exceed what float32 holds.

The other numbers are needed by some losses only, and not written for the others:

    second   reverse KL: e - d_T, which keeps its digits where teacher and student are nearly equal.  Mixed KL: the c of
             reverse KL.  A divergence of two sweeps: its value, beside the sum of the student's slopes in the place of c.
    h        sum e^{(z - m_s)/T} (z - m_s), for the student's entropy

The tuples of disjoint sets of columns merge into the tuple of their union.  The merge is associative and commutative, and
has an identity.  So a row can be cut into tiles of a kernel, or shared by several programs: each part gives its tuple,
and the tuples merge.  A tensor of statistics is `[9, N]`, in the order below; each column of it is the tuple of one row.
"""

import torch
from torch import Tensor

M_S, D_1, D_T, M_T, E, C, LABEL, SECOND, H = range(9)
COUNT = 9  # numbers per row
# The unit of c.  A sum of 2^31 differences, each below 2^130, is less than 2^121 units.  Division by a power of two is
# exact.  UNIT is an int, since a float would become an input of every compiled graph.
UNIT = 2**40
# A row with a smaller reverse KL, in nats, gets e - d_T column by column.  The rounding of e and d_T is up to 4e-7 nats.
CLOSE = 1e-3
MAXIMA = slice(M_S, M_T + 1, M_T - M_S)  # (m_s, m_t), as a slice: a list of indices would be copied from the host


def identity(rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the statistics of an empty set of columns, `[9, rows]`.

    The maxima are the lowest finite number, so that two of them can be subtracted.
    """
    statistics = torch.zeros(COUNT, rows, dtype=dtype, device=device)
    statistics[MAXIMA] = torch.finfo(dtype).min
    return statistics


def merge(
    parts: Tensor,  # [S, 9, N]
    temperature: float,
    divergence: str = "forward_kl",  # or "reverse_kl", "mixed_kl"
) -> Tensor:  # [9, N]
    """Return the statistics of the union of S disjoint sets of columns.  Sums are taken in the order of the parts.

    The sums of a second sweep merge by addition.
    """
    maxima = parts[:, MAXIMA]
    merged_maxima = maxima.amax(0)
    ds, dt = torch.sub(maxima / UNIT, merged_maxima, alpha=1 / UNIT).unbind(1)  # [S, N] each, <= 0
    b = torch.exp(dt * (UNIT / temperature))
    a_1, a_T = torch.exp(ds * UNIT), torch.exp(ds * (UNIT / temperature))
    d_T, e = parts[:, D_T], parts[:, E]

    def moved(total: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        # A sum is infinite where one distribution has mass and the other has none.  Its product with a factor that has
        # underflowed to 0 would be NaN.
        return torch.where(factor > 0, factor * (total + shift), 0.0)

    first, second = parts[:, C], parts[:, SECOND]
    if divergence == "reverse_kl":
        first = moved(first, a_T, d_T * (ds - dt))
        # e b - d_T a_T, without the rounding of either product where both factors are nearly equal.
        log_ratio = (dt - ds) * (UNIT / temperature)
        near = moved(second, a_T, e * torch.expm1(log_ratio.clamp(max=1.0)))
        second = torch.where(log_ratio.abs() < 1, near, e * b - d_T * a_T)
    else:
        first = moved(first, b, e * (dt - ds))
        second = moved(second, a_T, d_T * (ds - dt)) if divergence == "mixed_kl" else torch.zeros_like(second)
    h = moved(parts[:, H], a_T, d_T * ds * UNIT)
    sums = [parts[:, D_1] * a_1, d_T * a_T, e * b, first, parts[:, LABEL], second, h]
    d_1, d_T, e, *others = torch.stack(sums).sum(1)
    return torch.stack([merged_maxima[0], d_1, d_T, merged_maxima[1], e, *others])


def round_to(
    statistics: Tensor,  # [9, N], written
    total: Tensor,  # [9, N], float64, merged
    temperature: float,
    divergence: str,
) -> None:
    """Round merged statistics.

    The value of reverse KL is c in nats plus `second`, in the first order of the difference of the models, where both
    nearly cancel.  So `second` takes up the rounding of c.
    """
    statistics.copy_(total)
    if divergence == "reverse_kl":
        lost = total[C] - statistics[C]
        statistics[SECOND] = torch.add(total[SECOND], lost, alpha=UNIT / temperature)


def statistics_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """Return float32, or float64 if an input is float64."""
    has_float64 = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    return torch.float64 if has_float64 else torch.float32
