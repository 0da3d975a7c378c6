"""Slow tests of upstreams: exits learned from one, and a stream of texts while everything is killed in turn."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import pytest

from de3.server.learn import fitting
from tests.fixtures import make_rows
from tests.serving import CERTIFICATES, free_port, until
from tests.test_learn import PROGRAM
from tests.test_processes import Running
from tests.test_upstream_server import rows_of
from tests.test_upstream_shared import report_of
from tests.upstream import KEY, LABELS, chat, model_of, opinion, served, service, write_toml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
# Each text ends with a number, which the models do not know, and which changes the upstream's answer to one in ODD.
RATE, ODD = 0.05, 50


def answer(text: str) -> str:
    """The upstream's answer to a text."""
    return "mixed" if int(text.rsplit(None, 1)[1]) % ODD == 0 else opinion(text)


def texts_of(seed: int, count: int, negated: bool = True) -> list[str]:
    """Texts with different numbers. negated: some have negated words."""
    rows = [text for text, _ in make_rows(2 * count, seed) if negated or "not" not in text.split()]
    return [f"{text} {seed * 100_000 + n}" for n, text in enumerate(rows[:count])]


def test_a_server_learns_exits_from_its_upstream(
    tmp_path: Path, store: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an encoder only; after 1,000 texts, most are answered without a call, and within the guarantee."""
    for name, value in (("PROGRAM", PROGRAM), ("IDLE_CORES", -1.0), ("SPARE_CORES", float("inf"))):
        monkeypatch.setattr(fitting, name, value)
    fields: dict[str, Any] = {"learn": True, "guarantee": 0.1, "state_dir": tmp_path / "state"}
    with service(answer) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url, price_per_call=0.001), encoder=str(encoder))

        def fits(server: Any) -> list[dict[str, Any]]:
            return list(httpx.get(f"{server.url}/v1/models/tickets/learn").json()["fits"])

        with served(tmp_path, store, of, **fields) as server:
            for i in range(12):
                rows_of(server, input=texts_of(i, 100, negated=False))
            until(lambda: any(fit["outcome"] == "served" for fit in fits(server)), "a fit", 300)
            local, wrong = 0, 0
            for i in range(12, 42):
                rows = rows_of(server, input=(texts := texts_of(i, 100, negated=False)))
                local += sum(row["exit"]["reason"] == "threshold" for row in rows)
                wrong += sum(row["label"] != answer(text) for text, row in zip(texts, rows, strict=True))
            until(lambda: not report_of(server)["pending"] and not upstream.running, "the audits")
            report = report_of(server)["upstream"]
            assert local > 1000
            assert wrong <= 0.1 * 3000
            assert report["local_share"] > 0 and report["saved"] > 0
            assert len(upstream.requests) < 4200 - local / 2
        with served(tmp_path, store, of, **fields) as server:  # the learned exits are served again
            rows = rows_of(server, input=texts_of(42, 100, negated=False))
            assert any(row["exit"]["reason"] == "threshold" for row in rows)


class Stream:
    """Four clients that send texts one by one, each again and again until it is answered.

    Attributes:
        url: of the server, which may change.
        rows: the answer to each text.
        failures: status codes of failed attempts; 0: the connection was closed.
    """

    def __init__(self, texts: list[str]) -> None:
        self.rows, self.failures, self.is_over = dict[str, dict[str, Any]](), list[int](), False
        self.client, self.pool = httpx.Client(verify=CERTIFICATES, timeout=60), ThreadPoolExecutor(4)
        self.texts = texts

    def start(self, url: str) -> None:
        self.url = url
        self.sending = [self.pool.submit(self.send, text) for text in self.texts]

    def stop(self) -> None:
        self.is_over = True
        self.pool.shutdown(cancel_futures=True)

    def send(self, text: str) -> None:
        while text not in self.rows and not self.is_over:
            status = 0
            with suppress(httpx.TransportError):
                response = self.client.post(f"{self.url}/classify", json={"input": text})
                status = response.status_code
                assert status == 200 or (status in (502, 503, 504) and "retry-after" in response.headers)
            if status == 200:
                (self.rows[text],) = response.json()["data"]
            else:
                self.failures.append(status)
                sleep(0.05)

    def wait(self, more: int = 500) -> None:
        """Wait until more texts are answered."""
        goal = min(len(self.texts), len(self.rows) + more)
        until(lambda: len(self.rows) >= goal, f"{goal} answers, have {len(self.rows)}")

    def wait_for(self, status: int) -> None:
        """Wait for a new failure with this status."""
        seen = self.failures.count(status)
        until(lambda: self.failures.count(status) > seen, f"a failure with status {status}")


def test_no_accepted_request_is_lost_and_the_guarantee_holds_whatever_is_killed(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLM_KEY", KEY)
    port, state = free_port(), tmp_path / "state"
    upstream = chat(f"http://127.0.0.1:{port}/v1/chat/completions", timeout_s=1, api_key_env="LLM_KEY")
    path = write_toml(tmp_path / "tickets.toml", upstream, name="tickets", encoder="tiny", labels=LABELS)
    options = f"--quantize none --threads 2 --guarantee {RATE} --state-dir {state} --timeout-s 3"

    def tau() -> float:
        return float(running.get("/v1/models/tickets/audit").json()["tau"]["tau"])

    running, stream = Running(store, str(path), *options.split()), Stream(texts_of(1, 12_000))
    logs = [running.log]
    try:
        with service(answer, port):
            running.wait()
            stream.start(running.url)
            until(lambda: tau() > 0, "a proof")
            stream.wait()
        stream.wait_for(502)
        with service(answer, port) as again:
            stream.wait()
            again.gate.clear()  # it hangs
            stream.wait_for(504)
            again.gate.set()
            stream.wait()
            os.kill(running.pids[0], signal.SIGKILL)
            stream.wait_for(0)
            stream.wait()
            pids = running.pids
            running.process.kill()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            stream.wait_for(0)
            running.stop()
            running = Running(store, str(path), *options.split()).wait()
            logs.append(running.log)
            stream.url = running.url
            assert tau() > 0  # the evidence was saved
            stream.wait()
            metrics = running.get("/metrics").text
            for sent in stream.sending:
                sent.result(300)
    finally:
        stream.stop()
        running.stop()
    wrong = sum(row["label"] != answer(text) for text, row in stream.rows.items())
    assert 0 < wrong <= RATE * len(stream.rows)
    assert sum(row["exit"]["reason"] == "threshold" for row in stream.rows.values()) > 0.3 * len(stream.rows)
    content = [file.read_text(errors="replace") for file in state.rglob("*") if file.is_file()]
    assert not any(KEY in text for text in [metrics, *content, *logs[0], *logs[1]])
