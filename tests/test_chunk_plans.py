"""The plans of plan_chunks for a GPU and for lean mode, and the model of their time beside a measured run."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from fused_kd import plan_chunks
from fused_kd.devices import DEVICES
from fused_kd.heads import chunks as planning
from fused_kd.heads import times
from fused_kd.heads.step import Side, Step, row_stride

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
N, GB = 8192, 10**9
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu.json"
# Vocabulary, hidden sizes of student and teacher.
MODELS = {
    "H = 4096": (151_936, 4096, 4096),
    "Gemma 3 270M under 1B": (262_144, 640, 1152),
    "Llama 3.2 1B under 3.1 8B": (128_256, 2048, 4096),
    "TinyLlama under Llama 2 7B": (32_000, 2048, 4096),
    "Gemma 2 2B under 9B": (256_000, 2304, 3584),
}
of_models = pytest.mark.parametrize("model", MODELS)
both_heads = pytest.mark.parametrize("trained", [True, False])


def step_of(model, trained, logits=F32, rows=N):
    vocabulary, student, teacher = MODELS[model]
    return Step(
        rows, vocabulary,
        (Side("student", student, BF16, BF16, BF16, logits, True, trained, False),
         Side("teacher", teacher, BF16, BF16, BF16, logits, False, False, False)),
    )  # fmt: skip


# --- the time


def measured():
    """Return the measured seconds of a step by vocabulary, head and tokens per chunk; 0 for the bare products."""
    found: dict[tuple[int, str, int], float] = {}
    head = ""  # a record of bare products says it for those that follow
    for result in json.loads(RECORD.read_text())["stages"]["hidden"]["results"]:
        head = result.get("head", head)
        subject = result["subject"]
        if "seconds" in result and (subject == "bare products" or "chunks of" in subject):
            tokens = 0 if subject == "bare products" else int(subject.rsplit(" ", 1)[1])
            found[result["vocabulary"], head, tokens] = result["seconds"]
    return found


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_the_model_of_time_fits_what_was_measured(head):
    """The run had the scheme of then: 16-bit logits, and the gradient of each chunk multiplied by itself."""
    compared = []
    for (vocabulary, its_head, tokens), seconds in measured().items():
        step = step_of("H = 4096", head == "trained", BF16)._replace(vocab_size=vocabulary)
        # Frozen chunks of 256 waited for the host.  A single chunk was summed in float32 then, and is not now.
        if its_head == head and (256 if head == "trained" else 512) <= tokens <= 4096:
            modelled = sum(times.seconds(step, DEVICES["H200"], tokens, tokens).values())
            compared.append(modelled / seconds)
    assert len(compared) == (10 if head == "trained" else 4)
    assert min(compared) > 0.95
    assert max(compared) < 1.05


def test_the_model_of_float32_logits_fits_what_was_measured():
    float32, bfloat16 = (
        sum(times.seconds(step_of("Llama 3.2 1B under 3.1 8B", True, logits), DEVICES["H200"], 1024, 1024).values())
        for logits in (F32, BF16)
    )
    assert float32 - bfloat16 == pytest.approx(3.07e-3, rel=0.1)  # N = 8192, V = 128 256


def test_the_rate_of_products_is_the_measured_one():
    for (vocabulary, head, tokens), seconds in measured().items():
        if tokens == 0:
            flops = (4 if head == "trained" else 3) * 2 * N * vocabulary * 4096
            assert flops / seconds == pytest.approx(DEVICES["H200"].flops_16, rel=0.02)


@both_heads
def test_a_step_on_a_modelled_h100_takes_hardly_longer_than_its_products(trained):
    plan = plan_chunks(N, *MODELS["H = 4096"], weight_grad=trained, device="H100")
    bare = (4 if trained else 3) * 2 * N * 151_936 * 4096 / 728e12
    assert bare < plan.modelled_seconds <= (1.12 if trained else 1.15) * bare


@of_models
@both_heads
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits", [F32, BF16])
def test_no_plan_is_slower_than_chunks_of_1024_tokens(model, trained, device, logits):
    """The same step with the same logits, in the scheme that had one chunk's gradients only."""
    plan = plan_chunks(N, *MODELS[model], weight_grad=trained, logits_dtype=logits, device=device)
    usual = times.seconds(step_of(model, trained, logits), DEVICES[device], 1024, 1024)
    assert plan.modelled_seconds <= sum(usual.values())


