"""Upstreams of a server as a whole: its processes, its audits, its state folder, and its secrets."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.runtime.upstream import upstreams
from tests.commands import refusal
from tests.fixtures import make_rows
from tests.serving import CERTIFICATES, Server, until, waiting_client
from tests.test_processes import Running
from tests.test_upstream_server import TEXTS, rows_of
from tests.upstream import KEY, LABELS, chat, model_of, opinion, served, service, write_toml


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLM_KEY", KEY)


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/classify", json=body, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_limits_and_counts_are_the_servers_and_it_stops_after_the_last_answer(
    tmp_path: Path, store: Path
) -> None:
    """`de3 serve tickets.toml other.toml --processes 2`."""
    state = tmp_path / "state"
    with service(opinion) as upstream, ExitStack() as ends, ThreadPoolExecutor(8) as pool:
        of = chat(upstream.url, concurrency=1, price_per_call=0.5, api_key_env="LLM_KEY")
        files = [
            write_toml(tmp_path / f"{name}.toml", of | more, name=name, encoder="tiny", labels=LABELS)
            for name, more in (("tickets", {"max_calls_per_hour": 15}), ("other", {"concurrency": 16}))
        ]
        options = f"--quantize none --threads 2 --default-model tickets --state-dir {state}".split()
        running = Running(store, *map(str, files), *options)
        ends.callback(running.stop)
        clients = ends.enter_context(running.wait().both())
        # A client that disconnects: its call ends, which frees the only slot.
        upstream.gate.clear()
        with waiting_client(running.url, input=TEXTS[0], tau=0):
            until(lambda: upstream.running == 1, "the first text to be sent")
        first = pool.submit(post, clients[0], input=TEXTS[1], tau=0)
        until(lambda: upstream.running == 2, "the second text to be sent")
        second = pool.submit(post, clients[1], input=TEXTS[2], tau=0)
        upstream.gate.set()
        assert first.result().status_code == second.result().status_code == 200
        assert upstream.texts == TEXTS[:3]
        # The rest of the calls of an hour.
        bodies = [{"input": text, "tau": 0} for text in TEXTS[3:27]]
        found = list(pool.map(lambda i: post(clients[i % 2], **bodies[i]), range(24)))
        refused = [one for one in found if one.status_code == 502]
        assert sorted(one.status_code for one in found) == 12 * [200] + 12 * [502]
        assert len(upstream.requests) == 15
        assert all("max_calls_per_hour (15) is reached" in one.text for one in refused)
        assert all(3000 < int(one.headers["retry-after"]) <= 3610 for one in refused)
        assert post(clients[0], input=TEXTS, tau=0.5).status_code == 200
        until(lambda: running.metric("de3_local_texts_total", model="tickets") == 60, "the counts")
        assert running.metric("de3_upstream_calls_total", model="tickets") == 15
        assert running.metric("de3_upstream_cost_total", model="tickets") == 7.5
        assert running.metric("de3_upstream_available", model="tickets") == 0
        # Without the client that has gone.
        assert running.metric("de3_exit_layer_count", model="tickets:1") == 60 + 14
        metrics = running.get("/metrics").text
        assert metrics.count('de3_upstream_calls_total{kind="audit",model="tickets"}') == 1
        shown = [metrics, running.get("/v1/models").text, running.get("/").text, refused[0].text]
        upstream.gate.clear()
        last = pool.submit(post, clients[0], input=TEXTS[:5], tau=0, model="other")
        until(lambda: upstream.running == 5, "the calls")
        running.process.terminate()
        until(lambda: running.logged("Shutting down"), "the end to begin")
        upstream.gate.set()
        assert [row["label"] for row in last.result().json()["data"]] == list(map(opinion, TEXTS[:5]))
        assert running.process.wait(60) == 0
        saved = [path.read_text() for path in sorted((state / "upstream").iterdir())]
        assert [sum(json.loads(one)["calls"].values()) for one in saved] == [5, 15]
        assert not any(KEY in text for text in [*shown, *saved, *running.log])


def report_of(server: Server) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/models/tickets/audit", verify=CERTIFICATES)
    assert response.status_code == 200, response.text
    return dict(response.json())


def settled(server: Server, texts: int) -> dict[str, Any]:
    """The report, once this many texts have been counted, and no audit is pending."""
    until(lambda: (found := report_of(server))["texts"] >= texts and not found["pending"], f"{texts} texts")
    return report_of(server)


def at_odds(text: str) -> str:
    """An opinion that the exits do not share on a few texts."""
    return "mixed" if "scene" in text.split() else opinion(text)


def test_audits_ask_the_upstream(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstreams, "REPEAT_SHARE", 0.0)
    with service(at_odds) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url, max_calls_per_hour=100))
        with served(tmp_path, store, of, audit_share=1.0, tau=0.5) as server:
            rows = rows_of(server, input=TEXTS)
            assert {row["exit"]["reason"] for row in rows} == {"threshold"}
            report = settled(server, len(TEXTS))
            assert sorted(upstream.texts) == sorted(TEXTS)
            differing = sum(at_odds(text) != row["label"] for text, row in zip(TEXTS, rows, strict=True))
            assert differing > 1
            assert (report["texts"], report["audits"]) == (60, 60)
            assert report["measured"]["disagreement"] == pytest.approx(differing / 60)
            assert report["measured"]["as_served"] == pytest.approx(differing / 60)
            assert (report["upstream"]["calls"]["audit"], report["upstream"]["local_texts"]) == (60, 60)
            shares = [row["upstream_share"] for row in report["taus"]]
            assert shares == sorted(shares, reverse=True)
            assert (shares[0], report["taus"][0]["disagreement"]) == (1, 0)
            rows_of(server, input=TEXTS[0], tau=0)
            assert report_of(server)["audits"] == 60  # not of a request that sets τ
            # The limit on calls holds for audits, too: the texts after the last call are answered, but do not count.
            assert len(rows_of(server, input=[f"{text} {n}" for n, text in enumerate(TEXTS)])) == 60
            until(lambda: report_of(server)["excluded"]["upstream_failed"] == 21, "the audits without a call")
            report = settled(server, 60)
            assert len(upstream.requests) == 100
            assert 60 <= report["texts"] == report["audits"] <= 99
            assert not report["upstream"]["available"]


def test_an_audit_that_fails_does_not_count(
    tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else each hour without calls would look like one without disagreement."""
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, audit_share=1.0, tau=0.5) as server:

            def failed(count: int) -> dict[str, Any]:
                """The report, once this many audits have failed."""
                until(lambda: report_of(server)["excluded"]["upstream_failed"] == count, f"{count} failures")
                return report_of(server)

            upstream.is_broken = True
            rows_of(server, input=TEXTS)
            report = failed(60)
            assert (report["texts"], report["audits"], report["pending"]) == (0, 0, 0)
            assert report["measured"]["upper"] == 1
            upstream.is_broken, upstream.answer = False, lambda text: f"I cannot label: {text}"
            until(lambda: "no label" in server.classify(input=TEXTS[0], tau=0).text, "the calls to go on")
            rows_of(server, input=TEXTS[:7])
            assert failed(67)["audits"] == 0
            upstream.answer = opinion
            rows_of(server, input=TEXTS[7:8])
            before = settled(server, 8)
            assert (before["audits"], before["pending"]) == (1, 0)
            upstream.is_broken = True
            rows_of(server, input=new_texts(1, 20))
            report = failed(87)
            assert (report["audits"], report["taus"]) == (1, before["taus"])
    assert not any(text in caplog.text for text in TEXTS[:7])  # they are user data


