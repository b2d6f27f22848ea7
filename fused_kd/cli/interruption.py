"""Ctrl-C and SIGTERM: the first signal asks a long command to stop and to keep its results, the second one ends it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The exception of a second signal, which ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class _Left(KeyboardInterrupt):
    """The exception of a first signal, in a block that may be left."""


class Interruption:
    """A request to stop, by the user or the system.  It is true once a signal has come."""

    signal: int | None = None
    _may_leave = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return 128 plus the signal's number, as shells do: 130 after Ctrl-C, 143 after SIGTERM; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    @contextlib.contextmanager
    def may_leave(self) -> Iterator[None]:
        """Let a signal end the block at once, instead of after its last statement."""
        try:
            self._may_leave = True
            yield
        except _Left:
            pass
        finally:
            self._may_leave = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Take the first Ctrl-C or SIGTERM during the block as a request; the second one ends the command.

    A signal stays ignored if the command was started so (`nohup`, background jobs of a shell).
    """
    request = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
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
            signal.signal(each, signal.SIG_DFL)  # a third signal ends the process without waiting for Python
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
    """Return the exit code of a command that this exception has ended."""
    return 128 + (end.signal if isinstance(end, Interrupted) else signal.SIGINT)
