"""The records of a request: its id, its line in the log, and its trace."""

import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from de3.runtime.answer import significant
from de3.server.http import traces
from de3.server.http.http_server import hint
from de3.server.http.traces import MAX_TEXTS, Traces
from tests.serving import Server, process, serving, until


def post(server: Server, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(server.url + "/classify", json=body, headers=headers, timeout=30)


def test_a_request_id_comes_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"X-Request-ID": "a1-b2.c3:d4/e5+f6=@_".ljust(128, "x")}
    for method, path in (("GET", "/health"), ("GET", "/nothing-here")):
        answer = httpx.request(method, server.url + path, headers=ids)
        assert answer.headers["x-request-id"] == ids["X-Request-ID"], path
    assert post(server, ids, input="good").json()["id"] == "classify-" + ids["X-Request-ID"]
    one, two = (post(server, input="good") for _ in range(2))
    assert one.json()["id"] == "classify-" + one.headers["x-request-id"] != two.json()["id"]
    for unsafe in ("", "a b", "a\tb", 'a"b', "é", "x" * 129, "{}"):
        answer = post(server, {"X-Request-ID": unsafe.encode("latin-1")}, input="good")  # type: ignore[dict-item]
        assert (answer.status_code, len(answer.headers["x-request-id"])) == (200, 32), unsafe
    monkeypatch.setattr(server.frontend, "sheds", lambda _: True)
    answer = post(server, ids, input="good")
    assert (answer.status_code, answer.headers["x-request-id"]) == (503, ids["X-Request-ID"])


FAILS = """
import threading, warnings
from de3.cli import main
import de3.server.main
serve = de3.server.main.serve
def fail(*arguments, **named):
    warnings.warn("first")
    thread = threading.Thread(target=lambda: {}["second"])
    thread.start()
    thread.join()
    serve(*arguments, **named)
    raise RuntimeError("third")
de3.server.main.serve = fail
main()
"""


def test_a_json_log_has_requests_without_their_texts_and_uncaught_errors(store: Path) -> None:
    options = ("--model", "tiny", "--log-format", "json", "--log-requests")
    with process(store, *options, code=FAILS) as running:
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
    good, bad, odd, broken = (line for line in whole if line["logger"] == "de3.requests")
    assert good["request_id"] == "r1" and good["status"] == 200 and good["model"] == "tiny:1"
    assert good["texts"] == 2 and len(good["exit_layers"]) == 2 and good["tau"] == 0.2
    assert 0 < good["model_ms"] < good["duration_ms"]
    assert good["level"] == "INFO" and good["time"].startswith("20")
    assert (bad["request_id"], bad["status"], bad["cause"]) == ("r2", 422, "bad_request")
    assert (odd["cause"], broken["cause"]) == ("unknown_field", "not_json")
    assert "good film" not in json.dumps(whole)
    first, second, third = (line for line in whole if line["level"] not in ("INFO", "DEBUG"))
    assert [line["level"] for line in (first, second, third)] == ["WARNING", "CRITICAL", "CRITICAL"]
    assert "first" in first["message"]
    assert "KeyError: 'second'" in second["exc_info"] and "RuntimeError: third" in third["exc_info"]


@pytest.mark.parametrize(
    "settings",
    [{"default_model": None}, {"api_keys": "me a-user-key-of-some-length", "models": ["tiny"]}],
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


def test_texts_are_logged_only_if_asked_for(
    store: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "de3.requests")
    assert server.classify(input="a good film").status_code == 200
    until(lambda: server.service.in_flight == 0, "the end of the request")
    assert caplog.records == []
    with serving(store, models=["tiny"], log_texts=True) as logging:
        logging.classify(input=["a good film", "bad\nline"])
        until(lambda: caplog.records, "the line")
    (record,) = caplog.records
    assert "'a good film'" in record.getMessage() and "'bad\\nline'" in record.getMessage()  # in one line


@contextmanager
def collector() -> Iterator[tuple[str, ExportTraceServiceRequest]]:
    """The address of an OpenTelemetry collector, and all that it has received."""
    received = ExportTraceServiceRequest()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.MergeFromString(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{listening.server_port}", received
        listening.shutdown()


def test_traces_reach_a_collector(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span for each stage of a request, why another failed, and few of a large batch."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-ID": "r3"}
    with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with serving(store, models=["tiny"], traces=True) as server:
            row = post(server, headers, input="a good film").json()["data"][0]["exit"]
            for path in ("classify", "v2/models/tiny/infer"):
                httpx.post(f"{server.url}/{path}", json={})
            post(server, input=["good"] * 100)
        # Once the server has stopped, all spans have been sent.
    services, traced, others = set[str](), dict[str, Any](), list[Any]()
    about = dict[bytes, dict[str, Any]]()  # the attributes of each span
    for resource in received.resource_spans:
        services |= {
            one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
        }
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            values = {one.key: one.value for one in span.attributes}
            about[span.span_id] = {k: getattr(v, v.WhichOneof("value")) for k, v in values.items()}
            if span.trace_id.hex() == trace:
                traced[span.name] = span
            else:
                others.append(span)
    assert services == {"de3"}
    root, text = traced["POST /classify"], traced["text"]
    assert root.parent_span_id.hex() == parent and about[root.span_id]["de3.request_id"] == "r3"
    inside = {"read": root, "text": root, "queue": text, "tokenize": text, "model": text}
    assert traced.keys() == {"POST /classify", *inside}
    for name, above in inside.items():
        span = traced[name]
        assert span.parent_span_id == above.span_id
        starts, ends = (
            [getattr(one, f"{end}_time_unix_nano") for one in (above, span)] for end in ("start", "end")
        )
        assert starts[0] <= starts[1] <= ends[1] <= ends[0], name
    assert traced["queue"].end_time_unix_nano == traced["tokenize"].start_time_unix_nano
    assert traced["tokenize"].end_time_unix_nano == traced["model"].start_time_unix_nano
    assert about[traced["model"].span_id]["de3.exit.layer"] == row["layer"]
    found = {name: about[text.span_id][f"de3.exit.{name}"] for name in ("layer", "reason", "signal", "score")}
    assert found | {"score": significant(found["score"])} == {name: row[name] for name in found}
    failed = [one for one in map(about.get, about) if one and one.get("error.type") == "bad_request"]
    assert [one["http.route"] for one in failed] == ["/classify", "/v2/models/{model}/infer"]
    assert {one["http.response.status_code"] for one in failed} == {422}
    assert sum(span.name == "text" for span in others) == MAX_TEXTS


def test_a_collector_that_hangs_does_not_hold_up_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    class Hanging(TracerProvider):
        def shutdown(self) -> None:
            answered.wait()

    monkeypatch.setattr(traces, "STOP_S", 0.01)
    Traces(Hanging(shutdown_on_exit=False)).stop()
    answered.set()
