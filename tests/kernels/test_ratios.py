"""Divergences of two sweeps in the kernels: their functions of one column, their sums, their gradients, their launches."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import mpmath
import pytest
import torch
import triton
import triton.language as tl

from fused_kd import statistics as stats
from fused_kd.backends import triton as kernels
from fused_kd.backends.triton import ratios
from fused_kd.backends.triton.arguments import functions_of
from fused_kd.backends.triton.tiles import LINE
from fused_kd.devices import DEVICES, SHARED_TWO_SWEEPS
from fused_kd.divergences import JSD, Divergence, Objective, SkewKL, of
from fused_kd.launch import Launch, SinglePass, best_single_pass
from fused_kd.logit_map import IDENTITY_MAP, LogitMap

from ..oracle import relative_error
from .test_kernels import LANES, TILE, K, some_columns, weights_of

NAMES = ["jsd", "skew_kl", "skew_reverse_kl", "tvd"]
DEFAULTS = {"jsd": (0.5,), "skew_kl": (0.1,), "skew_reverse_kl": (0.1,), "tvd": ()}
WITH_PARAMETERS = [
    *[("jsd", beta) for beta in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6)],
    *[("skew_kl", skew) for skew in (1e-6, 0.1, 0.5)],
    *[("skew_reverse_kl", skew) for skew in (1e-3, 0.1, 0.5)],
    ("tvd", 0.0),
]


# One column


def functions_kernel(
    p_ptr, q_ptr, log_ratio_ptr, value_ptr, slope_ptr, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    x = ratios.Elements(tl.load(p_ptr + i), tl.load(q_ptr + i), tl.load(log_ratio_ptr + i), parameter)
    tl.store(value_ptr + i, VALUE(x))
    tl.store(slope_ptr + i, SLOPE(x))


def functions_at(name, p, q, log_ratio, parameter):
    """Return f and G of columns, in float32."""
    value, slope = torch.full_like(p, torch.nan), torch.full_like(p, torch.nan)
    pair = getattr(ratios, f"{name}_value"), getattr(ratios, f"{name}_slope")
    kernel = triton.jit(functions_kernel)  # here, where `kernel_device` has said whether it is interpreted
    kernel[(1,)](p, q, log_ratio, value, slope, parameter, *pair, p.numel())
    return value, slope


def exact(name, t, p, parameter):
    """Return f and G of one column in 40 digits."""
    with mpmath.workdps(40):
        b, t, p = mpmath.mpf(parameter), mpmath.mpf(t), mpmath.mpf(p)
        if name == "skew_reverse_kl":
            b = 1 - b
        q = p * mpmath.exp(t)
        m = (1 - b) * p + b * q
        of_p, of_q = mpmath.log(m / p), mpmath.log(q / m)
        f, G = {
            "jsd": (b * q * of_q - (1 - b) * p * of_p, -(1 - b) * p * of_p),
            "skew_kl": (q * of_q - (1 - b) * (q - p), -(1 - b) * q * p / m),
            "skew_reverse_kl": (b * (q - p) - p * of_p, b * q * p / m - p * of_p),
            "tvd": (abs(p - q) / 2, p * mpmath.sign(p - q) / 2),
        }[name]
        return float(f), float(G)


@pytest.mark.parametrize(("name", "parameter"), WITH_PARAMETERS)
def test_functions_of_one_column(kernel_device, name, parameter):
    """f to a relative 1e-4, wherever it is small; G to 2e-6 of itself or of p - q, times the smaller share."""
    parameter = float(torch.tensor(parameter))  # as the kernel gets it
    size = 10 ** torch.linspace(-7, 1.9, 256, dtype=torch.float64)
    t = torch.cat([size, -size]).float().double()
    p, q = torch.where(t > 0, torch.exp(-t), 1.0), torch.where(t > 0, 1.0, torch.exp(t))
    given = (x.float().to(kernel_device) for x in (p, q, t))
    value, slope = (x.double().cpu() for x in functions_at(name, *given, parameter))
    f, G = torch.tensor([exact(name, *column, parameter) for column in zip(t.tolist(), p.tolist(), strict=True)]).T
    b = {"jsd": parameter * (1 - parameter), "skew_kl": (1 - parameter) ** 2, "skew_reverse_kl": (1 - parameter) ** 2}
    precision = 2e-6 if 0.01 < parameter < 0.99 else 2e-5  # theta is large
    rounding = 4e-7 * p.abs() if name == "tvd" else torch.zeros(())  # p - q of float32 has no more digits
    assert ((value - f).abs() <= 1e-4 * f + rounding).all()
    assert (
        (slope - G).abs() <= precision * b.get(name, 1.0) * p * (1 + t.abs()) + (2e-6 + 1e-7 * t.abs()) * G.abs()
    ).all()
    assert (value >= 0).all()


@pytest.mark.parametrize("kind", [JSD, SkewKL])
def test_kernels_get_the_smaller_share(kernel_device, kind):
    """Rounded to float32, as a kernel gets it, a share next to 1 would have lost the digits of the other share."""
    share = 1 - 1e-6
    parameter = float(torch.tensor(kind(share).kernel_parameter, dtype=torch.float32))
    t = torch.tensor([-3.0, -0.5, 0.5, 3.0], dtype=torch.float64)
    p = torch.full_like(t, 0.25)
    given = (x.float().to(kernel_device) for x in (p, p * t.exp(), t))
    _, slope = functions_at(kind.name, *given, parameter)
    exactly = torch.tensor([exact(kind.name, *column, share)[1] for column in zip(t.tolist(), p.tolist(), strict=True)])
    assert relative_error(slope.cpu(), exactly) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_ratio", [torch.inf, -torch.inf, torch.nan, 1e4, -1e4])
def test_columns_without_mass(kernel_device, name, log_ratio):
    """f is its limit, which is finite, and G is 0 without the student's mass."""
    b = (0.3, 0.7)[name == "skew_reverse_kl"]
    p, q = torch.tensor([0.0, 0.0, 0.25]), torch.tensor([0.0, 0.25, 0.0])
    t = torch.full((4,), log_ratio)
    t[1], t[2] = torch.inf if log_ratio > 0 else 200.0, -torch.inf if log_ratio < 0 else -200.0
    p, q = torch.cat([p, torch.zeros(1)]).to(kernel_device), torch.cat([q, torch.zeros(1)]).to(kernel_device)
    value, slope = (x.cpu() for x in functions_at(name, p, q, t.to(kernel_device), 0.3))
    log = torch.tensor([b, 1 - b]).log()
    expected = {
        "jsd": (-b * log[0], -(1 - b) * log[1]),
        "skew_kl": (-log[0] - (1 - b), 1 - b),
        "skew_reverse_kl": (b, -log[1] - b),
        "tvd": (0.5, 0.5),
    }[name]
    slope_without_q = {
        "jsd": -(1 - b) * log[1], "skew_kl": 0.0, "skew_reverse_kl": -log[1], "tvd": 0.5
    }[name]  # fmt: skip
    expected = 0.25 * torch.tensor([0.0, *expected, 0.0])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(slope, 0.25 * torch.tensor([0.0, 0.0, slope_without_q, 0.0]), rtol=1e-6, atol=1e-30)


