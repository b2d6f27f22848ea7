"""Models by their names on the Hugging Face hub; from the local cache alone where the hub is out of reach."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

SECONDS = 2.0  # to wait for the hub's answer, where HF_HUB_ETAG_TIMEOUT does not say


@contextlib.contextmanager
def cached_if_out_of_reach(source: str) -> Iterator[None]:
    """Let the block look up a hub name in the local cache alone if the hub does not answer.

    The hub's client would try for half a minute first.  A folder, a file and HF_HUB_OFFLINE are left as they are.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (os.path.exists(source) or answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def answers() -> bool:
    """Whether the hub (HF_ENDPOINT, by way of the proxies that are set) answers in time, and with no server error."""
    from huggingface_hub import constants, get_session

    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    found = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            found.append(get_session().head(constants.ENDPOINT, timeout=seconds).status_code < 500)

    asking = threading.Thread(target=ask, daemon=True)  # a name that resolves slowly heeds no timeout
    asking.start()
    asking.join(seconds)
    return any(found)
