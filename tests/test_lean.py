"""The lean sweep of heads, slab by slab, against the float64 oracle: values, statistics, every gradient."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_kd import reference
from fused_kd import statistics as stats
from fused_kd import sweep as kd_sweep
from fused_kd.backends import cpu
from fused_kd.divergences import Objective, named
from fused_kd.heads import lean
from fused_kd.heads.chunks import row_stride
from fused_kd.heads.head import Head
from fused_kd.heads.sweep import NOTHING, LinearOptions, unit_weights
from fused_kd.logit_map import IDENTITY_MAP, LogitMap
from fused_kd.rows import RowOptions, row_weights
from fused_kd.sweep import KDOptions
from fused_kd.testing.memory import peak_bytes

from . import test_synchronisation as synchronisation
from .divergences import OBJECTS, each_object
from .oracle import EPSILON, relative_error

N, V, H_S, H_T, R = 6, 139, 12, 20, 3  # two whole slabs, and one of 11 columns
IGNORED = -100
NAMES = ("hidden", "weight", "bias")
kernels, fake_device = synchronisation.kernels, synchronisation.fake_device  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", "kernels"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU operators and the kernels; there is one way to launch these."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("kernel_device")


def make(device, dtype=torch.float32, rows=N, vocabulary=V, padding=0, scale=1.0) -> SimpleNamespace:
    """Heads of both models, and a low-rank one, whose logits have a standard deviation of about 3."""

    def normal(*shape):
        return torch.randn(*shape).to(device).to(dtype)

    def weight(width):
        return (3 * scale * torch.randn(vocabulary + padding, width) / width**0.5).to(device).to(dtype)

    return SimpleNamespace(
        student=[Head(normal(rows, H_S), weight(H_S), normal(vocabulary + padding))],
        lora=Head(normal(rows, R), weight(R), None),
        teacher=[Head(normal(rows, H_T), weight(H_T), normal(vocabulary + padding))],
        labels=torch.randint(vocabulary, (rows,)).to(device),
    )


def needed_by_default(given):
    """The gradients that are asked for, of each head: all of the student's."""
    of_student = [(True, True, head.bias is not None) for head in given.student]
    return of_student + [(False, False, False)] * len(given.teacher)


def run(
    given, *, columns=64, needed=None, alpha=0.3, temperature=1.0, divergence="forward_kl", reduction="mean",
    token_weights=None, maps=(IDENTITY_MAP, IDENTITY_MAP), vocabulary=V, products=None, out=None, parts=True,
    logits_dtype=None, loss=None,
):  # fmt: skip
    """The loss and its parts, and the gradients of every head."""
    heads = [*given.student, *given.teacher]
    dtype = products or given.student[0].hidden.dtype
    statistics_dtype = torch.float64 if torch.float64 in {head.hidden.dtype for head in heads} else torch.float32
    name, parameters = named(divergence)
    kd = KDOptions(
        vocabulary, alpha < 1, alpha > 0, statistics_dtype, True, parts, Objective(*maps, temperature, name, parameters)
    )
    weights, _ = row_weights(
        given.labels, token_weights, None, None, given.student[0].hidden,
        RowOptions(len(given.student[0].hidden), 0, vocabulary, IGNORED, reduction == "mean", alpha, None, temperature),
    )  # fmt: skip
    weights = weights.detach().contiguous()
    needed = needed or needed_by_default(given)
    options = LinearOptions(
        kd, (), dtype, products or (given.teacher or given.student)[0].hidden.dtype, logits_dtype, None
    )
    statistics = kd_sweep.new_statistics(weights, kd)
    scaled, unit = unit_weights(weights, None, options._replace(needed=(True,)), NOTHING)
    heads = [*given.student, *[None] * (2 - len(given.student)), *(given.teacher or [None])]
    wanted = iter(needed)
    of_heads = [(False,) * 3 if head is None else next(wanted) for head in heads]
    plan = SimpleNamespace(slab_columns=columns)
    outside = NOTHING._replace(weight_grad_out=out)
    found = lean.sweep(heads, of_heads, given.labels, scaled, options, outside, statistics, None, plan)
    found = [gradients for gradients, head in zip(found, heads, strict=True) if head is not None]
    counters = kd_sweep.new_counters(weights, 1)
    losses = kd_sweep.row_losses(statistics, weights, counters, kd, given.labels is not None, bool(given.teacher))
    gradients = {
        f"{name} {i}": gradient.double() * unit if unit.numel() else gradient
        for i, head in enumerate(found) for name, gradient in zip(NAMES, head, strict=True) if gradient is not None
    }  # fmt: skip
    values = {name: getattr(losses, name) for name in ("loss", "ce", "divergence", "entropy")}
    return values | gradients | ({"statistics": statistics} if reduction == "none" else {})


