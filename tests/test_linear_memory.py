"""The chunks and the memory of linear_kd_loss, compared with the plan of plan_chunks."""

import pytest
import torch

from fused_kd import linear_kd_loss, plan_chunks
from fused_kd.heads import chunks as chunk_plan
from fused_kd.heads import head as linear
from fused_kd.testing.launches import fake_gpu
from fused_kd.testing.memory import peak_bytes

from .heads import H_S, H_T, Given, make

pytestmark = pytest.mark.usefixtures("one_thread")


def test_plan_bounds_the_workspace():
    one = 10 * 32_000  # two float32 logits and a 16-bit gradient
    for bound in (one, 10**6, 10**8):
        plan = plan_chunks(1000, 32_000, 64, 128, workspace_bytes=bound)
        assert plan.workspace_bytes <= bound
        assert plan.workspace_bytes == sum(size for name, size in plan.buffers.items() if "logits" in name)
        assert plan.chunk_rows * (plan.chunks - 1) < 1000 <= plan.chunk_rows * plan.chunks
    assert plan_chunks(1000, 32_000, 64, 128, workspace_bytes=one).chunk_rows == 1
    assert plan_chunks(10, 32_000, 64, 128).chunk_rows == 10  # no larger buffers than there are tokens
    assert plan_chunks(0, 32_000, 64, 128).chunks == 0


def test_an_impossible_bound_names_the_smallest_possible_one():
    given = make("cpu")
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least 10240, .* of 1237, got 10239"):
        linear_kd_loss(*given[:5], workspace_bytes=10239)
    linear_kd_loss(*given[:5], workspace_bytes=10240).backward()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden"), [(8192, 128_256, 2048), (2048, 262_144, 640), (100, 32_000, 64)]
)
def test_default_plan(rows, vocabulary, hidden):
    trained = plan_chunks(rows, vocabulary, hidden, 2 * hidden)
    accumulator = 4 * vocabulary * hidden
    assert trained.buffers.get("weight gradient, summed in float32") == (accumulator if trained.chunks > 1 else None)
    assert trained.gradient_rows == trained.chunk_rows <= 512
    assert trained.workspace_bytes <= max(accumulator, chunk_plan.TRAINED_WORKSPACE)
    frozen = plan_chunks(rows, vocabulary, hidden, 2 * hidden, weight_grad=False)
    assert frozen.chunk_rows <= 256
    assert not any("weight" in name for name in frozen.buffers)
    only_loss = plan_chunks(rows, vocabulary, hidden, 2 * hidden, weight_grad=False, hidden_grad=False)
    assert only_loss.peak_bytes == only_loss.workspace_bytes


@pytest.mark.parametrize("asked", [("hidden", "weight"), ("hidden",), ()])
def test_the_loss_runs_in_the_chunks_of_the_plan(asked, monkeypatch):
    given = make("cpu", shape=(1500,), vocabulary=64)
    for name in {"hidden", "weight", "bias"} - set(asked):
        getattr(given, name).requires_grad_(False)
    needed = {f"{name}_grad": name in asked for name in ("hidden", "weight")}
    planned = plan_chunks(1500, 64, H_S, H_T, dtype=torch.float32, **needed)
    project, rows = linear.project, []

    def recorded(hidden, *arguments, **options):
        rows.append(hidden.shape[0])
        project(hidden, *arguments, **options)

    monkeypatch.setattr(linear, "project", recorded)
    linear_kd_loss(*given[:5])
    assert len(rows) == 2 * planned.chunks == 2 * (3 if "weight" in asked else 6)  # student and teacher
    assert rows[0] == planned.chunk_rows


def peak(given: Given, **options) -> int:
    def step():
        for tensor in (given.hidden, given.weight):
            tensor.grad = None
        loss = linear_kd_loss(*given[:5], **options)
        if loss.requires_grad:
            loss.backward()

    return peak_bytes(step, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [2, 16, 128, 256])  # 256: one chunk
