"""The load generator: the requests that it sends, the answers that it counts, and when each latency starts."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path

import pytest

from de3.loadtest import client, compare, ramp, report, servers
from de3.loadtest.client import Target, accuracy, ask_alone, quantile, send_traffic, wrong_labels
from de3.loadtest.texts import Sample, read, with_long, with_taus
from de3.model_store.store import Store
from tests.commands import de3, invoke
from tests.fixtures import make_rows, write_rows
from tests.serving import serving
from tests.upstream import service

SAMPLES = [Sample(text, label) for text, label in make_rows(30, 4)]


@contextmanager
def plain_server(answer: Callable[[int], bytes]) -> Iterator[Target]:
    """A server that answers request n, counted from 0, with `answer(n)`, or closes the connection if that is empty.

    Yields it as a Target.
    """
    numbers, lock = count(), threading.Lock()

    def respond(handler: BaseHTTPRequestHandler, _: object) -> None:
        with lock:
            sent = answer(next(numbers))  # one at a time, so that one stall delays all
        handler.wfile.write(sent)
        handler.close_connection = not sent

    with service() as one:
        one.respond = respond
        yield Target(f"http://127.0.0.1:{one.port}", label=lambda a: a["label"])


def reply(label: str, status: str = "200 OK") -> bytes:
    body = json.dumps({"label": label}).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def arrivals(seconds: float, rate: float, seed: int = 0) -> list[float]:
    """The times at which the requests of an open loop are due."""
    rng, due = random.Random(seed), list[float]()
    while (following := (due[-1] if due else 0.0) + rng.expovariate(rate)) <= seconds:
        due.append(following)
    return due


def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    def answer(number: int) -> bytes:
        if number == 5:
            time.sleep(0.3)  # one stall: all requests that arrive during it wait
        return reply("a")

    with plain_server(answer) as target:
        run = send_traffic(target, SAMPLES, seconds=0.4, rate=200, connections=2, seed=1)
    expected = arrivals(0.4, 200, seed=1)
    assert sorted(a.due for a in run.answers) == expected and run.statuses() == {200: len(expected)}
    during = sum(0.1 < due < 0.2 for due in expected)
    assert sum(x > 100 for x in run.latencies_ms()) >= during > 10  # more than its 2 connections


def test_a_closed_loop_sends_the_samples_in_turn() -> None:
    with plain_server(lambda _: reply("a")) as target:
        run = send_traffic(target, SAMPLES[:3], seconds=0.2, connections=4)
    assert run.offered is None and len(run.answers) >= 4
    assert [a.sample for a in run.answers] == [i % 3 for i in range(len(run.answers))]
    first = run.answers[:50]
    assert max(sum(a.sent <= b.sent < a.done for a in first) for b in first) <= 4


def test_a_run_counts_what_was_answered_in_time() -> None:
    times = [
        (0.1, 0.2, 0.5, 200),
        (0.3, 0.3, 1.0, 200),
        (0.4, 0.8, 1.1, 200),
        (0.5, 0.6, 0.7, 503),
        (0.9, 0, 0, 0),
    ]
    answers = [client.Answer(i, due, sent, done, status) for i, (due, sent, done, status) in enumerate(times)]
    run = client.Run([*SAMPLES[:4], Sample("long", long=True)], answers, 1.0, None, 2, 0.0)
    assert run.rate() == 2 and run.statuses() == {200: 3, 503: 1, 0: 1}
    assert run.latencies_ms() == pytest.approx([400, 700, 700]) and run.latencies_ms(long=True) == []
    run.labels = [SAMPLES[0].label, "neither", "neither", None, None]
    assert report.summary(run)["accuracy"] == pytest.approx(1 / 3)
    run.labels = ["unknown"] * 5
    assert report.summary(run)["accuracy"] is None  # other names of labels
    assert run.lateness_ms(1) == pytest.approx(400) and run.lateness_ms(0) == 0
    assert [quantile([3, 1, 2, 5, 4], share) for share in (0.5, 0.99)] == [3, 5]  # in any order


def test_requests_that_were_due_but_never_sent_count_as_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_CONNECTIONS", 2), ("GRACE_S", 0.1)):
        monkeypatch.setattr(client, name, limit)
    is_over = threading.Event()

    def answer(number: int) -> bytes:
        if number >= 3:
            is_over.wait(60)
        return reply("a")

    with plain_server(answer) as target:
        run = send_traffic(target, SAMPLES, seconds=0.2, rate=200, connections=2)
        is_over.set()
    assert [a.due for a in run.answers] == arrivals(0.2, 200)
    assert run.statuses().get(200, 0) <= 3 and run.statuses()[0] >= len(run.answers) - 3
    assert sum(bool(a.sent) for a in run.answers) <= 5


def test_refusals_closed_connections_and_wrong_labels_are_counted() -> None:
    answers = {3: reply("x", "503 Service Unavailable"), 5: b"", 8: reply("b")}
    answers[9] = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!"
    with plain_server(lambda number: answers.get(number, reply("a"))) as target:
        run = send_traffic(target, SAMPLES[:10], seconds=0.2, rate=200, connections=1)
    statuses = run.statuses()
    assert statuses[503] == 1 and statuses[0] == 1
    assert wrong_labels(run, ["a"] * 10) == 2  # "b", and the invalid answer
    assert report.summary(run, 2)["statuses"]["503"] == 1


def test_answers_differ_only_where_both_servers_answered_with_the_same_label_names() -> None:
    samples = [Sample(text) for text in "wxyz"]
    found = client.differing(samples, ["a", "b", "b", None], ["a", "b", "a", "a"])
    assert found == {
        "count": 1,
        "of": 3,
        "share": 1 / 3,
        "texts": [{"text": "y", "full_depth": "a", "label": "b"}],
    }
    assert client.differing(samples, ["LABEL_0"] * 4, ["a", "b", "a", "a"]) is None


def test_compare_computes_the_accuracy_from_the_texts_sent_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = SAMPLES[:4]

    def answer(number: int) -> bytes:
        label = samples[number].label if number < len(samples) else None
        return reply(label or "under load")

    @contextmanager
    def running(*_: object) -> Iterator[servers.Running]:
        process = subprocess.Popen([sys.executable, "-c", ""])
        yield servers.Running(target, process)
        process.wait()

    monkeypatch.setattr(compare, "running", running)
    comparison = compare.Comparison([servers.Server("de3", [])], samples, tmp_path, 0.1, rounds=1)
    with plain_server(answer) as target, pytest.raises(ValueError, match="no peer could be started"):
        comparison.all(None)
    (row,) = comparison.results["saturation"]["de3"]
    assert row["accuracy"] == 1 and row["wrong_labels"] > 0


def test_against_the_real_server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Store(store).open("tiny-int8").manifest.labels
    samples = [Sample(s.text, names[int(s.label)]) if s.label in ("0", "1") else s for s in SAMPLES]
    key = "a-key-for-classifying"
    with serving(store, models=["tiny-int8"], api_keys=f"alice {key}") as server:
        target = Target(server.url, key=key)
        alone = ask_alone(target, samples)
        run = send_traffic(target, samples, seconds=0.2, connections=8)
        assert wrong_labels(run, alone) == 0 and set(run.statuses()) == {200}
        share = accuracy(samples, alone)
        assert share is not None and share > 0.7
        file = tmp_path / "texts.tsv"
        file.write_text("text\tsentiment\n" + "".join(f"{s.text}\t{s.label}\n" for s in samples))
        command = (
            f"loadtest run {server.url} --texts {file} --seconds 0.5 --rate 50 --tau 0 --tau 0.5 "
            f"--json {tmp_path}/r.json --label-column sentiment"
        )
        refused = invoke(command)
        assert re.search(r"[1-9]\d* × 401 ", refused.output)
        assert str(refused.exception) == f"{server.url}: no request was answered with status 200"
        monkeypatch.setenv("DE3_API_KEY", key)
        de3(command)
        numbers = json.loads((tmp_path / "r.json").read_text())
        assert numbers["wrong_labels"] == 0 and set(numbers["statuses"]) == {"200"}
        assert numbers["accuracy"] > 0.7
        # Another server on the port would be measured instead.
        for port, says in ((server.port, f"already answers on port {server.port}"), (1, "no such thing")):
            broken = servers.Server("broken", ["/bin/sh", "-c", "echo no such thing; exit 1"])
            with pytest.raises(ValueError, match=says), servers.running(broken, port, tmp_path / "log"):
                pass


def test_texts_are_read_made_long_and_given_taus(tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    file.write_text('sentence\tlabel\na "film\t1\ndull\t0\nodd\tother\n')
    *samples, other = read(file, "sentence", label_names="bad, good")
    assert [*samples, other] == [Sample('a "film', "good"), Sample("dull", "bad"), Sample("odd", "other")]
    long = with_long(samples * 200, 0.1, 50)
    assert 20 < sum(s.long for s in long) < 60
    assert {len(s.text.split()) for s in long if s.long} == {50}
    assert [s.tau for s in with_taus(samples, [0.0, 0.2])] == [0.0, 0.2, 0.0, 0.2]
    with pytest.raises(ValueError, match="no column 'text'"):
        read(file, "text")
    parts = tmp_path / "x.jsonl"
    parts.write_text('{"text": "a film", "of": "f"}\n{"text": "film", "of": "f", "fragment": true}\n')
    assert [s.text for s in read(parts, "text")] == ["a film"]
    assert [s.group for s in read(parts, "text", group_column="of")] == ["f", "f"]
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    assert [s.text for s in read(tmp_path / "x.txt", "sentence")] == ["one", "two"]


@pytest.mark.slow
def test_the_ramp_reports_both_runs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = ("half", 1, 0.5, 0.5), ("twice", 1, 2.0, 2.0), ("after", 1, 0.5, 0.5)
    monkeypatch.setattr(ramp, "PHASES", phases)
    monkeypatch.setattr(ramp, "SECONDS", 3)
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(60, 33))
    de3(f"loadtest ramp --store {store} --model tiny --texts {texts} --out {tmp_path}")
    found = json.loads((tmp_path / "ramp.json").read_text())
    assert set(found["runs"]) == {"off", "on"}
    for one in found["runs"].values():
        offered = [one["phases"][name]["offered_per_s"] for name in ("half", "twice", "after")]
        assert one["phases"]["half"]["answered"] > 0 and offered[1] > 2 * offered[0]


def test_sigterm_stops_the_server_that_a_measurement_started(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from de3.loadtest.servers import Server, free_port, running\n"
        "command = [sys.executable, '-m', 'http.server', '{port}', '--bind', '127.0.0.1']\n"
        "server = Server('one', command, ready='/')\n"
        f"with running(server, free_port(), Path({str(tmp_path / 'log')!r})) as started:\n"
        "    print(started.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as measuring:
        assert measuring.stdout is not None
        pid = int(measuring.stdout.readline())
        measuring.terminate()
        assert measuring.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
