"""Rows that do not count are left out of the products: by `compact`, by `counted_rows`, and where neither is given."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import linear_kd_loss, plan_chunks, reference
from fused_kd.launching import TWO
from fused_kd.testing import launching
from fused_kd.testing.launches import fake_gpu

from .heads import CHUNKED, F_S, F_T, N, make, run
from .oracle import relative_error
from .test_launches import take_step
from .unread import unread

pytestmark = pytest.mark.usefixtures("one_thread")

L = N // 2  # tokens per sequence
IGNORED = [1, 2, 6, 7, 13]
COUNTED = N - len(IGNORED)
WAYS = [
    {"compact": True}, {"compact": False}, {"compact": None},
    *({"counted_rows": bound} for bound in (COUNTED, COUNTED + 2, N, N + 100)),
    {"counted_rows": COUNTED, "compact": True}, {"counted_rows": COUNTED, "compact": False},
]  # fmt: skip
FEW_WAYS = [{"compact": True}, {"compact": False}, {"counted_rows": COUNTED + 2}]
looked_at = pytest.mark.parametrize("looked_at", [True, False])  # False: as on a GPU, where nobody looks at the labels


def some_ignored(device, looked_at=True, dtype=torch.float32):
    """Heads with rows that do not count, before and after these have been filled with NaN."""
    clean = make(device, dtype, shape=(2, L))
    clean.labels.view(-1)[IGNORED] = -100
    dirty = clean.to(dtype)
    with torch.no_grad():
        for hidden in (dirty.hidden, dirty.teacher_hidden):
            hidden.view(N, -1)[IGNORED] = torch.nan
    return clean, dirty if looked_at else dirty._replace(labels=unread(dirty.labels))


def assert_close(found, oracle, bound=1e-6):
    assert found.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert exact.norm() > 0
        assert relative_error(found[name], exact) < bound, name


@looked_at
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count_add_nothing(device, looked_at, reduction):
    clean, dirty = some_ignored(device, looked_at)
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64), reduction=reduction)
    for way in FEW_WAYS:
        found = run(linear_kd_loss, dirty, reduction=reduction, workspace_bytes=CHUNKED, **way)
        assert_close(found, oracle)
        assert not found["hidden"].view(N, -1)[IGNORED].any()


@looked_at
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_way_and_reduction(looked_at, reduction):
    clean, dirty = some_ignored("cpu", looked_at)
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64), reduction=reduction, temperature=2.0)
    for way in WAYS:
        assert_close(run(linear_kd_loss, dirty, reduction=reduction, temperature=2.0, **way), oracle)


@looked_at
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads(device, looked_at, dtype):
    clean, dirty = some_ignored(device, looked_at, dtype)
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64))
    for way in FEW_WAYS[::2]:
        assert_close(run(linear_kd_loss, dirty, **way), oracle, bound=4e-3)


@looked_at
def test_labels_that_are_moved(device, looked_at):
    clean, dirty = some_ignored(device, looked_at)
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64), shift=True)
    moved = clean.labels[:, 1:] != -100
    count = int(moved.sum())
    with torch.no_grad():
        for hidden, own in ((dirty.hidden, clean.hidden), (dirty.teacher_hidden, clean.teacher_hidden)):
            hidden.copy_(torch.where(torch.nn.functional.pad(moved, (0, 1))[..., None], own, torch.nan))
    for way in ({"compact": True}, {"compact": False}, {"counted_rows": count}):
        assert_close(run(linear_kd_loss, dirty, shift=True, **way), oracle)


@looked_at
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights_that_learn(looked_at, reduction):
    """A row of weight 0 is read for the gradient of its weight, and needs a place among the counted rows."""
    clean, dirty = some_ignored("cpu", looked_at)
    values = torch.linspace(0, 1, N, dtype=torch.float64).reshape(2, L)
    found = []
    ways = [(reference.linear_kd_loss, clean.to(torch.float64), {})]
    ways += [(linear_kd_loss, dirty, way) for way in WAYS]
    for loss, given, way in ways:
        weights = values.clone().requires_grad_()
        result = run(loss, given, token_weights=weights, reduction=reduction, **way)
        found.append({**result, "token weights": weights.grad})
    oracle, *others = found
    assert oracle["token weights"][0, 0] != 0
    for ours in others:
        assert_close(ours, oracle)


@looked_at
def test_a_teacher_that_learns(device, looked_at):
    clean, dirty = some_ignored(device, looked_at)
    found = []
    for loss, given, way in [(reference.linear_kd_loss, clean.to(torch.float64), {})] + [
        (linear_kd_loss, dirty, way) for way in FEW_WAYS
    ]:
        given = given._replace(
            teacher_hidden=given.teacher_hidden.clone().requires_grad_(),
            teacher_weight=given.teacher_weight.clone().requires_grad_(),
        )
        result = run(loss, given, teacher_grad=True, **way)
        found.append({**result, "teacher": given.teacher_hidden.grad, "its head": given.teacher_weight.grad})
    oracle, *others = found
    for ours in others:
        assert_close(ours, oracle)


@looked_at
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_parts(looked_at, reduction):
    clean, dirty = some_ignored("cpu", looked_at)
    oracle = reference.linear_kd_loss(*clean.to(torch.float64)[:5], reduction=reduction, return_parts=True)
    for way in WAYS:
        found = linear_kd_loss(*dirty[:5], reduction=reduction, return_parts=True, **way)
        for name, exact in oracle._asdict().items():
            assert relative_error(getattr(found, name).detach(), exact.detach()) < 1e-6, name


# --- what is projected


@pytest.mark.parametrize(
    ("way", "looked_at", "share"),
    [
        ({}, True, 0.5),  # a CPU
        ({"compact": True}, True, 0.5),
        ({"counted_rows": N // 2}, True, 0.5),
        ({"counted_rows": N}, True, 0.5),
        ({"compact": False}, True, 1.0),
        ({}, False, 1.0),  # a small step elsewhere
        ({"compact": True}, False, 0.5),
        ({"counted_rows": N // 2}, False, 0.5),
        ({"counted_rows": N - 1}, False, (N - 1) / N),
        ({"counted_rows": N}, False, 1.0),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_half_of_the_rows_take_half_of_the_products(way, looked_at, share, trained):
    given = make("cpu")
    given.weight.requires_grad_(trained)
    given.labels[::2] = -100
    if not looked_at:
        given = given._replace(labels=unread(given.labels))
    with FlopCounterMode(display=False) as counter:
        linear_kd_loss(*given[:5], **way).backward()
    assert counter.get_total_flops() == share * ((2 + trained) * F_S + F_T)


def test_without_labels_and_token_weights_no_row_is_looked_for(monkeypatch):
    given = make("cpu")
    for tensor in (given.hidden, given.weight):
        tensor.requires_grad_(False)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # on a GPU it would synchronise
    for compact in (None, True):
        linear_kd_loss(*map(unread, given[:4]), alpha=1.0, compact=compact)


class Multiplications(TorchDispatchMode):
    """A mode that counts the multiplications of products, also of those that PyTorch's counter of flops does not know."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_half_of_the_rows_on_a_gpu():
    """Half of the multiplications, and of the launches of chunks; on a fake GPU."""
    rows, vocabulary, H = 4096, 32_000, 512
    bound = rows // 4 * plan_chunks(1, vocabulary, H, H).workspace_bytes

    def taken(**options):
        with launching(TWO), fake_gpu() as launches:
            student, teacher = (torch.randn(rows, H, dtype=torch.bfloat16) for _ in range(2))
            weight, teacher_weight = (torch.randn(vocabulary, H, dtype=torch.bfloat16) for _ in range(2))
            leaves, labels = [student.requires_grad_(), weight.requires_grad_()], torch.randint(vocabulary, (rows,))
            heads = student, weight, teacher, teacher_weight
            with Multiplications() as products:
                count, names = take_step(
                    launches, lambda: linear_kd_loss(*heads, labels, workspace_bytes=bound, **options), leaves
                )
        return products.count, names["row_statistics_kernel"], count, names

    multiplications, chunks, launched, _ = taken()
    half_of_them, half_of_chunks, fewer, names = taken(counted_rows=rows // 2)
    assert half_of_them * 2 == multiplications > 0
    assert half_of_chunks * 2 == chunks > 2
    per_chunk = 4  # two projections and two kernels
    assert fewer <= launched - per_chunk * half_of_chunks + 12, names  # the rows are sorted, gathered and put back


# --- a bound that does not hold


@pytest.mark.parametrize("bound", [0, COUNTED - 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bound_that_is_too_small_gives_nan_where_labels_are_not_looked_at(device, bound, reduction):
    """Never a silent drop: every row's loss is NaN, since nothing says which rows were left out."""
    clean, _ = some_ignored(device)
    given = clean._replace(labels=unread(clean.labels))
    found = run(linear_kd_loss, given, counted_rows=bound, reduction=reduction, workspace_bytes=CHUNKED)
    assert found["value"].isnan().all()
    assert found["weight"].isnan().all()
    assert found["bias"].isnan().all()
    assert found["hidden"].isnan().any()


@pytest.mark.parametrize("compact", [None, True, False])
def test_a_bound_that_is_too_small_is_refused_on_a_cpu(compact):
    given, _ = some_ignored("cpu")
    out = torch.ones(given.weight.shape)
    for bound in (0, COUNTED - 1):
        with pytest.raises(ValueError, match=f"counted_rows: expected at least {COUNTED}, .* got {bound}"):
            linear_kd_loss(*given[:5], counted_rows=bound, compact=compact, weight_grad_out=out)
    with pytest.raises(ValueError, match=f"counted_rows: expected at least {N}, .* got 3"):
        linear_kd_loss(*given[:4], alpha=1.0, counted_rows=3, compact=compact)
    assert bool((out == 1).all())


@looked_at
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bound_of_no_rows(device, looked_at, reduction):
    given = make(device)
    given.labels.fill_(-100)
    with torch.no_grad():
        given.hidden.fill_(torch.nan)
    if not looked_at:
        given = given._replace(labels=unread(given.labels))
    for result in run(linear_kd_loss, given, counted_rows=0, reduction=reduction).values():
        assert bool((result == 0).all())
    empty = make(device, shape=(0,))
    run(linear_kd_loss, empty, counted_rows=0, reduction=reduction)


def test_a_divergence_of_two_sweeps(device):
    clean, dirty = some_ignored(device, looked_at=False)
    oracle = run(reference.linear_kd_loss, clean.to(torch.float64), divergence="jsd")
    assert_close(run(linear_kd_loss, dirty, divergence="jsd", counted_rows=COUNTED + 1), oracle)


# --- where the number of rows cannot be read


def test_a_capture_refuses_to_wait(monkeypatch):
    given = make("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"compact: expected None or False under .*the capture of a CUDA graph"):
        linear_kd_loss(*given[:5], compact=True)
    for way in ({}, {"compact": False}, {"compact": True, "counted_rows": N}):
        linear_kd_loss(*given[:5], **way)


def test_the_default_waits_where_the_planned_step_takes_long(monkeypatch):
    """A synchronisation takes some 20 us, and a step of over a millisecond gains more from a tenth of its rows."""
    from fused_kd import linear
    from fused_kd.heads.sweep import LinearOptions
    from fused_kd.sweep import KDOptions

    def pays(rows, vocabulary, needed=(True, True, *[False] * 6)):
        with launching(device="H100"):
            kd = KDOptions(vocabulary, True, True, torch.float32)
            options = LinearOptions(kd, needed, torch.bfloat16, torch.bfloat16, None, None)
            hidden = torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta")
            return linear._pays(OnGpu(hidden), hidden, options)

    class OnGpu:
        is_cuda = True

        def __init__(self, hidden):
            self.shape, self.device = hidden.shape, hidden.device

    assert not pays(64, 32_000)
    assert not pays(1024, 32_000)
    assert pays(8192, 32_000)
    assert pays(8192, 128_256)
    assert not pays(2048, 32_000, needed=(False,) * 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not pays(8192, 128_256)


def test_what_pays_decides_where_nothing_is_asked_for(monkeypatch):
    from fused_kd import linear

    given = make("cpu")
    given.labels[::2] = -100
    given = given._replace(labels=unread(given.labels))
    for answer, share in ((True, 0.5), (False, 1.0)):
        monkeypatch.setattr(linear, "_pays", lambda *_, answer=answer: answer)
        with FlopCounterMode(display=False) as counter:
            linear_kd_loss(*given[:5]).backward()
        assert counter.get_total_flops() == share * (3 * F_S + F_T)
