"""Each kernel on its own, at block shapes and splits of every kind, against the formulas in float64."""

import inspect
import sys

import pytest
import torch
import triton
import triton.language as tl

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd.backends import triton as kernels
from fused_kd.backends.triton import elements
from fused_kd.backends.triton.arguments import divergence_number
from fused_kd.backends.triton.tiles import LINE, Scalars, Statistics
from fused_kd.divergences import Objective, coefficients, of
from fused_kd.launch import Launch, two_passes
from fused_kd.logit_map import IDENTITY_MAP, LogitMap

from ..oracle import relative_error

LANES, K = 32, 8
TILE = LANES * K
NAMES = ["forward_kl", "reverse_kl", "mixed_kl"]  # of one sweep
SHARES = {"forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0), "mixed_kl": (0.7, 0.3)}  # of forward and of reverse KL
PARAMETERS = {"mixed_kl": (0.3,)}


def launch(vocabulary, splits):
    columns = -(-vocabulary // (splits * TILE)) * TILE
    return Launch(LANES, K, 1, splits, columns)  # more splits than tiles: the last ones have no columns


def given(device, vocabulary, rows=3, student_dtype=torch.float32, pad=0):
    student = 3 * torch.randn(1, rows, vocabulary + pad).to(student_dtype).to(device)[..., :vocabulary]
    teacher = 3 * torch.randn(1, rows, vocabulary).to(device)
    weights = torch.rand(rows, device=device) + 0.5
    return student, teacher, weights, 1 - 0.5 * weights


def objective(temperature, divergence="forward_kl", maps=()):
    parameters = PARAMETERS.get(divergence, ())
    return Objective(*maps or (IDENTITY_MAP, IDENTITY_MAP), temperature, divergence, parameters)


def value_of(statistics, temperature, divergence):
    """Return the divergence of each row, as PyTorch computes it from the statistics."""
    return of(divergence, PARAMETERS.get(divergence, ())).value(statistics, temperature)


def some_columns(count, rows, dtype, device):
    """Return NaN, [count, rows], as numbers of a chunk of rows lie in those of all rows."""
    return torch.full((count, rows + 5), torch.nan, dtype=dtype, device=device)[:, 2 : rows + 2]


def weights_of(ce, kl):
    """Return the weights of the rows, [3, N].  That of the row itself is not used by the sweeps."""
    weights = some_columns(3, ce.shape[0], torch.float64, ce.device)
    weights[1], weights[2] = ce, kl
    return weights


def statistics_of(
    student, teacher, labels, temperature, divergence=NAMES[0], *, weights=None, maps=(), counters=None,
    entropy=False, **options,
):  # fmt: skip
    """Return the statistics of each row; without weights all rows count."""
    N = student.shape[0] * student.shape[1]
    statistics = some_columns(stats.COUNT, N, torch.float32, student.device)
    if weights is None:
        weights = weights_of(*torch.ones(2, N, device=student.device))
    arguments = student, teacher, labels, weights, statistics, counters, objective(temperature, divergence, maps)
    kernels.row_statistics(*arguments, entropy, **options)
    return statistics


def written(statistics, divergence, entropy=False):
    """Return the numbers that a loss needs, after a check that the sweep has written 0 to the others."""
    wanted = {*range(stats.SECOND), *[stats.SECOND] * (divergence != "forward_kl"), *[stats.H] * entropy}
    assert not statistics[[index for index in range(stats.COUNT) if index not in wanted]].any()
    return statistics[sorted(wanted)]


def gradients_of(
    student, teacher, labels, ce, kl, temperature, divergence, *, teacher_grad=False, maps=(), upstream=None,
    entropy=False, **options,
):  # fmt: skip
    """Return the statistics, the student's gradient and, if it is wanted, the teacher's."""
    weights = weights_of(ce, kl)
    statistics = statistics_of(
        student, teacher, labels, temperature, divergence, weights=weights, maps=maps, entropy=entropy, **options
    )
    gradient = torch.full_like(student, torch.nan)
    of_teacher = torch.full_like(teacher, torch.nan) if teacher_grad else None
    kernels.logit_gradient(
        student, teacher, labels, statistics, weights, upstream, gradient, of_teacher,
        objective(temperature, divergence, maps), **options,
    )  # fmt: skip
    return statistics, gradient, of_teacher


def exact_statistics(student, teacher, labels, temperature, divergence):
    """Return those of the definition, in float64; NaN where nothing is written."""
    z, y = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
    u, v = z - z.amax(1, keepdim=True), y - y.amax(1, keepdim=True)
    p, q = (u / temperature).exp(), (v / temperature).exp()
    forward, reverse = (q * (v - u)).sum(1) / stats.UNIT, (p * (u - v)).sum(1) / stats.UNIT
    c, second = {
        "forward_kl": (forward, torch.zeros_like(forward)),
        "reverse_kl": (reverse, q.sum(1) - p.sum(1)),
        "mixed_kl": (forward, reverse),
    }[divergence]
    label, h = z.gather(1, labels.long()[:, None])[:, 0], (p * u).sum(1)
    return torch.stack([z.amax(1), u.exp().sum(1), p.sum(1), y.amax(1), q.sum(1), c, label, second, h])


def sizes_of(exact, temperature, divergence):
    """Return the sizes that the errors of the statistics are relative to: c is a difference of logits."""
    sizes = exact.abs()
    of_student, of_teacher = exact[stats.D_T] * (temperature / stats.UNIT), exact[stats.E] * (temperature / stats.UNIT)
    sizes[stats.C] += of_student if divergence == "reverse_kl" else of_teacher
    sizes[stats.SECOND] += of_student if divergence == "mixed_kl" else exact[stats.D_T] + exact[stats.E]
    return sizes


def exact_divergence(student, teacher, temperature, divergence):
    """Return it from the formula, in float64."""
    student, teacher = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
    pairs = zip(SHARES[divergence], ((student, teacher), (teacher, student)), strict=True)
    return sum(share * reference.kl_divergence(*pair, temperature) for share, pair in pairs if share)


def exact_gradients(student, teacher, labels, ce, kl, temperature, divergence):
    """Return those of student and teacher, by autograd in float64."""
    student, teacher = (logits.double().requires_grad_() for logits in (student, teacher))
    loss = (kl.double() * exact_divergence(student, teacher, temperature, divergence)).sum()
    if labels is not None:
        rows = torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.long(), reduction="none")
        loss = loss + (ce.double() * rows).sum()
    return torch.autograd.grad(loss, (student, teacher))


SIZES = [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 5 * TILE + 17]  # below, at and above one tile; whole tiles only


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize(("divergence", "entropy"), [*((name, False) for name in NAMES[:2]), (NAMES[2], True)])
def test_row_statistics(kernel_device, vocabulary, splits, temperature, divergence, entropy):
    student, teacher, *_ = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device)
    options = {"launch": launch(vocabulary, splits), "entropy": entropy}
    found = statistics_of(student, teacher, labels, temperature, divergence, **options)
    exact = exact_statistics(student, teacher, labels, temperature, divergence)
    if not entropy:
        exact[stats.H] = 0
    not_needed = [stats.SECOND] * (divergence == "forward_kl") + [stats.H] * (not entropy)
    assert not found[not_needed].any()
    assert ((found - exact).abs() <= 1e-6 * sizes_of(exact, temperature, divergence)).all()
    exactly = [stats.M_S, stats.M_T, stats.LABEL]
    assert torch.equal(found[exactly], exact[exactly].float())


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_row_statistics_in_memory_of_a_chunk(kernel_device, splits):
    """The columns of other rows stay as they were, and counters that were given are those that are used."""
    student, teacher, *_ = given(kernel_device, 3 * TILE)
    whole = torch.full((stats.COUNT, 8), torch.nan, device=kernel_device)
    counters = torch.zeros(4, LINE.value, dtype=torch.int32, device=kernel_device)
    kernels.row_statistics(
        student, teacher, None, weights_of(*torch.ones(2, 3, device=kernel_device)), whole[:, 2:5], counters,
        objective(2.0, "mixed_kl"), True, launch(3 * TILE, splits),
    )  # fmt: skip
    assert whole[:, 2:5].isfinite().all()
    assert whole[:, [0, 1, 5, 6, 7]].isnan().all()
    assert not whole[stats.LABEL, 2:5].any()  # there are no labels
    assert counters[1:, 0].tolist() == [splits * (splits > 1)] * 3
    assert counters.sum() == counters[1:, 0].sum()


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("label", [-100, -1, 700, 2**40])
def test_a_label_outside_the_vocabulary_reads_nothing_outside(kernel_device, splits, label):
    """The weights of its row are NaN, and so is its loss, whatever logit is read."""
    student, teacher, *_ = given(kernel_device, 700)
    labels = torch.full((3,), label, device=kernel_device)
    statistics = statistics_of(student, teacher, labels, 2.0, launch=launch(700, splits))
    assert torch.isin(statistics[stats.LABEL], student[0, :, [0, 699]]).all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("student_map", [LogitMap(0.5), LogitMap(2.0, 5.0)])
