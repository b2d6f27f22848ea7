"""Models by name where the hub is out of reach: from the cache, or an error at once."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("transformers")
from huggingface_hub import constants

from fused_kd.cli import hub

from .processes import COMMAND, ENVIRONMENT, run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = '{"model_type": "llama", "vocab_size": 256, "hidden_size": 32}'


ANSWERS = hub.answers


@pytest.fixture(autouse=True)
def ask_again(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    ANSWERS.cache_clear()
    yield
    ANSWERS.cache_clear()


@contextlib.contextmanager
def serving(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextlib.contextmanager
def listening(backlog=8):
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def closed():
    with listening() as port:
        pass
    yield port


@pytest.mark.parametrize(
    ("endpoint", "reached"),
    [(lambda: serving(200), True), (lambda: serving(404), True), (lambda: serving(503), False), (closed, False),
     (listening, False)],
    ids=["found", "no page there", "server error", "closed", "silent"],
)  # fmt: skip
def test_whether_the_hub_answers(endpoint, reached, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.5 if endpoint is listening else 20)
    with endpoint() as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        begin = time.monotonic()
        assert hub.answers() is reached
        assert time.monotonic() - begin < 15


def test_a_name_that_resolves_slowly_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(30))
    begin = time.monotonic()
    assert not hub.answers()
    assert time.monotonic() - begin < 15


def test_the_time_to_wait_can_be_set(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    monkeypatch.setattr(hub, "SECONDS", 60)
    with listening() as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        begin = time.monotonic()
        assert not hub.answers()
        assert time.monotonic() - begin < 15


def test_only_a_name_asks_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "answers", lambda: asked.append(1))
    with hub.cached_if_out_of_reach(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    assert not asked
    with contextlib.suppress(KeyError), hub.cached_if_out_of_reach("some/model"):
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert asked == [1]
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("command", "name", "code"),
    [("plan", "some/model", 0), ("plan", "other/model", 2), ("distill", "other/model", 2)],
)
def test_a_name_offline_comes_from_the_cache_or_fails_at_once(command, name, code, tmp_path):
    """The client's retries take half a minute, and say so."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(CONFIG)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    options = {"plan": ["--student-hidden", "32", "--teacher"], "distill": ["--output", f"{tmp_path}/out", "--teacher"]}
    with closed() as port:
        environment = ENVIRONMENT | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
        for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(variable, None)
        done = run(*COMMAND, command, *options[command], name, env=environment)
    assert done.returncode == code, done.stderr
    assert "Retrying" not in done.stderr
    if code:
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"fused-kd {command}: cannot ")
        assert name in last
