"""Audits over HTTP: counts (compared with full depth), the guarantee, the saved state, the log and resets."""

import asyncio
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from errno import ENOSPC
from itertools import count
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock
from weakref import WeakSet, ref

import httpx
import numpy as np
import pytest

from de3.exits.criteria import Limits, criteria_of
from de3.exits.flags import Flag
from de3.exits.guarantee import Audited
from de3.exits.kinds import CLASSES, Spans
from de3.exits.reading import Reading, read
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.exits.spans import SpanRule
from de3.export import recalibrate, records
from de3.model_store.fitted import FittedTexts, Marks, client_hash, pieces_of
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Artifact, Store
from de3.runtime.choice import InForce, Standing
from de3.runtime.engine import audit as audit_engine
from de3.runtime.engine.audit import OVERDUE_SHARE, Audit, AuditThreads, run_audits
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.request import Entry, Sender
from de3.runtime.errors import RequestError
from de3.runtime.rules import Rules
from de3.server.audit import auditor, ledgers
from de3.server.audit.auditor import LEARN_TEXTS, MAX_HELD, ROOM, Auditor, Traffic
from de3.server.audit.audits import Audits
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.ledger import MIN_AUDITS, Ledger
from de3.server.audit.report import Live, report
from de3.server.audit.state import StateDir, TenantState, restore, state_of
from de3.server.audit.tenant import MAX_RESETS, Bounded, Settled, Tenant
from de3.server.learn.record import Record
from de3.server.service import Service
from de3.server.settings import Settings
from tests import jobs
from tests.commands import de3, refusal
from tests.fixtures import make_rows
from tests.serving import Gate, Server, serving, until

TEXTS = [text for text, _ in make_rows(200, 41)]
SEEDS = count(1000)
TAU = 0.6  # some answers of the tiny models differ from full depth at this τ
ADMIN_KEYS = "boss an-admins-key-0123456789abcdef"
ADMIN = {"Authorization": "Bearer an-admins-key-0123456789abcdef"}


def new_texts() -> list[str]:
    """200 texts, most of them new: repeats are no evidence for a guarantee."""
    return [text for text, _ in make_rows(200, next(SEEDS))]


def audit(server: Server, model: str = "tiny-int8") -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/models/{model}/audit")
    assert response.status_code == 200, response.text
    return dict(response.json())


def settled(server: Server, texts: int) -> dict[str, Any]:
    """The audit report, once at least this many texts have been counted."""
    until(lambda: audit(server)["texts"] >= texts, f"{texts} texts to be counted")
    return audit(server)


def raise_tau(server: Server) -> None:
    """Send new texts until audits have raised τ, which never happens within a request."""
    for _ in range(20):
        answer = server.classify(input=new_texts(), explain=True).json()
        assert answer["tau_choice"]["tau"] == 0
        if audit(server)["tau"]["tau"] > 0:
            return
    raise AssertionError("τ stays at 0")


def answers(server: Server, **options: Any) -> list[dict[str, Any]]:
    """The answers to TEXTS."""
    return list(server.classify(input=TEXTS, **options).json()["data"])