def logits_of(heads, logit_map, vocabulary):
    logits = sum(
        head.hidden @ head.weight[:vocabulary].T + (0 if head.bias is None else head.bias[:vocabulary])
        for head in heads
    )
    return logit_map.of(logits)


def expected(given, *, dtype=torch.float64, needed=None, maps=(IDENTITY_MAP, IDENTITY_MAP), vocabulary=V, alpha=0.3,
             temperature=1.0, divergence="forward_kl", reduction="mean", token_weights=None, **_):  # fmt: skip
    """The same by the oracle, in another dtype."""
    models = [
        [Head(*(None if x is None else x.to(dtype).detach().requires_grad_() for x in head)) for head in heads]
        for heads in (given.student, given.teacher)
    ]
    student = logits_of(models[0], maps[0], vocabulary)
    teacher = logits_of(models[1], maps[1], vocabulary) if given.teacher else None
    counts = given.labels != IGNORED if given.labels is not None else torch.ones(len(student), dtype=torch.bool)
    options = {"alpha": alpha, "temperature": temperature, "divergence": divergence, "reduction": reduction}
    out = reference.kd_loss(
        student[counts], None if teacher is None else teacher[counts],
        None if given.labels is None else given.labels[counts],
        token_weights=None if token_weights is None else token_weights[counts], return_parts=True, teacher_grad=True,
        **options,
    )  # fmt: skip
    heads = [*models[0], *models[1]]
    needed = needed or needed_by_default(given)
    leaves = {
        f"{name} {i}": x
        for i, (head, need) in enumerate(zip(heads, needed, strict=True))
        for name, x, wants in zip(NAMES, head, need, strict=True) if wants
    }  # fmt: skip
    gradients = torch.autograd.grad(out.loss, list(leaves.values()), materialize_grads=True) if leaves else ()
    return (
        {"loss": out.loss.detach()}
        | dict(zip(leaves, gradients, strict=True))
        | {
            name: value.detach()
            for name in ("ce", "divergence", "entropy")
            if (value := getattr(out, name)) is not None
        }
    )


def assert_matches_oracle(given, floor=4 * EPSILON, **options) -> dict[str, Tensor]:
    """Every result within twice the error of eager in the same dtype, or `floor`, of the float64 oracle."""
    ours, exact = run(given, **options), expected(given, **options)
    eager = expected(given, dtype=given.student[0].hidden.dtype, **options)
    assert {name for name, value in ours.items() if value.numel()} == exact.keys()
    for name, oracle in exact.items():
        bound = max(2 * relative_error(eager[name], oracle), floor)
        assert relative_error(ours[name], oracle) <= bound, name
    return ours


@each_object
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 1.0), (1.0, 2.0), (0.3, 2.5), (0.6, 0.5)])
def test_matches_the_oracle(device, divergence, alpha, temperature):
    assert_matches_oracle(make(device), alpha=alpha, temperature=temperature, divergence=divergence)


@pytest.mark.parametrize("columns", [1, 3, 64, V, 1000])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_any_slab(device, columns, divergence):
    """The label of each row is in another slab, and no column of any other slab."""
    given = make(device, vocabulary=7 if columns < 64 else V)
    options = {"columns": columns, "divergence": divergence, "vocabulary": len(given.student[0].weight)}
    assert_matches_oracle(given, temperature=2.0, **options)


