"""Models that are loaded, unloaded and rolled back while the server runs."""

import json
import random
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
from de3.server import manager
from de3.server.errors import RequestError
from de3.server.models import MAX_HISTORY, MAX_LOADED, Models, default_of, find
from de3.server.service import Service
from de3.server.settings import Settings
from tests.commands import de3, refusal
from tests.fixtures import make_rows
from tests.serving import Gate, Server, running, serving, until

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


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Set when a model begins to load, and to be set for the load to go on."""
    begun, go_on, load = threading.Event(), threading.Event(), manager.load
    monkeypatch.setattr(manager, "load", lambda *a: (begun.set(), go_on.wait(30), load(*a))[2])
    return begun, go_on


def change(server: Server, what: str, headers: dict[str, str] = HEADERS, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/models/tiny/{what}", json=body, headers=headers, timeout=60)


def answering(server: Server, model: str | None = None) -> str:
    body = {} if model is None else {"model": model}
    answer = server.classify(input="good", **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def rows(server: Server) -> list[dict[str, Any]]:
    return list(httpx.get(server.url + "/v1/models").json()["data"])


def served(server: Server) -> list[str]:
    return [model["id"] for model in rows(server)]


def test_a_new_version_takes_over_and_can_be_rolled_back(server: Server) -> None:
    loaded = change(server, "load", version=2).json()
    start = {"next_start": "tiny:1", "reason": "command line"}
    assert loaded == {"model": "tiny:2", "role": "current", "runtime": "onnxruntime", **start}
    assert server.classify(input="good").json()["data"][0]["label"] in ("no", "yes")
    assert (answering(server), served(server)) == ("tiny:2", ["tiny:2"])
    assert change(server, "rollback").json()["model"] == "tiny:1"
    assert (answering(server), served(server)) == ("tiny:1", ["tiny:1"])


def test_which_version_serves_is_a_decision_that_survives(
    versions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Publishing does not deploy once a person has chosen a version; the command line comes first."""
    copy(versions, 4)

    def next_start(answer: httpx.Response) -> tuple[str, str]:
        assert answer.status_code == 200, answer.text
        return answer.json()["next_start"], answer.json()["reason"]

    with admin_server(versions, models=[]) as server:
        assert answering(server) == "tiny:4"
        assert next_start(change(server, "load", version=1)) == ("tiny:1", "pinned")
        assert next_start(change(server, "load", version=2)) == ("tiny:2", "pinned")
        assert next_start(change(server, "rollback")) == ("tiny:1", "pinned")
        for role in ({"role": "canary", "share": 0.5}, {"role": "shadow"}, {"role": "loaded"}):
            assert next_start(change(server, "load", version=4, **role)) == ("tiny:1", "pinned")
            if role["role"] != "loaded":
                refused = change(server, "rollback")
                assert refused.status_code == 409 and f"tiny:4 is a {role['role']}" in refused.text
        assert {row["id"]: row["is_pinned"] for row in rows(server)} == {"tiny:1": True, "tiny:4": False}
    copy(versions, 5)  # published later
    with admin_server(versions, models=["tiny"]) as server:
        assert answering(server) == "tiny:1"
    with admin_server(versions, models=["tiny:4"]) as server:
        assert answering(server) == "tiny:4"
        assert next_start(change(server, "load", version=2, role="loaded")) == ("tiny:4", "command line")
        assert next_start(change(server, "unload", version=2)) == ("tiny:4", "command line")
    with running(Service(Settings(store=versions, port=0), [Store(versions).open("tiny")])) as server:
        assert answering(server) == "tiny:1"
    with admin_server(versions, models=[]) as server:
        (versions / "tiny/pinned").write_text("9")
        assert next_start(change(server, "load", version=4, role="loaded")) == ("tiny:5", "newest")
        assert next_start(change(server, "load")) == ("tiny:5", "newest")
        assert next_start(change(server, "unload", version=4)) == ("tiny:5", "newest")
        assert answering(server) == "tiny:5"
        assert not any(row["is_pinned"] for row in rows(server))
    (versions / "tiny/pinned").write_text("9")
    caplog.clear()
    with admin_server(versions, models=[]) as server:
        assert answering(server) == "tiny:5"
    assert len([line for line in caplog.messages if "tiny is pinned to version 9" in line]) == 1


