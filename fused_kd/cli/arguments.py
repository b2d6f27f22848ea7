"""The types of arguments that several commands take.  A wrong value ends the command with a message of what is expected."""

import argparse
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from . import outputs
from .errors import UserError

if TYPE_CHECKING:
    import torch

    from ..divergences import Divergence

MOST = 2**63 - 1  # the largest size that PyTorch takes


def at_least_one(text: str) -> int:
    return _whole(text, 1)


def at_least_two(text: str) -> int:
    return _whole(text, 2)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = MOST + 1 if text.strip().isdecimal() else least - 1  # int() refuses thousands of digits
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {quoted(text)}")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most {MOST}, got {quoted(text)}")
    return value


def quoted(text: str) -> str:
    """Return the argument in quotes, shortened if it is long."""
    return repr(text) if len(text) <= 40 else f"{text[:20]!r}... of {len(text)} characters"


def number(text: str) -> float:
    """Return the text as a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def positive(text: str) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {quoted(text)}")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {quoted(text)}")
    return value


def known(option: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse what is none of the names."""
    expected = list(names)
    unknown = [name for name in given if name not in expected]
    if unknown:
        raise UserError(f"{option}: expected some of {', '.join(expected)}, got {', '.join(unknown)}")


def divergence(text: str) -> str:
    """Return the text if it names a divergence; see `named_divergence`."""
    try:
        named_divergence(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def named_divergence(text: str) -> "Divergence":
    """Return the divergence of a name, such as "jsd", or of a name and its parameters, such as "jsd:0.3".

    Raises:
        ValueError: it has no such name, or another number of parameters, or refuses their values.
    """
    from ..divergences import DIVERGENCES, of

    name, *given = text.split(":")
    if name not in DIVERGENCES:
        raise ValueError(f"expected one of {', '.join(DIVERGENCES)}, got {quoted(text)}")
    parameters = [number(value) for value in given]
    fields = [field.name for field in dataclasses.fields(DIVERGENCES[name])]
    if len(parameters) > len(fields):
        form = ":".join([name, *(each.upper() for each in fields)])
        raise ValueError(f"expected {form}, got {quoted(text)}")
    return of(name, parameters)


def new_file(text: str) -> Path:
    """Return a path to write to.  Writing is tried at once, so that it does not fail after the work is done."""
    path = Path(text)
    try:
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {quoted(text)}")
        outputs.try_file(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except OSError as error:  # such as a name that no file may have
        raise argparse.ArgumentTypeError(f"cannot write {quoted(text)}: {error.strerror}") from error
    return path


def device(name: str) -> "torch.device":
    """Return the named device.  "auto" is cuda if PyTorch sees a CUDA device, otherwise cpu."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: PyTorch sees {torch.cuda.device_count()} CUDA devices here, got {name!r}")
    return found


def folder(path: Path) -> Path:
    """Make the output folder and try to write there, before any long work, and return it."""
    try:
        outputs.try_folder(path)
    except UserError as error:
        raise UserError(f"--output: {error}") from error
    return path
