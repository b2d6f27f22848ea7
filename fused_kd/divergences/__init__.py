"""The divergences of teacher and student: their definitions, their values and the coefficients of their gradients.

Let p and q be the probabilities of student and teacher at temperature T, u = z - m_s and v = y - m_t their logits relative
to the maximum of their row, and d_T and e the normalisers: p = e^{u/T} / d_T, q = e^{v/T} / e.

A Kullback-Leibler divergence takes one sweep over the logits.  It has the coefficients A, B, C, W and R of each row:

    forward KL   dL/dz[j] = A e^u + B e^{u/T} - C e^{v/T} - W [j = label]       dL/dy[j] = C e^{v/T} ((v - u)/T - R)
    reverse KL   dL/dz[j] = A e^u + B e^{u/T} ((u - v)/T - R) - W [j = label]   dL/dy[j] = C e^{v/T} - B e^{u/T}

R is the mean of the difference of the logits, (v - u)/T or (u - v)/T, under the distribution that the divergence averages
over.  The normalisers cancel, so no logarithm is needed.  A mixture of both has R for the first and S for the second.

Every other divergence D = sum_j f(p_j, q_j) needs the normalisers before it can be summed, so it takes a second sweep.
f is homogeneous, f(a p, a q) = a f(p, q), as in every f-divergence.  With the slopes G = p df/dp and K = q df/dq

    f = G + K     dL/dz[j] = A e^u + B d_T (G - p R) - W [j = label]     dL/dy[j] = C e (K - q S)

where R and S are the sums of G and K over the row.  G / p and K / q are functions of the log-ratio log(q / p) alone.  f
contains the multiple of p - q, which sums to 0, that makes both of them 0 where the log-ratio is 0.  So the value keeps its
digits even if teacher and student are nearly equal.  (TVD has no such multiple: its slope jumps.)

`coefficients` computes the numbers of each row from the merged statistics, the weights of the row and the temperature.
`backends/triton/elements.py` and `ratios.py` have the same functions for kernels.
"""

from .base import DIVERGENCES, Divergence, Ratio, Slopes, named, of
from .kullback_leibler import ForwardKL, KullbackLeibler, MixedKL, ReverseKL
from .objective import Coefficients, Objective, coefficients, cross_entropy, divergence_of, entropy, values
from .ratios import JSD, MixtureDivergence, SkewKL, SkewReverseKL, TotalVariation

__all__ = [
    "DIVERGENCES",
    "JSD",
    "Coefficients",
    "Divergence",
    "ForwardKL",
    "KullbackLeibler",
    "MixedKL",
    "MixtureDivergence",
    "Objective",
    "Ratio",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "Slopes",
    "TotalVariation",
    "coefficients",
    "cross_entropy",
    "divergence_of",
    "entropy",
    "named",
    "of",
    "values",
]
