"""The kernels on one or a few numbers per row, against the same in PyTorch: weights, losses, scaling, units, copies."""

import itertools
import math

import pytest
import torch

from fused_kd import rows
from fused_kd import statistics as stats
from fused_kd.backends import triton as kernels
from fused_kd.divergences import Objective, divergence_of
from fused_kd.rows import CE, DIVERGENCE, NEGLIGIBLE, ROW, RowOptions

IGNORED = -100
VOCABULARY = 50
SIZES = [0, 1, 1000, 5000]
NAN = math.nan


def options(N, **others):
    usual = {"mean": True, "alpha": 0.3, "num_items": None, "temperature": 2.5, "sequence": 0}
    return RowOptions(**{"rows": N, "vocabulary": VOCABULARY, "ignore_index": IGNORED, **usual, **others})


def check_weights(labels, token_weights, alpha, num_items, device, given):
    """Compare with `rows.row_weights`, and with the same launch again."""
    like = torch.empty(0, device=device)
    weights, new_labels = kernels.row_weights(labels, token_weights, alpha, num_items, like, given)
    expected, expected_labels = rows.row_weights(labels, token_weights, alpha, num_items, like, given)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0, equal_nan=True)
    if given.sequence:
        assert new_labels.dtype == labels.dtype
        assert torch.equal(new_labels, expected_labels)
    else:
        assert new_labels.shape == (0,)
    again, _ = kernels.row_weights(labels, token_weights, alpha, num_items, like, given)
    assert torch.equal(again.view(torch.int64), weights.view(torch.int64))
    return weights


def some_labels(N, device, dtype=torch.int64):
    labels = torch.randint(VOCABULARY, (N,), device=device, dtype=dtype)
    labels[1::3] = IGNORED
    return labels


