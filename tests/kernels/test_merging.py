"""The merge of a slab's statistics in a kernel, against `statistics.merge` in float64."""

import pytest
import torch

from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.backends import triton as kernels
from fused_kd.divergences import Objective

DIVERGENCES = ["forward_kl", "reverse_kl", "mixed_kl"]


def parts_of(divergence, temperature, rows, scale, slabs=3, columns=20):
    """The statistics of slabs of random logits, float32."""
    z, y = scale * torch.randn(2, slabs, rows, columns)
    objective = Objective(temperature=temperature, divergence=divergence)
    parts = torch.zeros(slabs, stats.COUNT, rows)
    weights = torch.ones(3, rows, dtype=torch.float64)
    labels = torch.arange(rows)
    for i, part in enumerate(parts):
        cpu.row_statistics(z[i][None], y[i][None], labels - i * columns, weights, part, None, objective, True)
    return parts, objective


def merged(parts, objective, entropy=True):
    total = stats.identity(parts.shape[2]).double().to(parts.device)
    for part in parts:
        kernels.merge_(total, part, None, 0, objective, entropy)
    return total


def by_the_formulas(parts, objective):
    """The same, slab by slab too: `second` of reverse KL is merged in another way where factors are nearly equal."""
    total = stats.identity(parts.shape[2]).double()
    for part in parts.double():
        total = stats.merge(torch.stack([total, part]), objective.temperature, objective.divergence)
    return total


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_slabs_merge_to_what_the_formulas_say(kernel_device, divergence, temperature, scale):
    parts, objective = parts_of(divergence, temperature, 150, scale)  # more rows than a program has
    expected = by_the_formulas(parts, objective)
    found = merged(parts.to(kernel_device), objective).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    operators = stats.identity(150).double()
    for part in parts:
        cpu.merge_(operators, part, None, 0, objective, True)
    torch.testing.assert_close(operators, expected, rtol=1e-12, atol=1e-12)
    found = merged(parts.to(kernel_device), objective, entropy=False).cpu()
    torch.testing.assert_close(found[: stats.H], expected[: stats.H], rtol=1e-12, atol=1e-12)
    assert not found[stats.H].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_logit_of_a_label_comes_from_the_slab_that_has_it(kernel_device, dtype):
    parts, objective = parts_of("forward_kl", 1.0, 4, 1.0)
    parts[:, stats.LABEL] = torch.arange(1.0, 1 + 4 * len(parts)).view(len(parts), 4)
    total = stats.identity(4).double().to(kernel_device)
    labels = torch.tensor([3, 10, -1, 22], dtype=dtype, device=kernel_device)  # of columns 0 to 19, ten per slab
    for i, part in enumerate(parts[:2].to(kernel_device)):
        kernels.merge_(total, part, labels - 10 * i, 10, objective, False)
    assert total[stats.LABEL].tolist() == [1.0, 6.0, 0.0, 0.0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes(kernel_device, divergence):
    """An infinite sum without weight beside the others adds nothing; one with weight, or a NaN, stays."""
    parts, objective = parts_of(divergence, 1.0, 4, 1.0)
    parts[0, stats.C], parts[0, stats.SECOND] = torch.inf, torch.inf if divergence == "mixed_kl" else 0.0
    parts[0, stats.MAXIMA, 0] -= 3e38
    parts[1, stats.D_1 : stats.D_T + 1, 2] = torch.nan
    parts[2, :, 3] = stats.identity(1)[:, 0]
    expected = by_the_formulas(parts, objective)
    found = merged(parts.to(kernel_device), objective).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[:, 0].isfinite().all()
    assert found[stats.C, [1, 3]].isposinf().all()
    assert found[stats.D_1 : stats.D_T + 1, 2].isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rounded_statistics_keep_a_small_reverse_kl(temperature):
    """The sum of c and `second` is rounded once where they cancel."""
    c, value = torch.linspace(1e-3, 1.9e-3, 1000, dtype=torch.float64), 5e-7
    total = stats.identity(1000).double()
    total[[stats.D_T, stats.E]] = 1.0
    total[stats.C], total[stats.SECOND] = temperature * c / stats.UNIT, value - c
    rounded = torch.zeros(stats.COUNT, 1000)
    stats.round_to(rounded, total, temperature, "reverse_kl")
    found = rounded[stats.C].double() * (stats.UNIT / temperature) + rounded[stats.SECOND].double()
    assert (found - value).abs().max() <= 2.0**-34  # half the step of float32 below 2^-9