@pytest.mark.usefixtures("small_blocks")
def test_memory_is_what_the_plan_says(dtype, trained, chunk):
    given = make("cpu", dtype, shape=(256,), vocabulary=8000)
    given.weight.requires_grad_(trained)
    bound = chunk * plan_chunks(1, 8000, H_S, H_T, dtype=dtype).workspace_bytes
    plan = plan_chunks(256, 8000, H_S, H_T, dtype=dtype, weight_grad=trained, workspace_bytes=bound)
    measured = peak(given, workspace_bytes=bound)
    assert 0.95 * plan.peak_bytes <= measured <= 1.1 * plan.peak_bytes + 600_000  # 3 blocks of 128 KB, 256 rows' values


def test_plan_under_autocast():
    dtypes = {"dtype": torch.float32, "teacher_dtype": torch.float32, "autocast_dtype": torch.bfloat16}
    buffers = plan_chunks(100, 1000, H_S, H_T, **dtypes).buffers
    assert buffers["weights in the autocast dtype"] == 1000 * (H_S + H_T) * 2
    assert buffers["teacher logits"] == 100 * linear.row_stride(1000) * 4
    half_teacher = plan_chunks(100, 1000, H_S, H_T, **dtypes | {"teacher_dtype": torch.bfloat16}).buffers
    assert half_teacher["weights in the autocast dtype"] == 1000 * H_S * 2
    two_dtypes = dtypes | {"dtype": torch.bfloat16, "weight_dtype": torch.float32}
    buffers = plan_chunks(100, 1000, H_S, H_T, **two_dtypes, bias_grad=True).buffers
    assert buffers["hidden gradient"] == 100 * H_S * 2
    assert (buffers["weight gradient"], buffers["bias gradient"]) == (1000 * H_S * 4, 1000 * 4)
    assert buffers["weights in the autocast dtype"] == 1000 * (H_S + H_T) * 2


@pytest.mark.parametrize("hidden_grad", [True, False])
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_the_copy_of_the_hidden_states_is_planned_where_a_gpu_makes_it(hidden_grad, weight_grad, products):
    pytest.importorskip("triton")
    dtypes = {"dtype": torch.float32, "autocast_dtype": products}
    plan = plan_chunks(100, 1000, H_S, H_T, **dtypes, hidden_grad=hidden_grad, weight_grad=weight_grad)
    with fake_gpu():
        head = linear.Head(torch.randn(100, H_S), torch.randn(1000, H_S), None)
        sums = linear.Gradients(head, (hidden_grad, weight_grad, False), torch.float32, 1000)
        sums.prepare(head.cast(products, 1000), torch.ones(3, 100, dtype=torch.float64))
        is_own = sums._counted is not head.hidden and sums._counted is not sums.hidden
        size = sums._counted.nbytes if is_own else 0
    assert plan.buffers.get("hidden states that count", 0) == size
    assert is_own == (weight_grad and not (hidden_grad and products == torch.float32))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_memory_under_autocast_is_what_the_plan_says(trained):
    given = make("cpu", shape=(256,), vocabulary=8000)
    halves = {name: getattr(given, name).detach().bfloat16() for name in ("hidden", "teacher_hidden")}
    given = given._replace(**halves)
    given.hidden.requires_grad_()
    given.weight.requires_grad_(trained)
    bound = 64 * plan_chunks(1, 8000, H_S, H_T).workspace_bytes
    plan = plan_chunks(
        256, 8000, H_S, H_T, dtype=torch.bfloat16, weight_dtype=torch.float32, teacher_weight_dtype=torch.float32,
        autocast_dtype=torch.bfloat16, weight_grad=trained, workspace_bytes=bound,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        measured = peak(given, workspace_bytes=bound)
    assert 0.95 * plan.peak_bytes <= measured <= 1.1 * plan.peak_bytes + 600_000


@pytest.mark.usefixtures("small_blocks")
def test_memory_grows_with_rows_by_hidden_states_only():
    def of(rows, **options):
        return peak(make("cpu", shape=(rows,), vocabulary=8000), workspace_bytes=16 * 2 * 8000 * 4, **options)

    growth = of(512) - of(256)
    assert growth < 256 * (4 * 3 * H_S * 4 + 400)  # 7 % of what a row of float32 logits would be
