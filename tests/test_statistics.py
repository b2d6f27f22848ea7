"""The merge laws: whatever the cut and the order, the statistics of the parts merge to those of the whole."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd.backends import cpu


def of_columns(student, teacher, temperature):
    ones = torch.ones(student.shape[0], dtype=student.dtype)
    return cpu.row_statistics(student[None], teacher[None], ones, ones, temperature, True)[0]


def logits(seed, scale, rows=3, columns=24):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2)]


CASES = {
    "seed": st.integers(0, 10**6),
    "scale": st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    "temperature": st.sampled_from([0.5, 1.0, 2.0, 7.0]),
}


@settings(max_examples=60, deadline=None)
@given(**CASES, cuts=st.lists(st.integers(1, 23), unique=True, max_size=5), order=st.randoms(use_true_random=False))
def test_parts_merge_to_the_whole_in_any_order(seed, scale, temperature, cuts, order):
    student, teacher = logits(seed, scale)
    edges = [0, *sorted(cuts), 24]
    parts = [of_columns(student[:, a:b], teacher[:, a:b], temperature) for a, b in pairwise(edges)]
    order.shuffle(parts)
    merged = stats.merge(torch.stack(parts), temperature)
    torch.testing.assert_close(merged, of_columns(student, teacher, temperature), rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_merge_is_associative_commutative_and_has_an_identity(seed, scale, temperature):
    student, teacher = logits(seed, scale)
    a, b, c = (of_columns(student[:, i : i + 8], teacher[:, i : i + 8], temperature) for i in (0, 8, 16))

    def merge(*parts):
        return stats.merge(torch.stack(parts), temperature)

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
    assert torch.isnan(stats.kl_divergence(of_columns(masked, masked, 2.0), 2.0)).all()


def test_identity_survives_maxima_further_apart_than_float32_reaches():
    lowest = torch.finfo(torch.float32).min
    whole = of_columns(torch.tensor([[1e38, 0.0]]), torch.tensor([[lowest, lowest]]), 2.0)
    assert torch.equal(stats.merge(torch.stack([stats.identity(1), whole]), 2.0), whole)


def test_parts_further_apart_than_float32_reaches_merge_to_the_whole():
    student = torch.tensor([[1e38, 0.0, -2.5e38, -3e38], [3e38, 3e38, -3e38, 3e38]])
    teacher = torch.tensor([[-2.5e38, -3e38, 1e38, 1e38], [1e38, 1e38, 1e38, 1e38]])
    for temperature in (0.05, 1.0):
        parts = [of_columns(student[:, [i]], teacher[:, [i]], temperature) for i in range(4)]
        merged = stats.merge(torch.stack(parts), temperature)
        torch.testing.assert_close(merged, of_columns(student, teacher, temperature))
        kl = stats.kl_divergence(merged, temperature)
        expected = reference.kl_divergence(student.double(), teacher.double(), temperature)
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)


def test_an_infinite_divergence_survives_a_merge_and_never_becomes_nan():
    student, teacher = logits(0, 1.0)
    student[0, 3] = -torch.inf
    student[1, 3] = -torch.inf
    teacher[1, :12] -= 1e5  # a part infinite by itself, of no weight beside the other
    parts = [of_columns(student[:, s], teacher[:, s], 1.0) for s in (slice(0, 12), slice(12, 24))]
    kl = stats.kl_divergence(stats.merge(torch.stack(parts), 1.0), 1.0)
    assert kl[0] == torch.inf
    assert kl[1:].isfinite().all()


def test_final_values():
    student, teacher = logits(1, 3.0)
    statistics = of_columns(student, teacher, 3.0)
    torch.testing.assert_close(
        stats.kl_divergence(statistics, 3.0), reference.kl_divergence(student, teacher, 3.0), rtol=1e-12, atol=0
    )
    labels = torch.tensor([0, 5, 23])
    torch.testing.assert_close(
        stats.cross_entropy(statistics, student.gather(1, labels[:, None])[:, 0]),
        torch.nn.functional.cross_entropy(student, labels, reduction="none"),
        rtol=1e-12,
        atol=0,
    )