# Sums and gradients


def given(device, vocabulary, rows=4, pad=0, sd=3.0):
    student, teacher = (sd * torch.randn(1, rows, vocabulary + pad, device=device)[..., :vocabulary] for _ in range(2))
    labels = torch.randint(vocabulary, (rows,), device=device)
    weights = torch.rand(rows, device=device) + 0.5
    return student, teacher, labels, weights_of(weights, 2 - weights)


def objective_of(name, temperature, maps=(IDENTITY_MAP, IDENTITY_MAP), parameters=None):
    return Objective(*maps, temperature, name, DEFAULTS[name] if parameters is None else parameters)


def expected(student, teacher, labels, weights, objective):
    """Return values and gradients in float64, from the definition of the divergence.  Minus infinity is -1e5 here."""
    logits = [logits[0].double().clamp(min=-1e5).requires_grad_() for logits in (student, teacher)]
    z, y = (
        m.softcap * torch.tanh(m.scale * x / m.softcap) if m.is_capped else m.scale * x
        for x, m in zip(logits, objective[:2], strict=True)
    )
    log_p, log_q = ((x / objective.temperature).log_softmax(-1) for x in (z, y))
    value = of(objective.divergence, objective.parameters).elements(log_p, log_q).sum(-1)
    loss = (weights[2] * value).sum()
    if labels is not None:
        loss = loss + (weights[1] * torch.nn.functional.cross_entropy(z, labels, reduction="none")).sum()
    return value.detach(), *torch.autograd.grad(loss, logits)


