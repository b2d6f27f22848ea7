"""Each kernel on its own, at block shapes and splits of every kind, against the formulas in float64."""

import inspect
import sys

import pytest
import torch
import triton
import triton.language as tl

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.backends import triton as kernels
from fused_kd.backends.triton import elements
from fused_kd.backends.triton.arguments import divergence_number
from fused_kd.backends.triton.tiles import Statistics
from fused_kd.divergences import DIVERGENCES, Objective, coefficients
from fused_kd.launch import Launch, two_passes
from fused_kd.logit_map import IDENTITY_MAP, LogitMap

from ..oracle import relative_error

LANES, K = 32, 8
TILE = LANES * K
NAMES = list(DIVERGENCES)


def launch(vocabulary, splits):
    columns = -(-vocabulary // (splits * TILE)) * TILE
    return Launch(LANES, K, 1, splits, columns)  # more splits than tiles: the last ones have no columns


def given(device, vocabulary, rows=3, student_dtype=torch.float32, pad=0):
    student = 3 * torch.randn(1, rows, vocabulary + pad).to(student_dtype).to(device)[..., :vocabulary]
    teacher = 3 * torch.randn(1, rows, vocabulary).to(device)
    weights = torch.rand(rows, device=device) + 0.5
    return student, teacher, weights, 1 - 0.5 * weights


def objective(temperature, divergence="forward_kl", maps=()):
    return Objective(*maps or (IDENTITY_MAP, IDENTITY_MAP), temperature, divergence)


def statistics_of(
    backend, student, teacher, temperature, divergence, *, counted=None, need_ce=True, maps=(), **options
):
    """Return the merged statistics of a backend, in the dtype that the CPU has for such logits and the kernels always."""
    counted = torch.ones(student.shape[1], dtype=torch.bool, device=student.device) if counted is None else counted
    dtype = torch.float32 if backend is kernels else student.dtype
    parts = backend.row_statistics(
        student, teacher, counted, dtype, need_ce, objective(temperature, divergence, maps), **options
    )
    return stats.merge(parts, temperature, DIVERGENCES[divergence].mass)


def gradients_of(
    backend, student, teacher, labels, ce, kl, temperature, divergence, *, teacher_grad=False, maps=(), **options
):
    """Return the merged statistics, the student's gradient and, if it is wanted, the teacher's."""
    counted = (ce != 0) | (kl != 0)
    statistics = statistics_of(
        backend, student, teacher, temperature, divergence, counted=counted, need_ce=labels is not None, maps=maps,
        **options,
    )  # fmt: skip
    of_rows = coefficients(
        statistics,
        None if labels is None else ce,
        None if teacher is None else kl,
        objective(temperature, divergence),
    )
    gradient = torch.full_like(student, torch.nan)
    of_teacher = torch.full_like(teacher, torch.nan) if teacher_grad else None
    backend.logit_gradient(
        student, teacher, labels, of_rows, gradient, of_teacher, objective(temperature, divergence, maps), **options
    )
    return statistics, gradient, of_teacher


def exact_divergence(student, teacher, temperature, divergence):
    """Return it from the formula, in float64."""
    pair = (student, teacher) if divergence == "forward_kl" else (teacher, student)
    return reference.kl_divergence(*(logits.double().flatten(0, 1) for logits in pair), temperature)


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
@pytest.mark.parametrize("divergence", NAMES)
def test_row_statistics(kernel_device, vocabulary, splits, temperature, divergence):
    student, teacher, *_ = given(kernel_device, vocabulary)
    merged = statistics_of(kernels, student, teacher, temperature, divergence, launch=launch(vocabulary, splits)).cpu()
    oracle = statistics_of(cpu, student.cpu().double(), teacher.cpu().double(), temperature, divergence)
    for index in range(6):
        size = oracle[index].abs()
        if index == stats.C:  # a difference
            size = size + oracle[DIVERGENCES[divergence].mass] * (temperature / stats.UNIT)
        assert ((merged[index] - oracle[index]).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_row_statistics_are_those_of_each_split(kernel_device, splits):
    student, teacher, *_ = given(kernel_device, 3 * TILE)
    counted = torch.ones(3, dtype=torch.bool, device=kernel_device)
    options = {"launch": launch(3 * TILE, splits)}
    parts = kernels.row_statistics(student, teacher, counted, torch.float32, True, objective(2.0), **options)
    assert parts.shape == (splits, 6, 3)
    width = options["launch"].columns_per_split
    for split, part in enumerate(parts):
        columns = slice(split * width, (split + 1) * width)
        maxima = (student[0, :, columns], teacher[0, :, columns])
        if maxima[0].shape[1]:
            assert torch.equal(part[stats.MAXIMA], torch.stack([logits.amax(1) for logits in maxima]))
        else:
            assert torch.equal(part, stats.identity(3, device=kernel_device))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_of_one_class_both_terms_cancel_exactly(kernel_device, temperature, divergence):
    """p_1 - 1 and p_T - q each by itself; a sum of p_1 and p_T would have been rounded."""
    student, teacher, ce, kl = given(kernel_device, 1, rows=50)
    labels = torch.zeros(50, dtype=torch.int64, device=kernel_device)
    _, gradient, _ = gradients_of(kernels, student, teacher, labels, ce, kl, temperature, divergence)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(
    ("need_ce", "divergence"),
    [(True, "forward_kl"), (True, "reverse_kl"), (True, None), (False, "forward_kl"), (False, "reverse_kl")],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_logit_gradient(kernel_device, vocabulary, splits, need_ce, divergence, temperature):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device) if need_ce else None
    ce, kl = ce * need_ce, kl * (divergence is not None)
    expected, _ = exact_gradients(student, teacher, labels, ce, kl, temperature, divergence or NAMES[0])
    _, gradient, _ = gradients_of(
        kernels, student, teacher if divergence else None, labels, ce, kl, temperature, divergence or NAMES[0],
        launch=launch(vocabulary, splits),
    )  # fmt: skip
    assert not gradient.isnan().any()
    if vocabulary > 1:  # with one class there is nothing to learn
        assert relative_error(gradient, expected) < 1e-6
    else:
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_value_and_both_gradients_match_float64(kernel_device, splits, temperature, divergence):
    student, teacher, ce, kl = given(kernel_device, 3 * TILE + 5)
    labels = torch.randint(3 * TILE + 5, (3,), device=kernel_device)
    statistics, *found = gradients_of(
        kernels, student, teacher, labels, ce, kl, temperature, divergence, teacher_grad=True,
        launch=launch(3 * TILE + 5, splits),
    )  # fmt: skip
    value = DIVERGENCES[divergence].value(statistics, temperature)
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
    averaged[0, 1, 1::7] = -torch.inf
    other[0, 2, 2 * TILE + 1] = -torch.inf
    statistics, gradient, of_teacher = gradients_of(
        kernels, student, teacher, None, ce, kl, temperature, divergence, teacher_grad=True,
        launch=launch(3 * TILE + 5, splits),
    )  # fmt: skip
    value = DIVERGENCES[divergence].value(statistics, temperature)
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
        kernels, student, teacher, None, ce, kl, 2.5, divergence, teacher_grad=True, launch=launch(3 * TILE + 5, splits)
    )
    assert DIVERGENCES[divergence].value(statistics, 2.5).isnan().tolist() == [False, True, False]
    for gradient in found:
        assert gradient[0, 1].isnan().any()
        assert not gradient[0, ::2].isnan().any()


@pytest.mark.parametrize("pad", [0, 1, 16])  # rows at odd addresses, and at multiples of 16 bytes
@pytest.mark.parametrize("divergence", NAMES)
def test_gradients_in_the_places_of_the_logits(kernel_device, pad, divergence):
    student, teacher, ce, kl = given(kernel_device, 16 * TILE, pad=pad)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    statistics, *expected = gradients_of(kernels, student, teacher, labels, ce, kl, 2.0, divergence, teacher_grad=True)
    of_rows = coefficients(statistics, ce, kl, objective(2.0, divergence))
    kernels.logit_gradient(student, teacher, labels, of_rows, student, teacher, objective(2.0, divergence))
    assert all(torch.equal(a, b) for a, b in zip((student, teacher), expected, strict=True))


@pytest.mark.parametrize("divergence", NAMES)
def test_rows_that_do_not_count_are_not_read(kernel_device, divergence):
    student, teacher, ce, kl = given(kernel_device, 2 * TILE + 5)
    ce[1] = kl[1] = 0
    student[0, 1] = teacher[0, 1] = torch.nan
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    statistics, *gradients = gradients_of(
        kernels, student, teacher, labels, ce, kl, 2.0, divergence, teacher_grad=True, launch=launch(2 * TILE + 5, 2)
    )
    assert torch.equal(statistics[:, 1:2], stats.identity(1, device=kernel_device))
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
    statistics = statistics_of(kernels, student, teacher, 1.0, divergence, launch=launch(2 * TILE, 1))
    assert DIVERGENCES[divergence].value(statistics, 1.0).isfinite().all()


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
    statistics = statistics_of(kernels, student, teacher, temperature, divergence, **options)
    found = DIVERGENCES[divergence].value(statistics, temperature)
    exact = exact_divergence(student, teacher, temperature, divergence)
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=0)  # of exponents near 20


