"""Each kernel on its own, at block shapes and splits of every kind, against the CPU operators in float64."""

import pytest
import torch

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.backends import triton as kernels
from fused_kd.backends.triton.launch import Launch, plan
from fused_kd.logit_map import LogitMap

from ..oracle import relative_error

LANES, K = 32, 8
TILE = LANES * K


def launch(vocabulary, splits):
    columns = -(-vocabulary // (splits * TILE)) * TILE
    return Launch(LANES, K, 1, splits, columns)  # more splits than tiles: the last ones have no columns


def given(device, vocabulary, rows=3, student_dtype=torch.float32, pad=0):
    student = 3 * torch.randn(1, rows, vocabulary + pad).to(student_dtype).to(device)[..., :vocabulary]
    teacher = 3 * torch.randn(1, rows, vocabulary).to(device)
    weights = torch.rand(rows, device=device) + 0.5
    return student, teacher, weights, 1 - 0.5 * weights


SIZES = [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 5 * TILE + 17]  # below, at and above one tile; whole tiles only


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_row_statistics(kernel_device, vocabulary, splits, temperature):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    parts = kernels.row_statistics(student, teacher, ce, kl, temperature, True, launch=launch(vocabulary, splits))
    assert parts.shape == (splits, 6, 3)
    oracle = cpu.row_statistics(
        student.cpu().double(), teacher.cpu().double(), ce.cpu().double(), kl.cpu().double(), temperature, True
    )[0]
    merged = stats.merge(parts, temperature)
    for index in range(6):
        size = oracle[index].abs()
        if index == stats.C:  # a difference
            size = size + oracle[stats.E] * (temperature / stats.UNIT)
        assert ((merged[index].cpu() - oracle[index]).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 2.5])
def test_of_one_class_both_terms_cancel_exactly(kernel_device, temperature):
    """p_1 - 1 and p_T - q each by itself; a sum of p_1 and p_T would have been rounded."""
    student, teacher, ce, kl = given(kernel_device, 1, rows=50)
    labels = torch.zeros(50, dtype=torch.int64, device=kernel_device)
    parts = kernels.row_statistics(student, teacher, ce, kl, temperature, True)
    gradient = torch.full_like(student, torch.nan)
    statistics = stats.merge(parts, temperature)
    kernels.logit_gradient(student, teacher, labels, statistics, ce, kl, temperature, gradient)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("need_ce", "need_kl"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_logit_gradient(kernel_device, vocabulary, splits, need_ce, need_kl, temperature):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    teacher = teacher if need_kl else None
    labels = torch.randint(vocabulary, (3,), device=kernel_device) if need_ce else None
    ce, kl = ce * need_ce, kl * need_kl

    def gradient(backend, *arguments, out, **options):
        statistics = stats.merge(backend.row_statistics(*arguments[:2], ce_, kl_, temperature, need_ce), temperature)
        backend.logit_gradient(*arguments, statistics, ce_, kl_, temperature, out, **options)
        return out

    ce_, kl_ = ce, kl
    out = torch.full_like(student, torch.nan)
    ours = gradient(kernels, student, teacher, labels, out=out, launch=launch(vocabulary, splits))
    ce_, kl_ = ce.cpu().double(), kl.cpu().double()
    oracle = gradient(
        cpu, student.cpu().double(), None if teacher is None else teacher.cpu().double(),
        None if labels is None else labels.cpu(), out=torch.empty_like(student, dtype=torch.float64, device="cpu"),
    )  # fmt: skip
    assert not ours.isnan().any()
    if vocabulary > 1:  # with one class there is nothing to learn
        assert relative_error(ours.cpu(), oracle) < 1e-6
    else:
        assert ours.abs().max() < 1e-6


@pytest.mark.parametrize("pad", [0, 1, 16])  # rows at odd addresses, and at multiples of 16 bytes
def test_gradient_in_the_students_place(kernel_device, pad):
    student, teacher, ce, kl = given(kernel_device, 16 * TILE, pad=pad)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    statistics = stats.merge(kernels.row_statistics(student, teacher, ce, kl, 2.0, True), 2.0)
    expected = torch.empty_like(student)
    kernels.logit_gradient(student, teacher, labels, statistics, ce, kl, 2.0, expected)
    kernels.logit_gradient(student, teacher, labels, statistics, ce, kl, 2.0, student)
    assert torch.equal(student, expected)


def test_rows_of_weight_zero_are_not_read(kernel_device):
    student, teacher, ce, kl = given(kernel_device, 2 * TILE + 5)
    ce[1] = kl[1] = 0
    student[0, 1] = teacher[0, 1] = torch.nan
    statistics = stats.merge(
        kernels.row_statistics(student, teacher, ce, kl, 2.0, True, launch=launch(2 * TILE + 5, 2)), 2.0
    )
    assert torch.equal(statistics[:, 1:2], stats.identity(1, device=kernel_device))
    gradient = torch.full_like(student, torch.nan)
    labels = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    kernels.logit_gradient(student, teacher, labels, statistics, ce, kl, 2.0, gradient, launch=launch(2 * TILE + 5, 2))
    assert not gradient[0, 1].any()
    assert not gradient.isnan().any()


def test_an_infinite_divergence_of_no_weight_never_becomes_nan(kernel_device):
    """Teacher mass where the student has none, in a first tile whose own maximum the next tile dwarfs."""
    student, teacher, ce, kl = given(kernel_device, 2 * TILE)
    student[..., 3] = -torch.inf
    teacher[..., :TILE] -= 1e4
    parts = kernels.row_statistics(student, teacher, ce, kl, 1.0, True, launch=launch(2 * TILE, 1))
    assert stats.kl_divergence(parts[0], 1.0).isfinite().all()


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 7.0])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_tiles_and_splits_further_apart_than_float32_reaches(kernel_device, splits, temperature):
    student, teacher, ce, kl = given(kernel_device, 5 * TILE)
    student[0, 0, :TILE], student[0, 0, TILE:] = 1e38, -2.5e38
    teacher[0, 0, : 4 * TILE], teacher[0, 0, 4 * TILE :] = -2.5e38, 1e38
    student[0, 1], student[0, 1, 7] = 3e38, -3e38
    parts = kernels.row_statistics(
        student, teacher, ce, kl, temperature, True, launch=launch(student.shape[-1], splits)
    )
    found = stats.kl_divergence(stats.merge(parts, temperature), temperature)
    exact = reference.kl_divergence(student[0].double(), teacher[0].double(), temperature)
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=0)  # of exponents near 20