def test_a_pin_that_cannot_be_saved_is_reported(versions: Path, tmp_path: Path) -> None:
    (versions / "tiny/pinned.new").mkdir()
    copy(versions, 4)
    with admin_server(versions, models=["tiny"]) as server:
        done = change(server, "load", version=2).json()
        assert done["next_start"] == "tiny:4" and "newest; the pin cannot be saved: " in done["reason"]
        assert answering(server) == "tiny:2"
    with admin_server(versions, models=["tiny"], state_dir=tmp_path / "state") as server:
        assert change(server, "load", version=2).json()["reason"] == "pinned"
    with admin_server(versions, models=["tiny"], state_dir=tmp_path / "state") as server:
        assert answering(server) == "tiny:2"


def test_a_change_is_made_although_the_newest_version_is_damaged(versions: Path) -> None:
    copy(versions, 4)
    with admin_server(versions, models=[]) as server:
        (versions / "tiny/4/manifest.json").write_text("{")
        done = change(server, "load", version=2, role="canary", share=0.5)
    assert (done.status_code, done.json()["role"], "next_start" in done.json()) == (200, "canary", False)


@pytest.mark.parametrize(
    ("what", "body", "status", "says"),
    [
        ("load", {}, 422, "layer_02.onnx: damaged"),  # without a version, the newest is loaded
        ("load", {"version": 99}, 404, "no version '99'"),
        ("load", {"role": "king"}, 422, "role: input should be"),
        ("load", {"share": 0.5}, 422, "share: required for a canary"),
        ("load", {"role": "canary"}, 422, "share: required for a canary"),
        ("load", {"role": "canary", "share": 1.5}, 422, "share: input should be less than 1"),
        ("load", {"role": "shadow", "version": 1}, 409, "role: tiny:1 is current"),
        ("load", {"vresion": 2}, 422, "vresion: extra inputs"),
        ("unload", {}, 409, "tiny is the only model"),
        ("unload", {"version": 2}, 404, "no model 'tiny:2'"),
        ("rollback", {}, 409, "no version was current before"),
    ],
    ids=range(11),
)
def test_a_change_that_is_refused_changes_nothing(
    server: Server, what: str, body: dict[str, Any], status: int, says: str
) -> None:
    rejected = partial(server.metric, "de3_rejected_total", cause="bad_artifact")
    before = rejected()
    refused = change(server, what, **body)
    assert (refused.status_code, says in refused.text) == (status, True), refused.text
    assert (answering(server), served(server)) == ("tiny:1", ["tiny:1"])
    assert rejected() == before + (says == "layer_02.onnx: damaged")
    assert rejected() == before or refused.json()["error"]["param"] == "name"


def test_a_version_gets_a_role_can_lose_it_and_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.5)
    change(server, "load", version=2, role="canary", share=0.75)
    change(server, "load", version=4, role="shadow")
    assert [(r["id"], r["role"], r.get("share"), r["runtime"], r["instructions"]) for r in rows(server)] == [
        ("tiny:1", "current", None, "onnxruntime", None),
        ("tiny:2", "canary", 0.75, "onnxruntime", None),
        ("tiny:4", "shadow", None, "onnxruntime", None),
    ]
    assert (answering(server), answering(server, "tiny:1")) == ("tiny:2", "tiny:1")
    assert httpx.get(server.url + "/v1/models/tiny/calibration").json()["model"] == "tiny:1"
    for version in (2, 4):
        assert change(server, "load", version=version, role="loaded").status_code == 200
    assert (answering(server), answering(server, "tiny:2")) == ("tiny:1", "tiny:2")
    assert [row["role"] for row in rows(server)] == ["current", "loaded", "loaded"]
    refused = change(server, "unload", version=1)
    assert refused.status_code == 409 and "loaded: tiny:2" in refused.text
    assert change(server, "unload", version=2).json()["unloaded"] == ["tiny:2"]
    assert server.classify(input="good", model="tiny:2").status_code == 404


def test_a_shadow_is_compared_and_answers_nobody(server: Server) -> None:
    for version, disagreements in ((5, 0), (2, 60)):  # the labels of version 2 have other names
        change(server, "load", version=version, role="shadow")
        answers = [server.classify(input=TEXTS[i : i + 12]).json() for i in range(0, 60, 12)]
        assert {a["model"] for a in answers} == {"tiny:1"}
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


def test_a_shadow_takes_nobodys_room(versions: Path) -> None:
    """A shadow's texts do not count as pending, so the autoscaler and the load controller do not see them."""
    with admin_server(versions, max_queue=8, max_texts=8) as server:
        change(server, "load", version=2, role="shadow")
        for _ in range(20):
            assert server.classify(input=["good"] * 8).status_code == 200
        until(lambda: server.metric("de3_shadow_texts_total") >= 8, "a shadow")
        assert server.service.engine.finished == 160


