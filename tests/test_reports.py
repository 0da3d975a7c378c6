"""The records of a request: its id, its line in the log, and its trace."""

import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from de3.server.answer import significant
from de3.server.http import traces
from de3.server.http.http_server import hint
from de3.server.http.traces import MAX_TEXTS, Traces
from tests.serving import Server, process, serving, until


def post(server: Server, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(server.url + "/classify", json=body, headers=headers, timeout=30)


def test_a_request_id_comes_back(server: Server) -> None:
    ids = {"X-Request-ID": "a1-b2.c3:d4/e5+f6=@_".ljust(128, "x")}
    for method, path in (("POST", "/classify"), ("GET", "/health"), ("GET", "/nothing-here")):
        answer = httpx.request(method, server.url + path, headers=ids)
        assert answer.headers["x-request-id"] == ids["X-Request-ID"], path
    assert post(server, ids, input="good").json()["id"] == "classify-" + ids["X-Request-ID"]
    one, two = (post(server, input="good") for _ in range(2))
    assert one.json()["id"] == "classify-" + one.headers["x-request-id"] != two.json()["id"]
    for unsafe in ("", "a b", "a\tb", 'a"b', "é", "x" * 129, "{}"):
        answer = post(server, {"X-Request-ID": unsafe.encode("latin-1")}, input="good")  # type: ignore[dict-item]
        assert (answer.status_code, len(answer.headers["x-request-id"])) == (200, 32), unsafe


def test_a_shed_request_has_its_id(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.frontend, "sheds", lambda _: True)
    answer = post(server, {"X-Request-ID": "mine"}, input="good")
    assert (answer.status_code, answer.headers["x-request-id"]) == (503, "mine")


def test_requests_are_logged_as_json_without_their_texts(store: Path) -> None:
    with process(store, "--model", "tiny", "--log-format", "json", "--log-requests") as running:
        assert running.stderr is not None
        head = list(takewhile(lambda line: "ready in" not in line, running.stderr))
        (port,) = re.findall(r"running on http://[0-9.]+:(\d+)", "".join(head))
        for content, more in (
            ('{"input": ["a good film", "bad\\nline"], "tau": 0.2}', {"X-Request-ID": "r1"}),
            ('{"input": "a good film", "tau": 7}', {"X-Request-ID": "r2"}),
            ('{"input": "a good film", "a good film": 1}', {}),
            ("a good film", {}),
        ):
            httpx.post(f"http://127.0.0.1:{port}/classify", content=content, headers=more)
        running.terminate()
        whole = [json.loads(line) for line in [*head, *running.stderr]]
    assert {"uvicorn.error", "de3", "de3.requests"} == {line["logger"] for line in whole}
    good, bad, odd, broken = (line for line in whole if line["logger"] == "de3.requests")
    assert good["request_id"] == "r1" and good["status"] == 200 and good["model"] == "tiny:1"
    assert good["texts"] == 2 and len(good["exit_layers"]) == 2 and good["tau"] == 0.2
    assert 0 < good["model_ms"] < good["duration_ms"] < 10_000
    assert good["level"] == "INFO" and good["time"].startswith("20")
    assert (bad["request_id"], bad["status"], bad["cause"]) == ("r2", 422, "bad_request")
    assert (odd["cause"], broken["cause"]) == ("unknown_field", "not_json")
    assert "good film" not in json.dumps(whole)


@pytest.mark.parametrize(
    "settings",
    [{}, {"default_model": None}, {"api_keys": "me a-user-key-of-some-length", "models": ["tiny"]}],
)
def test_the_log_has_a_command_that_classifies_a_text(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setenv("DE3_API_KEY", "a-user-key-of-some-length")
    caplog.set_level("INFO")
    with serving(store, **settings) as server:
        until(lambda: "or try: curl" in caplog.text, "the command")
        (found,) = re.findall(r"open (\S+) in a browser, or try: curl (.*)", caplog.text)
        page, command = found
        url, *options = shlex.split(os.path.expandvars(command))
        headers = dict(
            value.split(": ") for name, value in zip(options[::2], options[1::2], strict=True) if name == "-H"
        )
        answer = httpx.post(url, content=options[-1], headers=headers)
        assert answer.status_code == 200, answer.text
        assert page == server.url and httpx.get(page).headers["content-type"].startswith("text/html")
        manifest = server.service.manifests()[0]
    pairs = manifest.model_copy(update={"input": "pair"})
    assert """-d '{"input": {"text": "A film.", "text_pair": """ in hint(
        "http://x", [pairs], None, has_keys=False
    )


FAILS = """
import sys, threading, warnings
from de3.cli import main
import de3.server.main
def fail(*_):
    warnings.warn("first")
    thread = threading.Thread(target=lambda: {}["second"])
    thread.start()
    thread.join()
    raise RuntimeError("third")
de3.server.main.serve = fail
sys.argv = ["de3", "serve", "--demo", "--log-format", "json"]
main()
"""


def test_uncaught_errors_are_json_in_a_json_log() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, check=False)
    rows = list(map(json.loads, (done.stdout + done.stderr).splitlines()))
    assert done.returncode == 1 and [row["level"] for row in rows] == ["WARNING", "CRITICAL", "CRITICAL"]
    said = [row["message"] + row.get("exc_info", "") for row in rows]
    for row, what in zip(said, ("first", "KeyError: 'second'", "RuntimeError: third"), strict=True):
        assert what in row


def test_texts_are_logged_only_if_asked_for(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "de3.requests")

    def logged(**settings: Any) -> list[logging.LogRecord]:
        caplog.clear()
        with serving(store, models=["tiny"], **settings) as server:
            server.classify(input=["a good film", "bad\nline"])
            until(lambda: server.service.in_flight == 0, "the request to be logged")
        return [record for record in caplog.records if record.name == "de3.requests"]

    (record,) = logged(log_texts=True, log_format="json")
    texts = [{"text": "a good film", "text_pair": None}, {"text": "bad\nline", "text_pair": None}]
    assert record.__dict__["input"] == texts
    (line,) = logged(log_texts=True)
    assert "'bad\\nline'" in line.getMessage()  # one line in the log
    assert logged() == []
    assert "good film" not in caplog.text


@pytest.fixture
def spans(server: Server) -> Iterator[InMemorySpanExporter]:
    """The SDK's in-memory exporter, with the spans that it received from the server."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)
    server.frontend._reporters.append(traces)
    yield exporter
    server.frontend._reporters.remove(traces)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_trace_has_a_span_for_each_stage(server: Server, spans: InMemorySpanExporter) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-ID": "r3"}
    row = post(server, headers, input="a good film").json()["data"][0]["exit"]
    until(lambda: len(spans.get_finished_spans()) == 6, "the spans")
    found: dict[str, Any] = {span.name: span for span in spans.get_finished_spans()}
    root, text = found["POST /classify"], found["text"]
    assert root.parent.span_id == int(parent, 16) and attributes(root)["de3.request_id"] == "r3"
    assert {span.context.trace_id for span in found.values()} == {int(trace, 16)}
    for name, above in (("read", root), ("text", root), ("queue", text), ("tokenize", text), ("model", text)):
        span = found[name]
        assert span.parent.span_id == above.context.span_id
        assert above.start_time <= span.start_time <= span.end_time <= above.end_time, name
    assert attributes(found["model"])["de3.exit.layer"] == row["layer"]
    about = {name: attributes(text)[f"de3.exit.{name}"] for name in ("layer", "reason", "signal", "score")}
    assert about | {"score": significant(about["score"])} == {name: row[name] for name in about}
    assert found["queue"].end_time == found["tokenize"].start_time
    assert found["tokenize"].end_time == found["model"].start_time


@pytest.mark.parametrize(
    ("path", "route"), [("/classify", "/classify"), ("/v2/models/tiny/infer", "/v2/models/{model}/infer")]
)
def test_a_failed_request_says_which_route_and_why_in_its_trace(
    server: Server, spans: InMemorySpanExporter, path: str, route: str
) -> None:
    httpx.post(server.url + path, json={})
    until(spans.get_finished_spans, "the span")
    (root,) = spans.get_finished_spans()
    assert root.name == f"POST {route}"
    assert attributes(root).items() >= {
        ("http.route", route),
        ("http.response.status_code", 422),
        ("error.type", "bad_request"),
    }


def test_a_large_batch_has_few_spans(server: Server, spans: InMemorySpanExporter) -> None:
    post(server, input=["good"] * 100)
    until(lambda: any(s.name == "POST /classify" for s in spans.get_finished_spans()), "the spans")
    assert sum(s.name == "text" for s in spans.get_finished_spans()) == MAX_TEXTS


def test_traces_reach_a_collector(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received = ExportTraceServiceRequest()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.MergeFromString(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    with serving(store, models=["tiny"], traces=True) as server:
        post(server, input="good")
    # Once the server has stopped, all spans have been sent.
    collector.shutdown()
    (resource,) = received.resource_spans
    names = [s.name for scope in resource.scope_spans for s in scope.spans]
    assert sorted(names) == ["POST /classify", "model", "queue", "read", "text", "tokenize"]
    assert ("service.name", "de3") in [(a.key, a.value.string_value) for a in resource.resource.attributes]


def test_a_collector_that_hangs_does_not_hold_up_a_stop(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never answers
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
        monkeypatch.setattr(traces, "STOP_S", 0.1)
        with serving(store, models=["tiny"], traces=True) as server:
            assert post(server, input="good").status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < 20  # the exporter alone would wait for 30 s