def test_the_parts_are_those_of_the_step():
    trained = plan_chunks(N, *MODELS["H = 4096"], device="H100", workspace_bytes=GB)
    assert set(trained.seconds) == {
        "student projection", "teacher projection", "float32 results", "sweep", "weight gradient", "float32 sum",
        "hidden gradient", "rounding", "launches",
    }  # fmt: skip
    assert trained.modelled_seconds == sum(trained.seconds.values())
    frozen = plan_chunks(N, *MODELS["H = 4096"], device="H100", weight_grad=False)
    assert not {"weight gradient", "float32 sum", "rounding"} & set(frozen.seconds)
    loss = plan_chunks(N, *MODELS["H = 4096"], device="H100", weight_grad=False, hidden_grad=False)
    assert set(loss.seconds) == {"student projection", "teacher projection", "float32 results", "sweep", "launches"}
    assert plan_chunks(N, *MODELS["H = 4096"]).seconds == {}
    assert plan_chunks(N, *MODELS["H = 4096"]).modelled_seconds == 0


def test_two_passes_read_each_logit_twice():
    one, two = (plan_chunks(N, 151_936, 4096, 4096, device=device).seconds["sweep"] for device in ("H100", "H200"))
    pairs = N * 151_936
    assert one == pytest.approx(10 * pairs / (times.COPIED * 3.35e12))
    assert two == pytest.approx(18 * pairs / (times.COPIED * 4.8e12))


# --- the choice


@of_models
@both_heads
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 100, 1000, 8192, 12_345, 100_000])
def test_a_plan_is_a_plan(model, trained, device, rows):
    vocabulary = MODELS[model][0]
    plan = plan_chunks(rows, *MODELS[model], weight_grad=trained, device=device)
    assert 1 <= plan.chunk_rows <= plan.gradient_rows <= rows
    assert plan.gradient_rows == rows or plan.gradient_rows % plan.chunk_rows == 0
    assert plan.chunk_rows * (plan.chunks - 1) < rows <= plan.chunk_rows * plan.chunks
    assert trained or plan.gradient_rows == plan.chunk_rows
    assert (plan.slab_columns, plan.slabs) == (vocabulary, 1)
    assert plan.workspace_bytes <= DEVICES[device].memory / 8
    assert plan.workspace_bytes == sum(size for name, size in plan.buffers.items() if "logits" in name)


def test_one_group_needs_no_float32_sum():
    plan = plan_chunks(N, *MODELS["H = 4096"], device="H100")
    assert plan.gradient_rows == N > plan.chunk_rows
    assert not any("summed" in name for name in plan.buffers)
    several = plan_chunks(N, *MODELS["H = 4096"], device="H100", workspace_bytes=GB)
    assert several.gradient_rows < N
    assert several.buffers["weight gradient, summed in float32"] == 4 * 151_936 * 4096
    float16 = plan_chunks(N, *MODELS["H = 4096"], device="H100", dtype=FP16)  # the unit is multiplied by in backward
    assert float16.gradient_rows == N
    assert float16.buffers["weight gradient, summed in float32"] == 4 * 151_936 * 4096
    assert float16.peak_bytes >= 6 * 151_936 * 4096


@pytest.mark.parametrize("rows", [1, 77, 5000])
@pytest.mark.parametrize("logits", [F32, BF16])
@both_heads
def test_a_bound_is_kept_and_used(rows, logits, trained):
    """Any bound has a plan; with a larger one the plan is never slower."""
    options = {"device": "H100", "logits_dtype": logits, "weight_grad": trained}
    one = plan_chunks(1, 32_000, 64, 128, **options).workspace_bytes
    last = float("inf")
    for tokens in (1, 2, 3, 15, 16, 17, 63, 64, 100, 1000, 1024, 4999, 10_000):
        plan = plan_chunks(rows, 32_000, 64, 128, workspace_bytes=tokens * one, **options)
        assert plan.workspace_bytes <= tokens * one
        assert plan.chunk_rows >= min(rows, tokens, 64) / 2
        assert plan.modelled_seconds <= 1.03 * last
        last = plan.modelled_seconds


