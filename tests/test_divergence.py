"""The option `divergence`: the reference against the formulas of the papers, and both losses against the reference."""

import itertools
import math
import os

import pytest
import torch

from fused_kd import divergences, kd_loss, linear_kd_loss, operators, reference
from fused_kd.divergences import DIVERGENCES, JSD, Objective
from fused_kd.logit_map import LogitMap
from fused_kd.sweep import KDOptions

from .divergences import NAMES, OBJECTS, definition, each_name, each_object
from .oracle import EPSILON, assert_matches_oracle, relative_error

N, V, H_S, H_T = 6, 203, 8, 6
T = 2.0
pytestmark = pytest.mark.usefixtures("one_thread")


def logits(device="cpu", dtype=torch.float32):
    student, teacher = (3 * torch.randn(2, N, V, dtype=dtype)).to(device)
    return student, teacher, torch.randint(V, (N,), device=device)


# The reference


def test_every_divergence_has_a_formula_in_the_reference():
    built_in = [name for name, kind in DIVERGENCES.items() if kind.__module__.startswith(divergences.__name__)]
    assert built_in == NAMES
    assert {divergence.name for divergence in OBJECTS} == set(NAMES)


@each_object
def test_the_reference_is_the_definition(divergence):
    student, teacher, labels = logits(dtype=torch.float64)
    student.requires_grad_(), teacher.requires_grad_()
    output = reference.kd_loss(
        student, teacher, labels, temperature=T, divergence=divergence, reduction="none", alpha=0.3, teacher_grad=True,
        return_parts=True,
    )  # fmt: skip
    p, q = (torch.softmax(z / T, -1) for z in (student, teacher))
    expected = definition(divergence, p, q)
    assert relative_error(output.divergence, expected.detach()) < 1e-13
    assert relative_error(output.entropy, -(p * p.log()).sum(-1).detach()) < 1e-14
    loss = 0.7 * torch.nn.functional.cross_entropy(student, labels, reduction="none") + 0.3 * T**2 * expected
    assert relative_error(output.loss.detach(), loss.detach()) < 1e-13
    for ours, exact in zip(
        *(torch.autograd.grad(x.sum(), (student, teacher)) for x in (output.loss, loss)), strict=True
    ):
        assert relative_error(ours, exact) < 1e-12


@each_object
def test_elements_sum_to_the_definition(divergence):
    """The sum of `elements` stands for a divergence without a formula in the reference.  Elements are at least 0."""
    student, teacher, _ = logits(dtype=torch.float64)
    log_p, log_q = (z.log_softmax(-1) for z in (student, teacher))
    elements = divergence.elements(log_p, log_q)
    assert relative_error(elements.sum(-1), definition(divergence, log_p.exp(), log_q.exp())) < 1e-12
    assert (elements >= -1e-16).all()
    assert torch.allclose(divergence.elements(log_p + 0.7, log_q + 0.7), elements * math.exp(0.7), atol=1e-15)


def test_the_gradients_of_the_docstring():
    """The gradients of student and teacher for reverse KL, by hand: alpha T p (log(p / q) - D) and alpha T (q - p)."""
    student, teacher, _ = logits(dtype=torch.float64)
    for name, first, second in (("reverse_kl", student, teacher), ("forward_kl", teacher, student)):
        student.requires_grad_(), teacher.requires_grad_()
        loss = reference.kd_loss(
            student, teacher, None, temperature=T, divergence=name, alpha=1.0, reduction="sum", teacher_grad=True
        )
        of_first, of_second = torch.autograd.grad(loss, (first, second))
        w, o = (torch.softmax(z.detach() / T, -1) for z in (first, second))
        ratio = (w / o).log()
        assert relative_error(of_first, T * w * (ratio - (w * ratio).sum(-1, keepdim=True))) < 1e-12
        assert relative_error(of_second, T * (o - w)) < 1e-12


# Finite differences.  Only the CPU operators compute in float64.


@each_object
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(divergence, temperature):
    student, teacher = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"alpha": 0.6, "temperature": temperature, "divergence": divergence, "teacher_grad": True}
    options |= {"logit_softcap": (None, 3.0), "logit_scale": (0.7, 1.0)}
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda *z, reduction=reduction: kd_loss(*z, torch.arange(3), reduction=reduction, **options),
            (student, teacher),
        )


@each_object
def test_gradcheck_from_hidden_states(divergence):
    shapes = (3, 4), (7, 4), (3, 5), (7, 5)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = {"alpha": 0.6, "temperature": 1.7, "divergence": divergence, "teacher_grad": True}
    assert torch.autograd.gradcheck(lambda *x: linear_kd_loss(*x, torch.arange(3), **options), leaves)


# Both losses against the oracle


