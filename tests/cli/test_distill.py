"""`fused-kd distill` on a tiny model: that it trains, compares, writes what it says, and refuses what it must."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fused_kd import reference  # noqa: E402
from fused_kd.cli import main  # noqa: E402
from fused_kd.cli.distillation import models, text  # noqa: E402


@pytest.fixture
def tiny(tmp_path):
    """A Llama of 4 layers and a tokenizer of single bytes, in a folder, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tiny")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path


def command(tiny, *more):
    options = [
        "--student-layers",
        "2",
        "--steps",
        "12",
        "--sequence-length",
        "32",
        "--lr",
        "0.01",
        "--alpha",
        "0.9",
        "--device",
        "cpu",
    ]
    folders = ["--teacher", str(tiny / "tiny"), "--text", str(tiny / "text"), "--output", str(tiny / "out")]
    return ["distill", *folders, *options, *more]


def test_trains_compares_and_writes(tiny, capsys):
    assert main(command(tiny, "--compare", "eager")) == 0
    assert "largest relative difference" in capsys.readouterr().out
    record = json.loads((tiny / "out" / "distill.json").read_text())
    for run in record["runs"].values():
        assert run["after"]["kl"] < run["before"]["kl"]
        assert len(run["curves"]["loss"]) == 12
        assert 0 < run["loss_seconds"] < run["step_seconds"]
    fused, eager = (record["runs"][name]["loss_peak_bytes"] for name in ("fused", "eager"))
    assert 0 < fused < eager
    assert (tiny / "out" / "curves.png").stat().st_size > 10_000
    student = transformers.AutoModelForCausalLM.from_pretrained(tiny / "out")
    assert student.config.num_hidden_layers == 2


def test_curves_that_differ_give_exit_code_1(tiny, monkeypatch):
    right = reference.kd_loss
    monkeypatch.setattr(
        reference, "kd_loss", lambda *a, temperature, **k: right(*a, temperature=temperature + 0.1, **k)
    )
    assert main(command(tiny, "--compare", "eager")) == 1


def test_the_student_has_the_teachers_first_and_last_layers(tiny):
    teacher, _ = models.load(str(tiny / "tiny"), torch.float32)
    student = models.student_of(teacher, 2)
    for ours, theirs in ((0, 0), (1, 3)):
        a, b = (m.model.layers[i].mlp.up_proj.weight for m, i in ((student, ours), (teacher, theirs)))
        assert torch.equal(a, b)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_labels_are_the_next_tokens():
    assert text.next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student-layers", "9"], "--student-layers: expected 2 to 4"),
        (["--text", "nowhere"], "no such text file: nowhere"),
        (["--sequence-length", "100000"], "the text has"),
        (["--teacher", "missing.gguf"], "no such GGUF file"),
        (["--steps", "0"], "--steps"),
        (["--alpha", "2"], "alpha: expected a number in"),
    ],
)
def test_wrong_use_gives_one_line_and_exit_code_2(tiny, arguments, message, capsys):
    assert main(command(tiny, *arguments)) == 2
    assert message in capsys.readouterr().err
