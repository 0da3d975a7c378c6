"""Invalid input: requests generated from the OpenAPI schema, mutated valid requests, and damaged artifacts."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from de3.server.http import connection
from lab.fuzz import RawRequest, Result, check, fuzz, send
from tests.serving import Server, serving

KEY = "an-admin-key-of-some-length"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "BODY_TIMEOUT_S", 1.0)
        with serving(store, models=["tiny"], admin_keys=f"root {KEY}") as running:
            yield running


@pytest.mark.slow
def test_every_answer_is_as_the_schema_says(server: Server, tmp_path: Path) -> None:
    """Schemathesis sends requests to every route, both valid and invalid according to the schema."""
    config = tmp_path / "schemathesis.toml"
    # A budget that is too small is answered with 503, as documented.
    config.write_text('[checks.not_a_server_error]\nexpected-statuses = ["2xx", "4xx", 503]\n')
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", "--no-color"]
    command += [server.url + "/openapi.json"]
    command += ["--max-examples", "50", "--seed", "1", "-H", f"Authorization: Bearer {KEY}"]
    # The schema does not say which fields exclude each other (such as tau and target_speedup): it would be unreadable.
    command += ["--exclude-checks", "positive_data_acceptance"]
    command += ["--request-timeout", "60", "--suppress-health-check", "too_slow"]  # on a busy machine
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "40 selected / 40 total" in done.stdout


@pytest.mark.slow
def test_no_request_breaks_the_server(server: Server) -> None:
    before = server.classify(input="good film", explain=True).json()["data"]
    found = fuzz(server.url, 3000, seed=2)
    assert found.problems == []
    assert found.statuses["200"] > 100 and found.statuses["422"] > 500 and found.statuses["400"] > 100
    assert server.classify(input="good film", explain=True).json()["data"] == before
    assert server.metric("de3_in_flight_requests") == 0 == server.metric("de3_queue_texts")
    assert server.metric("de3_rejected_total", cause="internal") == 0


def test_the_check_finds_what_is_wrong() -> None:
    as_json = {"content-type": "application/json"}
    good = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": 422}}).encode()
    assert check(422, as_json, good, b"POST ") == ""
    assert "the right code" in check(404, as_json, good, b"POST ")
    assert "wrong shape" in check(422, as_json, b'{"detail": 1}', b"POST ")
    assert check(500, as_json, good, b"POST ") == "status 500"
    assert "wrong shape" in check(404, {"content-type": "text/html"}, b"<html>", b"POST ")
    assert "wrong shape" in check(404, {"content-type": "text/plain"}, b"no", b"POST ")
    assert check(503, {}, b"", b"POST ") == "503 without Retry-After"
    assert check(503, {"retry-after": "1"}, b"", b"POST ") == ""


def test_a_connection_is_not_used_again_after_a_malformed_request() -> None:
    """The fuzzer half-closes if a request may be incomplete; a slow server may still answer it with 200."""
    ours, servers = socket.socketpair()
    with ours, servers, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            while servers.recv(100):
                pass
            servers.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        answering = pool.submit(answer)
        result = Result()
        assert not send(ours, RawRequest(b"GET / HTTP/1.1\r\n\r\n", is_http=False), result)
        answering.result()
    assert result.statuses == {"200": 1} and result.problems == []
