"""Models that are loaded, unloaded and rolled back while the server runs."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from de3.model_store.store import Store, StoreError
from de3.runtime.errors import RequestError
from de3.server import manager
from de3.server.models import MAX_HISTORY, Models, default_of, find
from de3.server.service import Service
from de3.server.settings import Settings
from tests.commands import de3, refusal
from tests.fixtures import make_rows
from tests.serving import Server, serving, until

KEY = "an-admin-key-of-some-length"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TEXTS = [text for text, _ in make_rows(60, 21)]


def copy(path: Path, version: int, **fields: Any) -> None:
    shutil.copytree(path / "tiny" / "1", path / "tiny" / str(version))
    manifest = path / "tiny" / str(version) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": version} | fields))


def make_versions(store: Path, path: Path, damaged: int) -> Path:
    """A store with tiny:1, tiny:2 (renamed labels identify its answers) and a damaged version."""
    shutil.copytree(store / "tiny" / "1", path / "tiny" / "1")
    copy(path, 2, labels=["no", "yes"])
    copy(path, damaged)
    segment = path / "tiny" / str(damaged) / "layer_02.onnx"
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    return path


@pytest.fixture
def versions(store: Path, tmp_path: Path) -> Path:
    return make_versions(store, tmp_path / "store", 3)


def admin_server(store: Path, **settings: Any) -> AbstractContextManager[Server]:
    return serving(store, admin_keys=f"root {KEY}", **{"models": ["tiny:1"]} | settings)


@pytest.fixture(scope="module")
def running_server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = make_versions(store, tmp_path_factory.mktemp("versions") / "store", 9)
    for version in (4, 5):
        copy(path, version)
    with admin_server(path, threads=2) as running:
        yield running


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """A server of tiny:1, which can also load tiny:2, tiny:4 and tiny:5; tiny:9 is damaged."""
    yield running_server
    for model in rows(running_server):
        if model["role"] != "current":
            change(running_server, "unload", version=model["version"])
    while change(running_server, "rollback").status_code == 200:
        pass
    assert served(running_server) == ["tiny:1"]


def change(
    server: Server, what: str, name: str = "tiny", headers: dict[str, str] = HEADERS, **body: Any
) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/models/{name}/{what}", json=body, headers=headers, timeout=60)


def answering(server: Server, model: str | None = None) -> str:
    body = {} if model is None else {"model": model}
    answer = server.classify(input="good", **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def rows(server: Server) -> list[dict[str, Any]]:
    return list(httpx.get(server.url + "/v1/models").json()["data"])


def served(server: Server) -> list[str]:
    return [model["id"] for model in rows(server)]


def next_start(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 200, answer.text
    return answer.json()["next_start"], answer.json()["reason"]


def test_which_version_serves_is_a_decision_that_survives(versions: Path) -> None:
    """Publishing does not deploy once a person has chosen a version; the command line comes first."""
    copy(versions, 4)
    with admin_server(versions, models=[]) as server:
        assert answering(server) == "tiny:4"
        assert next_start(change(server, "load", version=1)) == ("tiny:1", "pinned")
        assert next_start(change(server, "load", version=2)) == ("tiny:2", "pinned")
        assert next_start(change(server, "rollback")) == ("tiny:1", "pinned")
        for role in ({"role": "canary", "share": 0.5}, {"role": "shadow"}):
            assert next_start(change(server, "load", version=4, **role)) == ("tiny:1", "pinned")
            refused = change(server, "rollback")
            assert refused.status_code == 409 and f"tiny:4 is a {role['role']}" in refused.text
        assert {row["id"]: row["is_pinned"] for row in rows(server)} == {"tiny:1": True, "tiny:4": False}
    copy(versions, 5)  # published later
    with admin_server(versions, models=["tiny:4"]) as server:
        assert answering(server) == "tiny:4"
        assert next_start(change(server, "load", version=2, role="loaded")) == ("tiny:4", "command line")
        assert next_start(change(server, "unload", version=2)) == ("tiny:4", "command line")
    with admin_server(versions, models=[]) as server:
        assert answering(server) == "tiny:1"
        assert next_start(change(server, "load")) == ("tiny:5", "newest")  # without a version: lifts the pin
        (versions / "tiny/pinned").write_text("9")
        assert next_start(change(server, "load", version=4, role="loaded")) == ("tiny:5", "newest")
        assert answering(server) == "tiny:5"
        assert not any(row["is_pinned"] for row in rows(server))


def test_a_pin_that_cannot_be_saved_is_reported(versions: Path, tmp_path: Path) -> None:
    (versions / "tiny/pinned.new").mkdir()
    copy(versions, 4)
    with admin_server(versions, models=["tiny"]) as server:
        done = change(server, "load", version=2).json()
        assert done["next_start"] == "tiny:4" and "newest; the pin cannot be saved: " in done["reason"]
        assert answering(server) == "tiny:2"
        (versions / "tiny/4/manifest.json").write_text("{")
        done = change(server, "load", version=1, role="canary", share=0.5)  # although the newest is damaged
    assert (done.status_code, done.json()["role"], "next_start" in done.json()) == (200, "canary", False)


@pytest.mark.parametrize(
    ("what", "body", "status", "says"),
    [
        ("load", {}, 422, "layer_02.onnx: damaged"),  # without a version, the newest is loaded
        ("load", {"version": 99}, 404, "no version '99'"),
        ("load", {"role": "canary"}, 422, "share: required for a canary"),
        ("load", {"role": "canary", "share": 1}, 422, "share: input should be less than 1"),
        ("load", {"role": "shadow", "version": 1}, 409, "role: tiny:1 is current"),
        ("unload", {}, 409, "tiny is the only model"),
        ("unload", {"version": 2}, 404, "no model 'tiny:2'"),
        ("rollback", {}, 409, "no version was current before"),
    ],
    ids=range(8),
)
def test_a_change_that_is_refused_changes_nothing(
    server: Server, what: str, body: dict[str, Any], status: int, says: str
) -> None:
    refused = change(server, what, **body)
    assert (refused.status_code, says in refused.text) == (status, True), refused.text
    assert (answering(server), served(server)) == ("tiny:1", ["tiny:1"])


def test_a_version_gets_a_role_can_lose_it_and_stays(server: Server) -> None:
    share = 1 - 1e-9  # so the canary answers
    change(server, "load", version=2, role="canary", share=share)
    change(server, "load", version=4, role="shadow")
    shown = [("tiny:1", "current", None), ("tiny:2", "canary", share), ("tiny:4", "shadow", None)]
    assert [(r["id"], r["role"], r.get("share")) for r in rows(server)] == shown
    assert (answering(server), answering(server, "tiny:1")) == ("tiny:2", "tiny:1")
    for version in (2, 4):
        assert change(server, "load", version=version, role="loaded").status_code == 200
    assert (answering(server), answering(server, "tiny:2")) == ("tiny:1", "tiny:2")
    assert [row["role"] for row in rows(server)] == ["current", "loaded", "loaded"]
    refused = change(server, "unload", version=1)
    assert refused.status_code == 409 and "loaded: tiny:2" in refused.text
    assert change(server, "unload", version=2).json()["unloaded"] == ["tiny:2"]


def test_a_shadow_is_compared_and_answers_nobody(server: Server) -> None:
    for version, disagreements in ((5, 0), (2, 60)):  # the labels of version 2 have other names
        change(server, "load", version=version, role="shadow")
        assert server.classify(input=TEXTS).json()["model"] == "tiny:1"
        texts = partial(server.metric, model="tiny:1", shadow=f"tiny:{version}")
        until(lambda texts=texts: texts("de3_shadow_texts_total") == 60, "the shadow")  # type: ignore[misc]
        assert texts("de3_shadow_disagreements_total") == disagreements
    # Answers that a deadline cuts short are not compared.
    hurried = server.classify(input=TEXTS, latency_budget_ms=0.001, best_effort=True).json()["data"]
    whole = sum(row["exit"]["reason"] != "deadline" for row in hurried)
    assert whole < len(TEXTS) - 1
    server.classify(input=TEXTS[0])
    until(lambda: texts("de3_shadow_disagreements_total") >= 60 + whole + 1, "the shadow")
    compared = [texts(f"de3_shadow_{name}_total") for name in ("texts", "disagreements")]
    assert compared == [60 + whole + 1] * 2


def test_metrics_of_old_versions_are_dropped(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.metrics.KEPT_MODELS", 1)
    sizes = []
    with admin_server(versions) as server:
        for version in (4, 5, 6):
            copy(versions, version)
            change(server, "load", version=version)
            server.classify(input=TEXTS[0])
            text = httpx.get(server.url + "/metrics").text
            sizes.append(len(text.splitlines()))
        assert len(set(sizes)) == 1 and "tiny:5" in text and "tiny:4" not in text
        assert server.metric("de3_model_info") == 1


def test_a_full_server_can_still_change_versions(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "MAX_LOADED", 3)
    for version in (4, 5):
        assert change(server, "load", version=version, role="loaded").status_code == 200
    refused = change(server, "load", version=2, role="loaded")
    assert refused.status_code == 409 and "3 models are loaded" in refused.text
    assert change(server, "load", version=2).status_code == 200
    assert change(server, "rollback").status_code == 200
    assert len(served(server)) == 3


def test_changes_are_off_without_an_admin_key(versions: Path) -> None:
    with serving(versions, models=["tiny:1"]) as server:
        for what in ("load", "unload", "rollback", "audit/reset", "learn"):
            refused = change(server, what)
            assert refused.status_code == (405 if what == "learn" else 404)
            assert f"{what} needs a server with --admin-keys-file" in refused.text


def test_a_change_needs_an_admin_key(versions: Path) -> None:
    with admin_server(versions, api_keys="alice a-key-for-classifying") as server:
        for headers in ({}, {"Authorization": "Bearer nobody-has-this-key"}, {"Authorization": KEY}):
            refused = change(server, "load", headers=headers, version=2)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        user = {"Authorization": "Bearer a-key-for-classifying"}
        for path in ("/v1/models/tiny/load", "/classify/"):  # the second only resembles an admin route
            forbidden = httpx.post(server.url + path, json={}, headers=user)
            assert forbidden.status_code == 403 and "admin's key" in forbidden.text
        for path in ("load%0A", "unload/", "%0A/load", "x/rollback%00"):
            strange = httpx.post(f"{server.url}/v1/models/tiny/{path}", json={})
            assert strange.status_code == 401, path
        assert httpx.get(server.url + "/v1/models", headers=HEADERS).status_code == 200  # an admin may read
        assert httpx.get(server.url + "/v1/models/tiny/load", headers=HEADERS).status_code == 405


def test_one_change_at_a_time(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is a change, too."""
    begun, go_on, load = threading.Event(), threading.Event(), manager.load
    monkeypatch.setattr(manager, "load", lambda *a: (begun.set(), go_on.wait(30), load(*a))[2])
    settings: dict[str, Any] = {"store": versions, "models": ["tiny:1"], "admin_keys": f"root {KEY}"}
    server = Server(Service(Settings(port=0, **settings)))
    server.start()
    try:
        for before in (None, "tiny:1"):
            with ThreadPoolExecutor(1) as pool:
                first = pool.submit(change, server, "load", version=2) if before else None
                assert begun.wait(20)
                refused = change(server, "load", version=2)
                assert refused.status_code == 409 and "another change" in refused.text
                assert before is None or answering(server) == before  # until the new version is ready
                go_on.set()
                assert first is None or first.result().status_code == 200
            until(lambda: httpx.get(server.url + "/ready").status_code == 200, "the start")
            begun.clear()
            go_on.clear()
        assert answering(server) == "tiny:2"
    finally:
        go_on.set()
        server.stop()