def test_metrics_of_old_versions_are_dropped(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.metrics.KEPT_MODELS", 2)
    sizes = []
    with admin_server(versions) as server:
        for version in range(4, 8):
            copy(versions, version)
            change(server, "load", version=version)
            server.classify(input=TEXTS[0])
            sizes.append(len(httpx.get(server.url + "/metrics").text.splitlines()))
        assert sizes[0] < sizes[1] == sizes[-1]  # those of the current version and of two others
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


def test_the_start_is_a_change_too(versions: Path, loading: tuple[threading.Event, threading.Event]) -> None:
    begun, go_on = loading
    running = Server(Service(Settings(store=versions, port=0, models=["tiny:1"], admin_keys=f"root {KEY}")))  # type: ignore[arg-type]
    running.start()
    try:
        assert begun.wait(20)
        refused = change(running, "load", version=2)
        assert refused.status_code == 409 and "another change" in refused.text
        go_on.set()
        until(lambda: httpx.get(running.url + "/ready").status_code == 200, "the start")
    finally:
        running.stop()


def test_a_request_keeps_the_model_it_began_with(versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with admin_server(versions) as server, ThreadPoolExecutor(1) as pool:
        found = pool.submit(server.classify, input="good")
        until(lambda: len(server.service.engine.queue) == 1, "the text to wait")
        assert change(server, "load", version=2).status_code == 200
        gate.open()
        assert found.result().json()["model"] == "tiny:1"
        assert answering(server) == "tiny:2"


def test_changes_are_off_without_an_admin_key(versions: Path) -> None:
    with serving(versions, models=["tiny:1"]) as server:
        for what in ("load", "unload", "rollback", "audit/reset", "learn"):
            refused = change(server, what)
            assert refused.status_code == (405 if what == "learn" else 404)
            assert f"{what} needs a server with --admin-keys-file" in refused.text
        paths = httpx.get(server.url + "/openapi.json").json()["paths"]
        assert not [path for path in paths if path.endswith("load")]


def test_a_change_needs_an_admin_key(versions: Path, caplog: pytest.LogCaptureFixture) -> None:
    users = "alice a-key-for-classifying"
    caplog.set_level("INFO")
    with admin_server(versions, api_keys=users) as server:
        for headers in ({}, {"Authorization": "Bearer nobody-has-this-key"}, {"Authorization": KEY}):
            refused = change(server, "load", headers=headers, version=2)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        user = {"Authorization": "Bearer a-key-for-classifying"}
        for path in ("/v1/models/tiny/load", "/classify/"):  # the second only resembles an admin route
            forbidden = httpx.post(server.url + path, json={}, headers=user)
            assert forbidden.status_code == 403 and "www-authenticate" not in forbidden.headers
            assert "admin's key" in forbidden.text
        for path in ("load%0A", "load%0a?x", "unload/", "rollback%0D", "%0A/load", "x/rollback%00"):
            strange = httpx.post(f"{server.url}/v1/models/tiny/{path}", json={})
            assert strange.status_code == 401, path
        unknown = httpx.post(f"{server.url}/v1/clasify", json={"input": "good"}, headers=HEADERS)
        assert unknown.status_code == 404 and "sends POST" not in caplog.text
        changed = change(server, "load", version=2)
        assert changed.status_code == 200
        (line,) = [line for line in caplog.messages if "sends POST" in line]
        assert line.startswith("admin root sends POST /v1/models/tiny/load {")
        assert line.endswith(f"request id {changed.headers['x-request-id']}")
        assert httpx.get(server.url + "/v1/models", headers=HEADERS).status_code == 200  # an admin may read
        assert httpx.get(server.url + "/v1/models/tiny/load", headers=HEADERS).status_code == 405


def test_one_change_at_a_time(server: Server, loading: tuple[threading.Event, threading.Event]) -> None:
    begun, go_on = loading
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(change, server, "load", version=2)
        assert begun.wait(20)
        refused = change(server, "load", version=2)
        assert refused.status_code == 409 and "another change" in refused.text
        assert answering(server) == "tiny:1"  # until the new version is ready
        go_on.set()
        assert (first.result().status_code, answering(server)) == (200, "tiny:2")


def test_reloads_under_load_fail_no_request(server: Server) -> None:
    """No answer mixes two versions: the labels would show it."""
    labels = {"tiny:1": {"negative", "positive"}, "tiny:2": {"no", "yes"}}
    stop, count = threading.Event(), Counter[str]()

    def load(number: int) -> None:
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                answer = client.post(server.url + "/classify", json={"input": TEXTS[number : number + 8]})
                assert answer.status_code == 200, answer.text
                found = answer.json()
                count[found["model"]] += 1
                assert {row["label"] for row in found["data"]} <= labels[found["model"]], answer.text

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, number) for number in range(2)]
        try:
            for version in (2, 1, 1, 2, 2, 1):
                answered = count[f"tiny:{version}"]
                done = change(server, "load", version=version)
                assert done.status_code == 200, done.text

                def goes_on(version: int = version, answered: int = answered) -> bool:
                    return count[f"tiny:{version}"] > answered or any(one.done() for one in loads)

                until(goes_on, "an answer of it")
        finally:
            stop.set()
        for one in loads:
            one.result()
    assert len(served(server)) == 1