@pytest.mark.parametrize("vocabulary", [TILE - 1, 2 * TILE, 2 * TILE + 5])
@pytest.mark.parametrize("student_map", [LogitMap(0.5), LogitMap(2.0, 5.0)])
@pytest.mark.parametrize("teacher_map", [LogitMap(), LogitMap(0.5, 3.0)])
@pytest.mark.parametrize("divergence", NAMES)
def test_logit_maps(kernel_device, vocabulary, student_map, teacher_map, divergence):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device)
    maps = student_map, teacher_map
    statistics, *found = gradients_of(
        kernels, student, teacher, labels, ce, kl, 3.0, divergence, teacher_grad=True, maps=maps,
        launch=launch(vocabulary, 2),
    )  # fmt: skip
    leaves = [logits.double().requires_grad_() for logits in (student, teacher)]
    logits = [logit_map.of(leaf) for logit_map, leaf in zip(maps, leaves, strict=True)]
    exact = exact_divergence(*logits, 3.0, divergence)
    expected = torch.autograd.grad(
        logits, leaves, exact_gradients(*(z.detach() for z in logits), labels, ce, kl, 3.0, divergence)
    )
    assert relative_error(DIVERGENCES[divergence].value(statistics, 3.0), exact.detach()) < 1e-6
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def coefficients_kernel(
    statistics_ptr, ce_weight_ptr, divergence_weight_ptr, coefficients_ptr, N, inverse_T, DIVERGENCE: tl.constexpr
):
    row = tl.program_id(0)
    s = statistics_ptr + row
    of_row = Statistics(
        tl.load(s), tl.load(s + N), tl.load(s + 2 * N), tl.load(s + 3 * N), tl.load(s + 4 * N), tl.load(s + 5 * N)
    )
    k = elements.coefficients_of(
        of_row, tl.load(ce_weight_ptr + row), tl.load(divergence_weight_ptr + row), inverse_T, DIVERGENCE
    )
    out = coefficients_ptr + row
    tl.store(out, k.m_s)
    tl.store(out + 1 * N, k.m_t)
    tl.store(out + 2 * N, k.A)
    tl.store(out + 3 * N, k.B)
    tl.store(out + 4 * N, k.C)
    tl.store(out + 5 * N, k.W)
    tl.store(out + 6 * N, k.R)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("divergence", NAMES)