def test_reloads_under_load_fail_no_request(server: Server) -> None:
    """No answer mixes two versions: the labels would show it."""
    labels = {"tiny:1": {"negative", "positive"}, "tiny:2": {"no", "yes"}}
    stop, count = threading.Event(), Counter[str]()

    def ask(number: int) -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                answer = client.post(server.url + "/classify", json={"input": TEXTS[number : number + 8]})
                assert answer.status_code == 200, answer.text
                found = answer.json()
                assert {row["label"] for row in found["data"]} <= labels[found["model"]], answer.text
                count[found["model"]] += 1

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, number) for number in range(2)]
        try:
            for version in (2, 1, 2, 1):
                most = count[f"tiny:{version}"]
                assert change(server, "load", version=version).status_code == 200
                answers = partial(count.__getitem__, f"tiny:{version}")
                until(lambda: answers() > most or any(x.done() for x in asking), "an answer")  # noqa: B023
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert len(served(server)) == 1


def test_the_command_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DE3_ADMIN_KEY", raising=False)
    assert "DE3_ADMIN_KEY" in refusal(f"models load tiny --url {server.url}")
    monkeypatch.setenv("DE3_ADMIN_KEY", KEY)

    start = "its command line names tiny:1, so a restart with the same command line serves tiny:1"
    for arguments, says in (
        ("load tiny:2", "tiny:2 is current (onnxruntime)"),
        ("load tiny:1 --canary 0.5", "tiny:1 is canary (onnxruntime)"),
        ("unload tiny:1", "tiny:1 is unloaded"),
        ("rollback tiny", "tiny:1 is current again (onnxruntime)"),
    ):
        assert de3(f"models {arguments} --url {server.url}").strip() == f"{says}\n{start}"
    assert "layer_02.onnx: damaged" in refusal(f"models load tiny:9 --url {server.url}")
    assert "control characters" in refusal(["models", "load", "tiny:9", "--url", "http://a b"])