def test_a_plan_is_the_callers_own():
    for memory in planning.MEMORIES:
        first = plan_chunks(N, 32_000, 64, 128, device="H100", memory=memory)
        first.buffers.clear()
        first.seconds.clear()
        second = plan_chunks(N, 32_000, 64, 128, device="H100", memory=memory)
        assert second.buffers
        assert second.seconds


def test_batches_of_about_one_size_share_a_plan():
    planning._default.cache_clear()
    planning._chosen.cache_clear()
    for rows in range(N - 200, N + 1, 40):
        plan = plan_chunks(rows, *MODELS["H = 4096"], device="H100")
        assert plan.gradient_rows == rows
    assert planning._chosen.cache_info().misses == 1


def test_the_device_is_a_name_or_a_device():
    small = DEVICES["H100"]._replace(memory_bytes=10 * GB)
    options = N, *MODELS["H = 4096"]
    assert plan_chunks(*options, device=DEVICES["H100"]) == plan_chunks(*options, device="H100")
    assert plan_chunks(*options, device=small).workspace_bytes <= 1.25 * GB
    with pytest.raises(ValueError, match=r"device: expected a Device, or one of A100, .* got 'H1000'"):
        plan_chunks(*options, device="H1000")
    with pytest.raises(ValueError, match=r"memory: expected one of default, lean, got 'small'"):
        plan_chunks(*options, memory="small")


def test_the_logits_are_float32_by_default():
    for products in (BF16, FP16, F32):
        buffers = plan_chunks(64, 1000, 8, 8, dtype=products).buffers
        assert buffers["student logits"] == buffers["teacher logits"] == 64 * row_stride(1000) * 4
        assert ("student logits' gradient, rounded" in buffers) == (products != F32)
    float64 = plan_chunks(64, 1000, 8, 8, dtype=torch.float64).buffers
    assert float64["student logits"] == 64 * row_stride(1000) * 8
    half = plan_chunks(64, 1000, 8, 8, logits_dtype=BF16).buffers  # the gradient overwrites the logits
    assert [name for name in half if "logits" in name] == ["teacher logits", "student logits"]


def test_logits_that_their_gradient_overwrites_exist_for_a_group():
    options = {"device": "H100", "logits_dtype": BF16}
    plan = plan_chunks(N, *MODELS["H = 4096"], **options)
    assert plan.gradient_rows == N > plan.chunk_rows
    assert plan.buffers["student logits"] == N * row_stride(151_936) * 2
    assert plan.buffers["teacher logits"] == plan.chunk_rows * row_stride(151_936) * 2
    both = plan_chunks(N, *MODELS["H = 4096"], **options, teacher_weight_grad=True)
    assert both.buffers["teacher logits"] == both.gradient_rows * row_stride(151_936) * 2


def test_an_adapter_has_gradients_of_its_own():
    plain, lora = (plan_chunks(N, 128_256, 2048, 4096, weight_grad=False, lora_rank=r, device="H100") for r in (0, 16))
    assert lora.buffers["LoRA gradient"] == 128_256 * 16 * 2
    assert plain.modelled_seconds < lora.modelled_seconds < 1.3 * plain.modelled_seconds
    several = plan_chunks(N, 128_256, 2048, 4096, weight_grad=False, lora_rank=16)
    assert several.buffers["LoRA gradient, summed in float32"] == 128_256 * 16 * 4
    alone = plan_chunks(N, 128_256, 2048, 4096, weight_grad=False, hidden_grad=False, lora_rank=16)
    assert "student logits' gradient, rounded" in alone.buffers


# --- lean mode