def test_audits_count_the_disagreement_with_full_depth(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At values of τ other than the one in force, the counts are compared with the answers to requests that set τ.

    A request that is not answered leaves nothing behind.
    """
    gate = Gate(monkeypatch)
    with serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU) as server:
        with monkeypatch.context() as patch:
            server.change(patch, timeout_s=0.2)
            assert server.classify(input=TEXTS).status_code == 504
        gate.open()
        early, full = answers(server), [row["label"] for row in answers(server, tau=0)]
        assert early == answers(server, tau=TAU)  # an answer does not depend on being audited
        said = settled(server, len(TEXTS))
        differing = sum(a["label"] != b for a, b in zip(early, full, strict=True))
        assert differing > 0
        assert (said["texts"], said["audits"], said["pending"]) == (200, 200, 0)
        assert said["tau"] == {"tau": TAU, "reason": "default"}
        assert said["guarantee"] is None
        measured = said["measured"]
        assert measured["disagreement"] == measured["as_served"] == pytest.approx(differing / 200)
        assert measured["lower"] <= measured["disagreement"] <= measured["upper"]
        for row in said["taus"][::90]:
            found = answers(server, tau=row["tau"])
            unlike = sum(a["label"] != b for a, b in zip(found, full, strict=True))
            assert row["disagreement"] == pytest.approx(unlike / 200)
            layers = sum(a["exit"]["layer"] for a in found)
            assert row["mean_exit_layer"] == pytest.approx(layers / 200)
        assert audit(server)["texts"] == 200  # requests with their own exit options do not count
        name = "tiny-int8:1"
        assert server.metric("de3_audit_texts_total", model=name) == 200
        assert server.metric("de3_audit_disagreements_total", model=name) == differing
        assert server.metric("de3_audit_seconds_total", model=name) > 0
        # Audits do not count as traffic.
        assert server.metric("de3_exit_layer_count", model=name) == 200 * (3 + len(said["taus"][::90]))
        # Nor do texts count with windows or a limit of layers.
        response = server.classify(input=["not good but bad " * 40, "good"], long="windows")
        assert response.json()["data"][0]["windows"]["of"] > 1
        server.classify(input="good", tau=0, max_layer=1)
        said = settled(server, 201)
        assert (said["texts"], said["excluded"]) == (201, {"deadline": 0, "max_layer": 1, "windows": 1})


def test_a_guarantee_is_proved_by_audits_and_outlives_a_restart_and_a_reload_until_an_admin_resets_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "SAVE_S", 0.02)
    file, failed = tmp_path / "state/tiny-int8-1.json", list[int]()
    options: dict[str, Any] = {"models": ["tiny-int8"], "guarantee": 0.2, "state_dir": tmp_path / "state"}

    def full(number: int) -> None:
        failed.append(number)
        raise OSError(ENOSPC, "No space left on device")

    with serving(store, **options) as server:
        assert server.service.settings.share_of_audits == 0.05
        first = server.classify(input=TEXTS[0], explain=True).json()
        assert first["data"][0]["exit"]["reason"] == "last_layer"
        guarantee = {"max_disagreement": 0.2, "confidence": 0.95, "reason": "start"}
        assert first["tau_choice"]["set_by"] == "guarantee"
        assert first["tau_choice"]["guarantee"] == guarantee
        server.classify(input=["not bad"] * 256)
        said = audit(server)
        assert said["texts"] == 257 and said["tau"]["tau"] == 0  # copies do not raise τ
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            raise_tau(server)
            until(lambda: len(failed) > 2, "the state to be saved again and again")
        assert caplog.text.count("No space left on device") == 1
        after = server.classify(input=TEXTS, explain=True).json()
        assert after["tau_choice"]["guarantee"] == guarantee | {"reason": "evidence"}
        assert any(row["exit"]["reason"] == "threshold" for row in after["data"])
        assert server.metric("de3_audit_guarantee", model="tiny-int8:1") == 0.2
        # A request's own options take precedence, and have no guarantee.
        for own in ({"signal": "edr", "lambda": 0.5}, {"latency_budget_ms": 30_000}, {"tau": 0.5}):
            answer = server.classify(input="good", explain=True, **own).json()
            assert "guarantee" not in answer["tau_choice"]
        assert answer["data"][0]["exit"]["tau"] == 0.5
        until(lambda: audit(server)["pending"] == 0, "the audits")
        before = audit(server)

        def saved() -> int:
            return sum(row["texts"] for row in json.loads(file.read_text())["counts"])

        # A server that is killed loses only the audits since the last save.
        until(lambda: file.exists() and saved() == before["texts"], "the state to be saved")
    assert file.stat().st_mode & 0o777 == 0o600  # only the server's user can read it
    with serving(store, **options, admin_keys=ADMIN_KEYS) as server:
        tau, models = before["tau"], f"{server.url}/v1/models"
        assert audit(server) == before
        assert server.metric("de3_tau", model="tiny-int8:1") == tau["tau"] > 0
        response = httpx.post(f"{models}/tiny-int8/load", headers=ADMIN, timeout=60)
        assert response.status_code == 200, response.text
        assert audit(server)["tau"] == tau
        assert server.classify(input="good", explain=True).json()["tau_choice"]["tau"] == tau["tau"]
        assert httpx.post(f"{models}/tiny-int8/audit/reset").status_code == 401
        assert httpx.post(f"{models}/other/audit/reset", headers=ADMIN).status_code == 404
        response = httpx.post(f"{models}/tiny-int8/audit/reset", headers=ADMIN)
        assert response.json() == {"model": "tiny-int8:1", "tau": {"tau": 0.0, "reason": "reset"}}
        said = audit(server)
        assert (said["audits"], said["texts"], said["resets"][0]["reason"]) == (0, 0, "reset")
        assert server.metric("de3_audit_resets_total", reason="reset") == 1


def test_each_keys_name_has_its_own_guarantee(store: Path) -> None:
    """A name's new key continues with the name's τ; a user sees only the row of its own name."""
    keys = {name: f"key-of-the-{name}-01234" for name in ("victim", "loud", "boss")}
    users = ";".join(f"{name} {keys[name]}" for name in ("victim", "loud"))
    on: dict[str, Any] = {"guarantee": 0.2, "api_keys": users, "admin_keys": f"boss {keys['boss']}"}
    with serving(store, models=["tiny-int8"], **on) as server:

        def head(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {keys[name]}"}

        def tau(name: str) -> float:
            body = {"input": "good", "explain": True}
            answer = httpx.post(f"{server.url}/classify", json=body, headers=head(name)).json()
            return float(answer["tau_choice"]["tau"])

        def seen(name: str) -> dict[str, Any]:
            return dict(httpx.get(f"{server.url}/v1/models/tiny-int8/audit", headers=head(name)).json())

        def send(texts: list[str]) -> None:
            httpx.post(f"{server.url}/classify", json={"input": texts}, headers=head("loud"), timeout=60)

        while tau("loud") == 0:
            send(new_texts())
        assert tau("victim") == 0
        lowest, highest = (server.metric(f"de3_audit_tau_{end}") for end in ("lowest", "highest"))
        assert lowest == 0 < highest == tau("loud")
        assert [row["tenant"] for row in seen("loud")["tenants"]] == ["loud"]
        assert seen("victim")["texts"] == 1 and seen("victim")["tau"]["tau"] == 0
        said = seen("boss")
        assert said["tenant"] == "loud" and said["texts"] >= 200
        rows = {row["tenant"]: row for row in said["tenants"]}
        assert list(rows) == ["loud", "victim"] and rows["victim"]["texts"] == 1
        assert (rows["loud"]["tau"], rows["loud"]["reason"]) == (tau("loud"), "evidence")
        reset = httpx.post(f"{server.url}/v1/models/tiny-int8/audit/reset", headers=head("boss"))
        assert reset.status_code == 200 and tau("loud") == 0 == tau("victim")


def test_load_never_raises_the_tau_of_a_guarantee(store: Path) -> None:
    manifest = Store(store).open("tiny").manifest
    for chosen, steps in (({"guarantee": 0.2}, False), ({"audit_share": 0.1}, True)):
        rules = Rules(manifest, Settings(slo_p99_ms=50, min_accuracy=0, **chosen))
        assert bool(rules.steps) == steps
        for level in (1, 9):
            assert (rules.in_force(level) is rules.default) == (not steps)


def test_a_state_folder_is_for_one_server_which_can_write_it(store: Path, tmp_path: Path) -> None:
    first = StateDir(tmp_path)
    with pytest.raises(ValueError, match="another server uses"):
        StateDir(tmp_path)
    first.close()
    StateDir(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"state_dir: .* cannot be written"):
        Service(Settings(store=store, audit_share=0.1, state_dir=tmp_path / "file/state"))


@pytest.mark.usefixtures("few_taus")
def test_a_model_is_freed_when_unloaded_and_calibrated_on_records_of_its_audits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps the records, also of texts that exited early; the model's own exits run on them."""
    on: dict[str, Any] = {"audit_share": 1.0, "tau": TAU, "state_dir": tmp_path, "admin_keys": ADMIN_KEYS}
    with serving(store, models=["tiny-int8", "tiny"], **on) as server:
        assert httpx.get(f"{server.url}/v1/models/tiny-int8/learn").status_code == 409  # it fits no exits
        learner = server.service.shared.audit_store.learners.of("tiny-int8")  # type: ignore[attr-defined]
        until(lambda: learner.is_restored, "the learner to be ready")
        server.classify(input=TEXTS, model="tiny-int8")
        settled(server, len(TEXTS))
        freed = ref(server.service.models.get("tiny-int8").model)
        response = httpx.post(f"{server.url}/v1/models/tiny-int8/unload", headers=ADMIN)
        assert response.status_code == 200, response.text
        until(lambda: gc.collect() is not None and freed() is None, "the model's memory")
    (file,) = (tmp_path / "learned").glob("tiny-int8-*.records")
    assert file.stat().st_mode & 0o777 == 0o600  # only the server's user can read them
    artifact = Store(store).open("tiny-int8")
    found = records.opened([file], artifact.manifest)
    rows = records.exits_of(artifact).recorded(records.texts_of(found, artifact.manifest))
    model = Model(artifact)
    assert found.numbers.tolist() == list(range(1, len(TEXTS) + 1))
    for text, logits, distances in zip(TEXTS, rows.logits, rows.distances, strict=True):
        for step, ours, far in zip(model.full_depth(model.tokenize(text)), logits, distances, strict=True):
            np.testing.assert_allclose(ours, step.logits, atol=0.02)  # states are in float16
            if step.distances is not None:  # for which the server also rounds the states to int8
                np.testing.assert_allclose(far, step.distances, atol=0.02)
    own = shutil.copytree(store, tmp_path / "store")
    command = f"calibrate tiny-int8 --store {own} --max-loss 5 --records {file}"
    assert "independent texts: too few to calibrate on" in refusal(command)
    monkeypatch.setattr(recalibrate, "MIN_TEXTS", 50)
    de3(command)
    calibration = Store(own).open("tiny-int8:2").manifest.calibration
    assert calibration is not None and calibration.self_labelled
    assert calibration.tune_size == len(found) // 2
    # Texts that are near to those of the earlier half certify only if an exit differs.
    rows = np.tile(np.arange(len(found)), 2)
    twice = replace(
        found.part(rows), numbers=np.arange(len(rows)), keys=np.arange(len(rows)).astype(np.uint64)
    )
    twice.write(file)
    de3(command)
    calibration = Store(own).open("tiny-int8:3").manifest.calibration
    assert calibration is not None and calibration.tune_size == len(found)
    assert 0 < calibration.certify_size - len(found) < len(found) / 2  # so few texts certify with both halves
    assert "give one of --texts, --records" in refusal(f"{command} --tune {file}")
    assert "another model" in refusal(f"calibrate tiny --store {own} --records {file}")


def test_a_server_without_audits_says_how_to_enable_them(store: Path) -> None:
    off = Audits(Settings(), unused, lambda: 0, coordinator_of(), unused)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--audit-share or --guarantee"):
        off.of(made(store))
    with pytest.raises(RequestError, match="--learn"):
        asyncio.run(off.learning(made(store)))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guarantee: .* tau", {"guarantee": 0.02, "tau": 0.1}),
        ("guarantee: .* max_disagreement", {"guarantee": 0.02, "max_disagreement": 0.1}),
        ("guarantee: ", {"guarantee": 0.02, "audit_share": 0}),
        ("guarantee", {"guarantee": 0}),
        ("learn: .* guarantee", {"learn": True}),
    ],
)
def test_settings_that_do_not_go_together(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=field):
        Settings(**values)