def fake(version: int, name: str = "a", source: str | None = None) -> Any:
    """A loaded model, as far as Models needs one."""
    names: Any = {"full_name": f"{name}:{version}"}
    manifest = SimpleNamespace(name=name, version=version, source=source, **names)
    return SimpleNamespace(model=SimpleNamespace(manifest=manifest, **names))


def test_the_last_versions_can_be_rolled_back_one_by_one() -> None:
    models = Models()
    versions = [fake(n) for n in range(1, MAX_HISTORY + 4)]
    for before, one in zip([None, *versions], versions, strict=False):
        assert models.add(one) == ([] if before is None else [before])
    for current in reversed(versions[3:]):
        assert models.routes["a"].before == list(range(3, current.model.manifest.version))
        models.add(versions[models.routes["a"].before[-1] - 1], back=True)
    assert (models.routes["a"].current, models.routes["a"].before, len(models.all)) == (3, [], 1)


def test_a_canary_and_a_shadow_lose_their_roles() -> None:
    models, (one, two, three, four) = Models(), (fake(n) for n in range(1, 5))
    models.add(one)
    models.add(two, "canary", 1.0)
    models.add(three, "shadow")
    assert (models.get("a"), models.get("a:1"), models.current("a")) == (two, one, one)
    assert [models.shadow_of(x) for x in (one, two, three)] == [three, None, None]
    assert [models.role_of(x.model.manifest) for x in models.all] == ["current", "canary", "shadow"]
    assert models.add(four, "canary", 0.0) == [two]
    assert models.get("a") is one
    assert models.remove("a", 4) == [four] and models.get("a") is one
    assert (models.routes["a"].canary, models.routes["a"].share) == (None, 0.0)
    assert models.remove("a", 3) == [three] and models.shadow_of(one) is None
    assert models.is_default("a") and models.get(None) is one
    models.add(other := fake(7, "b", "org/b@v1"))
    assert not models.is_default("a") and models.current("org/b") is models.current("org/b@v1") is other
    for name, version in (("org/b", None), ("b", 8), ("c", None)):
        with pytest.raises(RequestError):
            models.check_remove(name, version)
    assert models.remove("b", 7) == [other] and models.get(None) is one


