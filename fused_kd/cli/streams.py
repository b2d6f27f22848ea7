"""Standard output and error that outlast their readers: text that nobody reads is dropped, and the work goes on."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# These errors mean: the pipe has no reader, the descriptor is closed, the terminal is gone, the connection is gone.
UNREAD = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)


class _Descriptor(io.FileIO):
    """The descriptor under a stream.  After the first write that fails, it leads to /dev/null."""

    failure: OSError | None = None  # a failed write of text that has a reader, such as on a full disk

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
    """Replace sys.stdout and sys.stderr, each of which may be None, by streams that do not raise.

    After the block the list that it yields holds the error of writing to stdout, unless only the reader was missing.
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
    """Return a lasting stream.  A stream without a plain descriptor (tests, notebooks, Windows consoles) is unchanged."""
    if stream is None:  # it was closed when Python started
        try:
            os.fstat(descriptor)
        except OSError:  # the next file to be opened would get this descriptor, and the output of C code
            _point_nowhere(descriptor)
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    if type(getattr(buffer, "raw", buffer)) is not io.FileIO or stream.fileno() != descriptor:
        return stream
    assert isinstance(stream, io.TextIOWrapper)
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors  # an unencodable letter must not raise
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False)), stream.encoding, errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def _point_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
