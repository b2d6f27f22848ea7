"""The merge laws: whatever the cut and the order, the statistics of the parts merge to those of the whole."""

import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd import divergences, reference
from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.divergences import ForwardKL, MixedKL, Objective, ReverseKL

FORWARD_KL, REVERSE_KL, MIXED_KL = ForwardKL(), ReverseKL(), MixedKL(0.3)


def labels_of(logits):
    """A label for each row, in other parts of the columns."""
    rows, columns = logits.shape
    return 11 * torch.arange(rows) % columns


def objective_of(temperature, divergence):
    return Objective(temperature=temperature, divergence=divergence.name, parameters=divergence.parameters)


def of_columns(student, teacher, temperature, divergence=FORWARD_KL, columns=slice(None)):
    """The statistics of some columns; the label's logit is 0 if it is not among them."""
    rows, (first, end, _) = student.shape[0], columns.indices(student.shape[1])
    labels = labels_of(student) - first
    statistics, weights = student.new_empty(stats.COUNT, rows), torch.ones(3, rows, dtype=torch.float64)
    objective = objective_of(temperature, divergence)
    logits = (z[None, :, columns] for z in (student, teacher))
    cpu.row_statistics(*logits, labels, weights, statistics, None, objective, True)
    if divergence is FORWARD_KL:
        statistics[stats.SECOND] = 0  # it is not written
    statistics[stats.LABEL, (labels < 0) | (labels >= end - first)] = 0
    return statistics


def merged(parts, temperature, divergence=FORWARD_KL):
    return stats.merge(torch.stack(parts), temperature, divergence.name)


def exact_divergence(student, teacher, temperature, divergence):
    pairs = zip(divergence.weights, ((student, teacher), (teacher, student)), strict=True)
    return sum(share * reference.kl_divergence(*pair, temperature) for share, pair in pairs if share)


def logits(seed, scale, rows=3, columns=24):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2)]


CASES = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    "temperature": st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    "divergence": st.sampled_from([FORWARD_KL, REVERSE_KL, MIXED_KL]),
}


