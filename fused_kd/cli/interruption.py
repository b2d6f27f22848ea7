"""Ctrl-C and SIGTERM: the first one asks a long command to stop and to keep what it has, the second one ends it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A second signal: the command ends."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class _Left(KeyboardInterrupt):
    """A first signal, in a block that may be left."""


class Interruption:
    """Whether the user, or the system, has asked the command to stop."""

    signal: int | None = None
    _may_leave = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    @contextlib.contextmanager
    def may_leave(self) -> Iterator[None]:
        """A block that the request ends where it is, instead of waiting for its end."""
        try:
            self._may_leave = True
            yield
        except _Left:
            pass
        finally:
            self._may_leave = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Take the block's first Ctrl-C or SIGTERM as a request, true from then on; the second one ends the command.

    A signal that the command was started to ignore is left ignored (`nohup`, a shell's background jobs).
    """
    request = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each in before:
            signal.signal(each, end)
        if request._may_leave:
            raise _Left

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)  # a third one need not wait for Python
        raise Interrupted(number)

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(end: KeyboardInterrupt) -> int:
    """The exit code of a command that this ended."""
    return 128 + (end.signal if isinstance(end, Interrupted) else signal.SIGINT)
