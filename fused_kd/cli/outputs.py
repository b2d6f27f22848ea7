"""Files and folders that a command writes: each is written beside its place, then renamed into it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a free path beside `path`; the file or folder that the block writes there takes the place of `path`.

    If the block raises, `path` keeps what it held.  Devices and pipes, such as /dev/stdout, are given themselves.
    """
    path = path.resolve()
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    beside, before = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        yield beside
        if path.is_dir():  # a folder cannot be renamed over one that holds files
            path.rename(before)
        beside.replace(path)
    finally:
        for left_over in (beside, before):
            _remove(left_over)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