@settings(max_examples=60, deadline=None)
@given(**CASES, cuts=st.lists(st.integers(1, 23), unique=True, max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merge_to_the_whole_in_any_order(seed, scale, temperature, divergence, cuts, order):
    student, teacher = logits(seed, scale)
    edges = [0, *sorted(cuts), 24]
    parts = [of_columns(student, teacher, temperature, divergence, slice(a, b)) for a, b in pairwise(edges)]
    order.shuffle(parts)
    whole = of_columns(student, teacher, temperature, divergence)
    torch.testing.assert_close(merged(parts, temperature, divergence), whole, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_merge_is_associative_commutative_and_has_an_identity(seed, scale, temperature, divergence):
    student, teacher = logits(seed, scale)
    a, b, c = (of_columns(student, teacher, temperature, divergence, slice(i, i + 8)) for i in (0, 8, 16))

    def merge(*parts):
        return merged(parts, temperature, divergence)

    torch.testing.assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), rtol=1e-11, atol=1e-11)
    assert torch.equal(merge(a, b), merge(b, a))
    nothing = stats.identity(3, torch.float64)
    assert torch.equal(merge(a, nothing), a)
    assert torch.equal(merge(nothing, a), a)


def test_identity_survives_columns_that_are_all_masked():
    student, teacher = logits(0, 1.0)
    masked = torch.full_like(student, -torch.inf)
    whole = of_columns(student, teacher, 2.0)
    identity = stats.identity(3, torch.float64)
    assert torch.equal(stats.merge(torch.stack([identity, identity, whole]), 2.0), whole)
    assert torch.isnan(FORWARD_KL.value(of_columns(masked, masked, 2.0), 2.0)).all()


def test_identity_survives_maxima_further_apart_than_float32_reaches():
    lowest = torch.finfo(torch.float32).min
    whole = of_columns(torch.tensor([[1e38, 0.0]]), torch.tensor([[lowest, lowest]]), 2.0)
    assert torch.equal(stats.merge(torch.stack([stats.identity(1), whole]), 2.0), whole)


def test_parts_further_apart_than_float32_reaches_merge_to_the_whole():
    student = torch.tensor([[1e38, 0.0, -2.5e38, -3e38], [3e38, 3e38, -3e38, 3e38]])
    teacher = torch.tensor([[-2.5e38, -3e38, 1e38, 1e38], [1e38, 1e38, 1e38, 1e38]])
    for temperature, divergence in itertools.product((0.05, 1.0), (FORWARD_KL, REVERSE_KL, MIXED_KL)):
        parts = [of_columns(student, teacher, temperature, divergence, slice(i, i + 1)) for i in range(4)]
        whole = merged(parts, temperature, divergence)
        torch.testing.assert_close(whole, of_columns(student, teacher, temperature, divergence))
        expected = exact_divergence(student.double(), teacher.double(), temperature, divergence)
        torch.testing.assert_close(divergence.value(whole, temperature), expected, rtol=1e-6, atol=0)


def test_an_infinite_divergence_survives_a_merge_and_never_becomes_nan():
    student, teacher = logits(0, 1.0)
    student[0, 3] = -torch.inf
    student[1, 3] = -torch.inf
    teacher[1, :12] -= 1e5  # a part infinite by itself, of no weight beside the other
    parts = [of_columns(student, teacher, 1.0, columns=s) for s in (slice(0, 12), slice(12, 24))]
    kl = FORWARD_KL.value(merged(parts, 1.0), 1.0)
    assert kl[0] == torch.inf
    assert kl[1:].isfinite().all()
    parts = [of_columns(teacher, student, 1.0, REVERSE_KL, s) for s in (slice(0, 12), slice(12, 24))]
    assert torch.equal(REVERSE_KL.value(merged(parts, 1.0, REVERSE_KL), 1.0), kl)


def test_final_values():
    student, teacher = logits(1, 3.0)
    statistics = of_columns(student, teacher, 3.0)
    torch.testing.assert_close(
        FORWARD_KL.value(statistics, 3.0), reference.kl_divergence(student, teacher, 3.0), rtol=1e-12, atol=0
    )
    for divergence in (REVERSE_KL, MIXED_KL):
        value = divergence.value(of_columns(student, teacher, 3.0, divergence), 3.0)
        torch.testing.assert_close(value, exact_divergence(student, teacher, 3.0, divergence), rtol=1e-12, atol=0)
    distribution = torch.distributions.Categorical(logits=student / 3.0)
    torch.testing.assert_close(divergences.entropy(statistics, 3.0), distribution.entropy(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        divergences.cross_entropy(statistics),
        torch.nn.functional.cross_entropy(student, labels_of(student), reduction="none"),
        rtol=1e-12,
        atol=0,
    )


def row_weights(rows):
    return [torch.linspace(0.5, 2.0, rows, dtype=torch.float64), torch.linspace(1.0, 0.2, rows, dtype=torch.float64)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("divergence", [FORWARD_KL, REVERSE_KL, MIXED_KL], ids=lambda divergence: divergence.name)
def test_coefficients_give_the_gradient_of_both_logits(divergence, temperature):
    """The formulas at the head of `divergences.py`, as they stand there, against autograd."""
    student, teacher = (z.requires_grad_() for z in logits(2, 3.0))
    labels, (w_ce, w) = labels_of(student), row_weights(3)
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    expected = torch.autograd.grad(
        (w_ce * ce + w * exact_divergence(student, teacher, temperature, divergence)).sum(), (student, teacher)
    )
    z, y = student.detach(), teacher.detach()
    statistics = of_columns(z, y, temperature, divergence)
    objective = objective_of(temperature, divergence)
    statistics = statistics[:, :, None]
    A, B, C, W, R, S = divergences.coefficients(statistics, w_ce[:, None], w[:, None], objective)
    u, v = z - statistics[stats.M_S], y - statistics[stats.M_T]
    p, q, is_label = (u / temperature).exp(), (v / temperature).exp(), torch.nn.functional.one_hot(labels, 24)
    if divergence is FORWARD_KL:
        found = A * u.exp() + B * p - C * q - W * is_label, C * q * ((v - u) / temperature - R)
    elif divergence is REVERSE_KL:
        found = A * u.exp() + B * p * ((u - v) / temperature - R) - W * is_label, C * q - B * p
    else:
        a, b = divergence.weights
        of_student = a * (B * p - C * q) + b * B * p * ((u - v) / temperature - S)
        found = A * u.exp() + of_student - W * is_label, a * C * q * ((v - u) / temperature - R) + b * (C * q - B * p)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