@pytest.mark.parametrize("hidden", [64, 640, 2048, 4096])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_144])
@pytest.mark.parametrize("rows", [100, 2048, 8192])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_lean_mode_holds_at_most_280_mb(hidden, vocabulary, rows, dtype):
    plan = plan_chunks(rows, vocabulary, hidden, hidden, dtype=dtype, device="H100", memory="lean")
    assert plan.peak_bytes_beyond_gradients <= planning.LEAN_BYTES
    assert plan.slab_columns * (plan.slabs - 1) < vocabulary <= plan.slab_columns * plan.slabs
    assert plan.slabs == 1 or plan.slab_columns % 64 == 0
    assert (plan.chunk_rows, plan.gradient_rows, plan.chunks) == (rows, rows, 1)
    # ... and uses them.
    assert plan.slabs < 10 or plan.peak_bytes_beyond_gradients > 0.85 * planning.LEAN_BYTES
    on_cpu = plan_chunks(
        rows, vocabulary, hidden, hidden, dtype=dtype, memory="lean"
    )  # with a slab's weight in float32
    widened = 4 * on_cpu.slab_columns * hidden
    assert on_cpu.peak_bytes_beyond_gradients + widened <= planning.LEAN_BYTES


def test_the_buffers_of_lean_mode():
    plan = plan_chunks(N, 262_144, 4096, 2048, memory="lean")
    slab = N * row_stride(plan.slab_columns)
    assert plan.buffers == {
        "student logits": 4 * slab, "teacher logits": 4 * slab, "student logits' gradient, rounded": 2 * slab,
        "hidden gradient, summed in float32": 4 * N * 4096, "statistics": 132 * N,
        "hidden gradient": 2 * N * 4096, "weight gradient": 2 * 262_144 * 4096,
    }  # fmt: skip
    assert plan.workspace_bytes == 10 * slab
    frozen = plan_chunks(N, 262_144, 4096, 2048, weight_grad=False, hidden_grad=False, memory="lean")
    assert set(frozen.buffers) == {"student logits", "teacher logits", "statistics"}
    float32 = plan_chunks(N, 262_144, 640, 640, dtype=F32, memory="lean")
    assert "hidden gradient, summed in float32" not in float32.buffers  # the hidden gradient is the sum
    assert float32.buffers["hidden states that count"] == 4 * N * 640
    alone = plan_chunks(N, 262_144, 640, 640, hidden_grad=False, memory="lean")
    assert alone.buffers["hidden states that count"] == 2 * N * 640


def test_a_slab_of_many_tokens_has_256_columns():
    plan = plan_chunks(10**6, 262_144, 4096, 4096, memory="lean")
    assert plan.slab_columns == planning.MIN_SLAB


def test_lean_mode_keeps_a_bound():
    for bound in (10**8, 10**7):
        plan = plan_chunks(N, 262_144, 640, 640, memory="lean", workspace_bytes=bound)
        assert plan.workspace_bytes <= bound
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least 5242880, .* 64 columns of 8192 tokens"):
        plan_chunks(N, 262_144, 640, 640, memory="lean", workspace_bytes=10**6)


def test_lean_mode_projects_twice():
    plain, lean = (plan_chunks(N, *MODELS["H = 4096"], device="H100", memory=memory) for memory in planning.MEMORIES)
    for name in ("student projection", "teacher projection"):
        assert 1.9 * plain.seconds[name] < lean.seconds[name] < 2.2 * plain.seconds[name]
    assert lean.modelled_seconds > 1.3 * plain.modelled_seconds


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("memory", planning.MEMORIES)
def test_any_gradients_have_a_plan(needed, memory):
    options = dict(zip(("hidden_grad", "weight_grad", "teacher_weight_grad"), needed, strict=True))
    plan = plan_chunks(1000, 5000, 32, 16, device="L4", memory=memory, **options)
    assert plan.peak_bytes > 0
    assert plan.modelled_seconds > 0
    assert plan_chunks(0, 5000, 32, 16, device="L4", memory=memory, **options).chunks == 0
    assert plan_chunks(1000, 5000, 32, None, device="L4", memory=memory).buffers.get("teacher logits") is None
