"""Upstreams of a server as a whole: its processes, its audits, its state folder, and its secrets."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import until
from tests.test_processes import Running
from tests.test_upstream_server import LABELS, TEXTS, opinion
from tests.upstream import KEY, chat, service, write_toml


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLM_KEY", KEY)


@contextmanager
def processes(folder: Path, store: Path, upstream: dict[str, Any], *arguments: str) -> Iterator[Running]:
    """`de3 serve tickets.toml --processes 2`."""
    path = write_toml(folder / "tickets.toml", upstream, name="tickets", encoder="tiny", labels=LABELS)
    running = Running(store, str(path), "--quantize", "none", "--threads", "2", *arguments)
    try:
        yield running.wait()
    finally:
        running.stop()


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/classify", json=body, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_limits_and_counts_are_the_servers(tmp_path: Path, store: Path) -> None:
    with service(opinion) as upstream:
        fields = {"max_calls_per_hour": 15, "concurrency": 1, "price_per_call": 0.5, "api_key_env": "LLM_KEY"}
        with processes(tmp_path, store, chat(upstream.url, **fields)) as running, running.both() as clients:
            # A client that disconnects, then a process that is killed: their calls end, which frees the only slot.
            upstream.gate.clear()
            with pytest.raises(httpx.ReadTimeout):
                clients[0].post("/classify", json={"input": TEXTS[0], "tau": 0}, timeout=0.5)
            with ThreadPoolExecutor(2) as pool:
                first = pool.submit(post, clients[0], input=TEXTS[1], tau=0)
                until(lambda: upstream.running == 2, "the second text to be sent")
                gone = pool.submit(post, clients[1], input=TEXTS[2], tau=0)
                upstream.gate.set()
                assert first.result().status_code == gone.result().status_code == 200
            assert upstream.texts == TEXTS[:3]
            # The rest of the calls of an hour.
            with ThreadPoolExecutor(8) as pool:
                bodies = [{"input": text, "tau": 0} for text in TEXTS[3:27]]
                found = list(pool.map(lambda i: post(clients[i % 2], **bodies[i]), range(24)))
            assert sorted(one.status_code for one in found) == 12 * [200] + 12 * [502]
            assert len(upstream.requests) == 15
            (refused,) = {one.text for one in found if one.status_code == 502}
            assert "max_calls_per_hour (15) is reached" in refused
            assert all(
                3000 < int(one.headers["retry-after"]) <= 3610 for one in found if one.status_code == 502
            )
            assert post(clients[0], input=TEXTS, tau=0.5).status_code == 200
            until(lambda: running.metric("de3_local_texts_total", model="tickets") == 60, "the counts")
            assert running.metric("de3_upstream_calls_total", model="tickets") == 15
            assert running.metric("de3_upstream_cost_total", model="tickets") == 7.5
            assert running.metric("de3_upstream_available", model="tickets") == 0
            metrics = running.get("/metrics").text
            assert metrics.count('de3_upstream_calls_total{kind="audit",model="tickets"}') == 1
            assert (
                running.metric("de3_exit_layer_count", model="tickets:1") == 60 + 14
            )  # without the client that went
            hidden = [metrics, running.get("/v1/models").text, running.get("/").text, refused, *running.log]
            assert not any(KEY in text for text in hidden)