def test_the_labels_logit_is_mapped(kernel_device, splits, student_map):
    student, _, *_ = given(kernel_device, 3 * TILE, student_dtype=torch.bfloat16)
    labels = torch.tensor([0, TILE, 3 * TILE - 1], device=kernel_device)
    options = {"maps": (student_map, IDENTITY_MAP), "launch": launch(3 * TILE, splits)}
    statistics = statistics_of(student, None, labels, 1.0, **options)
    exact = student_map.of(student[0, [0, 1, 2], labels].double())
    torch.testing.assert_close(statistics[stats.LABEL].double(), exact, rtol=4e-7, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_of_one_class_both_terms_cancel_exactly(kernel_device, temperature, divergence):
    """p_1 - 1 and p_T - q each by itself; a sum of p_1 and p_T would have been rounded."""
    student, teacher, ce, kl = given(kernel_device, 1, rows=50)
    labels = torch.zeros(50, dtype=torch.int64, device=kernel_device)
    _, gradient, _ = gradients_of(student, teacher, labels, ce, kl, temperature, divergence)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(
    ("need_ce", "divergence"),
    [*((True, name) for name in [*NAMES, None]), *((False, name) for name in NAMES)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_logit_gradient(kernel_device, vocabulary, splits, need_ce, divergence, temperature):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device) if need_ce else None
    ce, kl = ce * need_ce, kl * (divergence is not None)
    expected, _ = exact_gradients(student, teacher, labels, ce, kl, temperature, divergence or NAMES[0])
    _, gradient, _ = gradients_of(
        student, teacher if divergence else None, labels, ce, kl, temperature, divergence or NAMES[0],
        launch=launch(vocabulary, splits),
    )  # fmt: skip
    assert not gradient.isnan().any()
    if vocabulary > 1:  # with one class there is nothing to learn
        assert relative_error(gradient, expected) < 1e-6
    else:
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["scalar", "rows", "expanded", "sliced"])
@pytest.mark.parametrize("divergence", NAMES)
def test_upstream_gradient(kernel_device, dtype, kind, divergence):
    """The product with the weights is rounded once, to float32: the same bits as from weights that have the factor."""
    student, teacher, ce, kl = given(kernel_device, TILE + 5, rows=4)
    ce, kl = ce.double() / 3, kl.double() / 3
    labels = torch.randint(TILE + 5, (4,), device=kernel_device)
    upstream = {
        "scalar": torch.tensor(1 / 3, dtype=dtype, device=kernel_device),
        "rows": torch.rand(4, dtype=dtype, device=kernel_device),
        "expanded": torch.tensor(0.7, dtype=dtype, device=kernel_device).expand(4),
        "sliced": torch.rand(8, dtype=dtype, device=kernel_device)[::2],
    }[kind]
    options = {"teacher_grad": True, "launch": launch(TILE + 5, 2)}
    _, *found = gradients_of(student, teacher, labels, ce, kl, 2.5, divergence, upstream=upstream, **options)
    _, *expected = gradients_of(student, teacher, labels, ce * upstream, kl * upstream, 2.5, divergence, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_without_upstream_gradient_are_not_read_again(kernel_device):
    student, teacher, ce, kl = given(kernel_device, TILE + 5)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    ce[2] = kl[2] = 1e-44
    upstream = torch.tensor([1.0, 0.0, 1e-3], device=kernel_device)  # the last underflows in float32
    weights = weights_of(ce, kl)
    statistics = statistics_of(student, teacher, labels, 2.0, weights=weights)
    student[0, 1:] = torch.nan
    gradient, of_teacher = torch.full_like(student, torch.nan), torch.full_like(teacher, torch.nan)
    kernels.logit_gradient(
        student, teacher, labels, statistics, weights, upstream, gradient, of_teacher, objective(2.0)
    )
    for found in (gradient, of_teacher):
        assert not found[0, 1:].any()
        assert found[0, 0].all()


@pytest.mark.parametrize("terms", ["ce", "kl"])
def test_the_weight_of_a_term_that_is_not_there_is_not_used(kernel_device, terms):
    """A term may be logged only; then its weights are those of the log."""
    student, teacher, ce, kl = given(kernel_device, TILE + 5)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    ce[1], kl[1] = (0, 1) if terms == "ce" else (1, 0)
    there = student, teacher if terms == "kl" else None, labels if terms == "ce" else None
    _, expected, _ = gradients_of(*there, ce * (terms == "ce"), kl * (terms == "kl"), 2.0, NAMES[0])
    _, found, _ = gradients_of(*there, ce, kl, 2.0, NAMES[0])
    assert torch.equal(found, expected)
    assert not found[0, 1].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_value_and_both_gradients_match_float64(kernel_device, splits, temperature, divergence):
    student, teacher, ce, kl = given(kernel_device, 3 * TILE + 5)
    labels = torch.randint(3 * TILE + 5, (3,), device=kernel_device)
    statistics, *found = gradients_of(
        student, teacher, labels, ce, kl, temperature, divergence, teacher_grad=True,
        launch=launch(3 * TILE + 5, splits),
    )  # fmt: skip
    value = value_of(statistics, temperature, divergence)
    exact = exact_divergence(student, teacher, temperature, divergence)
    torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)
    expected = exact_gradients(student, teacher, labels, ce, kl, temperature, divergence)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [2.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_masked_logits(kernel_device, splits, temperature, divergence):
    """A column counts for nothing if both are minus infinity; so it does if the distribution without mass is the one
    averaged over.  The other way round the divergence is infinite.
    """
    student, teacher, ce, kl = given(kernel_device, 3 * TILE + 5)
    averaged, other = (teacher, student) if divergence == "forward_kl" else (student, teacher)
    student[..., ::7] = teacher[..., ::7] = -torch.inf
    if divergence != "mixed_kl":  # which averages over both
        averaged[0, 1, 1::7] = -torch.inf
    other[0, 2, 2 * TILE + 1] = -torch.inf
    statistics, gradient, of_teacher = gradients_of(
        student, teacher, None, ce, kl, temperature, divergence, teacher_grad=True,
        launch=launch(3 * TILE + 5, splits),
    )  # fmt: skip
    value = value_of(statistics, temperature, divergence)
    assert value[2] == torch.inf
    rows = slice(0, 2)
    exact = exact_divergence(student[:, rows], teacher[:, rows], temperature, divergence)
    torch.testing.assert_close(value[rows], exact, rtol=1e-6, atol=0)
    cut = student.clone(), teacher.clone()
    for logits in cut:
        logits[logits == -torch.inf] = -1e4  # autograd makes NaN of 0 times infinity
    expected = exact_gradients(*cut, None, ce, kl, temperature, divergence)
    for found, exact in zip((gradient, of_teacher), expected, strict=True):
        assert relative_error(found[:, rows], exact[:, rows]) < 1e-6
        assert not found[:, rows, ::7].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("divergence", NAMES)
def test_nan_logits_make_their_row_nan_and_no_other(kernel_device, splits, who, divergence):
    student, teacher, ce, kl = given(kernel_device, 3 * TILE + 5)
    (student, teacher)[who][0, 1, TILE + 3] = torch.nan
    statistics, *found = gradients_of(
        student, teacher, None, ce, kl, 2.5, divergence, teacher_grad=True, launch=launch(3 * TILE + 5, splits)
    )
    assert value_of(statistics, 2.5, divergence).isnan().tolist() == [False, True, False]
    for gradient in found:
        assert gradient[0, 1].isnan().any()
        assert not gradient[0, ::2].isnan().any()


@pytest.mark.parametrize("pad", [0, 1, 16])  # rows at odd addresses, and at multiples of 16 bytes
@pytest.mark.parametrize("divergence", NAMES)
def test_gradients_in_the_places_of_the_logits(kernel_device, pad, divergence):
    student, teacher, ce, kl = given(kernel_device, 16 * TILE, pad=pad)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    statistics, *expected = gradients_of(student, teacher, labels, ce, kl, 2.0, divergence, teacher_grad=True)
    arguments = labels, statistics, weights_of(ce, kl), None
    kernels.logit_gradient(student, teacher, *arguments, student, teacher, objective(2.0, divergence))
    assert all(torch.equal(a, b) for a, b in zip((student, teacher), expected, strict=True))


@pytest.mark.parametrize("divergence", NAMES)
def test_rows_that_do_not_count_are_not_read(kernel_device, divergence):
    student, teacher, ce, kl = given(kernel_device, 2 * TILE + 5)
    ce[1] = kl[1] = 0
    student[0, 1] = teacher[0, 1] = torch.nan
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    statistics, *gradients = gradients_of(
        student, teacher, labels, ce, kl, 2.0, divergence, teacher_grad=True, launch=launch(2 * TILE + 5, 2)
    )
    assert torch.equal(written(statistics, divergence)[:, 1:2], written(stats.identity(1), divergence))
    for gradient in gradients:
        assert not gradient[0, 1].any()
        assert not gradient.isnan().any()


@pytest.mark.parametrize("divergence", NAMES)
def test_an_infinite_divergence_of_no_weight_never_becomes_nan(kernel_device, divergence):
    """Mass where the other distribution has none, in a first tile whose own maximum the next tile dwarfs."""
    averaged, other, *_ = given(kernel_device, 2 * TILE)
    averaged[..., :TILE] -= 1e4
    other[..., 3] = -torch.inf
    student, teacher = (other, averaged) if divergence == "forward_kl" else (averaged, other)
    statistics = statistics_of(student, teacher, None, 1.0, divergence, launch=launch(2 * TILE, 1))
    assert value_of(statistics, 1.0, divergence).isfinite().all()


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 7.0])
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_tiles_and_splits_further_apart_than_float32_reaches(kernel_device, splits, temperature, divergence):
    other, averaged, *_ = given(kernel_device, 5 * TILE)
    other[0, 0, :TILE], other[0, 0, TILE:] = 1e38, -2.5e38
    averaged[0, 0, : 4 * TILE], averaged[0, 0, 4 * TILE :] = -2.5e38, 1e38
    other[0, 1], other[0, 1, 7] = 3e38, -3e38
    student, teacher = (other, averaged) if divergence == "forward_kl" else (averaged, other)
    options = {"launch": launch(student.shape[-1], splits)}
    statistics = statistics_of(student, teacher, None, temperature, divergence, **options)
    found = value_of(statistics, temperature, divergence)
    exact = exact_divergence(student, teacher, temperature, divergence)
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=0)  # of exponents near 20


