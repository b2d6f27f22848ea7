"""The checkpoint of a training in the output folder, from which the training can be resumed after an interruption."""

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..outputs import written_beside
from .training import Training

NAME = "checkpoint.pt"
SECONDS = 600  # between two, where --checkpoint-every does not say
MAY_DIFFER = (
    "run",
    "output",
    "resume",
    "checkpoint_every",
)  # of the options, from those that a checkpoint was made with


class Checkpoint:
    """One file that is replaced as a whole.  Loading it runs no code from it."""

    def __init__(
        self,
        folder: Path,
        made_with: dict[str, str],
        every: int | None,  # steps
    ) -> None:
        self.path = folder / NAME
        self.made_with = made_with
        self.every = every
        self._last = time.monotonic()

    def due(self, done: int) -> bool:
        if self.every is not None:
            return done % self.every == 0
        return time.monotonic() - self._last >= SECONDS

    def write(self, record: dict[str, Any]) -> None:
        try:
            with written_beside(self.path) as place:
                torch.save({"made_with": self.made_with, **record}, place)
        except RuntimeError as error:  # torch.save on a full disk
            raise UserError(f"cannot write {self.path}: {error}") from error
        finally:
            self._last = time.monotonic()

    def check_absent(self) -> None:
        if self.path.exists():
            raise UserError(
                f"--output: {self.path} is of a training that did not end; pass --resume to go on with it, or remove it"
            )

    def read(self) -> dict[str, Any]:
        if not self.path.exists():
            raise UserError(f"--resume: there is no {self.path}; leave --resume out to begin")
        try:
            record: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            made_with, *_ = (dict(record[part]) for part in ("made_with", "runs", "before", "training"))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"--resume: cannot read {self.path}, is it whole?  {reason}") from error
        for option in [*self.made_with, *made_with]:
            theirs, ours = made_with.get(option), self.made_with.get(option)
            if theirs != ours:
                name = "--" + option.replace("_", "-")
                raise UserError(
                    f"--resume: {self.path} was made {_with(name, theirs)}, got {ours or 'none'}; "
                    "give the same options, or remove it to begin anew"
                )
        return record

    def restore(self, training: Training, state: dict[str, Any]) -> None:
        try:
            training.restore(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"--resume: {self.path} does not fit these models: {reason}") from error

    def remove(self) -> None:
        """Remove the checkpoint, and a partly written one that a crash has left."""
        for path in (self.path, *self.path.parent.glob(f".{NAME}.*.new")):
            path.unlink(missing_ok=True)


def _with(option: str, value: str | None) -> str:
    return f"without {option}" if value is None else f"with {option} {value}"


def made_with(options: argparse.Namespace, text: str, device: torch.device) -> dict[str, str]:
    """Return the options that a training depends on, with the content of the text and the kind of the device."""
    given = {name: str(value) for name, value in vars(options).items() if name not in MAY_DIFFER}
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**given, "device": device.type, "text": f"of digest {digest}"}