def test_the_command_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DE3_ADMIN_KEY", raising=False)
    assert "DE3_ADMIN_KEY" in refusal(f"models load tiny --url {server.url}")
    monkeypatch.setenv("DE3_ADMIN_KEY", KEY)

    def models(arguments: str) -> str:
        return de3(f"models {arguments} --url {server.url}").strip()

    start = "\nits command line names tiny:1, so a restart with the same command line serves tiny:1"
    assert models("load tiny:2") == f"tiny:2 is current (onnxruntime){start}"
    assert answering(server) == "tiny:2"
    assert models("load tiny:1 --canary 0.5") == f"tiny:1 is canary (onnxruntime){start}"
    assert "tiny:1 is a canary" in refusal(f"models rollback tiny --url {server.url}")
    assert models("unload tiny:1") == f"tiny:1 is unloaded{start}"
    assert models("rollback tiny") == f"tiny:1 is current again (onnxruntime){start}"
    assert "layer_02.onnx: damaged" in refusal(f"models load tiny:9 --url {server.url}")
    assert "--url: Invalid port" in refusal("models load tiny:9 --url http://[::1")
    assert "control characters" in refusal(["models", "load", "tiny:9", "--url", "http://a b"])
    assert "--url: Invalid port" in refusal("classify good --url http://[::1]evil:80")


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


def test_a_canary_and_a_shadow_lose_their_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.4)
    models, (one, two, three, four) = Models(), (fake(n) for n in range(1, 5))
    models.add(one)
    models.add(two, "canary", 0.5)
    models.add(three, "shadow")
    assert (models.get("a"), models.get("a:1"), models.current("a")) == (two, one, one)
    assert [models.shadow_of(x) for x in (one, two, three)] == [three, None, None]
    assert [models.role_of(x.model.manifest) for x in models.all] == ["current", "canary", "shadow"]
    assert models.add(four, "canary", 0.4) == [two]  # the share of texts is below it, not up to it
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


def test_the_first_of_several_versions_answers(versions: Path) -> None:
    shutil.copytree(versions / "tiny" / "1", versions / "other" / "1")  # its manifest has another name
    (versions / "tiny" / "99").mkdir()
    names = ["tiny:2", "tiny:1"]
    with serving(versions, models=names) as server:
        assert [answering(server, model) for model in (None, "tiny", *names)] == [names[0]] * 2 + names


def test_too_many_models_at_start_are_refused(versions: Path) -> None:
    with pytest.raises(StoreError, match=f"at most {MAX_LOADED}"):
        find(Store(versions), ["tiny:1"] * (MAX_LOADED + 1))


def test_the_default_is_the_settings_or_the_first_that_the_operator_named(store: Path) -> None:
    found = find(Store(store), [])
    assert default_of(Settings(default_model="tiny-int8"), found, False) == "tiny-int8"
    assert default_of(Settings(), found[::-1], True) == "tiny-int8"
    assert default_of(Settings(), found, False) is None  # not even the first in alphabetical order
    with pytest.raises(StoreError, match="--default-model: other is not served; available: tiny, tiny-int8"):
        default_of(Settings(default_model="other"), found, False)
    assert default_of(Settings(default_model="x", aliases=["x=tiny-int8:1"]), found, False) == "tiny-int8"
    for alias, says in (
        ("x=other", "other is not served; "),
        ("tiny=tiny-int8", "tiny is the name of a served"),
    ):
        with pytest.raises(StoreError, match=f"--alias {alias}: {says}"):
            default_of(Settings(aliases=[alias]), found, True)
    for alias in ("x", "=x", "x=", "x=y=z", "a b=c", "x:1=y"):
        with pytest.raises(ValueError, match=r"aliases\.0"):
            Settings(aliases=[alias])