def test_the_single_pass_makes_the_coefficients_of_the_two_passes(kernel_device, temperature, divergence):
    student, teacher, ce, kl = given(kernel_device, TILE, rows=5)
    ce[1], kl[2], ce[3], kl[3] = 0, 0, 0, 0  # one term, the other, none
    kl[4] = 1e-45  # counts, and underflows in the product with 1 / T
    statistics = statistics_of(kernels, student, teacher, temperature, divergence, counted=(ce != 0) | (kl != 0))
    expected = coefficients(statistics, ce, kl, objective(temperature, divergence))
    found = torch.empty_like(expected)
    kernel = triton.jit(coefficients_kernel)  # here, where `kernel_device` has said whether it is interpreted
    kernel[(5,)](statistics, ce, kl, found, 5, 1 / temperature, divergence_number(divergence))
    found, expected = found[2:], expected[2:]  # maxima of a row that is not read are not used
    assert torch.equal(found, expected)


def device_functions():
    """Return every @triton.jit function of the backend that is no kernel, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(kernels.__name__):
            for function in vars(module).values():
                if type(function) is type(elements.term) and not function.__name__.endswith("_kernel"):
                    found[function.__name__] = function
    return found


def test_device_functions_have_at_most_20_parameters():
    """A call with more arguments in a row cannot be read: values that travel together are one NamedTuple of `tiles`."""
    functions = device_functions()
    assert {"row_gradient", "sweep_statistics", "store_tile"} <= set(functions)
    counts = {name: len(inspect.signature(function.fn).parameters) for name, function in functions.items()}
    assert max(counts.values()) <= 20, counts


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
