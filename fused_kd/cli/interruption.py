"""Ctrl-C and SIGTERM: the first one asks a long command to finish what it is at, and to keep what it has."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interruption:
    """Whether the user, or the system, has asked the command to stop."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Take the block's first Ctrl-C or SIGTERM as a request, true from then on; the second one ends it at once."""
    request = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each in before:
            signal.signal(each, signal.default_int_handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
