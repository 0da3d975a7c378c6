"""Tests with real Ray: two nodes with a shared store, a killed replica, a change of the model, and autoscaling."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.fixtures import make_rows
from tests.serving import free_port, serving, until
from tests.test_models import copy

pytest.importorskip("ray", reason="ray is not installed (extra: ray)")

from lab import ray as measure

TEXTS = [text for text, _ in make_rows(50, 31) if text.strip()]


@pytest.fixture(scope="module")
def versions(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with tiny:1, and tiny:2 with different labels."""
    path = tmp_path_factory.mktemp("shared") / "store"
    shutil.copytree(store / "tiny" / "1", path / "tiny" / "1")
    copy(path, 2, labels=["no", "yes"])
    return path


@pytest.fixture(scope="module")
def port(versions: Path) -> Iterator[int]:
    """The port of Ray's proxy, which serves two replicas: each node has one core, and so one replica."""
    found = free_port()
    with measure.cluster(2, 1, found):
        measure.deploy(store=versions, models="tiny:1", min_replicas=2, max_replicas=2)
        until(lambda: answers(found), "the proxy to know the application")
        yield found


def answers(port: int) -> bool:
    """True if the proxy is up and routes to the application."""
    with suppress(httpx.TransportError):
        return classify(port, input="good").status_code == 200
    return False


def classify(port: int, **body: object) -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{port}/classify", json=body, timeout=30)


def test_it_answers_what_de3_serve_answers(port: int, versions: Path) -> None:
    ours = classify(port, input=TEXTS, explain=True).json()["data"]
    with serving(versions, models=["tiny:1"]) as server:
        assert ours == server.classify(input=TEXTS, explain=True).json()["data"]
    assert classify(port, input="good", tau=7).status_code == 422
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "tiny:1"


@pytest.mark.parametrize(("sent", "is_kept"), [([], False), (["my-own"], True), (["{}", "my-own"], True)])
def test_a_response_has_one_request_id(port: int, sent: list[str], is_kept: bool) -> None:
    """The answer's `id` contains the id that the replica logs."""
    headers = [("X-Request-ID", one) for one in sent]
    url = f"http://127.0.0.1:{port}"
    answer = httpx.post(url + "/classify", json={"input": "good"}, headers=headers)
    (request_id,) = answer.headers.get_list("x-request-id")
    assert answer.json()["id"] == f"classify-{request_id}"
    assert (request_id == "my-own") is is_kept and request_id not in ("", "a b", "{}")
    for other in (
        httpx.post(url + "/classify", json={}, headers=headers),
        httpx.get(url + "/v1/models", headers=headers),
        httpx.get(url + "/nothing", headers=headers),
    ):
        (request_id,) = other.headers.get_list("x-request-id")
        assert (request_id == "my-own") is is_kept


def test_a_killed_replica_is_replaced_and_every_request_answered(port: int) -> None:
    before = measure.replicas()
    with measure.Clients(port, TEXTS) as clients:
        until(lambda: clients.counts["200 tiny:1"] > 20, "answers")
        killed = measure.kill_one()
        until(lambda: len(measure.replicas().keys() - {killed}) == 2, "another replica")
        after = clients.counts["200 tiny:1"]
        until(lambda: clients.counts["200 tiny:1"] > after + 20, "answers with another replica")
    assert killed in before and len(set(measure.replicas().values())) == 2
    assert set(clients.counts) == {"200 tiny:1"}


def test_a_model_is_changed_without_an_error(port: int, versions: Path) -> None:
    with measure.Clients(port, TEXTS) as clients:
        until(lambda: clients.counts["200 tiny:1"] > 20, "answers of the old version")
        measure.deploy(store=versions, models="tiny:2", min_replicas=2, max_replicas=2)
        until(lambda: clients.counts["200 tiny:2"] > 20, "answers of the new version")
    assert set(clients.counts) == {"200 tiny:1", "200 tiny:2"}
