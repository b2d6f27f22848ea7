"""Fresh processes for work that depends on how Triton is imported: it decides there whether kernels are interpreted."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Result = TypeVar("Result")


def compiled() -> None:
    """Prepare a worker that compiles, before it imports Triton: an interpreter has nothing to compile."""
    os.environ.pop("TRITON_INTERPRET", None)


def interpreted() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def in_workers(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    prepare: Callable[[], None] = compiled,
    doing: str = "compiling",
) -> dict[Item, Result | BaseException]:
    """Run the task in fresh processes; an item that fails gives its exception and leaves the others alone."""
    # Spawned, so that a worker decides by itself how Triton is imported.
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(min(workers, len(items)), context, initializer=prepare) as pool:
        with _ignored(signal.SIGINT):  # workers inherit that: Ctrl-C is for this process, which ends them
            item_of = {pool.submit(task, item): item for item in items}
        try:
            for _ in track(as_completed(item_of), doing, len(items), console=Console(stderr=True), transient=True):
                pass
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            raise
    return {item: future.exception() or future.result() for future, item in item_of.items()}


@contextlib.contextmanager
def _ignored(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