@pytest.mark.parametrize("vocabulary", [TILE - 1, 2 * TILE, 2 * TILE + 5])
@pytest.mark.parametrize("student_map", [LogitMap(0.5), LogitMap(2.0, 5.0)])
@pytest.mark.parametrize("teacher_map", [LogitMap(), LogitMap(0.5, 3.0)])
def test_logit_maps(kernel_device, vocabulary, student_map, teacher_map):
    student, teacher, ce, kl = given(kernel_device, vocabulary)
    labels = torch.randint(vocabulary, (3,), device=kernel_device)

    def gradient(backend, dtype, device, **options):
        z, y, w_ce, w_kl = (tensor.to(dtype).to(device) for tensor in (student, teacher, ce, kl))
        maps = {"student_map": student_map, "teacher_map": teacher_map}
        statistics = stats.merge(backend.row_statistics(z, y, w_ce, w_kl, 3.0, True, **maps, **options), 3.0)
        out = torch.empty_like(z)
        backend.logit_gradient(z, y, labels.to(device), statistics, w_ce, w_kl, 3.0, out, **maps, **options)
        return stats.kl_divergence(statistics, 3.0).cpu(), out.cpu()

    ours = gradient(kernels, torch.float32, kernel_device, launch=launch(vocabulary, 2))
    oracle = gradient(cpu, torch.float64, "cpu")
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, oracle, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 64, 2048, 10**6])
@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 128_256, 262_144])
def test_plan_covers_every_column_once_and_fills_the_chip(rows, vocabulary):
    launched = plan(rows, vocabulary, 2, processors=132)
    tile = launched.lanes * launched.columns
    assert (
        launched.columns_per_split * (launched.splits - 1) < vocabulary <= launched.columns_per_split * launched.splits
    )
    assert launched.columns_per_split % tile == 0
    if rows >= 4096:
        assert launched.splits == 1
    if rows == 64 and vocabulary >= 128_256:
        assert rows * launched.splits >= 132 * 10