def two_launches(vocabulary, splits):
    return Launch(LANES, K, 1, max(1, splits), -(-vocabulary // (max(1, splits) * TILE)) * TILE)


def in_two_passes(student, teacher, labels, weights, objective, splits=1, counters=None):
    """Return statistics and both gradients."""
    launch = two_launches(student.shape[-1], splits)
    statistics = some_columns(stats.COUNT, student.shape[1], torch.float32, student.device)
    kernels.row_statistics(student, teacher, labels, weights, statistics, counters, objective, False, launch)
    gradients = torch.full_like(student, torch.nan), torch.full_like(teacher, torch.nan)
    kernels.logit_gradient(student, teacher, labels, statistics, weights, None, *gradients, objective, launch)
    return statistics, *gradients


def in_one_pass(student, teacher, labels, weights, objective, launch, gradient, counters=None, entropy=False):
    """Return the statistics."""
    statistics = some_columns(stats.COUNT, student.shape[1], torch.float32, student.device)
    kernels.statistics_and_gradient(
        student, teacher, labels, weights, statistics, gradient, counters, launch, objective, entropy
    )
    return statistics


def shared(vocabulary, splits, columns=K):
    """Return the launch of whole rows for no splits, otherwise that of so many programs per row."""
    tile = LANES * columns
    return SinglePass(1, 1, 32, columns, splits, -(-vocabulary // (max(1, splits) * tile)) * tile, columns // K)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("need_ce", [True, False])
def test_two_passes(kernel_device, name, temperature, splits, need_ce):
    student, teacher, labels, weights = given(kernel_device, 3 * TILE + 17)
    inputs = student, teacher, labels if need_ce else None, weights, objective_of(name, temperature)
    statistics, gradient, teacher_gradient = in_two_passes(*inputs, splits)
    value, of_student, of_teacher = expected(*inputs)
    # At T = 1 most of p is in few columns, where G - p R is a small difference, as is f - G in the teacher's gradient.
    assert relative_error(statistics[stats.SECOND], value) < 1e-6
    assert relative_error(gradient[0], of_student) < (5e-6 if temperature == 1 and not need_ce else 1e-6)
    assert relative_error(teacher_gradient[0], of_teacher) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("maps", [(LogitMap(0.7), LogitMap(1.3)), (LogitMap(1.0, 5.0), LogitMap(1.0, 7.0))])
def test_maps_of_logits(kernel_device, name, maps):
    student, teacher, labels, weights = given(kernel_device, TILE + 5)
    inputs = student, teacher, labels, weights, objective_of(name, 2.0, maps)
    statistics, gradient, teacher_gradient = in_two_passes(*inputs)
    value, of_student, of_teacher = expected(*inputs)
    assert relative_error(statistics[stats.SECOND], value) < 1e-6
    assert relative_error(gradient[0], of_student) < 1e-6
    assert relative_error(teacher_gradient[0], of_teacher) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [0, 1, 5])
@pytest.mark.parametrize("vocabulary", [1, 3 * TILE + 17])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_launch_in_place(kernel_device, name, splits, vocabulary, rows):
    """Five slices of fewer tiles leave some slices empty.  One and two rows leave stages of the pipeline without a row."""
    student, teacher, labels, weights = given(kernel_device, vocabulary, rows)
    inputs = teacher, labels, weights, objective_of(name, 2.0)
    value, of_student, _ = expected(student, *inputs)
    launch = shared(vocabulary, splits)
    gradient = torch.full_like(student, torch.nan)
    statistics = in_one_pass(student, *inputs, launch, gradient)
    from_statistics = torch.full_like(student, torch.nan)
    kernels.logit_gradient(
        student, *inputs[:2], statistics, weights, None, from_statistics, None, inputs[-1], two_launches(vocabulary, 1)
    )
    assert torch.equal(gradient, from_statistics)
    if vocabulary > 1:
        assert relative_error(statistics[stats.SECOND], value) < 1e-6
        assert relative_error(gradient[0], of_student) < 1e-6
    if splits <= 1:
        assert torch.equal(statistics.nan_to_num(), in_two_passes(student, *inputs)[0].nan_to_num())
    in_place = in_one_pass(student, *inputs, launch, student)
    assert torch.equal(student, gradient)
    assert torch.equal(in_place.nan_to_num(), statistics.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [1, 3])
def test_columns_in_several_accesses(kernel_device, name, splits):
    """The launch that is planned: one warp, and four loads of 16 bytes."""
    student, teacher, labels, weights = given(kernel_device, 9 * TILE + 16)
    inputs = student, teacher, labels, weights, objective_of(name, 2.0)
    gradient = torch.full_like(student, torch.nan)
    statistics = in_one_pass(*inputs, shared(student.shape[-1], splits, 4 * K), gradient, entropy=True)
    value, of_student, _ = expected(*inputs)
    assert relative_error(statistics[stats.SECOND], value) < 1e-6
    assert relative_error(gradient[0], of_student) < 1e-6
    log_p = (student[0].double() / 2).log_softmax(-1)
    d_T, h = statistics[stats.D_T].double(), statistics[stats.H].double()
    assert relative_error(d_T.log() - h / (2 * d_T), -(log_p.exp() * log_p).sum(-1)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [0, 3])
def test_rows_that_do_not_count_are_not_read(kernel_device, name, splits):
    student, teacher, labels, weights = given(kernel_device, 2 * TILE + 3)
    value, of_student, of_teacher = expected(student, teacher, labels, weights, objective_of(name, 2.0))
    weights[:, 1] = 0
    student[0, 1], teacher[0, 1] = torch.nan, torch.nan
    inputs = student, teacher, labels, weights, objective_of(name, 2.0)
    counted = [0, 2, 3]
    statistics, gradient, teacher_gradient = in_two_passes(*inputs, splits)
    ours = torch.full_like(student, torch.nan)
    in_one = in_one_pass(*inputs, shared(student.shape[-1], splits), ours)
    for found in (statistics, in_one):
        assert relative_error(found[stats.SECOND, counted], value[counted]) < 1e-6
        assert found[stats.SECOND, 1] == found[stats.C, 1] == 0
    for found in (gradient, ours):
        assert relative_error(found[0, counted], of_student[counted]) < 1e-6
        assert not found[0, 1].any()
    assert relative_error(teacher_gradient[0, counted], of_teacher[counted]) < 1e-5
    assert not teacher_gradient[0, 1].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [0, 3])
def test_masked_columns(kernel_device, name, splits):
    """Columns that are minus infinity in one model, or in both, or that are far below the others."""
    student, teacher, labels, weights = given(kernel_device, 2 * TILE + 3)
    student[..., :7] = student[..., 20:30] = -torch.inf
    teacher[..., 4:10] = teacher[..., 25:40] = -torch.inf
    student[..., 50], teacher[..., 51] = -3e38, -3e38
    student[..., 60], teacher[..., 61] = -1e4, -1e4
    labels.fill_(100)
    inputs = student, teacher, labels, weights, objective_of(name, 2.0)
    value, of_student, of_teacher = expected(*inputs)
    statistics, gradient, teacher_gradient = in_two_passes(*inputs, splits)
    assert relative_error(statistics[stats.SECOND], value) < 1e-6
    assert relative_error(gradient[0], of_student) < 1e-6
    assert relative_error(teacher_gradient[0], of_teacher) < 1e-5
    in_one_pass(*inputs, shared(student.shape[-1], splits), student)
    assert relative_error(student[0], of_student) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_an_offset(kernel_device, name):
    """A distribution does not depend on an offset of its logits, even if a difference of two offsets overflows."""
    student, teacher, labels, weights = given(kernel_device, TILE + 1)
    student[0, 1] -= 1000.0  # 32 bits leave 5e-5 of a logit
    student[0, 2], teacher[0, 2] = 3e38, -3e38
    student[0, 2, 7], teacher[0, 2, 9] = 2.9e38, -3.1e38
    inputs = student, teacher, labels, weights, objective_of(name, 2.0)
    value, of_student, _ = expected(student, teacher.clamp(min=-3.4e38), *inputs[2:])
    rows = [0, 1, 3]  # the oracle clamps the logits of row 2
    statistics, gradient, _ = in_two_passes(*inputs)
    assert relative_error(statistics[stats.SECOND, rows], value[rows]) < 1e-6
    assert relative_error(gradient[0, rows], of_student[rows]) < 1e-6
    assert statistics[stats.SECOND, 2] < 0.1  # two uniform distributions but for one column each
    assert gradient[0, 2].isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, "equal"])