def close_models(device, vocabulary=32_000, rows=2):
    """Return logits of which those of the teacher have noise, with which every divergence is of second order."""
    student = 3 * torch.randn(1, rows, vocabulary)
    student[0, 0, ::5] = -torch.inf  # masked tokens
    return student.to(device), (student + 1e-3 * torch.randn(1, rows, vocabulary)).to(device)


def check_close_models(value, found, logits, temperature):
    """Compare the reverse KL of models that are nearly equal, and gradients of it, with float64."""
    exact = exact_divergence(*logits, temperature, "reverse_kl")
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    cut = [z.clamp(min=-1e4) for z in logits]  # autograd makes NaN of 0 times infinity
    ones = torch.ones(logits[0].shape[1], device=value.device)
    expected = exact_gradients(*cut, None, ones, ones, temperature, "reverse_kl")
    for gradient, of_float64 in zip(found, expected, strict=False):
        assert relative_error(gradient, of_float64) < 1e-3


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
def test_reverse_kl_of_close_models(kernel_device, splits, temperature):
    """The normalisers are within 1e-6 of each other, and their rounding is larger than the divergence."""
    student, teacher = close_models(kernel_device)
    ones = torch.ones(2, device=kernel_device)
    options = {"teacher_grad": True, "launch": Launch(256, K, 8, splits, -(-32_000 // (splits * 2048)) * 2048)}
    statistics, *found = gradients_of(student, teacher, None, ones, ones, temperature, "reverse_kl", **options)
    check_close_models(value_of(statistics, temperature, "reverse_kl"), found, (student, teacher), temperature)


def test_reverse_kl_of_one_model_is_zero(kernel_device):
    student, _ = close_models(kernel_device, 3 * TILE + 5)
    statistics = statistics_of(student, student.clone(), None, 2.0, "reverse_kl", launch=launch(3 * TILE + 5, 2))
    assert not statistics[[stats.C, stats.SECOND]].any()
    assert not value_of(statistics, 2.0, "reverse_kl").any()


@pytest.mark.parametrize("shift", [0.0, 1e3, 3e38])
def test_reverse_kl_of_models_that_are_close_but_for_a_shift(kernel_device, shift):
    """Differences of logits may overflow where those relative to the maxima are small."""
    student = torch.tensor([3.0, 2.0, -torch.inf, 2.5], device=kernel_device).repeat(1, 2, 2 * TILE)
    teacher = student.clone()
    teacher[0, 0] -= shift
    student[0, 0] += shift
    statistics = statistics_of(student, teacher, None, 0.5, "reverse_kl", launch=launch(8 * TILE, 3))
    assert statistics[stats.SECOND].isfinite().all()
    value = value_of(statistics, 0.5, "reverse_kl")
    torch.testing.assert_close(value, exact_divergence(student, teacher, 0.5, "reverse_kl"), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, TILE, 5 * TILE + 17])
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("divergence", [None, *NAMES])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_entropy(kernel_device, vocabulary, splits, temperature, divergence):
    """With a teacher and without, of masked tokens and of tiles further apart than float32 reaches."""
    student, teacher, *_ = given(kernel_device, vocabulary, rows=4)
    student[0, 1, 1::3] = -torch.inf
    student[0, 2, : vocabulary // 2] = -2e38
    student[0, 3, vocabulary // 2 :] = 2.5e38
    statistics = statistics_of(
        student, teacher if divergence else None, torch.zeros(4, dtype=torch.int64, device=kernel_device), temperature,
        divergence or NAMES[0], entropy=True, launch=launch(vocabulary, splits),
    )  # fmt: skip
    d_T, h = statistics[stats.D_T].double(), statistics[stats.H].double()
    log_p = torch.log_softmax(student[0].double() / temperature, 1)
    expected = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(1)
    torch.testing.assert_close(d_T.log() - h / (temperature * d_T), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [TILE - 1, 2 * TILE, 2 * TILE + 5])
@pytest.mark.parametrize("student_map", [LogitMap(0.5), LogitMap(2.0, 5.0)])
@pytest.mark.parametrize("teacher_map", [LogitMap(), LogitMap(0.5, 3.0)])
@pytest.mark.parametrize("divergence", NAMES)
def test_logit_maps(kernel_device, vocabulary, student_map, teacher_map, divergence):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device)
    maps = student_map, teacher_map
    statistics, *found = gradients_of(
        student, teacher, labels, ce, kl, 3.0, divergence, teacher_grad=True, maps=maps,
        launch=launch(vocabulary, 2),
    )  # fmt: skip
    leaves = [logits.double().requires_grad_() for logits in (student, teacher)]
    logits = [logit_map.of(leaf) for logit_map, leaf in zip(maps, leaves, strict=True)]
    exact = exact_divergence(*logits, 3.0, divergence)
    expected = torch.autograd.grad(
        logits, leaves, exact_gradients(*(z.detach() for z in logits), labels, ce, kl, 3.0, divergence)
    )
    assert relative_error(value_of(statistics, 3.0, divergence), exact.detach()) < 1e-6
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def coefficients_kernel(
    statistics_ptr, ce_weight_ptr, divergence_weight_ptr, coefficients_ptr, N, inverse_T, DIVERGENCE: tl.constexpr
):
    row = tl.program_id(0)
    s = statistics_ptr + row
    of_row = Statistics(
        tl.load(s), tl.load(s + N), tl.load(s + 2 * N), tl.load(s + 3 * N), tl.load(s + 4 * N), tl.load(s + 5 * N),
        tl.load(s + 7 * N), tl.load(s + 8 * N),
    )  # fmt: skip
    scalars = Scalars(inverse_T, inverse_T, inverse_T)
    w_ce, w = tl.load(ce_weight_ptr + row), tl.load(divergence_weight_ptr + row)
    k = elements.coefficients_of(of_row, w_ce, w, scalars, DIVERGENCE)
    out = coefficients_ptr + row
    tl.store(out, k.m_s)
    tl.store(out + 1 * N, k.m_t)
    tl.store(out + 2 * N, k.A)
    tl.store(out + 3 * N, k.B)
    tl.store(out + 4 * N, k.C)
    tl.store(out + 5 * N, k.W)
    tl.store(out + 6 * N, k.R)
    tl.store(out + 7 * N, k.S)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_kernels_make_the_coefficients_of_pytorch(kernel_device, temperature, divergence):
    student, teacher, ce, kl = given(kernel_device, TILE, rows=5)
    ce[1], kl[2], ce[3], kl[3] = 0, 0, 0, 0  # one term, the other, none
    kl[4] = 1e-45  # counts, and underflows in the product with 1 / T
    labels = torch.zeros(5, dtype=torch.int64, device=kernel_device)
    statistics = statistics_of(student, teacher, labels, temperature, divergence, weights=weights_of(ce, kl)).clone()
    expected = torch.stack(coefficients(statistics, ce.float(), kl.float(), objective(temperature, divergence)))
    found = torch.empty_like(statistics)
    kernel = triton.jit(coefficients_kernel)  # here, where `kernel_device` has said whether it is interpreted
    kernel[(5,)](statistics, ce, kl, found, 5, 1 / temperature, divergence_number(divergence))
    found, counted = found[2:8], [0, 1, 2, 4]
    assert torch.equal(found[:, counted], expected[:, counted])
    assert found[:, 3].isnan().any()  # a row that does not count has no coefficients: no kernel asks for them


def device_functions():
    """Return every @triton.jit function of the backend that is no kernel, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(kernels.__name__):
            for function in vars(module).values():
                if type(function) is type(elements.term) and not function.__name__.endswith("_kernel"):
                    found[function.__name__] = function
    return found


def test_device_functions_have_at_most_22_parameters():
    """A call with more arguments in a row cannot be read: values that travel together are one NamedTuple of `tiles`."""
    functions = device_functions()
    assert {"row_gradient", "statistics_of_lanes", "store_tile"} <= set(functions)
    counts = {name: len(inspect.signature(function.fn).parameters) for name, function in functions.items()}
    assert max(counts.values()) <= 22, (
        counts
    )  # `row_gradient`: ten values and twelve constexprs, which no tuple may hold


@pytest.mark.parametrize("rows", [1, 7, 64, 2048, 10**6])
@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 128_256, 262_144])
def test_plan_covers_every_column_once_and_fills_the_chip(rows, vocabulary):
    launched = two_passes(rows, vocabulary, 2, processors=132)
    tile = launched.lanes * launched.columns
    assert (
        launched.columns_per_split * (launched.splits - 1) < vocabulary <= launched.columns_per_split * launched.splits
    )
    assert launched.columns_per_split % tile == 0
    if rows >= 4096:
        assert launched.splits == 1
    if rows == 64 and vocabulary >= 128_256:
        assert rows * launched.splits >= 132 * 10
