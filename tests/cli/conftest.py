"""Commands print as they do into a file, wherever the tests run."""

import pytest


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist sets COLUMNS, which the commands follow."""
    monkeypatch.delenv("COLUMNS", raising=False)