MAPS = {
    "scale": (LogitMap(0.5), LogitMap(2.0)),
    "softcap": (LogitMap(1.0, 5.0), LogitMap(0.5, 4.0)),
}


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
def test_maps_of_the_logits(device, maps, divergence):
    assert_matches_oracle(make(device), maps=MAPS[maps], divergence=divergence, temperature=3.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_terms_that_are_left_out_or_only_logged(device, alpha, divergence):
    """Without parts asked for, nothing of a term that is not in the loss is computed."""
    given = make(device)
    for logged in (True, False):
        if not logged:
            given.labels = given.labels if alpha < 1 else None
            given.teacher = given.teacher if alpha > 0 else []
        found, exact = (
            run(given, alpha=alpha, divergence=divergence),
            expected(given, alpha=alpha, divergence=divergence),
        )
        for name in ("loss", "hidden 0", "weight 0", "bias 0"):
            assert relative_error(found[name], exact[name]) < 2e-6, name


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_asked_for_is_computed(device, divergence, needed):
    options = {"needed": [needed, (False, False, False)], "divergence": divergence}
    assert_matches_oracle(make(device), **options)


def test_a_teacher_that_learns_from_a_frozen_student(device):
    assert_matches_oracle(make(device), needed=[(False,) * 3, (True, True, False)], divergence="reverse_kl", alpha=1.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_row_of_a_learned_weight_0_has_statistics_and_no_gradient(device, divergence):
    given = make(device)
    given.labels[2] = IGNORED
    token_weights = torch.ones(N, device=device)
    token_weights[1] = 0
    found = [run(given, divergence=divergence, token_weights=weights, reduction="none") for weights in (
        torch.ones(N, device=device), token_weights.requires_grad_()
    )]  # fmt: skip
    torch.testing.assert_close(*(result["statistics"] for result in found), rtol=0, atol=0)
    assert found[0]["hidden 0"][1].any()
    assert not found[1]["hidden 0"][1].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd"])
def test_padding_and_no_bias(device, divergence):
    given = make(device, padding=5)
    given.teacher[0] = given.teacher[0]._replace(bias=None)
    given.student[0].weight[V:], given.student[0].bias[V:], given.teacher[0].weight[V:] = 1e3, torch.nan, torch.inf
    found = assert_matches_oracle(given, divergence=divergence, temperature=2.0)
    assert found["weight 0"].shape == given.student[0].weight.shape
    assert not found["weight 0"][V:].any()
    assert not found["bias 0"][V:].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divergence", ["mixed_kl", "skew_reverse_kl"])
def test_rows_that_do_not_count_may_hold_anything(device, divergence, reduction):
    given = make(device)
    clean = SimpleNamespace(**vars(given))
    given.labels[[1, 4]] = IGNORED
    given.student, given.teacher = (
        [
            head._replace(hidden=head.hidden.index_fill(0, torch.tensor([1, 4], device=device), torch.nan))
            for head in heads
        ]
        for heads in (given.student, given.teacher)
    )
    token_weights = torch.rand(N, device=device)
    token_weights[0] = 0
    options = {"divergence": divergence, "reduction": reduction, "token_weights": token_weights}
    found, exact = run(given, **options), expected(clean, **options)
    for name, oracle in exact.items():
        assert relative_error(found[name], oracle) < 4e-6, name
    assert not found["hidden 0"][[0, 1, 4]].any()


@each_object
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_teacher_that_learns(device, divergence, temperature):
    needed = [(True, True, True)] * 2
    floor = (64 if divergence.name == "tvd" else 4) * EPSILON  # a sum of signs, which cancel
    assert_matches_oracle(make(device), floor, needed=needed, divergence=divergence, temperature=temperature, alpha=0.6)


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_whose_logits_add_up(device, divergence, dtype):
    """A low-rank head beside a frozen one, or beside one that learns too."""
    given = make(device, dtype)
    given.student.append(given.lora)
    rounding = 4 * EPSILON if dtype == torch.float32 else torch.finfo(dtype).eps
    for needed in ((True, False, False), (True, True, True)):
        options = {"needed": [needed, (True, True, False), (False,) * 3], "divergence": divergence, "temperature": 2.0}
        assert_matches_oracle(given, rounding, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_half_precision(device, dtype, biased, divergence):
    """The logits are exact, so that gradients have the error of their own rounding, and of the logits' gradients."""
    given = make(device, dtype)
    if not biased:
        given.student[0] = given.student[0]._replace(bias=None)
    options = {"temperature": 2.0, "divergence": divergence, "reduction": "sum"}
    found, exact = run(given, **options), expected(given, **options)
    for name, oracle in exact.items():
        assert relative_error(found[name], oracle) <= (torch.finfo(dtype).eps if " " in name else 2e-6), name
    if biased:
        assert relative_error(found["bias 0"], exact["bias 0"]) < 4e-6
    if dtype == torch.bfloat16:
        assert found["weight 0"].dtype == dtype
        assert relative_error(found["weight 0"], exact["weight 0"]) < 4 * 0.0017


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_of_16_bits(device, dtype, biased):
    """They are rounded, as in eager heads, and the gradient takes their memory."""
    given = make(device, dtype)
    if not biased:
        given.student[0] = given.student[0]._replace(bias=None)
    assert_matches_oracle(given, torch.finfo(dtype).eps, logits_dtype=dtype, temperature=2.0, reduction="sum")


def test_a_small_gradient_in_float16_has_a_unit(device):
    given = make(device, torch.float16)
    options = {"token_weights": torch.full((N,), 1e-9, device=device), "reduction": "sum"}
    found, exact = run(given, **options), expected(given, **options)
    for name in ("hidden 0", "weight 0"):
        assert relative_error(found[name], exact[name]) < 2e-3


def test_products_in_another_dtype(device):
    """Under autocast a slab of a float32 weight is cast; gradients are float32."""
    given = make(device)
    given.labels[2] = IGNORED
    rounded = SimpleNamespace(labels=given.labels, student=[], teacher=[])
    for name in ("student", "teacher"):
        getattr(rounded, name).extend(Head(*(x.bfloat16() for x in head)) for head in getattr(given, name))
    given.student[0].hidden[2] = torch.inf
    found, exact = run(given, products=torch.bfloat16, temperature=2.0), expected(rounded, temperature=2.0)
    for name in ("hidden 0", "weight 0"):
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], exact[name]) < torch.finfo(torch.bfloat16).eps / 2
    assert relative_error(found["loss"], exact["loss"]) < 2e-6


def test_float64():
    given = make("cpu", torch.float64)
    for divergence in OBJECTS:
        options = {"divergence": divergence, "temperature": 2.0}
        found, exact = run(given, **options), expected(given, **options)
        assert all(relative_error(found[name], exact[name]) < 1e-12 for name in exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_the_callers_is_added_to(device, dtype):
    given = make(device, dtype, padding=3)
    before = torch.randn(V + 3, H_S, device=device)
    out = before.clone()
    found, exact = run(given, out=out), expected(given)
    assert "weight 0" not in found
    assert torch.equal(out[V:], before[V:])
    bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(out - before, exact["weight 0"]) < bound


def test_no_rows(device):
    found = run(make(device, rows=0), token_weights=None, reduction="sum")
    assert found["loss"] == 0
    assert found["hidden 0"].shape == (0, H_S)
    assert not found["weight 0"].any()
    assert not found["bias 0"].any()


# Extremes


@pytest.mark.parametrize("divergence", [OBJECTS[1], *OBJECTS[4:]], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("columns", [8000, 1000])
def test_nearly_equal_models(device, divergence, temperature, columns):
    """The bounds are those of `kd_loss`: see test_divergence_limits."""
    z, noise = 3 * torch.randn(2, 2, 32_000, device=device)
    heads = [Head(torch.eye(2, device=device), logits.T.contiguous(), None) for logits in (z, z + 1e-3 / 3 * noise)]
    given = SimpleNamespace(student=heads[:1], teacher=heads[1:], labels=None)
    options = {
        "alpha": 1.0, "divergence": divergence, "temperature": temperature, "vocabulary": 32_000,
        "needed": [(False, True, False)] * 2,
    }  # fmt: skip
    found, exact = run(given, columns=columns, parts=False, **options), expected(given, **options)
    assert abs(found["loss"].item() / exact["loss"].item() - 1) <= 1e-3 * temperature
    bound = 1e-2 if divergence.name == "tvd" else 1e-3
    for name in ("weight 0", "weight 1"):
        assert relative_error(found[name], exact[name]) <= bound * temperature


def test_statistics_are_merged_in_float64_and_rounded_once():
    """So the value of a reverse KL near 0 does not depend on the number of slabs."""
    rows, columns = 100, 16
    z, noise = 3 * torch.randn(2, rows, V)
    y = z + 1e-3 * noise
    heads = [Head(torch.eye(rows), logits.T.contiguous(), None) for logits in (z, y)]
    weights = torch.ones(3, rows, dtype=torch.float64)
    objective = Objective(divergence="reverse_kl", temperature=1.5)
    kd = KDOptions(V, True, True, torch.float32, True, False, objective)
    options = LinearOptions(kd, (), torch.float32, torch.float32, None, None)
    labels = torch.arange(rows)
    found = torch.zeros(stats.COUNT, rows)
    plan = SimpleNamespace(slab_columns=columns)
    lean.sweep([heads[0], None, heads[1]], [(False,) * 3] * 3, labels, weights, options, NOTHING, found, None, plan)
    total = stats.identity(rows).double()
    for slab in range(0, V, columns):
        part = torch.zeros(stats.COUNT, rows)
        pair = (x[None, :, slab : slab + columns] for x in (z, y))
        cpu.row_statistics(*pair, labels - slab, weights, part, None, objective)
        total = stats.merge(torch.stack([total, part.double()]), 1.5, "reverse_kl")
    expected = torch.zeros(stats.COUNT, rows)
    stats.round_to(expected, total, 1.5, "reverse_kl")
    assert torch.equal(found, expected)
    assert not torch.equal(expected, total.float())


@each_object
def test_slabs_that_are_masked(device, divergence):
    """Biases of minus infinity, of whole slabs too, of both models or of one, where the divergence stays finite."""
    given = make(device)
    forward, reverse = getattr(divergence, "weights", (0.0, 0.0))
    student, teacher = given.student[0].bias, given.teacher[0].bias
    student[:70] = teacher[:70] = -torch.inf
    if not reverse:
        teacher[70:135] = -torch.inf
    elif not forward:
        student[70:135] = -torch.inf
    given.labels.clamp_(min=136)
    shorter = SimpleNamespace(labels=given.labels, student=[], teacher=[])
    for name in ("student", "teacher"):
        (head,) = getattr(given, name)
        getattr(shorter, name).append(head._replace(bias=head.bias.double().clamp(min=-1e6)))
    options = {"divergence": divergence, "temperature": 2.0, "columns": 16}
    found, exact = run(given, **options), expected(shorter, **options)
    for name in ("loss", "hidden 0", "weight 0", "bias 0"):
        assert relative_error(found[name], exact[name]) < 4e-6, name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl"])
def test_an_infinite_divergence(device, divergence):
    given = make(device)
    given.student[0].bias[70] = given.teacher[0].bias[3] = -torch.inf
    if divergence == "forward_kl":
        given.teacher[0].bias[3] = 0.0
    if divergence == "reverse_kl":
        given.student[0].bias[70] = 0.0
    assert run(given, divergence=divergence, columns=16)["divergence"] == torch.inf


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixed_kl"])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_logits_further_apart_than_float32_reaches(device, divergence, temperature):
    student = torch.tensor([[1e38, 0.0, -2.5e38, -3e38], [3e38, 3e38, -3e38, 3e38]], device=device)
    teacher = torch.tensor([[-2.5e38, -3e38, 1e38, 1e38], [1e38, 1e38, 1e38, 1e38]], device=device)
    heads = [Head(torch.eye(2, device=device), logits.T.contiguous(), None) for logits in (student, teacher)]
    given = SimpleNamespace(student=heads[:1], teacher=heads[1:], labels=None)
    options = {"alpha": 1.0, "divergence": divergence, "temperature": temperature, "vocabulary": 4, "reduction": "sum"}
    exact = expected(given, **options)["loss"]
    for columns in (1, 2, 4):
        found = run(given, columns=columns, parts=False, **options)["loss"]
        if exact < 3e38:
            assert relative_error(found, exact) < 1e-6
        else:
            assert found == torch.inf


@each_object
def test_nan_stays_in_its_row(device, divergence):
    for which in ("student", "teacher"):
        given = make(device)
        (head,) = getattr(given, which)
        head.hidden[2] = torch.nan
        found = run(given, divergence=divergence)
        assert found["loss"].isnan()
        assert found["hidden 0"].isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_a_label_outside_the_vocabulary_makes_its_row_nan(device):
    given = make(device)
    given.labels[3] = V + 2
    found = run(given, reduction="sum", token_weights=torch.ones(N, device=device))
    assert found["loss"].isnan()
    assert found["hidden 0"].isnan().all(1).tolist() == [False] * 3 + [True] + [False] * 2


# Work and memory


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("logged", [False, True])
def test_flops(divergence, logged):
    """Each slab is projected twice, three times for a divergence of two sweeps; a teacher only logged once less."""
    from torch.utils.flop_counter import FlopCounterMode

    given = make("cpu")
    with FlopCounterMode(display=False) as counter:
        run(given, divergence=divergence, alpha=0.0 if logged else 0.5)
    statistics = 2 if divergence == "jsd" else 1
    F_s, F_t = 2 * N * V * H_S, 2 * N * V * H_T
    assert counter.get_total_flops() == (statistics + 3) * F_s + (statistics + (not logged)) * F_t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_kl"])
@torch.no_grad()
def test_nothing_reads_a_value_or_moves_between_devices(fake_device, kernels, monkeypatch, dtype, divergence):
    monkeypatch.setattr(lean, "device_of", lambda tensor: nullcontext())
    given = SimpleNamespace(student=[], teacher=[], labels=torch.randint(V, (N,), device=fake_device))
    for name, width in (("student", H_S), ("teacher", H_T)):
        shapes = (N, width), (V, width), (V,)
        head = Head(*(torch.randn(*shape, dtype=dtype, device=fake_device) for shape in shapes))
        getattr(given, name).append(head)
    options = {"needed": [(True, True, True)] * 2, "divergence": divergence, "temperature": 2.0}
    with synchronisation.CopiesBetweenDevices() as copies:
        found = run(given, token_weights=torch.rand(N, device=fake_device), **options)
    assert copies.found == []
    assert "addmm" in copies.seen  # the heads
    assert all(tensor.device == fake_device for tensor in found.values())
    slabs = 3
    launched = {
        name: kernels.kernels[name] for name in ("row_statistics_kernel", "merge_kernel", "logit_gradient_kernel")
    }
    assert launched == dict.fromkeys(launched, slabs)
    assert kernels.kernels["copy_counted_kernel"] == 2
    assert kernels.kernels["ratio_sums_kernel"] == (0 if divergence == "reverse_kl" else 2 * slabs)  # the teacher's too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_memory(dtype, ignored):
    """Beyond gradients: the slab's buffers, the sum of the hidden gradient, or the copy of hidden states in float32."""
    rows, vocabulary, columns = 256, 12_000, 512
    given = make("cpu", dtype, rows, vocabulary)
    given.student[0] = given.student[0]._replace(bias=None)
    given.labels[:3] = IGNORED if ignored else 0
    gradients = (rows + vocabulary) * H_S * dtype.itemsize
    buffers = rows * row_stride(columns) * (8 if dtype == torch.float32 else 10)
    hidden = rows * H_S * 4 * (dtype == torch.bfloat16 or ignored)
    measured = peak_bytes(lambda: run(given, columns=columns, vocabulary=vocabulary), torch.device("cpu"))
    assert (
        0.98 * buffers <= measured - gradients <= 1.02 * (buffers + hidden) + 900_000
    )  # 5 blocks of 128 KB, statistics
