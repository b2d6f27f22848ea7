"""Row statistics: seven numbers that hold everything the loss needs to know about a set of columns, and their merge.

Let z and y be the logits of student and teacher and T the temperature.  For any set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}        d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}    c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT
    label = z of the row's label, or 0 if the label is not among the columns

This is the c of forward KL.  Reverse KL exchanges student and teacher:

    c   = sum e^{(z - m_s)/T} ((z - m_s) - (y - m_t)) / UNIT

The unit keeps c finite.  Logits reach 3.4e38 in size, so the difference of two of them may exceed what float32 holds.

The tuples of disjoint sets of columns merge into the tuple of their union.  The merge is associative and commutative, and
has an identity.  So a row can be cut into tiles of a kernel, or shared by several programs: each part gives its tuple,
and the tuples merge.  A tensor of statistics is `[7, N]`, in the order below; each column of it is the tuple of one row.
"""

import torch
from torch import Tensor

M_S, D_1, D_T, M_T, E, C, LABEL = range(7)
COUNT = 7  # numbers per row
# The unit of c.  A sum of 2^31 differences, each below 2^130, is less than 2^121 units.  Division by a power of two is
# exact.  UNIT is an int, since a float would become an input of every compiled graph.
UNIT = 2**40
MAXIMA = slice(M_S, M_T + 1, M_T - M_S)  # (m_s, m_t), as a slice: a list of indices would be copied from the host


def identity(rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the statistics of an empty set of columns, `[7, rows]`.

    The maxima are the lowest finite number, so that two of them can be subtracted.
    """
    statistics = torch.zeros(COUNT, rows, dtype=dtype, device=device)
    statistics[MAXIMA] = torch.finfo(dtype).min
    return statistics


def merge(
    parts: Tensor,  # [S, 7, N]
    temperature: float,
    mass: int = E,  # index of the normaliser of the distribution that c averages over; D_T for reverse KL
) -> Tensor:  # [7, N]
    """Return the statistics of the union of S disjoint sets of columns.  Sums are taken in the order of the parts."""
    if parts.shape[0] == 1:
        return parts[0]
    maxima = parts[:, MAXIMA]
    merged_maxima = maxima.amax(0)
    ds, dt = torch.sub(maxima / UNIT, merged_maxima, alpha=1 / UNIT).unbind(1)  # [S, N] each, <= 0
    b = torch.exp(dt * (UNIT / temperature))
    a_1, a_T = torch.exp(ds * UNIT), torch.exp(ds * (UNIT / temperature))
    factor, shift = (b, dt - ds) if mass == E else (a_T, ds - dt)
    # c is infinite where one distribution has mass and the other has none.  Its product with a factor that has underflowed
    # to 0 would be NaN.
    c = torch.where(factor > 0, factor * (parts[:, C] + parts[:, mass] * shift), 0.0)
    sums = [parts[:, D_1] * a_1, parts[:, D_T] * a_T, parts[:, E] * b, c]
    d_1, d_T, e, c = torch.stack(sums).sum(1)
    return torch.stack([merged_maxima[0], d_1, d_T, merged_maxima[1], e, c, parts[:, LABEL].sum(0)])


def statistics_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """Return float32, or float64 if an input is float64."""
    has_float64 = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    return torch.float64 if has_float64 else torch.float32