OPTIONS = {
    "none": {"reduction": "none"},
    "sum, weights": {"reduction": "sum", "token_weights": torch.linspace(0, 2, N)},
    "num_items": {"num_items": 40},
    "alpha by row": {"alpha": torch.linspace(0.1, 1, N), "token_weights": torch.linspace(2, 0.1, N)},
    "softcap, scale": {"logit_softcap": (9.0, 7.0), "logit_scale": (1.0, 0.5)},
    "vocab_size": {"vocab_size": V - 3},
    "shift": {"shift": True},
    "alpha = 1": {"alpha": 1.0},
}


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def results(loss, leaves, *rest, upstream, **options):
    """Loss, parts and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = loss(*leaves, *rest, return_parts=True, teacher_grad=True, **options)
    found = torch.autograd.grad(output.loss, leaves, (upstream * torch.ones_like(output.loss)).to(output.loss.dtype))
    return {**{name: part.detach() for name, part in output._asdict().items() if part is not None},
            **{f"gradient {i}": gradient for i, gradient in enumerate(found)}}  # fmt: skip


def assert_close(found, eager, exact, floor=4 * EPSILON):
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        error, by_eager = (relative_error(x[name], expected) for x in (found, eager))
        rounding = floor if found[name].dtype.itemsize > 2 else max(floor, torch.finfo(found[name].dtype).eps)
        assert error <= max(2 * by_eager, rounding), name


def assert_as_the_oracle(loss, oracle, leaves, *rest, **options):
    """Within twice eager float32's error, or a few epsilons: a slope and its mean cancel in a gradient."""
    upstream = torch.linspace(-1, 2, N, device=leaves[0].device) if options.get("reduction") == "none" else 0.7
    found = results(loss, leaves, *rest, upstream=upstream, **options)
    eager, exact = (
        results(oracle, [x.to(dtype) for x in leaves], *rest, upstream=upstream, **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(found, eager, exact, 20 * EPSILON)


@each_object
@pytest.mark.parametrize("options", OPTIONS)
def test_kd_loss(device, divergence, options):
    student, teacher, labels = logits(device)
    labels = labels.clamp(max=V - 4)
    labels[1] = -100
    for temperature in (1.0, 2.0, 2.5):
        assert_as_the_oracle(
            kd_loss, reference.kd_loss, [student, teacher], labels, temperature=temperature, divergence=divergence,
            **on(device, {"alpha": 0.3} | OPTIONS[options]),
        )  # fmt: skip


@each_object
def test_rows_that_do_not_count_are_not_read(device, divergence):
    student, teacher, labels = logits(device)
    labels[1] = -100
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 1.0], device=device)
    clean = results(kd_loss, [student, teacher], labels, token_weights=weights, upstream=1.0, divergence=divergence)
    student[1], teacher[1], student[2], teacher[2] = torch.nan, torch.nan, torch.nan, torch.inf
    found = results(kd_loss, [student, teacher], labels, token_weights=weights, upstream=1.0, divergence=divergence)
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert not found["gradient 0"][1:3].any()
    assert not found["gradient 1"][1:3].any()


def sizes_of_terms(divergence, student, teacher, temperature):
    """The norms of what cancels in the gradients of student and teacher: a slope, and its mean times a probability."""
    given = [(z.double() / temperature).log_softmax(-1).requires_grad_() for z in (student, teacher)]
    slopes = torch.autograd.grad(divergence.elements(*given).sum(), given)
    return [
        temperature * (slope.abs() + log.exp() * slope.abs().sum(-1, keepdim=True)).norm().item()
        for log, slope in zip(given, slopes, strict=True)
    ]


@each_object
def test_kd_loss_without_labels(device, divergence):
    student, teacher, _ = logits(device)
    for temperature in (0.5, 1.0, 5.0):
        options = {"temperature": temperature, "divergence": divergence, "alpha": 1.0, "reduction": "sum"}
        found, eager, exact = (
            results(loss, [z.to(dtype) for z in (student, teacher)], None, upstream=1.0, **options)
            for loss, dtype in (
                (kd_loss, torch.float32), (reference.kd_loss, torch.float32), (reference.kd_loss, torch.float64)
            )
        )  # fmt: skip
        sizes = sizes_of_terms(divergence, student, teacher, temperature)
        for name, expected in exact.items():
            error, by_eager = ((x[name].double() - expected).norm() for x in (found, eager))
            rounding = 4 * EPSILON * (sizes[int(name[-1])] if "gradient" in name else expected)
            assert error <= max(2 * by_eager, rounding), name


@each_object
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_kd_loss_of_16_bit_logits(device, dtypes, divergence):
    student, teacher, labels = logits(device)
    given = [z.to(dtype) for z, dtype in zip((student, teacher), dtypes, strict=True)]
    assert_as_the_oracle(kd_loss, reference.kd_loss, given, labels, temperature=T, divergence=divergence)