def test_a_request_without_a_model_gets_the_default_or_the_only_one_that_fits() -> None:
    models, (a, b, c) = Models("a", {"x": "b", "y": "c:1"}), (fake(1, name) for name in "abc")
    for one in (a, b, c):
        models.add(one)

    def get(names: str) -> Any:
        return models.get(None, lambda manifest: manifest.name in names)

    assert [get(names) for names in ("abc", "ab", "b", "c", "")] == [a, a, b, c, a]
    with pytest.raises(RequestError, match="model: is required, as several are served: b, c;"):
        get("bc")
    assert [models.get(name) for name in ("x", "x:1", "y")] == [models.current("x"), b, c] == [b, b, c]
    with pytest.raises(RequestError, match="no model 'b:2' is served"):
        models.get("x:2")
    models.add(newer := fake(2, "b"))
    assert [models.aliases_of(one.model.manifest) for one in (a, b, newer, c)] == [[], [], ["x"], ["y"]]
    models.remove("b", None)
    assert [models.aliases_of(one.model.manifest) for one in (a, c)] == [[], ["y"]]


def test_the_default_is_the_settings_or_the_first_that_the_operator_named(store: Path) -> None:
    found = find(Store(store), [])
    assert default_of(Settings(default_model="tiny-int8"), found, False) == "tiny-int8"
    assert default_of(Settings(), found[::-1], True) == "tiny-int8"
    assert default_of(Settings(), found, False) is None  # not even the first in alphabetical order
    with pytest.raises(StoreError, match="--default-model: other is not served; available: tiny, tiny-int8"):
        default_of(Settings(default_model="other"), found, False)
    assert default_of(Settings(default_model="x", aliases=["x=tiny-int8:1"]), found, False) == "tiny-int8"
    wrong = {"x=other": "other is not served; ", "tiny=tiny-int8": "tiny is the name of a served"}
    for alias, says in wrong.items():
        with pytest.raises(StoreError, match=f"--alias {alias}: {says}"):
            default_of(Settings(aliases=[alias]), found, True)
    for alias in ("x", "=x", "x=y=z", "a b=c", "x:1=y"):
        with pytest.raises(ValueError, match=r"aliases\.0"):
            Settings(aliases=[alias])
