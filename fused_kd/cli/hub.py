"""Access to models on the Hugging Face hub by name, from the local cache alone if the hub is out of reach."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

SECONDS = 2.0  # how long to wait for the hub's answer if HF_HUB_ETAG_TIMEOUT is not set


@contextlib.contextmanager
def cached_if_out_of_reach(source: str) -> Iterator[None]:
    """Let the block look up a hub name only in the local cache if the hub does not answer.

    Otherwise the hub's client would try for half a minute first.  Nothing changes for a folder or a file, or if
    HF_HUB_OFFLINE is set.
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
    """Return whether the hub answers in time and without a server error.  HF_ENDPOINT and proxies are respected."""
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
