"""A new protocol is one module and one path; here, a short version of Text Embeddings Inference's /predict."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from de3.server.engine.job import Job
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.http.app import PROTOCOLS
from de3.server.http.protocol import Call, Protocol
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import Server, until

KEY = "alice-has-a-long-key"


def parse(call: Call) -> Request:
    """Parse a body {"inputs": …} with a text or a list of texts; raises RequestError."""
    try:
        inputs = orjson.loads(call.body)["inputs"]
        texts = [Text(text + "") for text in (inputs if isinstance(inputs, list) else [inputs])]
    except (ValueError, KeyError, TypeError):
        raise RequestError("inputs: must be a text or a list of texts", "inputs") from None
    if not 0 < len(texts) <= call.max_texts:
        raise RequestError(f"inputs: 1 to {call.max_texts} texts are allowed, got {len(texts)}", "inputs")
    return Request(texts)


def serialize(request_id: str, job: Job) -> bytes:
    """The answer [[{"label", "score"}, …], …]: the labels of each text, the most probable first."""
    labels = job.model.manifest.labels
    return orjson.dumps(
        [
            sorted(
                ({"label": n, "score": p} for n, p in zip(labels, item.outcome.reading.probs, strict=True)),
                key=lambda row: -row["score"],
            )
            for item in job.items
            if item.outcome is not None
        ]
    )


def error(problem: RequestError) -> bytes:
    """The answer {"error", "error_type"} to a request that is refused or fails."""
    return orjson.dumps({"error": problem.message, "error_type": problem.cause})


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    settings = Settings(
        store=store, models=["tiny"], port=0, max_texts=4, api_keys=f"alice {KEY}", rate_limit="5/hour"
    )
    running = Server(Service(settings), {**PROTOCOLS, "/predict": Protocol(parse, serialize, error)})
    running.start()
    until(lambda: running.service.state == "ready", "readiness")
    yield running
    running.stop()


def predict(server: Server, body: Any, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(server.url + "/predict", json=body, headers=headers, timeout=30)


def test_it_answers_as_classify_does(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    theirs = httpx.post(server.url + "/classify", json={"input": "good"}, headers=headers).json()["data"][0]
    answer = predict(server, {"inputs": ["good", "bad"]})
    assert answer.status_code == 200 and "server-timing" in answer.headers
    assert answer.json()[0][0] == {"label": theirs["label"], "score": max(theirs["probs"])}


def test_keys_limits_and_metrics_come_with_it(server: Server) -> None:
    assert predict(server, {"inputs": "good"}, key="wrong").json()["error_type"] == "no_key"
    too_many = predict(server, {"inputs": ["good"] * 5})
    assert (too_many.status_code, too_many.json()["error_type"]) == (422, "bad_request")
    predict(server, {"inputs": "good"})
    # The sixth text of this hour; the refused request counts as one.
    over = predict(server, {"inputs": "good"})
    assert (over.status_code, over.json()["error_type"]) == (429, "rate_limited")
    assert int(over.headers["retry-after"]) > 0
    assert server.metric("de3_rejected_total", cause="rate_limited") == 1
    assert server.metric("de3_requests_total", model="tiny:1", status="200") == 3