def test_an_upstream_that_disagrees_with_itself_is_reported(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "REPEAT_SHARE", 1.0)
    seen = set[str]()

    def wavering(text: str) -> str:
        if text.endswith("0") and text in seen:
            return "mixed"
        seen.add(text)
        return "positive"

    with service(wavering) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, guarantee=0.02) as server:
            rows_of(server, input=new_texts(1, 60))  # at τ = 0, each is its own audit
            until(lambda: report_of(server)["upstream"]["repeated"] == 60, "the second calls")
            found = report_of(server)["upstream"]
            assert found["calls"] == {"learning": 60, "uncertain": 0, "audit": 0, "repeat": 60, "retry": 0}
            assert found["self_disagreement"] == pytest.approx(0.1)
            assert "differ in 10% of the cases: a guarantee of 2%" in found["warning"]


def new_texts(seed: int, count: int = 200) -> list[str]:
    """Texts that differ from those of other seeds."""
    return [f"{text} {seed} {n}" for n, (text, _) in enumerate(make_rows(count, seed))]


def test_a_guarantee_is_proved_survives_a_restart_and_is_reset(tmp_path: Path, store: Path) -> None:
    seeds = count(5000)

    def prove(server: Server, is_proved: bool) -> None:
        """Send texts until audits have proved a τ above 0, or until no such τ is proved any more."""
        for _ in range(40):
            rows_of(server, input=new_texts(next(seeds)))
            until(lambda: not report_of(server)["pending"], "the audits")
            if (report_of(server)["tau"]["tau"] > 0) == is_proved:
                return
        raise AssertionError("τ stays as it is")

    with service(opinion) as upstream:
        fields: dict[str, Any] = {"guarantee": 0.05, "state_dir": tmp_path / "state"}
        of = model_of(tmp_path, LABELS, chat(upstream.url, price_per_call=1))
        with served(tmp_path, store, of, **fields) as server:
            prove(server, True)
            rows = rows_of(server, input=new_texts(next(seeds)))
            assert sum(row["exit"]["reason"] == "threshold" for row in rows) > 100
            before = report_of(server)
        same = model_of(tmp_path, LABELS, chat(upstream.url, price_per_call=2, concurrency=8))
        with served(tmp_path, store, same, **fields) as server:
            after = report_of(server)
            assert after["tau"]["tau"] > 0
            assert after["texts"] >= before["texts"]
            assert after["upstream"]["local_texts"] == before["upstream"]["local_texts"] > 100
            # The upstream's answers change: the guarantee is proved anew.
            others = {"positive": "negative", "negative": "positive", "mixed": "mixed"}
            upstream.answer = lambda text: others[opinion(text)]
            prove(server, False)
            upstream.answer = opinion
        other = model_of(tmp_path, LABELS, chat(upstream.url, prompt="Label this.\nText: {text}"))
        with served(tmp_path, store, other, **fields) as server:
            anew = report_of(server)
            assert (anew["tau"]["tau"], anew["texts"], anew["upstream"]["local_texts"]) == (0, 0, 0)


def test_a_missing_key_is_refused_before_the_port_opens(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_KEY")
    upstream = chat("http://10.1.2.3/v1", api_key_env="LLM_KEY")
    path = write_toml(tmp_path / "t.toml", upstream, name="tickets", encoder="tiny", labels=LABELS)
    command = f"serve {path} --store {store} --quantize none --port 0"
    assert "--allow-plain-http" in refusal(command)
    assert "LLM_KEY has no key" in refusal(f"{command} --allow-plain-http --processes 2")
