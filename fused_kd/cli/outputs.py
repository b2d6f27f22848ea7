"""The files and folders that a command writes: tried before the work, written beside their place, then renamed into it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

TRIAL = b" " * 4096  # not empty: on a full disk an empty file can still be made


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path`.  The file or folder that the block writes there replaces `path`.

    If the block raises, `path` is unchanged.  For a device or a pipe, such as /dev/stdout, `path` itself is yielded.

    Raises:
        UserError: the path cannot be written.  The message says why.
    """
    with _refused(path):
        if _is_special(path):
            yield path
            return
        path = Path(os.path.realpath(path))  # the target of a link
        beside, before = _beside(path, "new"), _beside(path, "old")
        try:
            yield beside
            if path.is_dir():  # a folder cannot be renamed over a folder with files
                path.rename(before)
            beside.replace(path)
        finally:
            if before.exists() and not path.exists():  # the replacement has failed
                before.rename(path)
            for left_over in (beside, before):
                _remove(left_over)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    from ..testing import record  # imports PyTorch

    with written_beside(path) as place:
        record.write_json(place, figures)


def try_file(path: Path) -> None:
    """Write a file beside `path` and remove it, so that a command finds out before its work whether it can write.

    Raises:
        UserError: the file cannot be written.  The message says why.
    """
    with _refused(path):
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        beside = _beside(Path(os.path.realpath(path)), "new")
        try:
            beside.write_bytes(TRIAL)
        finally:
            _remove(beside)


def try_folder(path: Path) -> None:
    """Make the folder if there is none, and try a file in it.

    Raises:
        UserError: the folder cannot be made, or no file can be written there.  The message says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    try_file(path / "trial")


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{word}")


def _is_special(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