@each_object
@pytest.mark.parametrize("options", ["none", "sum, weights", "num_items", "softcap, scale", "vocab_size", "alpha = 1"])
def test_linear_kd_loss(device, divergence, options):
    leaves = [torch.randn(*shape, device=device) for shape in ((N, H_S), (V, H_S), (N, H_T), (V, H_T), (V,), (V,))]
    labels = torch.randint(V - 3, (N,), device=device)
    labels[1] = -100

    def of(loss):
        def with_biases(hidden, weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, labels, **options):
            biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
            return loss(hidden, weight, teacher_hidden, teacher_weight, labels, **biases, **options)

        return with_biases

    for chunk in (None, 4 * 2 * 4 * 256):
        assert_as_the_oracle(
            of(linear_kd_loss), of(reference.linear_kd_loss), leaves, labels, temperature=2.5, divergence=divergence,
            workspace_bytes=chunk, **on(device, OPTIONS[options]),
        )  # fmt: skip


def terms(student, teacher, weight, temperature):
    """The norm of what adds up to the gradient of a row: of p log(p / q), and of p times its mean."""
    p, q = (torch.log_softmax(z.double() / temperature, -1) for z in (student, teacher))
    mean = (p.exp() * (p - q)).sum(-1, keepdim=True)
    return weight * temperature * (p.exp() * ((p - q).abs() + mean)).norm()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"logit_softcap": (9.0, 7.0)}, {"shift": True}])
def test_reverse_kl_from_logits(device, alpha, options):
    student, teacher, labels = logits(device)
    labels[1] = -100
    counted = labels != -100
    if "shift" in options:
        counted = torch.cat([counted[1:], counted[:1] & False])
    caps = options.get("logit_softcap", (math.inf, math.inf))
    capped = [
        cap * torch.tanh(z / cap) if cap < math.inf else z for z, cap in zip((student, teacher), caps, strict=True)
    ]
    weight = alpha if options.get("reduction") == "none" else alpha / int(counted.sum())
    for temperature in (0.5, 1.0, 2.0, 5.0):
        assert_matches_oracle(
            kd_loss, student, teacher, labels, terms=terms(*(z[counted] for z in capped), weight, temperature),
            alpha=alpha, temperature=temperature, divergence="reverse_kl", **options,
        )  # fmt: skip


def spread(kind, shape, generator):
    """Logits of teacher and student."""
    first, second = (torch.randn(*shape, generator=generator) for _ in range(2))
    if kind == "flat":
        return 0.1 * first, 0.1 * second
    if kind == "nearly equal":
        return 3 * first, 3 * first + 1e-3 * second
    if kind == "peaked":
        peak = torch.zeros(shape).scatter_(1, torch.randint(shape[1], (shape[0], 1), generator=generator), 20.0)
        return 2 * first + peak, 2 * second + peak.roll(1, 0)
    return tuple(2 * z / torch.rand(shape, generator=generator).clamp_min(1e-3).sqrt() for z in (first, second))


@each_object
@pytest.mark.parametrize("kind", ["flat", "peaked", "heavy-tailed", "nearly equal"])
def test_errors_are_at_most_twice_eagers(device, divergence, kind):
    """Errors of the values and of both gradients, over seeds, are at most twice eager's or an epsilon, as in `check`.

    Kernels of two sweeps are a few epsilons off where slope and mean cancel, and 1e-5 of the value of nearly equal models:
    there it is a polynomial.
    """
    is_kernel = divergence.sweeps == 2 and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    floors = {"loss": 1e-5, "divergence": 1e-5, "gradient 0": 5 * EPSILON} if is_kernel else {}
    rows, columns = 4, 1500
    squares = {}
    generator = torch.Generator().manual_seed(11)
    for temperature, _ in itertools.product((1.0, 2.5), range(6)):
        leaves = [z.to(device) for z in spread(kind, (rows, columns), generator)]
        options = {"temperature": temperature, "divergence": divergence, "alpha": 1.0, "reduction": "none"}
        found, eager, exact = (
            results(loss, [z.to(dtype) for z in leaves], None, upstream=1.0, **options)
            for loss, dtype in (
                (kd_loss, torch.float32), (reference.kd_loss, torch.float32), (reference.kd_loss, torch.float64)
            )
        )  # fmt: skip
        for name, expected in exact.items():
            parts = [(x.double() - expected).square().sum() for x in (found[name], eager[name])]
            squares.setdefault(name, []).append(torch.stack([*parts, expected.square().sum()]))
    for name, parts in squares.items():
        error, by_eager, size = torch.stack(parts).sum(0).sqrt().tolist()
        bound = max(2 * by_eager, floors.get(name, EPSILON) * size)
        assert error <= bound, f"{name}: {error / size:.1e}, eager {by_eager / size:.1e}"


# The operators


def test_options_go_through_the_arguments_of_an_operator_and_come_back():
    objective = Objective(LogitMap(0.5), LogitMap(2.0, 30.0), 2.5, *divergences.named(JSD(0.3)))
    options = KDOptions(V, True, False, torch.float64, False, True, objective)
    assert operators.unpacked(*operators.packed(options)) == options
    assert len(operators.packed(options)) == operators.KD_ARGUMENTS


@each_name
def test_a_name_stands_for_the_defaults(device, divergence):
    given = logits(device)
    found = kd_loss(*given, divergence=divergence), kd_loss(*given, divergence=DIVERGENCES[divergence]())
    assert torch.equal(*found)