def test_nearly_equal_models(kernel_device, name):
    """The value keeps its digits, although its terms of first order cancel."""
    student, _, _, weights = given(kernel_device, 32_000, rows=2)
    teacher = student + (name != "equal") * 1e-3 * torch.randn_like(student)
    weights[1] = 0
    inputs = student, teacher, None, weights, objective_of("jsd" if name == "equal" else name, 1.0)
    value, of_student, _ = expected(*inputs)
    statistics, gradient, _ = in_two_passes(*inputs)
    if name == "equal":
        assert not statistics[stats.SECOND].any()
        assert gradient.abs().max() < 1e-12
        return
    assert relative_error(statistics[stats.SECOND], value) < (1e-3, 2e-3)[name == "tvd"]
    if name != "tvd":  # whose slope jumps from one sign to the other
        assert relative_error(gradient[0], of_student) < 1e-3


def test_counters_of_both_sweeps(kernel_device):
    """Lines 2 + N and on count the slices of the second sweep, plus 1 in one launch; line 1 + N is not used."""
    student, teacher, labels, weights = given(kernel_device, 3 * TILE)
    inputs = student, teacher, labels, weights, objective_of("jsd", 2.0)
    two, one = (torch.zeros(2 * (1 + 4) + 1, LINE.value, dtype=torch.int32, device=kernel_device) for _ in range(2))
    in_two_passes(*inputs, 3, counters=two)
    in_one_pass(*inputs, shared(student.shape[-1], 3), student, one)
    assert two[:, 0].tolist() == [0, 3, 3, 3, 3, 0, 3, 3, 3, 3, 0]
    assert one[:, 0].tolist() == [18, 4, 4, 4, 4, 0, 4, 4, 4, 4, 0]
    assert not two[:, 1:].any()
    assert not one[:, 1:].any()


