"""The CPU operators by themselves: the single pass against two passes, to the bit, and against the reference in float64."""

import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.divergences import Objective
from fused_kd.logit_map import LogitMap
from fused_kd.testing.accuracy import EPSILON, relative_error
from fused_kd.testing.blocks import blocks_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = OUTER, INNER, V = 6, 5, 131
N = OUTER * INNER
TEMPERATURES = [1.0, 2.0, 3.5]
DIVERGENCES = ["forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
TERMS = [("CE", "forward_kl"), *itertools.product(["both", "divergence"], DIVERGENCES)]


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def blocks(request):
    """Small ones: of seven rows, of three where they are gathered."""
    with blocks_of(7 * V, gathered=3 * V) if request.param else contextlib.nullcontext():
        yield


class Problem(NamedTuple):
    student: Tensor  # [outer, inner, V]
    teacher: Tensor | None
    labels: Tensor | None
    weights: Tensor


class Found(NamedTuple):
    statistics: Tensor
    gradient: Tensor


def make(dtype=torch.float32, counted="all", terms="both", shape=SHAPE, alpha=0.4, temperature=2.0) -> Problem:
    student, teacher = (3 * torch.randn(2, *shape, dtype=torch.float64)).to(dtype)
    rows, vocabulary = shape[0] * shape[1], shape[2]
    labels = torch.randint(vocabulary, (rows,))
    row = torch.rand(rows, dtype=torch.float64) + 0.5
    others = {"all": [], "every other": slice(1, None, 2), "the end of each sequence": slice(4, None, 5),
              "a prompt": slice(0, 17), "none": slice(None)}[counted]  # fmt: skip
    row[others], labels[others] = 0, -100
    student.view(rows, vocabulary)[others], teacher.view(rows, vocabulary)[others] = torch.nan, -torch.inf
    alpha = {"both": alpha, "CE": 0.0, "divergence": 1.0}[terms]
    weights = torch.stack([row, row * (1 - alpha), row * alpha * temperature**2])
    return Problem(student, None if terms == "CE" else teacher, None if terms == "divergence" else labels, weights)


def dtype_of(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.student.dtype == torch.float64 else torch.float32


def memory(problem: Problem, like: Tensor | None = None) -> Found:
    """Memory that holds NaN."""
    statistics = torch.full((9, problem.weights.shape[1]), torch.nan, dtype=dtype_of(problem))
    return Found(statistics, torch.full_like(problem.student if like is None else like, torch.nan))


def single(problem: Problem, objective: Objective, into: Found | None = None) -> Found:
    found = into or memory(problem)
    cpu.statistics_and_gradient(*problem, *found, None, None, objective, True)
    return found


def two(problem: Problem, objective: Objective, into: Found | None = None, upstream=None) -> Found:
    found = into or memory(problem)
    cpu.row_statistics(*problem, found.statistics, None, objective, True)
    student, teacher, labels, weights = problem
    cpu.logit_gradient(student, teacher, labels, found.statistics, weights, upstream, found.gradient, None, objective)
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(first: Found, second: Found) -> None:
    assert all(torch.equal(a, b) or torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def losses(problem: Problem, found: Found, objective: Objective, reduce=True, parts=True, dtype=torch.float64):
    has_ce, has_divergence = problem.labels is not None, problem.teacher is not None
    return cpu.row_losses(
        found.statistics, problem.weights, None, has_ce, has_divergence, reduce, parts, dtype, objective
    )


def exact(problem: Problem, objective: Objective, dtype=torch.float64, weights=None):
    """The loss, its parts and its gradient by the reference."""
    weights = problem.weights if weights is None else weights
    counted = torch.logical_or(*weights[1:])
    student = problem.student.reshape(-1, problem.student.shape[2])[counted].to(dtype).requires_grad_()
    maps = objective.student_map, objective.teacher_map
    options = {
        "temperature": objective.temperature, "divergence": objective.divergence, "reduction": "none",
        "logit_scale": tuple(each.scale for each in maps),
        "logit_softcap": tuple(each.softcap if each.is_capped else None for each in maps),
    }  # fmt: skip
    loss, parts = 0, []
    for weight, alpha in ((weights[1], 0.0), (weights[2], 1.0)):
        if (problem.labels, problem.teacher)[int(alpha)] is None:
            continue
        teacher = None if alpha == 0 else problem.teacher.reshape(student_shape(problem))[counted].to(dtype)
        labels = problem.labels[counted] if alpha == 0 else None
        value = reference.kd_loss(student, teacher, labels, alpha=alpha, **options)
        value = value / (objective.temperature**2 if alpha else 1)
        loss = loss + (weight[counted] * value).sum()
        parts.append((weights[0][counted] * value).sum().detach())
    scale, softcap = options["logit_scale"][0], options["logit_softcap"][0]
    entropy = reference.student_entropy(reference.mapped(student, scale, softcap), objective.temperature)
    parts.append((weights[0][counted] * entropy).sum().detach())
    (of_counted,) = torch.autograd.grad(loss, student)
    gradient = torch.zeros(student_shape(problem), dtype=dtype)
    gradient[counted] = of_counted
    return loss.detach(), parts, gradient.view(problem.student.shape)


def student_shape(problem: Problem) -> tuple[int, int]:
    return problem.weights.shape[1], problem.student.shape[2]


def assert_right(problem: Problem, objective: Objective, found: Found, terms: float = 0.0) -> None:
    loss, *parts = losses(problem, found, objective)
    parts = [part for part in parts if part.numel()]
    oracle, oracle_parts, oracle_gradient = exact(problem, objective)
    eager, _, eager_gradient = exact(problem, objective, torch.promote_types(problem.student.dtype, torch.float32))
    eps = torch.finfo(dtype_of(problem)).eps
    roundings = 4 if objective.divergence in ("forward_kl", "reverse_kl") else 20  # a sum of many terms
    assert relative_error(loss, oracle) <= max(2 * relative_error(eager, oracle), roundings * eps)
    for part, other in zip(parts, oracle_parts, strict=True):
        assert relative_error(part, other) <= 20 * eps
    rounding = max(4 * eps, torch.finfo(found.gradient.dtype).eps)
    assert relative_error(found.gradient, oracle_gradient) <= max(
        2 * relative_error(eager_gradient, oracle_gradient), rounding, terms
    )


MAPS = {
    "no map": (LogitMap(), LogitMap()),
    "maps": (LogitMap(0.5, 6.0), LogitMap(2.0)),
    "softcaps": (LogitMap(1.0, 5.0), LogitMap(0.7, 4.0)),
}


COUNTED = ["all", "every other", "the end of each sequence", "a prompt"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("terms", "divergence"), TERMS)
@pytest.mark.parametrize("counted", COUNTED)
def test_one_pass_has_the_bits_of_two(counted, terms, divergence):
    for dtype, temperature, maps in itertools.product(DTYPES, TEMPERATURES, MAPS.values()):
        objective = Objective(*maps, temperature, divergence)
        problem = make(dtype, counted, terms, temperature=temperature)
        found = single(problem, objective)
        assert_same(found, two(problem, objective))
        assert not found.gradient[(problem.weights[0] == 0).view(OUTER, INNER)].any()
        written = [*range(stats.SECOND), stats.H, *([] if divergence == "forward_kl" else [stats.SECOND])]
        assert found.statistics[written].isfinite().all()


@pytest.mark.parametrize(("terms", "divergence"), TERMS)
@pytest.mark.parametrize("counted", COUNTED[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype, counted, terms, divergence):
    """Terms cancel in all gradients but forward KL's, so that they are a few epsilons of the norm of the terms off."""
    floor = 0.0 if divergence == "forward_kl" else 40 * EPSILON
    for temperature, maps in zip(TEMPERATURES, MAPS.values(), strict=True):
        objective = Objective(*maps, temperature, divergence)
        problem = make(dtype, counted, terms, temperature=temperature)
        assert_right(problem, objective, single(problem, objective), floor)


def test_no_row_counts():
    for terms in ("both", "CE", "divergence"):
        problem, objective = make(counted="none", terms=terms), Objective(temperature=2.0)
        found = single(problem, objective)
        assert_same(found, two(problem, objective))
        assert not found.gradient.any()
        assert [part.item() for part in losses(problem, found, objective) if part.numel()].count(0.0) >= 2


@pytest.mark.parametrize("shape", [(1, 0, 5), (1, 1, 1), (1, 1, V), (1, 2, 2), (3, 1, 7)])
def test_the_smallest_sizes(shape):
    problem, objective = make(shape=shape), Objective(temperature=2.0)
    found = single(problem, objective)
    assert_same(found, two(problem, objective))
    if shape[1]:
        torch.testing.assert_close(found.gradient.double(), exact(problem, objective)[2], rtol=1e-5, atol=1e-6)
    else:
        assert losses(problem, found, objective)[0] == 0


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice of each sequence": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],
    "the sequence outermost": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "padded columns": lambda z: torch.cat([z, z], -1)[..., :V],
    "the columns outermost": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("counted", COUNTED)
def test_rows_in_other_memory(counted, place, divergence):
    """The bits of dense logits; also if the gradient takes the place of the student."""
    objective = Objective(LogitMap(), LogitMap(softcap=5.0), 3.5, divergence)
    problem = make(counted=counted, temperature=3.5)
    dense = single(problem, objective)
    placed = problem._replace(student=PLACES[place](problem.student))
    for run in (single, two):
        found = memory(placed, PLACES[place](problem.student))
        assert_same(run(placed, objective, found), dense)
        student = placed.student.clone(memory_format=torch.preserve_format)
        overwritten = Found(found.statistics, student)
        assert_same(run(placed._replace(student=student), objective, overwritten), dense)


def test_an_expanded_teacher():
    objective = Objective(temperature=2.0)
    for teacher in (torch.randn(V).expand(SHAPE), torch.randn(OUTER, 1, V).expand(SHAPE)):
        problem = make()._replace(teacher=teacher)
        found = single(problem, objective)
        assert_same(found, two(problem, objective))
        assert_right(problem, objective, found)


def test_statistics_and_weights_that_are_slices():
    """A chunk of tokens has some columns of all tokens' statistics and weights."""
    problem, objective = make(), Objective(temperature=2.0)
    expected = single(problem, objective)
    into = memory(problem)._replace(statistics=torch.full((9, 3 * N), torch.nan)[:, N : 2 * N])
    weights = torch.full((3, 2 * N), torch.nan, dtype=torch.float64)[:, 3 : N + 3].copy_(problem.weights)
    assert_same(single(problem._replace(weights=weights), objective, into), expected)


def test_the_label_is_the_students_logit():
    for maps in MAPS.values():
        problem = make(counted="every other")
        found = single(problem, Objective(*maps, 2.0))
        z = maps[0].of(problem.student).view(N, V)
        expected = z.gather(1, problem.labels.clamp(0)[:, None])[:, 0].where(problem.weights[0] != 0, 0.0)
        torch.testing.assert_close(found.statistics[6], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_gradient_of_another_dtype(dtype):
    """Rounded once."""
    problem, objective = make(counted="every other"), Objective(temperature=2.0)
    expected = single(problem, objective).gradient.to(dtype)
    for run in (single, two):
        found = run(problem, objective, memory(problem, problem.student.to(dtype)))
        assert torch.equal(found.gradient, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_upstream_gradients(divergence):
    problem, objective = make(counted="every other"), Objective(temperature=2.0, divergence=divergence)
    for upstream in (torch.tensor(0.3), torch.rand(N), torch.rand(N, dtype=torch.float64)):
        found = two(problem, objective, upstream=upstream)
        *_, expected = exact(problem, objective, weights=problem.weights * upstream)
        assert relative_error(found.gradient, expected) < 1e-6
        assert_same(two(problem._replace(weights=problem.weights * upstream), objective), found)


def of_the_teacher(student: Tensor, teacher: Tensor, weights: Tensor, options) -> Tensor:
    """The teacher's gradient by the reference."""
    teacher = teacher.detach().requires_grad_()
    value = reference.kd_loss(student, teacher, None, **options)
    return torch.autograd.grad((weights / options["temperature"] ** 2 * value).sum(), teacher)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_teachers_gradient(dtype, maps, divergence):
    for temperature in TEMPERATURES:
        objective = Objective(*MAPS[maps], temperature, divergence)
        problem = make(dtype, "every other", temperature=temperature)
        student, teacher, labels, weights = problem
        found, of_teacher = memory(problem), torch.full_like(teacher, torch.nan)
        cpu.row_statistics(*problem, found.statistics, None, objective, True)
        cpu.logit_gradient(
            student, teacher, labels, found.statistics, weights, None, found.gradient, of_teacher, objective
        )
        assert_same(found, single(problem, objective))
        counted = weights[0] != 0

        options = {
            "alpha": 1.0, "temperature": temperature, "divergence": divergence, "reduction": "none", "teacher_grad": True,
            "logit_scale": tuple(each.scale for each in MAPS[maps]),
            "logit_softcap": tuple(each.softcap if each.is_capped else None for each in MAPS[maps]),
        }  # fmt: skip
        expected, eager = (
            of_the_teacher(*(x.view(N, V)[counted].to(d) for x in (student, teacher)), weights[2][counted], options)
            for d in (torch.float64, torch.float32)
        )
        of_teacher = of_teacher.view(N, V)
        bound = max(2e-6, torch.finfo(dtype).eps, 2 * relative_error(eager, expected))
        assert relative_error(of_teacher[counted], expected) < bound
        assert not of_teacher[~counted].any()


def masked() -> Problem:
    """Infinite differences of logits: both without mass, the teacher alone, the student alone."""
    problem = make()
    student, teacher = problem.student.view(N, V), problem.teacher.view(N, V)
    student[:, 3] = teacher[:, 3] = -torch.inf
    teacher[4, 5] = student[8, 7] = -torch.inf
    student[9], teacher[9] = 1e38, -2.5e38
    student[9, 0], teacher[9, 1] = -2e38, 1e38
    return problem._replace(labels=torch.full((N,), 11))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.usefixtures("blocks")
def test_minus_infinity(divergence, temperature):
    problem, objective = masked(), Objective(temperature=temperature, divergence=divergence)
    found = single(problem, objective)
    assert_same(found, two(problem, objective))
    loss, *_ = losses(problem, found, objective, reduce=False)
    infinite = {"forward_kl": [8], "reverse_kl": [4], "mixed_kl": [4, 8]}.get(divergence, [])
    assert loss.isposinf().nonzero().flatten().tolist() == infinite
    # Reverse KL is infinite in row 4, and its slope in row 9 is beyond float32.
    with_gradient = [row for row in range(N) if divergence not in ("reverse_kl", "mixed_kl") or row not in (4, 9)]
    found, oracle = (z.view(N, V)[with_gradient] for z in (found.gradient, exact(problem, objective)[2]))
    assert found.isfinite().all()
    assert relative_error(found, oracle) < 2e-6


def test_a_row_of_nan_stays_alone():
    for name in ("student", "teacher"):
        problem, objective = make(), Objective(temperature=2.0)
        getattr(problem, name)[2, 1, 5] = torch.nan
        found = single(problem, objective)
        assert_same(found, two(problem, objective))
        row = torch.arange(N) == 2 * INNER + 1
        assert torch.equal(found.gradient.view(N, V).isnan().all(1), row)
        assert torch.equal(found.gradient.view(N, V).isnan().any(1), row)


def test_weights_that_the_statistics_do_not_hold():
    """A row of weight 1e-50 has statistics and no gradient, even if it holds NaN."""
    problem, objective = make(), Objective(temperature=2.0)
    problem.weights[:, 3] *= 1e-50
    problem.student[0, 3, 0] = torch.nan
    found = single(problem, objective)
    assert_same(found, two(problem, objective))
    assert found.statistics[1, 3].isnan()
    assert not found.gradient[0, 3].any()


@pytest.mark.parametrize("terms", ["both", "CE", "divergence"])
@pytest.mark.parametrize("parts", [False, True])
def test_losses(terms, parts):
    problem, objective = make(counted="every other", terms=terms), Objective(temperature=2.0)
    found = single(problem, objective)
    per_row = losses(problem, found, objective, reduce=False, parts=parts)
    sums = losses(problem, found, objective, parts=parts)
    has = [True, parts and terms != "divergence", parts and terms != "CE", parts]
    for of_rows, total, is_there in zip(per_row, sums, has, strict=True):
        assert of_rows.shape == ((N,) if is_there else (0,))
        assert total.shape == (() if is_there else (0,))
        if is_there:
            torch.testing.assert_close(of_rows.sum(), total)
            assert not of_rows[1::2].any()
    assert losses(problem, found, objective, dtype=torch.float32)[0].dtype == torch.float32


def test_an_infinite_value_of_weight_zero_adds_nothing():
    problem, objective = make(alpha=0.0), Objective(temperature=2.0)
    problem.student[0, 0, 0], problem.teacher[0, 0, 0] = -torch.inf, 1.0
    problem.weights[2] = 1e-280
    problem.labels[0] = 1
    loss, ce, divergence, _ = losses(problem, single(problem, objective), objective)
    assert loss == ce
    assert divergence.isposinf()


@pytest.mark.parametrize("rows", [3, 100_003])
def test_sums_do_not_depend_on_threads(rows):
    statistics, weights = torch.rand(9, rows) + 0.5, torch.rand(3, rows, dtype=torch.float64)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for terms in ((True, True), (True, False)):
            found.append(cpu.row_losses(statistics, weights, None, *terms, True, True, torch.float64, Objective()))
    torch.set_num_threads(threads)
    for other in found[2:]:
        assert any(all(torch.equal(a, b) for a, b in zip(other, first, strict=True)) for first in found[:2])


# Scaling, units and copies


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype, target_dtype):
    factors = [torch.tensor(0.7), torch.tensor(0.3, dtype=torch.float64)]
    with blocks_of(2 * V):
        for source in (torch.randn(SHAPE).to(dtype), torch.randn(V, 4).to(dtype).T, torch.randn(V).to(dtype)):
            wide = torch.promote_types(dtype, torch.float32)
            for given, factor in ((factors[:1], 0.7), (factors, 0.7 * 0.3)):
                target = torch.full_like(source, torch.nan, dtype=target_dtype)
                cpu.scale_(source, given, target)
                expected = source.double() * factor
                eps = max(torch.finfo(each).eps for each in (wide, target_dtype))
                torch.testing.assert_close(target.double(), expected, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_in_place(dtype):
    source = torch.randn(V).to(dtype)
    expected, version = source.clone(), source._version
    cpu.scale_(source, [torch.tensor(1.0)], source)
    assert source._version == version
    cpu.scale_(source, [torch.tensor(4.0), torch.tensor(0.5)], source)
    assert torch.equal(source, 2 * expected)


def test_unit_weights():
    weights = torch.rand(3, 9, dtype=torch.float64)
    for upstream in (None, torch.tensor(1e-9), torch.rand(9)):
        scaled, unit = cpu.unit_weights(weights, upstream, 2.0, 0.5)
        assert unit.log2() == unit.log2().round()
        expected = weights if upstream is None else weights * upstream
        assert torch.equal(scaled * unit, expected)
        largest = (2.0 * scaled[1] + 0.5 * scaled[2]).max()
        assert 2**8 <= largest < 2**9
    for nothing in (torch.zeros(3, 4, dtype=torch.float64), weights[:, :0]):
        assert cpu.unit_weights(nothing, None, 1.0, 1.0)[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_counted(dtype):
    hidden, weights = torch.randn(9, 4), torch.rand(3, 9, dtype=torch.float64)
    for others in ([], [2, 5]):
        weights[:, others] = 1e-280
        hidden[others] = torch.nan
        target = torch.empty(9, 4, dtype=dtype)
        cpu.copy_counted(hidden, weights, target)
        assert torch.equal(target, hidden.nan_to_num(0.0).to(dtype))
