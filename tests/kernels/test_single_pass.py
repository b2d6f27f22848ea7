"""The single pass, compared with the two passes whose device functions it shares; and its plan.

The interpreter runs the programs of the shared form one after another: each waits only for those before it.
"""

from types import SimpleNamespace

import pytest
import torch

from fused_kd import statistics as stats
from fused_kd.backends import triton as kernels
from fused_kd.backends.triton.tiles import LINE
from fused_kd.devices import DEVICES, Shape, device_of_properties
from fused_kd.launch import L2_SHARE, Launch, SinglePass, best_single_pass, resident_programs
from fused_kd.launching import single_pass
from fused_kd.logit_map import LogitMap

from ..oracle import relative_error
from .test_kernels import (
    NAMES,
    check_close_models,
    close_models,
    exact_divergence,
    exact_gradients,
    gradients_of,
    objective,
    sizes_of,
    some_columns,
    value_of,
    weights_of,
    written,
)

LANES, K = 32, 8
TILE = LANES * K
SIZES = [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 5 * TILE + 17]  # as in test_kernels.py
SPLITS = [0, 1, 5]  # 0: whole rows
FORWARD_KL, REVERSE_KL, MIXED_KL = NAMES


def whole_or_shared(vocabulary, splits):
    columns = -(-vocabulary // (max(1, splits) * TILE)) * TILE
    return SinglePass(1, 1, 32, K, splits, columns, 1)  # with empty slices where there are fewer tiles


def given(device, vocabulary, rows=4, pad=0, outer=1):
    gap = outer - 1  # between the rows of two batches, as in logits[:, :-1]
    student = 3 * torch.randn(outer, rows // outer + gap, vocabulary + pad, device=device)
    student = student[:, : rows // outer, :vocabulary]
    teacher = 3 * torch.randn(1, rows, vocabulary, device=device)
    labels = torch.randint(vocabulary, (rows,), device=device)
    weights = torch.rand(rows, device=device) + 0.5
    return student, teacher, labels, weights, 2 - weights


def in_two_passes(student, teacher, labels, ce, kl, temperature, splits, divergence=FORWARD_KL, *maps, entropy=False):
    columns = whole_or_shared(student.shape[-1], splits).columns_per_split
    launch = Launch(LANES, K, 1, max(1, splits), columns)
    options = {"maps": maps, "launch": launch}
    options["entropy"] = entropy
    return gradients_of(student, teacher, labels, ce, kl, temperature, divergence, **options)[:2]


def in_one_pass(
    student, teacher, labels, ce, kl, gradient, launch, temperature, divergence=FORWARD_KL, *maps, counters=None,
    entropy=False,
):  # fmt: skip
    """Return the statistics."""
    statistics = some_columns(stats.COUNT, student.shape[0] * student.shape[1], torch.float32, student.device)
    kernels.statistics_and_gradient(
        student, teacher, labels, weights_of(ce, kl), statistics, gradient, counters, launch,
        objective(temperature, divergence, maps), entropy,
    )  # fmt: skip
    return statistics


def gradient_from(statistics, student, teacher, labels, ce, kl, temperature, divergence=FORWARD_KL, *maps):
    """Return what the two passes' gradient is if these are the statistics."""
    gradient = torch.full_like(student, torch.nan)
    launch = Launch(LANES, K, 1, 1, student.shape[-1])
    options = objective(temperature, divergence, maps)
    weights = weights_of(ce, kl)
    kernels.logit_gradient(student, teacher, labels, statistics, weights, None, gradient, None, options, launch)
    return gradient


def same(statistics, others):
    """Return whether the numbers are the same to the bit; those that are not written are NaN."""
    return torch.equal(statistics.nan_to_num(12.5), others.nan_to_num(12.5))


def check(inputs, temperature, splits, divergence=FORWARD_KL, *maps, entropy=False):
    """Bit for bit where threads alone are merged; where slices are, their merge rounds once or twice elsewhere.

    Given the statistics the gradient is the same to the bit, however they were merged.
    """
    statistics, expected = in_two_passes(*inputs, temperature, splits, divergence, *maps, entropy=entropy)
    student = inputs[0]
    gradient = torch.full_like(student, torch.nan)
    launch = whole_or_shared(student.shape[-1], splits)
    ours = in_one_pass(*inputs, gradient, launch, temperature, divergence, *maps, entropy=entropy)
    assert torch.equal(gradient, gradient_from(ours, *inputs, temperature, divergence, *maps))
    if splits <= 1:
        assert same(ours, statistics)
        assert torch.equal(gradient, expected)
        return
    assert torch.equal(ours.isnan(), statistics.isnan())
    error = (ours - statistics).abs() - 4e-7 * sizes_of(statistics, temperature, divergence)
    assert (error.nan_to_num(0.0) <= 0).all()
    # A gradient of one class is the difference of two roundings.
    assert (gradient - expected).abs().max() <= 4e-7 * max(1.0, float(expected.abs().max()))
    if student.shape[-1] > 2:
        assert relative_error(gradient, expected.double()) < 4e-7


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("temperature", [2.0, 3.0])
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("entropy", [False, True])
def test_is_what_two_passes_give(kernel_device, vocabulary, splits, temperature, divergence, entropy):
    check(given(kernel_device, vocabulary), temperature, splits, divergence, entropy=entropy)


@pytest.mark.parametrize("vocabulary", [16, 2 * TILE, 6 * TILE, 7 * TILE + 16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
def test_columns_in_two_accesses(kernel_device, vocabulary, splits, temperature):
    """Tiles of three dimensions, whose sums are taken in another order."""
    student, teacher, labels, ce, kl = given(kernel_device, vocabulary)
    statistics, expected = in_two_passes(student, teacher, labels, ce, kl, temperature, 1)
    gradient = torch.full_like(student, torch.nan)
    columns = -(-vocabulary // (splits * 2 * TILE)) * 2 * TILE
    launch = SinglePass(1, 1, 32, 2 * K, -(-vocabulary // columns), columns, 2)
    ours = in_one_pass(student, teacher, labels, ce, kl, gradient, launch, temperature)
    assert relative_error(*(written(numbers, FORWARD_KL).double() for numbers in (ours, statistics))) < 4e-7
    assert relative_error(gradient, expected.double()) < 4e-7


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(
    ("need_ce", "need_kl", "divergence"),
    [(True, False, FORWARD_KL), *((False, True, divergence) for divergence in NAMES)],
)
def test_one_term(kernel_device, splits, need_ce, need_kl, divergence):
    student, teacher, labels, ce, kl = given(kernel_device, 3 * TILE + 5)
    terms = teacher if need_kl else None, labels if need_ce else None
    check((student, *terms, ce * need_ce, kl * need_kl), 2.0, splits, divergence)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under the interpreter
def test_rows_further_apart_than_float32_reaches(kernel_device, splits, divergence):
    """The gradient has the mean log-ratio R of the sweep that found it, not the infinity of the one before.

    For reverse KL the gradient of two passes is near only as far as R is.  The slope (u - v) / T - R may be small, while R
    is about 20: an epsilon of it is 2.4e-6.
    """
    other, averaged, labels, ce, kl = given(kernel_device, 3 * TILE)
    other[0, 1], other[0, 1, 7] = 3e38, -3e38
    student, teacher = (other, averaged) if divergence == FORWARD_KL else (averaged, other)
    statistics, expected = in_two_passes(student, teacher, labels, ce, kl, 0.5, splits, divergence)
    gradient = torch.full_like(student, torch.nan)
    launch = whole_or_shared(student.shape[-1], splits)
    ours = in_one_pass(student, teacher, labels, ce, kl, gradient, launch, 0.5, divergence)
    ours_written = written(ours, divergence)
    assert ours_written.isfinite().all()
    assert not gradient.isnan().any()
    torch.testing.assert_close(ours_written, written(statistics, divergence), rtol=4e-6, atol=1e-6 / stats.UNIT)
    from_ours = gradient_from(ours, student, teacher, labels, ce, kl, 0.5, divergence)
    torch.testing.assert_close(gradient, from_ours, rtol=0, atol=0)
    if divergence == FORWARD_KL:
        torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_reverse_kl_of_close_models(kernel_device, splits, temperature):
    student, teacher = close_models(kernel_device)
    ones, gradient = torch.ones(2, device=kernel_device), torch.full_like(student, torch.nan)
    columns = -(-32_000 // (max(1, splits) * 2048)) * 2048
    launch = SinglePass(1, 8, 32, K, splits, columns, 1)
    statistics = in_one_pass(student, teacher, None, ones, ones, gradient, launch, temperature, REVERSE_KL)
    value = value_of(statistics, temperature, REVERSE_KL)
    check_close_models(value, [gradient], (student, teacher), temperature)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("divergence", [None, *NAMES])
def test_entropy_is_that_of_two_passes(kernel_device, splits, divergence):
    student, teacher, labels, ce, kl = given(kernel_device, 3 * TILE + 5)
    student[..., ::5] = -torch.inf
    labels.fill_(1)
    teacher[..., ::5] = -torch.inf
    teacher = teacher if divergence else None
    check((student, teacher, labels, ce, kl * bool(divergence)), 2.5, splits, divergence or FORWARD_KL, entropy=True)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("temperature", [2.0, 2.5])
def test_mixed_kl_and_its_gradient(kernel_device, splits, temperature):
    student, teacher, _, ce, kl = given(kernel_device, 5 * TILE + 17)
    gradient, launch = torch.full_like(student, torch.nan), whole_or_shared(5 * TILE + 17, splits)
    statistics = in_one_pass(student, teacher, None, ce, kl, gradient, launch, temperature, MIXED_KL)
    exact = exact_divergence(student, teacher, temperature, MIXED_KL)
    torch.testing.assert_close(value_of(statistics, temperature, MIXED_KL), exact, rtol=1e-6, atol=0)
    expected, _ = exact_gradients(student, teacher, None, ce, kl, temperature, MIXED_KL)
    assert relative_error(gradient, expected) < 1e-6


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("student_map", [LogitMap(0.5), LogitMap(2.0, 5.0)])
@pytest.mark.parametrize("teacher_map", [LogitMap(), LogitMap(0.5, 3.0)])
@pytest.mark.parametrize("divergence", NAMES)
def test_logit_maps(kernel_device, splits, student_map, teacher_map, divergence):
    check(given(kernel_device, 2 * TILE + 5), 3.0, splits, divergence, student_map, teacher_map)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("pad", [0, 1, 16])  # rows at odd addresses, and at multiples of 16 bytes
@pytest.mark.parametrize("outer", [1, 2])  # rows one stride apart, and not
def test_gradient_in_the_students_place(kernel_device, splits, pad, outer):
    student, teacher, labels, ce, kl = given(kernel_device, 5 * TILE, pad=pad, outer=outer)
    apart = torch.empty_like(student)
    launch = whole_or_shared(5 * TILE, splits)
    expected = in_one_pass(student, teacher, labels, ce, kl, apart, launch, 2.0)
    check((student, teacher, labels, ce, kl), 2.0, splits)
    statistics = in_one_pass(student, teacher, labels, ce, kl, student, launch, 2.0)
    assert torch.equal(student, apart)
    assert same(statistics, expected)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(
    "ignored", [[0], [1], [3], [0, 1, 2, 3]]
)  # the first and the last row are waited for in their own way
@pytest.mark.parametrize("divergence", NAMES)
def test_rows_of_weight_zero_are_not_read(kernel_device, splits, ignored, divergence):
    student, teacher, labels, ce, kl = given(kernel_device, 2 * TILE + 5)
    ce[ignored] = kl[ignored] = 0
    student[0, ignored] = teacher[0, ignored] = torch.nan
    labels[ignored] = -100
    gradient = torch.full_like(student, torch.nan)
    launch = whole_or_shared(2 * TILE + 5, splits)
    statistics = in_one_pass(student, teacher, labels, ce, kl, gradient, launch, 2.0, divergence)
    expected = written(stats.identity(len(ignored)), divergence)
    assert torch.equal(written(statistics, divergence)[:, ignored], expected.to(kernel_device))
    assert not gradient[0, ignored].any()
    assert not gradient.isnan().any()
    counted = [row for row in range(4) if row not in ignored]
    assert (gradient[0, counted] != 0).any(1).all()


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(kernel_device, splits, rows):
    if rows:
        check(given(kernel_device, 2 * TILE + 5, rows=1), 2.0, splits)
        return
    student, teacher, labels, ce, kl = given(kernel_device, TILE, rows=0)
    launch = whole_or_shared(TILE, splits)
    in_one_pass(student, teacher, labels, ce, kl, student, launch, 2.0)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("label", [0, TILE - 1, TILE, 2 * TILE, 3 * TILE - 1, 3 * TILE + 4])
def test_labels_in_every_tile(kernel_device, splits, label):
    """The label's tile is swept by itself: the first, one between, the last whole one, the one that is not whole."""
    student, _, labels, ce, kl = given(kernel_device, 3 * TILE + 5)
    labels.fill_(label)
    gradient = torch.empty_like(student)
    launch = whole_or_shared(3 * TILE + 5, splits)
    statistics = in_one_pass(student, None, labels, ce, 0 * kl, gradient, launch, 1.0)
    assert torch.equal(statistics[stats.LABEL], student[0, :, label])
    expected = torch.softmax(student.double(), -1)
    expected[..., label] -= 1
    assert relative_error(gradient, expected * ce[:, None]) < 1e-6


def test_bfloat16_by_the_default_plan(kernel_device):
    student, teacher, labels, ce, kl = given(kernel_device, 20_000)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    gradient = torch.empty_like(student)
    launch = single_pass(student, teacher, in_place=False, always=True)
    statistics = in_one_pass(student, teacher, labels, ce, kl, gradient, launch, 2.0)
    merged, expected, _ = gradients_of(student, teacher, labels, ce, kl, 2.0, FORWARD_KL)
    assert torch.allclose(statistics, merged, rtol=4e-6, equal_nan=True)  # of 20 000 columns, in other orders
    assert (gradient != expected).double().mean() < 0.001  # one unit in the last place


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("pad", [1, 16])
def test_a_gradient_of_16_bits_of_float32_logits(kernel_device, splits, pad):
    """It is the float32 gradient, rounded in the store."""
    student, teacher, labels, ce, kl = given(kernel_device, 5 * TILE, pad=pad)
    launch = whole_or_shared(5 * TILE, splits)
    gradient, rounded = (torch.full_like(student, torch.nan, dtype=dtype) for dtype in (student.dtype, torch.bfloat16))
    expected = in_one_pass(student, teacher, labels, ce, kl, gradient, launch, 2.0)
    statistics = in_one_pass(student, teacher, labels, ce, kl, rounded, launch, 2.0)
    assert same(statistics, expected)
    assert torch.equal(rounded, gradient.bfloat16())


@pytest.mark.parametrize("splits", [1, 5])
def test_counters_that_were_given_are_used(kernel_device, splits):
    student, teacher, labels, ce, kl = given(kernel_device, 2 * TILE)
    counters = torch.zeros(5, LINE.value, dtype=torch.int32, device=kernel_device)
    gradient, launch = torch.empty_like(student), whole_or_shared(2 * TILE, splits)
    in_one_pass(student, teacher, labels, ce, kl, gradient, launch, 2.0, counters=counters)
    assert counters[:, 0].tolist() == [5 * splits] + [splits + 1] * 4


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("rows", [1, 64, 8192, 10**6])
@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("wide", [True, False])
def test_plan_covers_every_column_once(name, rows, vocabulary, wide):
    planned = best_single_pass(rows, vocabulary, 4, 2, DEVICES[name], wide)
    splits = max(1, planned.launch.splits)
    assert planned.launch.columns_per_split * (splits - 1) < vocabulary <= planned.launch.columns_per_split * splits
    assert 1 <= planned.rows_in_flight <= rows
    if planned.launch.splits:
        assert planned.launch.ctas == 1
        assert planned.launch.columns_per_split % (planned.launch.lanes * planned.launch.columns) == 0
    else:
        assert planned.launch.ctas == 1 or (DEVICES[name].clusters and wide)
        assert planned.launch.ctas in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("read", "written", "itemsize"), [(4, 2, 2), (4, 0, 2), (8, 4, 4), (2, 2, 2)])
def test_plan_keeps_the_rows_in_flight_in_half_of_the_cache(name, vocabulary, wide, read, written, itemsize):
    device = DEVICES[name]
    planned = best_single_pass(8192, vocabulary, read, written, device, wide, itemsize)
    assert planned.hits
    assert planned.bytes_in_flight <= 1.05 * L2_SHARE * device.l2_bytes
    assert planned.rows_in_flight * vocabulary * read <= planned.bytes_in_flight


def test_plan_of_the_shapes_that_were_modelled():
    def best(name, vocabulary):
        return best_single_pass(8192, vocabulary, 4, 2, DEVICES[name]).launch

    assert [(best("H100", V).ctas, best("H100", V).splits) for V in (32_000, 128_256)] == [(4, 0), (16, 0)]
    assert [best("H100", V).splits for V in (50_304, 100_352, 151_936, 262_144)] == [25, 49, 75, 128]
    assert [best("A100", V).splits for V in (32_000, 128_256)] == [16, 63]
    assert [best("B200", V).splits for V in (128_256, 262_144)] == [32, 64]
    assert [best(name, 128_256).accesses for name in ("H100", "A100", "B200")] == [1, 2, 2]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("vocabulary", range(25_000, 270_000, 7_000))
def test_plan_has_little_to_do_but_the_columns(name, vocabulary):
    """A last tile takes as long with few columns as with all: 1.3 of the floor's time where three are of use."""
    planned = best_single_pass(8192, vocabulary, 4, 2, DEVICES[name])
    tile = planned.launch.lanes * planned.launch.columns
    columns = -(-vocabulary // tile) * tile  # as if the slices of a row were one
    assert columns <= vocabulary * planned.work <= 1.75 * vocabulary


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("vocabulary", [500, 1000, 2000])
def test_short_rows_take_one_program_each(name, vocabulary):
    planned = best_single_pass(8192, vocabulary, 4, 2, DEVICES[name])
    assert (planned.launch.ctas, planned.launch.splits) == (1, 0)
    assert planned.launch.lanes * planned.launch.columns <= 1.03 * vocabulary


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("vocabulary", [8192, 32_000, 128_256, 262_144])
def test_few_rows_fill_the_device_as_far_as_they_can(name, rows, vocabulary):
    """With half of the programs that it can hold, or with a tile each."""
    device = DEVICES[name]
    planned = best_single_pass(rows, vocabulary, 4, 2, device)
    shape = Shape(planned.launch.num_warps, planned.launch.columns, 64)  # or fewer registers
    wanted = device.processors * resident_programs(device, shape) / 2
    tile = planned.launch.num_warps * device.warp_size * planned.launch.columns
    programs = planned.launch.splits or planned.launch.ctas
    assert rows * programs >= wanted or programs * tile >= min(vocabulary, 16 * tile)


def test_a_device_without_room_gets_one_tile_a_program_and_is_told():
    tiny = DEVICES["A100"]._replace(l2_bytes=2**20)
    planned = best_single_pass(8192, 262_144, 4, 2, tiny)
    assert planned.launch.columns_per_split == planned.launch.lanes * planned.launch.columns
    assert not planned.hits
    assert best_single_pass(8192, 262_144, 4, 2, tiny._replace(processors=1)).rows_in_flight == 1


@pytest.mark.parametrize(
    ("name", "registers", "programs"),
    [("H100", 48, 5), ("H100", 32, 8), ("H100", 33, 6), ("L40S", 32, 6)],  # 65 536 / (48 * 256); 2048 / 256; as 40
)
def test_registers_decide_how_many_programs_are_resident(name, registers, programs):
    assert resident_programs(DEVICES[name], Shape(8, 8, registers)) == programs


def test_devices_that_are_known_by_name_and_others():
    def properties(**given):
        return SimpleNamespace(**given)

    known = properties(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 * 2**20, major=9)
    assert device_of_properties(known) == DEVICES["H100"]
    slice_of_it = properties(
        name="NVIDIA A100-SXM4-80GB MIG 3g.40gb", multi_processor_count=42, L2_cache_size=20 * 2**20
    )
    found, whole = device_of_properties(slice_of_it), DEVICES["A100"]
    rates = {name: 42 / 108 * getattr(whole, name) for name in ("bandwidth", "flops_16", "flops_32")}
    assert found == whole._replace(processors=42, l2_bytes=20 * 2**20, **rates)
    other = properties(
        name="NVIDIA RTX A6000", multi_processor_count=84, L2_cache_size=6 * 2**20, major=8,
        max_threads_per_multi_processor=1536, warp_size=32,
    )  # fmt: skip
    found = device_of_properties(other)
    assert (found.processors, found.l2_bytes, found.clusters, found.threads) == (84, 6 * 2**20, False, 1536)
    # Its memory is no faster beside its multiprocessors than an H100's; that of an H20 is.
    assert device_of_properties(
        properties(**vars(other), clock_rate=1.8e6, memory_clock_rate=8e6, memory_bus_width=384)
    ).sharing
    h20 = properties(
        name="NVIDIA H20", multi_processor_count=78, L2_cache_size=60 * 2**20, major=9,
        clock_rate=1.98e6, memory_clock_rate=2.6e6, memory_bus_width=6144,
    )  # fmt: skip
    assert not device_of_properties(h20).sharing
    assert found.sharing  # PyTorch before 2.8 says nothing of clocks
    amd = properties(name="AMD Instinct MI210", multi_processor_count=104, gcnArchName="gfx90a", major=9, warp_size=64)
    assert not device_of_properties(amd).clusters