# A user's divergence


def hellinger_value(x):
    difference = tl.sqrt(x.p) - tl.sqrt(x.q)
    return difference * difference * x.parameter


def hellinger_slope(x):
    return (x.p - tl.sqrt(x.p * x.q)) * x.parameter


@dataclass(frozen=True)
class SquaredRoots(Divergence):
    name: ClassVar[str] = "squared_roots"
    factor: float = 0.5

    def elements(self, log_p, log_q):
        return self.factor * ((log_p / 2).exp() - (log_q / 2).exp()) ** 2

    def kernels(self):
        return triton.jit(hellinger_value), triton.jit(hellinger_slope)


@pytest.mark.parametrize("splits", [0, 3])
def test_a_divergence_of_the_user(kernel_device, splits):
    student, teacher, labels, weights = given(kernel_device, 2 * TILE + 3)
    inputs = (
        student,
        teacher,
        labels,
        weights,
        objective_of(SquaredRoots.name, 2.0, parameters=SquaredRoots(0.7).parameters),
    )
    value, of_student, of_teacher = expected(*inputs)
    statistics, gradient, teacher_gradient = in_two_passes(*inputs, splits)
    assert relative_error(statistics[stats.SECOND], value) < 1e-6
    assert relative_error(gradient[0], of_student) < 1e-6
    assert relative_error(teacher_gradient[0], of_teacher) < 1e-5
    in_one_pass(*inputs, shared(student.shape[-1], splits), student)
    assert relative_error(student[0], of_student) < 1e-6


def test_a_function_that_is_defined_anew_is_compiled_anew(monkeypatch):
    """Triton 3.3 finds a compiled kernel by the names of constexpr functions."""
    objective = objective_of(SquaredRoots.name, 2.0, parameters=SquaredRoots().parameters)
    found = []
    for key in ("a", "b"):
        pair = SimpleNamespace(cache_key="value"), SimpleNamespace(cache_key=key)
        monkeypatch.setattr(SquaredRoots, "kernels", lambda self, pair=pair: pair)
        found.append(functions_of(objective))
        assert (found[-1]["VALUE"], found[-1]["SLOPE"]) == pair
    assert found[0]["VERSION"] != found[1]["VERSION"]
    assert functions_of(Objective()) == {"VALUE": None, "SLOPE": None, "VERSION": None}


# The plan


@pytest.mark.parametrize("name", ["A100", "H100"])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_planned_launch(name, vocabulary):
    """No cluster, and longer slices than with one sweep."""
    device = DEVICES[name]
    planned = best_single_pass(8192, vocabulary, 4, 2, device, sweeps=2)
    one_sweep = best_single_pass(8192, vocabulary, 4, 2, device._replace(clusters=False))
    assert planned.hits
    assert planned.launch.ctas == 1
    if planned.launch.splits:
        shape = (planned.launch.num_warps, planned.launch.columns, planned.launch.accesses)
        assert shape == (SHARED_TWO_SWEEPS.num_warps, SHARED_TWO_SWEEPS.columns, SHARED_TWO_SWEEPS.accesses)
        per_thread = planned.launch.columns_per_split / planned.launch.lanes
        assert per_thread > one_sweep.launch.columns_per_split / one_sweep.launch.lanes
