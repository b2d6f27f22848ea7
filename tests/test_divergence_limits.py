"""Divergences at the ends of their ranges: nearly equal models, masked tokens, one-hot teachers, extreme parameters."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from fused_kd import kd_loss, linear_kd_loss, reference
from fused_kd.divergences import (
    JSD,
    MixedKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from fused_kd.divergences.base import NO_BOUND

from .divergences import OBJECTS, definition, each_object
from .oracle import EPSILON, relative_error

N, V = 5, 301
FAR = -1e6  # in float64 a logit without mass, and still a number
pytestmark = pytest.mark.usefixtures("one_thread")


def make(device, rows=N, vocabulary=V, scale=3.0):
    student, teacher = (scale * torch.randn(2, rows, vocabulary)).to(device)
    return student, teacher


def rows_of(loss, student, teacher, labels=None, **options):
    """Row losses, and the gradients of student and teacher."""
    leaves = [z.detach().clone().requires_grad_() for z in (student, teacher)]
    options = {"alpha": 1.0, "reduction": "none", "teacher_grad": True} | options
    value = loss(*leaves, labels, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def exact_rows(student, teacher, **options):
    """The same in float64, of logits that are finite."""
    return rows_of(reference.kd_loss, *(z.double().clamp_min(FAR) for z in (student, teacher)), **options)


def rounding(size):
    """Return the error that rounding may leave in a gradient: a few epsilons of the slopes and their mean, which cancel."""
    return 4 * EPSILON * size


# Nearly equal models


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@each_object
def test_nearly_equal_models(device, divergence, temperature):
    """Eager float32 is 10% off here, or more: the terms of the sum are a million times the sum."""
    student, noise = make(device, 2, 32_000)
    teacher = student + 1e-3 / 3 * noise
    options = {"divergence": divergence, "temperature": temperature}
    found, exact = rows_of(kd_loss, student, teacher, **options), exact_rows(student, teacher, **options)
    if (
        getattr(divergence, "weights", (0.0, 1.0))[0] == 0
    ):  # forward KL, alone or in a mixture, is as eager float32 here
        # At T = 2 the log-ratios are half as large, and their rounding is twice the share.
        assert ((found[0] / exact[0] - 1).abs() <= 1e-3 * temperature).all()
    for ours, expected in zip(found[1:], exact[1:], strict=True):
        bound = 1e-2 if divergence.name == "tvd" else 1e-3  # its slope jumps where the log-ratio, known to 1e-7, is 0
        assert ((ours - expected).norm(dim=1) <= bound * temperature * expected.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@each_object
def test_a_student_equal_to_its_teacher(device, divergence, dtype, temperature):
    student = make(device)[0].to(dtype)
    student[:, 7] = -torch.inf
    options = {"divergence": divergence, "temperature": temperature}
    value, of_student, of_teacher = rows_of(kd_loss, student.float(), student, **options)
    assert (value.abs() <= 1e-7 * temperature**2).all()
    p = (student.double() / temperature).softmax(1)
    roundings = 6 if isinstance(divergence, SkewKL | SkewReverseKL) else 4  # of p q / m and of its mean
    for gradient in (of_student, of_teacher):
        assert (gradient.abs() <= roundings * EPSILON * temperature * p).all()


# Masked tokens


def is_infinite(divergence, student_has_more):
    forward, reverse = getattr(divergence, "weights", (0.0, 0.0))
    return bool(reverse if student_has_more else forward)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 2.5])
@each_object
def test_masked_tokens(device, divergence, temperature):
    """Row 1: columns of the student alone; row 2: of the teacher alone; row 3: no column in common."""
    student, teacher = make(device)
    student[:, 3:6] = teacher[:, 3:6] = -torch.inf
    teacher[1, 10:], student[2, 40] = -torch.inf, -torch.inf
    student[3, :50], teacher[3, 50:] = -torch.inf, -torch.inf
    options = {"divergence": divergence, "temperature": temperature}
    value, *gradients = rows_of(kd_loss, student, teacher, **options)
    infinite = [is_infinite(divergence, True), is_infinite(divergence, False), any(
        is_infinite(divergence, more) for more in (True, False))]  # fmt: skip
    assert value.isposinf().tolist() == [False, *infinite, False]
    assert not value.isnan().any()
    expected, *exact = exact_rows(student, teacher, **options)
    finite = value.isfinite()
    torch.testing.assert_close(value[finite].double(), expected[finite], rtol=2e-6, atol=0)
    for gradient, other in zip(gradients, exact, strict=True):
        gradient, other = gradient[finite], other[finite]
        assert ((gradient - other).norm(dim=1) <= 4e-6 * other.norm(dim=1) + rounding(temperature)).all()
        assert not gradient[:, 3:6].any()
    if divergence.name == "jsd":  # without a common column the mixture is known: a share of each
        b = divergence.beta
        assert value[3].item() / temperature**2 == pytest.approx(-b * math.log(b) - (1 - b) * math.log1p(-b), rel=1e-6)
    if divergence.name == "tvd":
        assert value[3].item() / temperature**2 == pytest.approx(1.0)


@each_object
def test_masked_tokens_of_the_reference(divergence):
    student, teacher = make("cpu")
    student[:, 3] = teacher[:, 3] = -torch.inf
    teacher[1, 10:], student[2, 40] = -torch.inf, -torch.inf
    options = {"divergence": divergence, "temperature": 2.0, "alpha": 1.0, "reduction": "none"}
    value = reference.kd_loss(student.double(), teacher.double(), None, **options)
    infinite = [is_infinite(divergence, True), is_infinite(divergence, False)]
    assert value.isposinf().tolist() == [False, *infinite, False, False]
    p, q = (torch.softmax(z.double() / 2, -1) for z in (student, teacher))
    torch.testing.assert_close(value, 4 * definition(divergence, p, q), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        divergence.elements(p.log(), q.log())[[0, 3, 4]].sum(-1).nan_to_num(-1.0),
        (value[[0, 3, 4]] / 4).where(torch.tensor(not hasattr(divergence, "weights")), -1.0),
        rtol=1e-12, atol=0,
    )  # fmt: skip


@each_object
def test_masked_tokens_of_a_head(device, divergence):
    """Biases of minus infinity mask a token of every row."""
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, device=device) for shape in ((N, 8), (V, 8), (N, 6), (V, 6))
    )
    bias, teacher_bias = torch.zeros(2, V, device=device)
    bias[3:6] = teacher_bias[3:6] = -torch.inf
    if not is_infinite(divergence, True):
        teacher_bias[20:30] = -torch.inf
    if not is_infinite(divergence, False):
        bias[40:60] = -torch.inf
    found = []
    for loss, dtype in ((linear_kd_loss, torch.float32), (reference.linear_kd_loss, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        biases = [x.to(dtype).clamp_min(-math.inf if dtype == torch.float32 else FAR) for x in (bias, teacher_bias)]
        value = loss(
            *leaves, teacher_hidden.to(dtype), teacher_weight.to(dtype), None, student_bias=biases[0],
            teacher_bias=biases[1], alpha=1.0, temperature=2.0, divergence=divergence,
        )  # fmt: skip
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(relative_error(ours, exact) < 4e-6 for ours, exact in zip(*found, strict=True))


@each_object
def test_nan_stays_in_its_row(device, divergence):
    for which in (0, 1):
        given = make(device, vocabulary=20_003)  # the sum of a thread that has no other column is left out of a merge
        given[which][2, 7] = torch.nan
        value, *gradients = rows_of(kd_loss, *given, divergence=divergence, temperature=2.0)
        assert value.isnan().tolist() == [False, False, True, False, False]
        assert gradients[which].isnan().all(1).tolist() == [False, False, True, False, False]
        assert gradients[1 - which].isnan().any(1).tolist() == [False, False, True, False, False]


# One-hot models


@pytest.mark.parametrize("others", [-torch.inf, -1e4])
@each_object
def test_one_hot_teachers_and_students(device, divergence, others):
    student, teacher = make(device)
    hot = torch.full_like(student, others)
    hot[:, 11] = 0.0
    for z, y, student_has_more in ((student, hot, True), (hot, teacher, False), (hot, hot.roll(1, 1), True)):
        value, *gradients = rows_of(kd_loss, z, y, divergence=divergence)
        expected, *exact = exact_rows(z, y, divergence=divergence)
        forward, reverse = is_infinite(divergence, False), is_infinite(divergence, True)
        both = z is hot and y is not teacher
        if others == -torch.inf and (forward or reverse if both else reverse if student_has_more else forward):
            assert value.isposinf().all()
            continue
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
        for gradient, other in zip(gradients, exact, strict=True):
            assert ((gradient - other).norm(dim=1) <= 4e-6 * other.norm(dim=1) + rounding(1.0 + expected)).all()


# Extreme parameters


EXTREME = [
    JSD(1e-6), JSD(1 - 1e-6), SkewKL(1e-6), SkewKL(1 - 1e-6), SkewReverseKL(1e-6), SkewReverseKL(1 - 1e-6),
    MixedKL(1e-6), MixedKL(1 - 1e-6), JSD(1e-9), JSD(0.005), JSD(0.015), JSD(0.985), SkewKL(0.015), SkewKL(0.985),
    SkewReverseKL(0.985),
]  # fmt: skip


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("divergence", EXTREME, ids=str)
def test_extreme_parameters(device, divergence, scale):
    """The value of JSD is of the order of the smaller share."""
    student, teacher = make(device, scale=scale)
    for temperature in (1.0, 2.0):
        options = {"divergence": divergence, "temperature": temperature}
        found, exact = rows_of(kd_loss, student, teacher, **options), exact_rows(student, teacher, **options)
        eager = rows_of(reference.kd_loss, student, teacher, **options)
        for name, *of in zip(("value", "student", "teacher"), found, eager, exact, strict=True):
            error, by_eager = (relative_error(x, of[2]) for x in of[:2])
            assert error <= max(2 * by_eager, 20 * EPSILON), name


@pytest.mark.parametrize(
    ("divergence", "values"),
    [
        (JSD, {0: "pass ForwardKL()", 1: "pass ReverseKL()"}),
        (MixedKL, {0: "pass ForwardKL()", 1: "pass ReverseKL()"}),
        (SkewKL, {0: "pass ForwardKL()", 1: "such a divergence is always 0"}),
        (SkewReverseKL, {0: "pass ReverseKL()", 1: "such a divergence is always 0"}),
    ],
)
def test_parameters_that_are_refused(divergence, values):
    (field,) = (field.name for field in fields(divergence))
    for value, hint in values.items():
        for number in (value, float(value)):
            with pytest.raises(ValueError, match=f"^{divergence.__name__}: expected {field} from 1e-09 to 1 - 1e-09, got "
                               ) as raised:  # fmt: skip
                divergence(number)
            assert str(raised.value).endswith(f"got {number!r}; {hint}")
    for value in (-0.1, 1.1, math.nan, math.inf, 1e-10):
        with pytest.raises(ValueError, match=f"expected {field} from"):
            divergence(value)
    for value in ("0.5", None, True, torch.tensor(0.5), [0.5]):
        with pytest.raises(TypeError, match=f"expected {field} from"):
            divergence(value)
    for value in (np.float64(0.3), np.float32(0.25)):
        assert divergence(value) == divergence(float(value))
        assert repr(divergence(value)) == repr(divergence(float(value)))


# Bounds of the slope, and float16


def largest_found(divergence, generator):
    """The largest |dD/dz| T among random pairs of few and of many tokens, from flat ones to such without mass in common."""
    largest = 0.0
    for vocabulary in (2, 3, 20):
        for scale in (1.0, 4.0, 20.0, 100.0):
            z, y = (scale * torch.randn(3000, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
            z[:1000] = -y[:1000]
            y[1000:1500, 0] += scale
            z.requires_grad_()
            value = reference.divergence_values(z, y, 1.0, divergence)
            largest = max(largest, torch.autograd.grad(value.sum(), z)[0].abs().max().item())
    return largest


@pytest.mark.parametrize("divergence", [*OBJECTS, *EXTREME], ids=str)
def test_no_slope_is_larger_than_its_bound(divergence):
    if isinstance(divergence, ReverseKL | MixedKL):
        assert divergence.largest_slope >= NO_BOUND * divergence.weights[1]
        return
    assert largest_found(divergence, torch.Generator().manual_seed(1)) <= divergence.largest_slope * (1 + 1e-12)


@each_object
def test_a_mean_over_many_rows_does_not_underflow_in_float16(device, divergence):
    """A gradient in the forward pass is that of a mean over 2^20 rows; the loss scale comes later."""
    tokens, scale = 2**20, 2.0**20
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, device=device).half() for shape in ((6, 16), (V, 16), (6, 24), (V, 24))
    )
    options = {"divergence": divergence, "temperature": 2.0, "num_items": tokens, "alpha": 1.0}
    found = []
    for loss, dtype in ((linear_kd_loss, torch.float16), (reference.linear_kd_loss, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        value = loss(*leaves, teacher_hidden.to(dtype), teacher_weight.to(dtype), None, **options)
        found.append(torch.autograd.grad(scale * value, leaves))
    assert all(relative_error(ours, exact) < 3e-3 for ours, exact in zip(*found, strict=True))


def test_reverse_kl_of_models_that_disagree_fits_into_float16(device):
    hidden, teacher_hidden = torch.tensor([[0.5, 0.49], [0.2, 0.21]], device=device).half(), torch.eye(2, device=device)
    weight, teacher_weight = (scale * torch.eye(2, device=device).half() for scale in (30.0, -40.0))
    for divergence in (ReverseKL(), MixedKL(0.5)):
        found = []
        for loss, dtype in ((linear_kd_loss, torch.float16), (reference.linear_kd_loss, torch.float64)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
            teacher = teacher_hidden.to(dtype), teacher_weight.to(dtype)
            value = loss(*leaves, *teacher, None, alpha=1.0, divergence=divergence)
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert all(ours.isfinite().all() for ours in found[0])
        assert all(relative_error(ours, exact) < 5e-3 for ours, exact in zip(*found, strict=True))
