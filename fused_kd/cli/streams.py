"""Standard output and error that outlast their readers: what nobody reads any more goes nowhere, and the work goes on."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# The pipe's reader has gone, the descriptor is closed, the terminal or the connection is gone.
UNREAD = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)


class _Descriptor(io.FileIO):
    """The descriptor under a stream.  At the first write that fails it becomes that of /dev/null."""

    failure: OSError | None = None  # of a write that somebody wanted to read: a disk is full

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in UNREAD:
                self.failure = error
            _point_nowhere(self.fileno())
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting() -> Iterator[list[OSError]]:
    """Within it neither sys.stdout nor sys.stderr raises; either may be None when it begins.

    The list that it gives has, at the end, what else than a missing reader kept stdout from being written.
    """
    before = sys.stdout, sys.stderr
    out, err = sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    failures: list[OSError] = []
    try:
        yield failures
    finally:
        out.flush()
        if failure := getattr(getattr(getattr(out, "buffer", None), "raw", None), "failure", None):
            print(f"fused-kd: cannot write to stdout: {failure.strerror}", file=err)
            failures.append(failure)
        err.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    """Leave alone what is no plain descriptor: the streams of tests, of notebooks, of a Windows console."""
    if stream is None:  # it was closed when Python started
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would be it, and get what C code prints
            _point_nowhere(descriptor)
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    if type(getattr(buffer, "raw", buffer)) is not io.FileIO or stream.fileno() != descriptor:
        return stream
    assert isinstance(stream, io.TextIOWrapper)
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors  # a letter must not end the work either
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False)), stream.encoding, errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _point_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