LABELS = {"none": None, "i64": torch.int64, "i32": torch.int32}
TOKEN_WEIGHTS = {"none": None, "f32": torch.float32, "bf16": torch.bfloat16, "int": torch.int64, "bool": torch.bool}
ALPHAS = {"number": None, "scalar": torch.float32, "per row": torch.float64}
DIVISORS = {
    "sum": (False, None, None),
    "mean": (True, None, None),
    "number": (True, 37.5, None),
    "tensor": (True, None, torch.tensor(41)),
}


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("shifted", [False, True])
def test_row_weights_are_those_of_the_operators(kernel_device, N, divisor, shifted):
    mean, number, tensor = DIVISORS[divisor]
    cases = list(itertools.product(LABELS.values(), TOKEN_WEIGHTS.values(), ALPHAS.values()))
    for labels_dtype, token_dtype, alpha_dtype in cases if N < 5000 else cases[::7]:
        if shifted and labels_dtype is None:
            continue
        labels = None if labels_dtype is None else some_labels(N, kernel_device, labels_dtype)
        token_weights = None if token_dtype is None else (3 * torch.rand(N, device=kernel_device)).to(token_dtype)
        alpha = None if alpha_dtype is None else torch.rand((), dtype=alpha_dtype, device=kernel_device)
        if alpha_dtype is torch.float64:
            alpha = torch.rand(N, dtype=alpha_dtype, device=kernel_device)
        num_items = None if tensor is None else tensor.to(kernel_device)
        sequence = max(1, N // 10) if shifted else 0
        given = options(N, mean=mean, num_items=number, sequence=sequence)
        check_weights(labels, token_weights, alpha, num_items, kernel_device, given)


def test_values_per_row_may_have_any_stride(kernel_device):
    labels, values = some_labels(10, kernel_device), torch.rand(20, device=kernel_device)
    check_weights(labels, values[::2], values[1::2], None, kernel_device, options(10))
    check_weights(labels, values[:1].expand(10), values[1:2].expand(10), None, kernel_device, options(10, sequence=5))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_a_number_keeps_its_53_bits(kernel_device, alpha):
    labels = some_labels(10, kernel_device)
    given = options(10, alpha=alpha, num_items=1 / 3, temperature=1.1)
    weights = check_weights(labels, None, None, None, kernel_device, given)
    assert weights[CE, 0] == 3 * (1 - alpha)
    assert weights[DIVERGENCE, 0] == 3 * (alpha * 1.1**2)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bad", ["label", "low label", "alpha", "alpha of a row", "token weight", "infinite weight"])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_wrong_values_make_rows_nan(kernel_device, bad, divisor, shifted):
    N, at = 12, 4  # not the first of a sequence
    mean, number, tensor = DIVISORS[divisor]
    labels, token_weights, alpha = torch.arange(N), torch.rand(N), torch.rand(N)
    labels[7] = IGNORED
    if "label" in bad:
        labels[at] = VOCABULARY if bad == "label" else -1
    elif bad == "alpha of a row":
        alpha[at] = 1.5
    elif bad == "alpha":
        alpha = torch.tensor(-0.1)
    else:
        token_weights[at] = NAN if bad == "token weight" else math.inf
    num_items = None if tensor is None else tensor.to(kernel_device)
    arguments = (tensor.to(kernel_device) for tensor in (labels, token_weights, alpha))
    given = options(N, mean=mean, num_items=number, sequence=6 if shifted else 0)
    weights = check_weights(*arguments, num_items, kernel_device, given)
    assert not weights[:, at - shifted].isfinite().all()


@pytest.mark.parametrize("num_items", [-1.0, math.inf, NAN, 0.0, -0.0, 3.0])
@pytest.mark.parametrize("counts", [True, False])
def test_a_num_items_that_no_check_has_seen(kernel_device, num_items, counts):
    labels = torch.full((9,), 3 if counts else IGNORED, device=kernel_device)
    tensor = torch.tensor([num_items], device=kernel_device)
    weights = check_weights(labels, None, None, tensor, kernel_device, options(9))
    wrong = not 0 <= num_items < math.inf or (num_items == 0 and counts)
    assert bool(weights.isnan().all()) == wrong


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rows_that_do_not_count_have_no_divisor(kernel_device, weight):
    labels = torch.full((9,), IGNORED, device=kernel_device)
    token_weights = torch.full((9,), weight, device=kernel_device)
    weights = check_weights(labels, token_weights, None, None, kernel_device, options(9))
    assert torch.equal(weights, torch.zeros_like(weights))


def test_weights_that_cancel_have_no_mean(kernel_device):
    token_weights = torch.tensor([1.0, -1.0, 0.0], device=kernel_device)
    weights = check_weights(None, token_weights, None, None, kernel_device, options(3))
    assert weights[:, :2].isnan().all()
    assert (weights[:, 2] == 0).all()


def some_statistics(N, device):
    """Return statistics of rows at random, weights, and both between rows of memory that belong to others."""
    memory = torch.full((stats.COUNT, N + 5), NAN, device=device)
    statistics = memory[:, 2 : N + 2]
    statistics[stats.M_S : stats.E] = 5 * torch.randn(4, N, device=device)
    for normaliser in (stats.D_1, stats.D_T, stats.E):
        statistics[normaliser] = 1 + 100 * torch.rand(N, device=device)
    statistics[stats.C] = torch.randn(N, device=device) / stats.UNIT
    statistics[stats.LABEL] = torch.randn(N, device=device)
    statistics[stats.SECOND] = torch.randn(N, device=device)
    statistics[stats.H] = -100 * torch.rand(N, device=device)
    memory = torch.full((3, N + 7), NAN, dtype=torch.float64, device=device)
    weights = memory[:, 1 : N + 1]
    weights.copy_(torch.rand(3, N, device=device))
    weights[:, 1::5] = 0
    return statistics, weights


def expected_losses(statistics, weights, has_ce, has_divergence, parts, reduce, objective):
    ce = divergence = entropy = torch.zeros_like(weights[ROW])
    if has_ce:
        ce = statistics[stats.D_1].double().log() - (statistics[stats.LABEL].double() - statistics[stats.M_S].double())
    if has_divergence:
        divergence = divergence_of(objective).value(statistics, objective.temperature)
    if parts:
        d_T, h = statistics[stats.D_T].double(), statistics[stats.H].double()
        entropy = d_T.log() - h / (objective.temperature * d_T)
    loss = rows.weighted_values(weights[CE], ce) + rows.weighted_values(weights[DIVERGENCE], divergence)
    of_parts = [rows.weighted_values(weights[ROW], value) for value in (ce, divergence, entropy)]
    nothing = loss.new_empty(0)
    wanted = zip(of_parts, (has_ce, has_divergence, True), strict=True)
    results = [loss, *(part if parts and has else nothing for part, has in wanted)]
    return [result.sum() if reduce and result is not nothing else result for result in results]


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl", "jsd"])
def test_row_losses_are_those_of_the_operators(kernel_device, N, reduce, divergence):
    statistics, weights = some_statistics(N, kernel_device)
    if divergence == "mixed_kl":
        statistics[stats.SECOND] /= stats.UNIT
    statistics[stats.SECOND, ::2] *= 1e-9  # as where teacher and student are close
    statistics[stats.C, ::2] *= 1e-9
    objective = Objective(temperature=2.5, divergence=divergence, parameters=(0.3,) if divergence == "mixed_kl" else ())
    for has_ce, has_divergence, parts, dtype in itertools.product(
        [True, False], [True, False], [True, False], [torch.float32, torch.float64]
    ):
        terms = has_ce, has_divergence
        counter = torch.zeros(1, 32, dtype=torch.int32, device=kernel_device)
        results = kernels.row_losses(statistics, weights, counter, *terms, reduce, parts, dtype, objective)
        expected = expected_losses(statistics, weights, *terms, parts, reduce, objective)
        for result, other in zip(results, expected, strict=True):
            assert result.dtype == dtype
            assert result.shape == other.shape
            tolerance = 1e-13 if dtype is torch.float64 else 1e-7
            torch.testing.assert_close(result.double(), other, rtol=tolerance, atol=tolerance)
        addresses = {result.data_ptr() for result in results if result.numel()}
        assert len(addresses) == sum(result.numel() > 0 for result in results)
        counter.zero_()
        again = kernels.row_losses(statistics, weights, counter, *terms, reduce, parts, dtype, objective)
        assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


def test_reverse_kl_of_close_models_keeps_its_digits(kernel_device):
    statistics, weights = some_statistics(60, kernel_device)
    statistics[stats.SECOND] = statistics[stats.D_T] * torch.logspace(-30, -0.302, 60, device=kernel_device)
    statistics[stats.SECOND, ::2] *= -1
    statistics[stats.C], weights[:] = 0, 1
    objective = Objective(divergence="reverse_kl")
    terms = False, True, False, True, torch.float64
    _, _, found, _ = kernels.row_losses(statistics, weights, None, *terms, objective)
    expected = (statistics[stats.SECOND].double() / statistics[stats.D_T].double()).log1p()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("weight", [0.0, rows.LEARNED_ZERO, 2 * NEGLIGIBLE])
def test_a_weight_of_zero_hides_what_is_not_finite(kernel_device, reduce, weight):
    """An infinite CE, an infinite divergence, and statistics that nobody has written."""
    statistics, weights = some_statistics(3, kernel_device)
    statistics[stats.LABEL, 0] = -math.inf
    statistics[stats.C, 1] = math.inf
    statistics[:, 2] = NAN
    weights.fill_(weight)
    counter = torch.zeros(32, dtype=torch.int32, device=kernel_device)
    results = kernels.row_losses(statistics, weights, counter, *[True] * 2, reduce, True, torch.float64, Objective())
    if weight < NEGLIGIBLE:
        assert all(torch.equal(result, torch.zeros_like(result)) for result in results)
    elif reduce:
        assert all(result.isnan() for result in results)
    else:
        inf = math.inf
        expected = [[inf, inf, NAN], [inf, 0, NAN], [0, inf, NAN], [0, 0, NAN]]
        torch.testing.assert_close(
            torch.stack(results).cpu(), torch.tensor(expected).double(), rtol=0, atol=1e-230, equal_nan=True
        )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scaled(source, factors, dtype):
    product = math.prod(float(factor) for factor in factors)
    return (source.float() * torch.tensor(product, dtype=torch.float64).float()).to(dtype)


def sources(device):
    """Tensors of one to three dimensions, contiguous and not: a bias, weights, logits, rows, a padded row."""
    yield from (torch.randn(shape, device=device) for shape in ((1,), (5000,), (30, 60), (2, 3, 1500)))
    yield torch.randn(2, 5, 1504, device=device)[:, :4, :1500]
    yield torch.randn(300, 4, device=device).T
    yield torch.randn(1, 1, 40, device=device)[..., ::2]
    yield torch.randn(3, 0, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [(1 / 3,), (1.0,), (4.0, 0.25), (3.0, -0.7)])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
def test_scale_in_place(kernel_device, dtype, values, factor_dtype):
    factors = [torch.tensor(value, dtype=factor_dtype, device=kernel_device) for value in values]
    for source in sources(kernel_device):
        source = source.to(dtype) if source.is_contiguous() else source  # .to would close gaps
        expected = scaled(source, factors, source.dtype)
        memory = source.as_strided((source.untyped_storage().nbytes() // source.element_size(),), (1,), 0)
        before, inside = memory.clone(), torch.zeros(memory.shape, dtype=torch.bool, device=kernel_device)
        inside.as_strided(source.shape, source.stride()).fill_(True)
        kernels.scale_(source, factors, source)
        assert torch.equal(source, expected)
        assert torch.equal(memory[~inside], before[~inside])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("values", [(1 / 3,), (1.0,), (3.0, -0.7)])
def test_scale_into_another_tensor(kernel_device, dtype, target_dtype, values):
    factors = [torch.tensor(value, device=kernel_device) for value in values]
    for source in sources(kernel_device):
        source = source.to(dtype)
        before = source.clone()
        for target in (
            torch.full_like(source, NAN, dtype=target_dtype, memory_format=torch.contiguous_format),
            torch.full((*source.shape, 3), NAN, dtype=target_dtype, device=kernel_device)[..., 1],
        ):
            kernels.scale_(source, factors, target)
            assert torch.equal(target, scaled(source, factors, target_dtype))
            assert torch.equal(source, before)


def test_in_place_a_product_of_one_changes_no_bit(kernel_device):
    """Not even that of a signalling NaN, which a multiplication would."""
    source = torch.tensor([0x7F800001, -1, 0x3F800000], dtype=torch.int32, device=kernel_device).view(torch.float32)
    before = source.view(torch.int32).clone()
    kernels.scale_(source, [torch.tensor(8.0, device=kernel_device), torch.tensor(0.125, device=kernel_device)], source)
    assert torch.equal(source.view(torch.int32), before)


def expected_unit(weights, ce_slope, divergence_slope):
    """Return the unit that `heads.sweep` defines."""
    largest = ce_slope * weights[CE].abs() + divergence_slope * weights[DIVERGENCE].abs()
    largest = max([0.0, *(value for value in largest.tolist() if math.isfinite(value))])
    return 2.0 ** (math.frexp(largest)[1] - 1) / 2**8 if largest > NEGLIGIBLE else 1.0


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("upstream", ["none", "scalar", "per row", "expanded"])
@pytest.mark.parametrize("slopes", [(1.0, 0.4), (2.5, 32.0)])
def test_unit_weights(kernel_device, N, upstream, slopes):
    _, weights = some_statistics(N, kernel_device)
    weights /= 1000
    factor = None if upstream == "none" else torch.randn((N,) if upstream == "per row" else (), device=kernel_device)
    if upstream == "expanded":  # as the gradient of a sum of row losses is
        factor = torch.randn(1, device=kernel_device).expand(N)
    for odd in (None, NAN, math.inf):
        if odd is not None and N > 1:
            weights[CE, N // 2] = odd
        found, unit = kernels.unit_weights(weights, factor, *slopes)
        expected = weights if factor is None else weights * factor.double()
        assert unit.shape == ()
        assert unit.dtype == found.dtype == torch.float64
        assert unit.item() == expected_unit(expected, *slopes)
        torch.testing.assert_close(found, expected / unit, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weight", [0.0, rows.LEARNED_ZERO, 2.0**-40, 1.0, math.nextafter(2.0, 0)])
def test_the_unit_is_the_power_of_two_below(kernel_device, weight):
    weights = torch.full((3, 2), weight, dtype=torch.float64, device=kernel_device)
    _, unit = kernels.unit_weights(weights, None, 1.0, 0.0)
    assert unit.item() == expected_unit(weights, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 64, 1500])
def test_copy_counted(kernel_device, dtype, target_dtype, H):
    N = 20
    _, weights = some_statistics(N, kernel_device)
    weights[CE, 2] = weights[DIVERGENCE, 3] = 0.0  # counts for one term
    weights[CE:, 4] = rows.LEARNED_ZERO
    counts = (weights[CE].abs() + weights[DIVERGENCE].abs() > NEGLIGIBLE)[:, None]
    assert counts.sum() == 15
    values = torch.randn(N, H + 3, device=kernel_device).to(dtype)[:, :H]
    hidden = torch.where(counts, values, NAN)
    for source in (hidden, hidden.T.contiguous().T):
        target = torch.full((N, H), NAN, dtype=target_dtype, device=kernel_device)
        kernels.copy_counted(source, weights, target)
        assert torch.equal(target, torch.where(counts, values, 0.0).to(target_dtype))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_copy_counted_of_nothing(kernel_device, shape):
    hidden = torch.empty(shape, device=kernel_device)
    weights = torch.ones(3, shape[0], dtype=torch.float64, device=kernel_device)
    kernels.copy_counted(hidden, weights, torch.empty_like(hidden))
