"""Row statistics: the six numbers that say all the loss needs of a set of columns, their merge and their final values.

With z, y the logits of student and teacher and T the temperature, over any set of columns:

    m_s = max z    d_1 = sum e^{z - m_s}        d_T = sum e^{(z - m_s)/T}
    m_t = max y    e   = sum e^{(y - m_t)/T}    c   = sum e^{(y - m_t)/T} ((y - m_t) - (z - m_s)) / UNIT

The unit of c keeps its sum finite: logits of either sign up to 3.4e38 differ by more than float32 holds.
Tuples of disjoint columns merge into the tuple of their union: an associative and commutative operation with an
identity.  A tile of a kernel, programs that share a row, ranks that share a vocabulary are all "statistics, merge".
A tensor of statistics is `[6, N]`, in the order below; a column of it is one row's tuple.  Final values are taken in
float64, which costs nothing on [N] numbers and keeps the rounding of a logarithm near 12 out of the loss.
"""

import torch
from torch import Tensor

M_S, D_1, D_T, M_T, E, C = range(6)
UNIT = 2.0**40  # of c: a sum of 2^31 differences, each below 2^130, is below 2^121 of it; a power of two rounds nothing
MAXIMA = slice(M_S, M_T + 1, M_T - M_S)  # (m_s, m_t), as a slice: a list of indices would be copied from the host


def identity(rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """`[6, rows]`: the statistics of no columns.  The maxima are the lowest finite number, so they may be subtracted."""
    statistics = torch.zeros(6, rows, dtype=dtype, device=device)
    statistics[MAXIMA] = torch.finfo(dtype).min
    return statistics


def merge(
    parts: Tensor,  # [S, 6, N]
    temperature: float,
) -> Tensor:  # [6, N]
    """The statistics of the union of S disjoint sets of columns; the order of summation is that of the parts."""
    if parts.shape[0] == 1:
        return parts[0]
    maxima = parts[:, MAXIMA]
    merged_maxima = maxima.amax(0)
    ds, dt = torch.sub(maxima / UNIT, merged_maxima, alpha=1 / UNIT).unbind(1)  # [S, N] each, <= 0
    b = torch.exp(dt * (UNIT / temperature))
    # An infinite c (teacher mass where the student has none) must not meet a factor that underflowed to zero.
    c = torch.where(b > 0, b * (parts[:, C] + parts[:, E] * (dt - ds)), 0.0)
    a_1, a_T = torch.exp(ds * UNIT), torch.exp(ds * (UNIT / temperature))
    sums = [parts[:, D_1] * a_1, parts[:, D_T] * a_T, parts[:, E] * b, c]
    d_1, d_T, e, c = torch.stack(sums).sum(1)
    return torch.stack([merged_maxima[0], d_1, d_T, merged_maxima[1], e, c])


def cross_entropy(
    statistics: Tensor,  # [6, N]
    label_logit: Tensor,  # [N], the student's logit of the label
) -> Tensor:  # [N], float64
    """-log softmax(z)[label] at temperature 1, in nats."""
    return statistics[D_1].double().log() - (label_logit.double() - statistics[M_S].double())


def kl_divergence(
    statistics: Tensor,  # [6, N]
    temperature: float | Tensor,
) -> Tensor:  # [N], float64
    """KL(softmax(y / T) || softmax(z / T)), in nats.

    Both sums count from their maxima and lie in [1, V], so the logarithm of their ratio, unlike the difference of two
    logarithms, loses nothing where teacher and student are close.
    """
    _, _, d_T, _, e, c = statistics.double()
    scale, kl = UNIT / temperature, (d_T / e).log()
    kl = kl + c / e * scale if isinstance(scale, Tensor) else torch.addcdiv(kl, c, e, value=scale)
    return kl