def test_audits_wait_for_requests_unless_they_are_overdue(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overdue ones run at normal priority; a group of them yields what each yields alone."""
    model = Model(Store(store).open("tiny-int8"))
    if (forward := model.encoder.forward) is None:
        pytest.skip("no kernels")
    done, at_idle = list[Audit](), list[bool]()

    def note(*arguments: Any, **named: Any) -> None:
        at_idle.append(named["at_idle"])
        forward(*arguments, **named)

    timing = SimpleNamespace(full_depth_s=lambda _: 1e-4, layer_s=lambda _: 1e-4)
    served: Any = SimpleNamespace(model=model, timing=timing, group_s=lambda _: 1e-4)
    model.encoder = replace(model.encoder, forward=note)
    rule = ExitRule(TAU, model.manifest.default_signal)
    audits = [Audit(served, rule, model.tokenize(text), print) for text in TEXTS[:12]]
    for name in ("MOST_WAIT_S", "OVERDUE_S"):
        monkeypatch.setattr(audit_engine, name, 600)
    queue = WorkQueue(10)
    queue.put(jobs.job(["text"], [1.0]))
    threads = AuditThreads(2, queue, done.extend)
    threads.put(audits[:1])
    until(lambda: not threads._pending, "the thread that waits for an empty queue to take the first one")
    monkeypatch.setattr(audit_engine, "OVERDUE_S", 0)
    threads.put(audits[1:])
    until(lambda: len(done) == len(audits) - 1, "the overdue audits")
    assert audits[0] not in done and not any(at_idle)
    queue.next()
    until(lambda: audits[0] in done, "the first audit")
    assert at_idle[-1]
    threads.close()
    for one in audits:
        exits = [step.logits.tolist() for step in model.full_depth(one.tokens) if step.logits is not None]
        assert [reading.logits for reading in one.passed] == exits
    # Audits run slowly if requests are always pending.
    monkeypatch.setattr(audit_engine, "MOST_WAIT_S", 0.001)
    queue.put(jobs.job(["text"], [1.0]))
    again = [replace(one, passed=[]) for one in audits]
    run_audits(again, queue)
    assert [len(one.passed) for one in again] == [len(one.passed) for one in audits]
    run_audits(again, queue, lambda: True)
    assert all(one.is_dropped for one in again)


@pytest.mark.parametrize("threads", [4, 100])
def test_overdue_audits_take_a_share_of_engine_time(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    now, paused = 0.0, 0.0

    def pause(seconds: float) -> None:
        nonlocal paused
        paused += seconds

    running = AuditThreads(threads, WorkQueue(10), lambda _: None)
    monkeypatch.setattr(audit_engine, "thread_time", lambda: now)
    monkeypatch.setattr(running._closed, "wait", pause)
    for step_s in (0.0, 0.001, 0.2, 0.01):
        now += step_s
        running._pause()
    assert now / (now + paused) == pytest.approx(min(1.0, OVERDUE_SHARE * threads))


def test_tenants_with_pending_audits_have_equal_shares_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of their audits, the length of the texts, and the time at which a tenant begins."""
    timing = SimpleNamespace(full_depth_s=lambda tokens: 1.0 + tokens)
    served: Any = SimpleNamespace(group_s=lambda _: 0.0, model=jobs.NO_MODEL, timing=timing)
    order, done, begun, may_go_on = list[str](), list[Audit](), Event(), Event()

    def run(audits: Sequence[Audit], *_: object) -> None:
        order.extend(one.tenant for one in audits)
        if len(order) in (1, 6, 14):
            begun.set()
            may_go_on.wait(60)
            may_go_on.clear()

    def put(tenant: str, texts: int, tokens: int = 0) -> None:
        rule, ids = cast(Any, None), np.zeros((1, tokens), np.int64)
        threads.put(
            [Audit(served, rule, Tokens(ids, ids, False), print, tenant=tenant) for _ in range(texts)]
        )

    def go_on() -> None:
        begun.clear()
        may_go_on.set()
        assert begun.wait(60)

    monkeypatch.setattr(audit_engine, "run_audits", run)
    monkeypatch.setattr(audit_engine, "OVERDUE_S", 600)
    threads = AuditThreads(1, WorkQueue(10), done.extend)
    put("first", 1)
    assert begun.wait(60)
    put("long", 4, 2)  # 3 s each
    put("short", 9)  # 1 s
    go_on()
    put("new", 4)
    go_on()
    assert order[1:6] == ["long", "short", "short", "short", "long"]
    assert order[6:] == ["short", "new"] * 3 + ["long", "short"]
    threads.drop([served])
    assert [one.is_dropped for one in done] == [False] * 13 + [True] * 4
    may_go_on.set()
    threads.close()


def made(store: Path, version: int = 1, guarantee: float | None = None, **changes: Any) -> Any:
    """A stand-in for a served model: its manifest, and the attributes that an auditor reads.

    guarantee: None: none, and a τ instead.
    """
    manifest = Store(store).open("tiny").manifest.model_copy(update={"version": version, **changes})
    model = SimpleNamespace(manifest=manifest, full_name=f"tiny:{version}", runtime="onnxruntime", path=store)
    model.fitted, model.empty_states = None, lambda: STATES
    model.marks = lambda tokens: Marks(pieces_of(tokens), np.zeros(1, np.float16), np.zeros((), np.float32))
    rules = Rules(manifest, Settings(tau=TAU) if guarantee is None else Settings(guarantee=guarantee))
    monitor = SimpleNamespace(tau_factor=1.0, is_far=lambda _: False)
    return SimpleNamespace(model=model, rules=rules, monitor=monitor)


async def unused(*_: Any) -> Any:
    raise AssertionError


def coordinator_of(**settings: Any) -> Coordinator:
    """The ledgers of audits that never run."""
    return Coordinator(Settings(audit_share=1.0, **settings), unused, lambda *_: None, unused, unused)


def served_ledger(coordinator: Coordinator, served: Any) -> Ledger:
    model = served.model
    coordinator.serve(
        Artifact(model.path, model.manifest), served.rules, model.runtime, served.monitor.tau_factor
    )
    ledger = coordinator.ledgers.get(served.model.full_name)
    assert ledger is not None
    return ledger


# Scores and disagreement at the exits of the model that `made` stands for.
ALIKE = Audited([0.0, None, None, None], [[False] * 4])
UNLIKE = Audited([0.0, None, None, None], [[True, False, False, False]])


def settled_in(ledger: Ledger, share: float = 1.0, tenant: str = "", may_rise: bool = True) -> Settled:
    """Texts that are drawn in the present epoch; none at first."""
    return Settled(tenant, ledger.tenant(tenant).epoch, share, may_rise=may_rise)


def agree(ledger: Ledger, share: float = 1.0, served_differs: bool = False) -> None:
    """Count an audited text that agrees with full depth at every τ.

    share: probability with which it was drawn. served_differs: True if the answer that was sent differs nevertheless.
    """
    one = settled_in(ledger, share)
    one.add(None, ALIKE, served_differs)
    ledger.count([one])


def count_all(ledger: Ledger, keys: Iterable[int | None], kind: Audited = ALIKE, **of: Any) -> None:
    """Count together audited texts with these keys. of: as for `settled_in`."""
    one = settled_in(ledger, **of)
    for key in keys:
        one.add(key, kind, False)
    ledger.count([one])


def guaranteed(store: Path, rate: float, **settings: Any) -> Ledger:
    """The ledger of a model with a guarantee."""
    return served_ledger(coordinator_of(guarantee=rate, **settings), made(store, guarantee=rate))


def test_evidence_of_unloaded_models_is_saved_and_limited_in_memory_and_counts_for_the_same_model_only(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MAX_KEPT", 2)
    found, versions = [], [made(store, version) for version in (1, 2, 3)]
    for folder in (None, tmp_path):
        coordinator = coordinator_of(state_dir=folder)
        for served in versions:
            agree(served_ledger(coordinator, served))
            coordinator.forget(served.model.manifest)
        found.append([served_ledger(coordinator, served).audits for served in versions])
    assert found == [[0, 1, 1], [1, 1, 1]]
    other, on_other_runtime = made(store, 2, max_tokens=63), made(store, 3)
    on_other_runtime.model.runtime = "native"
    for served in (other, on_other_runtime):
        coordinator.forget(served.model.manifest)
        assert served_ledger(coordinator, served).audits == 0


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0"},
        {"signal": "entropy"},
        {"runtime": "native"},
        {"taus": [0.0, 0.5]},
        {"tenant": "../other"},
        {"since": 1e300},
        {"differing": 6},  # of 5 texts
        {"layers": 2**53},
        None,  # not a file
    ],
)
def test_a_state_that_does_not_fit_is_set_aside(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    file = tmp_path / "tiny-1.json"
    coordinator = coordinator_of(state_dir=tmp_path)
    for _ in range(5):
        agree(served_ledger(coordinator, made(store)))
    coordinator.stop()
    state = json.loads(file.read_text())
    if change is None:
        file.unlink()
        os.mkfifo(file)
        os.mkfifo(tmp_path / "tiny-1.json.new")
    else:
        for name in change.keys() & state["counts"][0].keys():
            state["counts"][0][name][3] = change.pop(name)
        file.write_text(json.dumps(state | change))
    coordinator = coordinator_of(state_dir=tmp_path)
    ledger = served_ledger(coordinator, made(store))
    assert ledger.audits == 0 and "cannot be used" in caplog.text
    assert (tmp_path / "tiny-1.json.old").exists()
    agree(ledger)
    coordinator.stop()
    assert json.loads(file.read_text())["counts"][0]["audits"] == 1


def test_the_report_separates_answers_as_served_from_those_of_the_tau_in_force(store: Path) -> None:
    ledger = served_ledger(coordinator_of(), made(store))
    for differs in (True, True, False, False):
        agree(ledger, 1.0, differs)
    measured = report(ledger, Live(1.0, 0, {}), ledger.rules.default)["measured"]
    assert (measured["disagreement"], measured["as_served"]) == (0, 0.5)


def test_only_the_last_resets_are_remembered_but_all_are_counted(store: Path) -> None:
    ledger = served_ledger(coordinator_of(), made(store))
    for number in range(MAX_RESETS + 3):
        for _ in range(number):
            agree(ledger)
        ledger.reset()
    assert [r.audits for r in ledger.tenants[""].resets] == list(range(3, MAX_RESETS + 3))
    assert ledger.num_resets["reset"] == MAX_RESETS + 3
    restore(ledger, state_of(ledger, ""))


def test_a_state_of_an_earlier_release_has_the_rate_of_missed_spans_in_fields_of_its_own(store: Path) -> None:
    ledger = guaranteed(store, 0.1)
    count_all(ledger, range(50))
    state = state_of(ledger, "")
    old = state.model_dump(exclude={"criteria"}) | {
        "missed_counts": [row.model_dump() for row in state.counts],
        "missed_guarantee": state.guarantee and state.guarantee.model_dump(),
    }
    found = TenantState.model_validate(old)
    assert found.criteria["missed"].model_dump() == found.by_criterion()[0].model_dump()
    assert found.by_criterion()[0].guarantee == state.guarantee is not None


def test_a_change_falls_back_to_full_depth_and_discards_the_texts_that_were_drawn_before_it(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the tenant whose rate has risen is affected."""
    ledger = guaranteed(store, 0.1)
    for name in ("one", "two"):
        count_all(ledger, range(100), tenant=name)
    proved, epoch = ledger.rules.of_tenant("one").rule.tau, ledger.tenants["one"].epoch
    late, unlike = settled_in(ledger, tenant="one"), settled_in(ledger, tenant="one")
    for key in range(100, 200):
        late.add(key, UNLIKE, True)
        unlike.add(key, UNLIKE, True)
    ledger.count([unlike, late])
    assert "more often than guaranteed" in caplog.text
    one, two = (report(ledger, Live(1.0, 0, {}), ledger.rules.default, name) for name in ("one", "two"))
    assert one["tau"] == {"tau": 0.0, "reason": "change"}
    (reset,) = one["resets"]
    assert (reset["reason"], reset["tau"], reset["audits"]) == ("change", proved, 200)
    assert ledger.tenants["one"].evidence.texts == 0 and ledger.tenants["one"].epoch != epoch
    assert (two["tau"]["tau"], two["resets"], two["audits"]) == (proved, [], 100)
    assert ledger.rules.of_tenant("two").rule.tau == proved > 0 == ledger.rules.of_tenant("one").rule.tau
    assert ledger.changes() == {"one": 1}


@pytest.mark.parametrize(
    ("rate", "texts", "others", "is_void"),
    [(0.1, 100, 200, True), (0.1, 100, 201, False), (0.3, MIN_AUDITS // 2, 0, True), (0.3, 30, 0, False)],
)
def test_a_change_voids_what_was_learned_only_if_its_tenant_sent_half_of_the_recent_texts(
    store: Path, rate: float, texts: int, others: int, is_void: bool
) -> None:
    """And of enough texts. others: texts of another tenant."""
    ledger = guaranteed(store, rate)
    count_all(ledger, range(texts), tenant="one")
    other = settled_in(ledger, tenant="two")
    other.skipped = others
    ledger.count([other])
    count_all(ledger, range(texts, 2 * texts), UNLIKE, tenant="one")
    assert (ledger.num_resets["change"], ledger.standing.num_changes) == (1, int(is_void))


@pytest.mark.parametrize(
    ("differs", "missed", "indices"),
    [
        (True, [False, False], (1, 2, 1)),  # at τ = 0.2 the answers have a span too many
        (False, None, (2, 0, 0)),  # no text has a span that could be missed
    ],
)
def test_tau_is_the_lower_one_that_the_two_guarantees_of_a_token_classifier_allow(
    differs: bool, missed: list[bool] | None, indices: tuple[int, int, int]
) -> None:
    taus = np.array([0.0, 0.1, 0.2])
    bounds = criteria_of(Spans(SpanRule(("O", "X"))), Limits(0.1))
    criteria = [Bounded(each, taus, 0.05) for each in bounds]
    rates = [each.guarantee for each in criteria if each.guarantee is not None]
    tenant, one = Tenant(taus, criteria, 0), Settled("", 0, 1.0, may_rise=True)
    for key in range(400):
        one.add(key, Audited([0.15, None], [[differs, False], missed]), False)
    tenant.count(one, [1, 2], 1000)
    assert (*(one.index for one in rates), tenant.index) == indices
    tenant.reset(1)
    assert (*(one.index for one in rates), tenant.index) == (0, 0, 0)


def test_a_text_that_was_counted_is_no_evidence_about_flagged_texts_either() -> None:
    """Whatever is counted beside it: the second criterion is only about the flagged texts."""
    taus, flag = np.array([0.0, 0.1, 0.2]), Flag((0,), (0.5,))
    for first, index in ((range(1000, 1400), 2), (range(400, 800), 0)):
        criteria = [Bounded(each, taus, 0.05) for each in criteria_of(CLASSES, Limits(None, 0.1, flag))]
        tenant = Tenant(taus, criteria, 0)
        safe, texts = [Audited([0.05, None], [[False, False], of]) for of in (None, [False, False])]
        for keys, audited in ((first, [safe] * 400), (range(800), [safe] * 400 + [texts] * 400)):
            one = Settled("", 0, 1.0, may_rise=True)
            for key, text in zip(keys, audited, strict=True):
                one.add(key, text, False)
            tenant.count(one, [1, 2], 10_000)
        assert tenant.index == index


def test_tau_rises_after_audits_of_earlier_batches_and_what_was_sent_counts_for_all_texts_alone() -> None:
    taus, flag = np.array([0.0, 0.1, 0.2]), Flag((0,), (0.5,))
    criteria = [Bounded(each, taus, 0.05) for each in criteria_of(CLASSES, Limits(0.1, None, flag))]
    tenant, one = Tenant(taus, criteria, 0), Settled("", 0, 1.0)
    for key in range(400):
        one.add(key, Audited([0.05, None], [[False, False], [False, False]]), key == 0)
    tenant.count(one, [1, 2], 1000)
    assert tenant.index == 0  # the request goes on
    tenant.count(Settled("", 0, 1.0, skipped=1, may_rise=True), [1, 2], 1000)
    assert tenant.index == 2
    served = [sum(tally.served for tally in each.evidence.tallies.values()) for each in criteria]
    assert served == [1, 0]


def test_a_text_in_windows_is_no_evidence_if_one_of_them_is_near_to_a_fitted_text() -> None:
    class Texts(list[int]):
        whole = 0

    def key_of(*parts: int) -> int | None:
        """The key of a text in windows, of which the windows 7 are near."""
        one: Any = SimpleNamespace(_has_guarantee=True, served=SimpleNamespace(model=SimpleNamespace()))
        model = one.served.model
        model.fitted, model.marks = SimpleNamespace(is_near=lambda window, _: window == 7), int
        with mock.patch.object(auditor, "_key", lambda _: 1):
            return Auditor._evidence_key(one, Texts(parts), "")  # type: ignore[arg-type]

    assert (key_of(1, 2, 3), key_of(1, 7, 3), key_of(7, 7), key_of(7, 1), key_of(1, 7)) == (1, *[None] * 4)


def test_an_admins_reset_is_that_of_all_versions_of_the_model(store: Path, tmp_path: Path) -> None:
    """Otherwise a rollback would return to a τ that was proved by texts from before the reset."""
    coordinator = coordinator_of(guarantee=0.1, state_dir=tmp_path)
    for version in (1, 2, 3):
        ledger = served_ledger(coordinator, made(store, version, 0.1))
        count_all(ledger, range(400))
        assert ledger.tenants[""].index > 0
    coordinator.forget(made(store, 1).model.manifest)
    (tmp_path / "tiny-9@a.json").write_text("of a version that was served before")
    (tmp_path / "tiny-x-9.json").write_text("of another model")
    coordinator.ledgers.reset("tiny")
    assert not (tmp_path / "tiny-9@a.json").exists() and (tmp_path / "tiny-x-9.json").exists()
    for version in (1, 2, 3):
        assert served_ledger(coordinator, made(store, version, 0.1)).tenants[""].index == 0
    coordinator.ledgers.stop()


def test_what_is_measured_is_the_tenant_that_speaks_most_against_its_guarantee(store: Path) -> None:
    """A tenant with many texts that agree does not hide one whose answers differ."""
    ledger = guaranteed(store, 0.1)
    count_all(ledger, range(50), UNLIKE, tenant="small", may_rise=False)
    for name, keys in (("large", range(3000)), ("small", range(50, 200))):
        count_all(ledger, keys, tenant=name, may_rise=False)
        ledger.tenants[name].strictest.index = 1  # type: ignore[union-attr]
    measured = ledger.measured(ledger.rules.default)
    assert measured is not None and measured[0] == 0.25 and measured[1] > 0.1


def test_tau_rises_only_after_the_last_text_of_a_request(store: Path) -> None:
    ledger = guaranteed(store, 0.1)
    for _ in range(2):
        for keys, may_rise in ((range(99), False), (range(99, 100), True)):
            count_all(ledger, keys, may_rise=may_rise)
            assert (ledger.rules.default.rule.tau > 0) == may_rise
        assert ledger.audits == 100
        ledger.reset()  # after which the same texts may count again
        assert ledger.rules.default.rule.tau == 0 and ledger.audits == 0


def test_the_speedup_is_that_of_the_audits_at_each_tenants_tau(store: Path) -> None:
    """Half of the texts exit at layer 0 above τ = 0; the others above τ = 0.9, with another answer."""
    hard = Audited([0.9, None, None, None], [[True, False, False, False]])
    for guaranteed in ({}, {"guarantee": 0.3}):
        found, served = [], made(store)
        served.rules = Rules(served.model.manifest, Settings(**guaranteed or {"tau": TAU}))
        ledger = served_ledger(coordinator_of(**guaranteed), served)
        for n in range(MIN_AUDITS):
            found.append(ledger.speedup())
            count_all(ledger, [n], (ALIKE, hard)[n % 2], may_rise=False)
        assert set(found) == {1.0}  # too few audits
        assert ledger.speedup() == (1.0 if guaranteed else 2.0)  # with the guarantee, τ is still 0
    for key in range(150):
        count_all(ledger, [key], tenant="fast")
    # 150 texts of the fast tenant at layer 0, 100 of the other one at layer 3.
    assert ledger.tenants["fast"].index > 0 == ledger.tenants[""].index
    assert ledger.speedup() == pytest.approx(3 / (100 * 3 / 250))
    assert ledger.rules.default.rule.tau == 0  # the lower median


def test_many_tenants_share_the_room_for_hashes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has room for four: of its texts, at least the last two are known, and at most the last four."""
    monkeypatch.setattr("de3.server.audit.ledger.MAX_SEEN", 40)
    ledger = guaranteed(store, 0.2)
    for keys, counted in ((range(40), 40), ((39, 38), 40), ((35, 0), 42)):
        for key in keys:
            for name in map(str, range(10)):
                count_all(ledger, [key], tenant=name, may_rise=False)
        for tenant in ledger.tenants.values():
            assert tenant.strictest is not None and tenant.strictest.evidence.audits == counted
    assert tenant.evidence.audits == 44  # the report has all of them, but bets on the distinct ones only
    for row in report(ledger, Live(1.0, 0, {}), ledger.rules.default)["taus"]:
        assert row["e_value"] == pytest.approx(np.mean([(1 + 0.2 * c) ** 42 for c in (0.25, 0.5, 0.75)]))


TOKENS = Tokens(np.array([[1, 2]]), np.array([[0, 0]]), truncated=False)
STATES = np.ones((3, 4), np.float32)
PASSED = [read(layer, [1.0, 0.0], None) for layer in range(4)]


class SentText:
    """A text that a test can see being freed."""


class Answering:
    """An auditor of stand-ins for jobs, whose audits run when a test says so.

    Attributes:
        waiting: the audits that have not run.
        counted: for each call, number of texts, and whether τ may rise.
        settled: the texts that were counted.
        kept: the records for learning.
        is_behind: nothing is drawn.
        texts: those that something still refers to.
    """

    def __init__(
        self, runner: asyncio.Runner, served: Any, learns: bool = False, asks: bool = False, **options: Any
    ) -> None:
        """asks: an upstream answers the audits."""
        self.waiting, self.counted = list[Audit](), list[tuple[int, bool]]()
        self.settled, self.kept, self.is_behind = list[Settled](), list[Record](), False
        self.texts, self.served, self._runner = WeakSet[SentText](), served, runner
        on = Settings(**{"audit_share": 1.0} | options)
        learn, ask = self.kept.extend if learns else None, self._ask if asks else None
        self.auditor = Auditor(
            *(served, on, self.waiting.extend, self._count, lambda: self.is_behind, learn), ask=ask
        )

    async def _ask(self, *_: object) -> Reading:
        return PASSED[-1]

    def _count(self, settled: Sequence[Settled]) -> None:
        self.settled += settled
        self.counted.append((sum(one.texts for one in settled), settled[-1].may_rise))

    def _job(
        self, texts: int, tau: float, exits: int, tenant: str, tokens: Tokens, is_private: bool = False
    ) -> Any:
        passed, items, heads = PASSED[:exits], [], []
        for _ in range(texts):
            outcome = SimpleNamespace(windows=(), reason="", passed=passed, reading=passed[-1], tokens=1)
            heads.append(SimpleNamespace(outcome=outcome, asks_all_exits=False, is_deep=False, states=STATES))
            items.append(SimpleNamespace(tokens=tokens, windows=None, text=SentText()))
            self.texts.add(items[-1].text)
        choice = SimpleNamespace(rule=ExitRule(tau, Entropy()))
        request, sender = SimpleNamespace(is_private=is_private), Sender(tenant=tenant)
        part = SimpleNamespace(choice=choice, entry=Entry(None), heads=heads)
        fields = {"request": request, "sender": sender, "first": part}
        rows = list(zip(items, heads, strict=True))
        return SimpleNamespace(client="one", items=items, rows=lambda _: rows, **fields)

    def answer(
        self,
        *is_drawn: float,
        tau: float = TAU,
        exits: int = 1,
        epoch: int = 0,
        fails: bool = False,
        tenant: str = "",
        tokens: Tokens = TOKENS,
        is_private: bool = False,
    ) -> None:
        """Answer a request; a text is drawn with a share of more than 1 - is_drawn.

        exits: number of exits passed. epoch: begins before the answer. fails: there is no answer. is_private: of texts
        to be redacted.
        """
        draws, job = iter(is_drawn), self._job(len(is_drawn), tau, exits, tenant, tokens, is_private)
        self.auditor._random = SimpleNamespace(random=lambda: 1.0 - next(draws))  # type: ignore[assignment]

        async def run() -> None:
            draw = self.auditor.draw(job, job.first)
            if fails:
                assert draw is not None
                self.auditor.abandon(job, job.first, draw)
                return
            self.auditor.apply(Standing(epoch, 0, {}))
            self.auditor.answered(job, job.first, draw)
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # after which the new audits have been submitted

        self._runner.run(run())

    def share(self, tenant: str = "") -> float:
        """The share with which the next text of a tenant is drawn."""
        job = self._job(0, TAU, 1, tenant, TOKENS)
        draw = self.auditor.draw(job, job.first)
        assert draw is not None
        return draw.share

    def run_audit(self, index: int, **result: Any) -> None:
        """Run the audit that waits at this index, with the usual result apart from these fields."""
        found: dict[str, Any] = {"passed": PASSED, "tokens": TOKENS, "states": STATES} | result
        if asks := "upstream_failed" in self.auditor.excluded:
            found["passed"] = found["passed"][:-1]
        audit = replace(self.waiting.pop(index), **found)

        async def run() -> None:
            audit.on_done(audit)
            if asks:
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        self._runner.run(run())


@pytest.fixture
def answering(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Answering]]:
    monkeypatch.setattr(auditor, "TICK_S", 0.0)
    with asyncio.Runner() as runner:
        yield lambda **options: Answering(runner, made(store), **options)


Answerings = Callable[..., Answering]


def test_texts_are_counted_in_order_and_tau_may_rise_after_the_last_of_a_request(
    answering: Answerings,
) -> None:
    """So the evidence does not depend on which audits are quick."""
    one = answering()
    one.answer(False)
    one.answer(False, True, True, True)
    one.answer(False)
    assert not one.texts  # an audit that waits keeps the tokens only
    one.run_audit(2)
    assert one.counted == [(1, True), (1, False)] and one.auditor.pending == 2
    one.run_audit(0)
    assert one.counted[2:] == [(1, False)]
    one.run_audit(0)
    assert one.counted[3:] == [(3, True)] and one.auditor.pending == 0


def test_texts_that_were_drawn_before_a_reset_or_with_share_0_do_not_count(answering: Answerings) -> None:
    """Nor are exits learned from them."""
    one = answering(learns=True)
    one.answer(False, True)
    assert one.counted == [(1, False)] and one.auditor.pending == 1
    one.answer(True, False, epoch=1)
    assert len(one.waiting) == 1
    one.run_audit(0)
    assert not one.kept
    one.is_behind = True
    one.answer(True, False, epoch=1)
    assert not one.waiting and one.auditor.pending == 0
    one.is_behind = False
    one.answer(False, epoch=1)
    assert one.counted[1:] == [(1, True)]


def test_an_answer_at_full_depth_is_its_own_audit(answering: Answerings) -> None:
    for tau in (0.0, TAU):
        one = answering()
        one.answer(True, False, True, tau=tau, exits=4)
        assert one.counted == [(3, True)] and one.auditor.audits == 2
        one.answer(True, tau=tau, fails=True)
        assert not one.waiting and one.auditor.pending == 0


def test_an_audit_that_fails_counts_as_a_disagreement_and_a_dropped_one_not_at_all(
    answering: Answerings,
) -> None:
    one = answering()
    one.answer(True, True, False)
    one.run_audit(0, error=RuntimeError("broken"))
    one.run_audit(0, is_dropped=True)
    assert sum(each.skipped for each in one.settled) == 0  # nor later texts, which were not drawn
    (worst,) = [each for each in one.settled if each.audited]
    assert worst.audited == [Audited([None, None, 0.0, None], [[False, False, True, False]])]
    assert worst.served == 1
    assert one.auditor.pending == 0 and one.auditor.audits == one.auditor.disagreements == 1


def test_ood_texts_count_at_their_lower_tau(answering: Answerings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raised score has the same effect, from the first exit on at which the text is out of distribution."""
    one = answering()
    one.served.monitor = SimpleNamespace(tau_factor=0.5, is_far=lambda reading: reading.layer == 1)
    one.answer(True)
    scored = [replace(reading, score=x) for reading, x in zip(PASSED, (0.2, 0.2, 0.3, None), strict=True)]
    one.run_audit(0, passed=scored)
    assert one.settled[0].audited[0].scores == [0.2, 0.4, 0.6, None]


def test_a_dropped_audit_discards_the_texts_since_the_audit_before_it_and_no_later_audit(
    answering: Answerings,
) -> None:
    """Texts after it, which need no audit, wait for the next one, so dropped audits alone prove nothing."""
    one = answering(learns=True)
    for exits in (1, 4, 4, 1, 4, 1, 4):
        one.answer(True, exits=exits)
    one.run_audit(1, is_dropped=True)
    one.run_audit(1)
    assert not one.counted and not one.kept  # until the first audit has run
    one.run_audit(0)
    assert sum(len(each.audited) for each in one.settled) == len(one.kept) == 4
    one.answer(True)
    one.answer(True, exits=4)
    one.run_audit(0, is_dropped=True)
    assert len(one.kept) == 4
    one.answer(True)
    one.run_audit(0)
    assert len(one.kept) == 6


def test_at_full_depth_texts_count_at_once_but_not_those_that_still_wait(answering: Answerings) -> None:
    one = answering(asks=True)
    one.answer(True, exits=4)
    assert not one.counted  # until an answer of the model is audited
    one.answer(True, False, tau=0.0, exits=4)
    assert one.counted == [(2, True)] and one.auditor.pending == 0


@pytest.mark.parametrize("is_dropped", [False, True])
def test_texts_that_wait_for_an_audit_are_limited(
    answering: Answerings, monkeypatch: pytest.MonkeyPatch, is_dropped: bool
) -> None:
    """If no answer of the model is drawn for long, they count, unless the last audit was dropped."""
    monkeypatch.setattr(auditor, "ENTRY_TEXTS", 1)
    one = answering(asks=True)
    one.answer(True)
    one.run_audit(0, is_dropped=is_dropped)
    before = sum(texts for texts, _ in one.counted)
    assert before == (not is_dropped)
    for _ in range(MAX_HELD + 5):
        one.answer(True, exits=4)  # of a guard that redacts, say
    counted = sum(texts for texts, _ in one.counted) - before
    assert counted == (0 if is_dropped else MAX_HELD + 1)
    one.answer(True)
    one.run_audit(0)
    counted = sum(texts for texts, _ in one.counted) - before
    assert counted == (MAX_HELD + 1 if is_dropped else MAX_HELD + 6)


def test_texts_drawn_under_load_count_with_the_share_in_force(answering: Answerings) -> None:
    """Each disagreement counts for 1/q texts, where q is the share in force, not --audit-share."""
    one = answering()
    for epoch, (share, pending) in enumerate(((1.0, 0), (0.5, ROOM // 8), (0.25, ROOM // 4))):
        one.answer(*[True] * (pending - one.auditor.pending), epoch=epoch)
        one.answer(epoch=epoch + 1)  # a reset, after which these audits are pending, and delay no texts
        one.answer(0.99 - share, epoch=epoch + 1)
        one.answer(1.01 - share, exits=4, epoch=epoch + 1)  # drawn
    counted = [(each.share, each.skipped) for each in one.settled]
    assert counted == [(q, rest) for q in (1.0, 0.5, 0.25) for rest in (1, 0)]


def test_pending_audits_are_limited_for_each_tenant(answering: Answerings) -> None:
    one, shares = answering(guarantee=0.2), []
    for _ in range(2 * ROOM + 1):
        shares.append(one.share("loud"))
        one.answer(True, tenant="loud")
    assert shares[0] == 1.0 and shares[ROOM] == 2**-8 and shares[-1] == 0.0
    assert shares == sorted(shares, reverse=True)
    assert one.share("other") == 1.0  # it has half of the room
    for _ in range(ROOM // 2):
        one.answer(True, tenant="other")
    assert one.share("other") == 2**-8 > one.share("loud") == one.auditor.share == 0.0
    for number in range(1000):
        one.answer(True, tenant=str(number))
    assert one.share("new") == 1.0


def test_texts_to_be_redacted_are_evidence_but_leave_no_records(answering: Answerings) -> None:
    one = answering(learns=True)
    one.answer(True, True, exits=4, is_private=True)
    assert sum(texts for texts, _ in one.counted) == 2 and not one.kept
    one.answer(True, exits=4)
    assert len(one.kept) == 1


def test_records_have_only_finite_values(answering: Answerings) -> None:
    one = answering(learns=True, audit_share=0.5)
    one.answer(*[True] * 7)
    for value, kept in ((6e4, 2), (-7e4, 3), (float("nan"), 3)):  # float16 ends at 65504
        states = STATES.copy()
        states[1, 2] = value
        one.run_audit(0, states=states)
        one.run_audit(0, passed=[*PASSED[:-1], read(3, [1.0, value], None)])
        assert len(one.kept) == kept
    one.run_audit(0, tokens=Tokens(TOKENS.ids, np.array([[0, 1]]), truncated=False))  # a pair of texts
    assert one.kept[-1].key not in {each.key for each in one.kept[:-1]}
    assert (one.kept[-1].share, one.kept[-1].states.dtype) == (0.5, np.float16)


@pytest.mark.parametrize("tenant", ["", "me", "you"])
def test_an_audited_text_near_to_a_fitted_one_has_no_key(answering: Answerings, tenant: str) -> None:
    """So it counts only against the exits, in whichever process it was audited; if similar, only to another's text."""
    texts = [
        Tokens(np.array([[9, *ids, 9]]), np.zeros((1, 0)), truncated=False)
        for ids in ([1, 2, 3], [4, 5, 6], [7, 8])
    ]
    clients = np.array([client_hash("me")], np.uint64)
    by_me, found = FittedTexts(pieces_of(texts[0])[None], np.ones((1, 1), np.float16), clients), []
    for fitted in (None, by_me):
        one = answering(guarantee=0.2)
        one.served.model.fitted = fitted
        one.served.model.marks = lambda tokens: Marks(
            pieces_of(tokens), np.full(1, 1 if len(tokens) == 4 else 3, np.float16), np.ones((), np.float32)
        )
        for text in texts:
            one.answer(True, exits=4, tokens=text, tenant=tenant)
        found.append([key for each in one.settled for key in each.keys])
    similar = None if tenant == "you" else found[0][2]
    assert None not in found[0] and len({*found[0]}) == 3 and found[1] == [None, found[0][1], similar]


def test_a_pending_audit_of_one_tenant_delays_no_other(answering: Answerings) -> None:
    one = answering(guarantee=0.2)
    one.answer(True, tenant="slow")
    one.answer(False, True, tenant="other", exits=4)
    assert one.counted == [(2, True)] and one.settled[0].tenant == "other"
    # A tenant's reset discards only its own texts.
    one.auditor.apply(Standing(0, 0, {"slow": InForce(7, None, None)}))
    one.answer(False, tenant="other")
    one.run_audit(0)
    assert one.counted == [(2, True), (1, True)] and one.auditor.pending == 0


def test_the_share_falls_with_the_traffic_until_a_reset_after_which_exits_are_learned_fast_again(
    store: Path,
) -> None:
    traffic, shares = Traffic(processes=2), []
    on = Settings(audit_share=0.1)
    one = Auditor(made(store), on, lambda _: None, lambda *_: None, traffic=traffic)
    for texts in (0, LEARN_TEXTS // 2, LEARN_TEXTS // 2 + 1, 8 * LEARN_TEXTS):
        traffic.texts = texts
        shares.append(one.share)
    one.apply(Standing(1, 1, {}))
    assert [*shares, one.share] == [1.0, 1.0, 0.5, 0.1, 1.0]


def test_metrics_are_read_in_another_thread_while_texts_are_answered(
    answering: Callable[..., Answering],
) -> None:
    """Python switches between the threads as often as it can."""
    one, before = answering(guarantee=0.2), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(lambda: [(one.auditor.share, one.auditor.pending) for _ in range(5000)])
            for number in count():
                if read.done():
                    break
                one.answer(1.0, tenant=f"tenant {number % 300}")
                if number > 20:
                    one.run_audit(0)
        assert len(read.result()) == 5000
    finally:
        sys.setswitchinterval(before)
