"""Audits over HTTP: counts (compared with full depth), the guarantee, the saved state, the log and resets."""

import gc
import json
import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from errno import ENOSPC
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import ref

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits.guarantee import MAX_SHARES, Evidence, Guarantee, profiles
from de3.exits.reading import read
from de3.export import recalibrate, records
from de3.model_store.fitted import FittedTexts, pieces_of
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Artifact, Store
from de3.server.audit import ledgers
from de3.server.audit.auditor import (
    ENTRY_TEXTS,
    LEARN_TEXTS,
    MAX_HELD,
    NO_OPTIONS,
    ROOM,
    Auditor,
    Traffic,
    _key,
)
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.ledger import LOG_S, MIN_AUDITS, Ledger
from de3.server.audit.report import Live, report
from de3.server.audit.state import NEW_SHARES, StateDir, restore, state_of
from de3.server.audit.tenant import MAX_RESETS, Settled, Tenant
from de3.server.engine import audit as audit_engine
from de3.server.engine.audit import OVERDUE_SHARE, Audit, AuditThreads, run_audits
from de3.server.engine.queue import WorkQueue
from de3.server.engine.request import Text
from de3.server.learn.record import Record
from de3.server.rules import InForce, Rules, Standing
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


def auditor_of(server: Server) -> Auditor:
    (served,) = server.service.models.all
    return server.service.audits.of(served)


@contextmanager
def held_back(server: Server) -> Iterator[list[Audit]]:
    """The audits that a server would run, none of which it runs."""
    audits = list[Audit]()
    auditor_of(server)._submit = audits.extend
    yield audits


def ledger_of(server: Server) -> Ledger:
    (served,) = server.service.models.all
    ledger = server.service.shared.audit_store.ledgers.get(served.model.full_name)  # type: ignore[attr-defined]
    assert isinstance(ledger, Ledger)
    return ledger


def texts_of(server: Server) -> int:
    """Number of texts in the evidence, audited or not."""
    return sum(tenant.evidence.texts for tenant in list(ledger_of(server).tenants.values()))


def audit(server: Server, model: str = "tiny-int8") -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/models/{model}/audit")
    assert response.status_code == 200, response.text
    return dict(response.json())


def settled(server: Server, texts: int) -> dict[str, Any]:
    """The audit report, once at least this many texts have been counted."""
    until(lambda: texts_of(server) >= texts, f"{texts} texts to be counted")
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


def test_audits_count_the_disagreement_with_full_depth(store: Path) -> None:
    """At values of τ other than the one in force, the counts are compared with the answers to requests that set τ."""
    with serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU) as server:
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


def test_ood_texts_count_at_their_lower_tau(store: Path) -> None:
    """A raised score has the same effect, from the first exit on at which the text is out of distribution."""
    served = made(store)
    served.monitor = SimpleNamespace(tau_factor=0.5, is_far=lambda reading: reading.layer == 1)
    passed: list[Any] = [SimpleNamespace(layer=n, score=x) for n, x in enumerate((0.2, 0.2, 0.3, None))]
    assert Answering(served)._scores(passed) == [0.2, 0.4, 0.6, None]


def test_texts_with_windows_or_a_layer_limit_are_excluded(store: Path) -> None:
    with serving(store, models=["tiny-int8"], audit_share=1.0, latency_budget_ms=30_000) as server:
        long = "not good but bad " * 40
        response = server.classify(input=[long, "good"], long="windows")
        assert response.json()["data"][0]["windows"]["of"] > 1
        server.classify(input="good", tau=0, max_layer=1)
        said = settled(server, 1)
        assert said["texts"] == 1
        assert said["excluded"] == {"deadline": 0, "max_layer": 1, "windows": 1}


def test_a_guarantee_starts_at_full_depth_and_audits_raise_tau(store: Path) -> None:
    with serving(store, models=["tiny-int8"], guarantee=0.2) as server:
        assert server.service.settings.share_of_audits == 0.05
        first = server.classify(input=TEXTS[0], explain=True).json()
        assert first["data"][0]["exit"]["reason"] == "last_layer"
        guarantee = {"max_disagreement": 0.2, "confidence": 0.95, "reason": "start"}
        assert first["tau_choice"]["set_by"] == "guarantee"
        assert first["tau_choice"]["guarantee"] == guarantee
        server.classify(input=["not bad"] * 256)
        said = audit(server)
        assert said["texts"] == 257 and said["tau"]["tau"] == 0  # copies do not raise τ
        raise_tau(server)
        said = audit(server)
        after = server.classify(input=TEXTS, explain=True).json()
        assert after["tau_choice"]["guarantee"] == guarantee | {"reason": "evidence"}
        assert after["tau_choice"]["tau"] == said["tau"]["tau"]
        assert any(row["exit"]["reason"] == "threshold" for row in after["data"])
        assert server.metric("de3_audit_guarantee", model="tiny-int8:1") == 0.2
        # A request's own options take precedence, and have no guarantee.
        for options in ({"signal": "edr", "lambda": 0.5}, {"latency_budget_ms": 30_000}, {"tau": 0.5}):
            answer = server.classify(input="good", explain=True, **options).json()
            assert "guarantee" not in answer["tau_choice"]
        assert answer["data"][0]["exit"]["tau"] == 0.5


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
            # With only max_layer, τ is the tenant's as well.
            body |= {"max_layer": 2}
            limited = httpx.post(f"{server.url}/classify", json=body, headers=head(name)).json()
            assert limited["tau_choice"]["tau"] == answer["tau_choice"]["tau"]
            return float(answer["tau_choice"]["tau"])

        def seen(name: str) -> dict[str, Any]:
            return dict(httpx.get(f"{server.url}/v1/models/tiny-int8/audit", headers=head(name)).json())

        def send(texts: list[str]) -> None:
            httpx.post(f"{server.url}/classify", json={"input": texts}, headers=head("loud"), timeout=60)

        # Of the others' texts a user sees nothing.
        send(["good"])
        fresh = seen("victim")
        assert (fresh["tenant"], fresh["texts"], fresh["audits"]) == ("victim", 0, 0)
        assert [row["tenant"] for row in fresh["tenants"]] == ["victim"]

        while tau("loud") == 0:
            send(new_texts())
        assert tau("victim") == 0
        lowest, highest = (server.metric(f"de3_audit_tau_{end}") for end in ("lowest", "highest"))
        assert lowest == 0 < highest == tau("loud")
        assert server.metric("de3_audit_tenants") == 2
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


def test_an_unanswered_request_leaves_nothing_behind(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU) as server:
        with monkeypatch.context() as patch:
            server.change(patch, timeout_s=0.2)
            assert server.classify(input=TEXTS).status_code == 504
        assert auditor_of(server).pending == 0
        gate.open()
        server.classify(input="good")
        settled(server, 1)
        assert texts_of(server) == 1


def test_audits_go_on_after_a_restart_and_a_reload_until_an_admin_resets_them(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "SAVE_S", 0.02)
    file = tmp_path / "state/tiny-int8-1.json"
    options: dict[str, Any] = {"models": ["tiny-int8"], "guarantee": 0.2, "state_dir": tmp_path / "state"}
    with serving(store, **options) as server:
        raise_tau(server)
        before = audit(server)

        def saved() -> int:
            return sum(row["audits"] for row in json.loads(file.read_text())["counts"])

        # A server that is killed loses only the audits since the last save.
        until(lambda: file.exists() and saved() == before["audits"], "the state to be saved")
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
def test_a_model_is_calibrated_on_records_of_its_audits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps the records, also of texts that exited early; the model's own exits run on them."""
    with serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU, state_dir=tmp_path) as server:
        assert httpx.get(f"{server.url}/v1/models/tiny-int8/learn").status_code == 409  # it fits no exits
        server.classify(input=TEXTS)
        settled(server, len(TEXTS))
        learner = server.service.shared.audit_store.learners.of("tiny-int8")  # type: ignore[attr-defined]
        until(lambda: learner.is_restored, "the learner to be ready")
    (file,) = (tmp_path / "learned").glob("*.records")
    assert file.stat().st_mode & 0o777 == 0o600  # only the server's user can read them
    artifact = Store(store).open("tiny-int8")
    found = records.opened([file], artifact.manifest)
    rows = records.exits_of(artifact).recorded(records.texts_of(found, artifact.manifest))
    model = Model(artifact)
    tokens = [model.tokenize(text) for text in TEXTS]
    steps = {_key(one): model.full_depth(one) for one in tokens}
    assert set(found.keys.tolist()) == set(steps)
    for key, logits, distances in zip(found.keys.tolist(), rows.logits, rows.distances, strict=True):
        for step, ours, far in zip(steps[key], logits, distances, strict=True):
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
    assert "give one of --texts, --records" in refusal(f"calibrate tiny --store {own}")
    assert "--certify is required, too" in refusal(f"calibrate tiny --store {own} --tune {file}")


def test_a_server_without_audits_says_how_to_enable_them(store: Path) -> None:
    with serving(store, models=["tiny-int8"]) as server:
        for path, options in (("audit", "--audit-share or --guarantee"), ("learn", "--learn")):
            response = httpx.get(f"{server.url}/v1/models/tiny-int8/{path}")
            assert response.status_code == 409
            assert options in response.json()["error"]["message"]
            assert httpx.get(f"{server.url}/v1/models/other/{path}").status_code == 404


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"guarantee": 0.02, "tau": 0.1}, "guarantee: .* tau"),
        ({"guarantee": 0.02, "max_disagreement": 0.1}, "guarantee: .* max_disagreement"),
        ({"guarantee": 0.02, "audit_share": 0}, "guarantee: "),
        ({"guarantee": 0}, "guarantee"),
        ({"guarantee": 1}, "guarantee"),
        ({"audit_share": 1.1}, "audit_share"),
        ({"learn": True}, "learn: .* guarantee"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Settings(**values)


def test_an_unloaded_model_is_freed(store: Path) -> None:
    options: dict[str, Any] = {"audit_share": 1.0, "tau": TAU, "admin_keys": ADMIN_KEYS}
    with serving(store, models=["tiny-int8", "tiny"], **options) as server:
        server.classify(model="tiny-int8", input=TEXTS)
        until(lambda: audit(server)["texts"] == 200, "the audits")
        freed = ref(server.service.models.get("tiny-int8").model)
        response = httpx.post(f"{server.url}/v1/models/tiny-int8/unload", headers=ADMIN)
        assert response.status_code == 200, response.text
        until(lambda: gc.collect() is not None and freed() is None, "the model's memory")


def test_grouped_audits_match_single_ones_and_wait(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait keep the tokens and not the text: they may be pending for a long time, and texts may be large."""
    with (
        serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU) as server,
        held_back(server) as audits,
    ):
        (served,) = server.service.models.all
        server.classify(input=TEXTS[:12])
        until(lambda: audits, "the audits")
        for one in audits:
            referred = gc.get_referents(one, *(one.on_done.__closure__ or ()))  # type: ignore[attr-defined]
            assert any(isinstance(each, Tokens) for each in referred)
            assert not any(
                isinstance(each, Text) or (isinstance(each, str) and each in TEXTS) for each in referred
            )
        if served.model.encoder.forward is None:
            pytest.skip("no kernels")
        queue = WorkQueue(10)
        queue.put(jobs.job(["text"], [1.0]))
        running = threading.Thread(target=run_audits, args=(audits, queue), daemon=True)
        running.start()
        running.join(0.01)
        assert running.is_alive() and not any(one.passed for one in audits)
        # Audits run slowly if requests are always pending.
        monkeypatch.setattr(audit_engine, "MOST_WAIT_S", 0.01)
        running.join(20)
        for one in audits:
            alone = served.model.full_depth(one.tokens)
            exits = [step.logits.tolist() for step in alone if step.logits is not None]
            assert [reading.logits for reading in one.passed] == exits
        run_audits(audits, queue, lambda: True)
        assert all(one.is_dropped for one in audits)


def test_overdue_audits_run_at_normal_priority_while_requests_are_pending(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(store, models=["tiny-int8"], audit_share=1.0, tau=TAU) as server,
        held_back(server) as audits,
    ):
        (served,) = server.service.models.all
        if (forward := served.model.encoder.forward) is None:
            pytest.skip("no kernels")
        done, at_idle = list[Audit](), list[bool]()
        server.classify(input=TEXTS[:12])
        until(lambda: len(audits) > 1, "the audits")

        def note(*arguments: Any, **named: Any) -> None:
            at_idle.append(named["at_idle"])
            forward(*arguments, **named)

        monkeypatch.setattr(served.model, "encoder", replace(served.model.encoder, forward=note))
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
        assert audits[0] not in done and all(one.passed for one in done) and not any(at_idle)
        queue.next()
        until(lambda: audits[0] in done, "the first audit")
        assert audits[0].passed and at_idle[-1]
        threads.close()


@pytest.mark.parametrize("threads", [1, 4, 100])
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


def test_states_are_saved_once_the_disk_has_room_again(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(ENOSPC, "No space left on device")

    coordinator = coordinator_of(state_dir=tmp_path)
    versions = [served_ledger(coordinator, made(store, version)) for version in (1, 2)]
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for _ in range(3):
                for ledger in versions:
                    agree(ledger)
                    coordinator.ledgers._save(ledger)
        coordinator.ledgers._save(versions[0])
    assert caplog.text.count("No space left on device") == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["tiny-1.json"]
    coordinator.stop()
    for version in (1, 2):
        state = json.loads((tmp_path / f"tiny-{version}.json").read_text())
        assert (state["model"], state["counts"][0]["audits"]) == (f"tiny:{version}", 6)


def made(store: Path, version: int = 1, **changes: Any) -> Any:
    """A stand-in for a served model: its manifest, and the attributes that an auditor reads."""
    manifest = Store(store).open("tiny").manifest.model_copy(update={"version": version, **changes})
    model = SimpleNamespace(manifest=manifest, full_name=f"tiny:{version}", runtime="onnxruntime", path=store)
    model.fitted = None
    rules = Rules(manifest, Settings(tau=TAU))
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
ALIKE: tuple[list[float | None], list[bool]] = ([0.0, None, None, None], [False] * 4)
UNLIKE: tuple[list[float | None], list[bool]] = ([0.0, None, None, None], [True, False, False, False])


def settled_in(ledger: Ledger, share: float = 1.0, tenant: str = "", may_rise: bool = True) -> Settled:
    """Texts that are drawn in the present epoch; none at first."""
    return Settled(tenant, ledger.tenant(tenant).epoch, share, may_rise=may_rise)


def agree(ledger: Ledger, share: float = 1.0, served_differs: bool = False) -> None:
    """Count an audited text that agrees with full depth at every τ.

    share: probability with which it was drawn. served_differs: True if the answer that was sent differs nevertheless.
    """
    one = settled_in(ledger, share)
    one.add(None, *ALIKE, served_differs)
    ledger.count([one])


def count_all(ledger: Ledger, keys: Iterable[int | None], kind: Any = ALIKE, **of: Any) -> None:
    """Count together audited texts with these keys. of: as for `settled_in`."""
    one = settled_in(ledger, **of)
    for key in keys:
        one.add(key, *kind, False)
    ledger.count([one])


def guaranteed(store: Path, rate: float) -> Ledger:
    """The ledger of a model with a guarantee."""
    served = made(store)
    served.rules = Rules(served.model.manifest, Settings(guarantee=rate))
    return served_ledger(coordinator_of(guarantee=rate), served)


def test_evidence_of_an_unloaded_model_does_not_count_for_another_of_its_name(store: Path) -> None:
    coordinator, first = coordinator_of(), made(store)
    agree(served_ledger(coordinator, first))
    coordinator.forget(first.model.manifest)
    ledger = served_ledger(coordinator, changed := made(store, max_tokens=63))
    assert ledger.audits == 0
    agree(ledger)
    coordinator.forget(changed.model.manifest)
    assert served_ledger(coordinator, changed).audits == 1
    coordinator.forget(changed.model.manifest)
    changed.model.runtime = "native"
    assert served_ledger(coordinator, changed).audits == 0


def test_evidence_of_unloaded_models_is_saved_and_limited_in_memory(
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


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0"},
        {"signal": "entropy"},
        {"runtime": "native"},
        {"taus": [0.0, 0.5]},
        {"schema_version": 2},
        {"tenant": "../other"},
        {"since": 1e300},
        {"since": float("nan")},
        {"differing": 6},  # of 5 texts
        {"layers": 2**53},
        "{",
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
    elif isinstance(change, str):
        file.write_text(change)
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


def test_a_state_leaves_room_for_the_shares_that_a_server_adds(store: Path) -> None:
    ledger = served_ledger(coordinator_of(), made(store))
    for number in range(MAX_SHARES - NEW_SHARES):
        agree(ledger, (1 + number) / MAX_SHARES)
    restore(ledger, state_of(ledger, ""))
    agree(ledger, 1.0)
    with pytest.raises(ValueError, match="shares"):
        restore(ledger, state_of(ledger, ""))


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
        late.add(key, *UNLIKE, True)
        unlike.add(key, *UNLIKE, True)
    ledger.count([unlike, late])
    assert "differ from full depth more often than the guaranteed 10%" in caplog.text
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
    rates = Guarantee(0.1, taus), Guarantee(0.1, taus)
    tenant, one = Tenant(taus, rates[0], 0, rates[1], has_spans=True), Settled("", 0, 1.0, may_rise=True)
    for key in range(400):
        one.add(key, [0.15, None], [differs, False], False, [missed])
    tenant.count(one, [1, 2], 1000)
    assert (*(one.index for one in rates), tenant.index) == indices
    tenant.reset(1)
    assert (*(one.index for one in rates), tenant.index) == (0, 0, 0)


def test_an_admins_reset_is_that_of_all_versions_of_the_model(store: Path, tmp_path: Path) -> None:
    """Otherwise a rollback would return to a τ that was proved by texts from before the reset."""
    coordinator = coordinator_of(guarantee=0.1, state_dir=tmp_path)
    for version in (1, 2, 3):
        ledger = served_ledger(coordinator, made(store, version))
        count_all(ledger, range(400))
        assert ledger.tenants[""].index > 0
    coordinator.forget(made(store, 1).model.manifest)
    (tmp_path / "tiny-9@a.json").write_text("of a version that was served before")
    (tmp_path / "tiny-x-9.json").write_text("of another model")
    coordinator.ledgers.reset("tiny")
    assert not (tmp_path / "tiny-9@a.json").exists() and (tmp_path / "tiny-x-9.json").exists()
    for version in (1, 2, 3):
        assert served_ledger(coordinator, made(store, version)).tenants[""].index == 0
    coordinator.ledgers.stop()


def test_what_is_measured_is_the_tenant_that_speaks_most_against_its_guarantee(store: Path) -> None:
    """A tenant with many texts that agree does not hide one whose answers differ."""
    ledger = guaranteed(store, 0.1)
    count_all(ledger, range(50), UNLIKE, tenant="small", may_rise=False)
    for name, keys in (("large", range(3000)), ("small", range(50, 200))):
        count_all(ledger, keys, tenant=name, may_rise=False)
        ledger.tenants[name].guarantee.index = 1  # type: ignore[union-attr]
    measured = ledger.measured(ledger.rules.default)
    assert measured is not None and measured[0] == 0.25 and measured[1] > 0.1


def test_the_traffic_of_a_gone_tenant_is_forgotten(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.audit.ledger.RECENT_TEXTS", 100)
    ledger = served_ledger(coordinator_of(guarantee=0.1), made(store))
    for name in ["gone"] * 90 + ["present"] * 1000:
        one = settled_in(ledger, tenant=name)
        one.skipped += 1
        ledger.count([one])
    assert list(ledger.traffic()) == ["present"]


def test_tau_rises_only_after_the_last_text_of_a_request(store: Path) -> None:
    ledger = guaranteed(store, 0.1)
    for _ in range(2):
        for keys, may_rise in ((range(99), False), (range(99, 100), True)):
            count_all(ledger, keys, may_rise=may_rise)
            assert (ledger.rules.default.rule.tau > 0) == may_rise
        assert ledger.audits == 100
        ledger.reset()  # after which the same texts may count again
        assert ledger.rules.default.rule.tau == 0 and ledger.audits == 0


def test_the_log_says_how_far_tau_has_risen_now_and_then(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    now = 0.0
    monkeypatch.setattr("de3.server.audit.ledger.monotonic", lambda: now)
    ledger, index = guaranteed(store, 0.1), list[int]()
    weak: tuple[list[float | None], list[bool]] = ([0.3, None, None, None], [True, False, False, False])
    for number in range(300):
        count_all(ledger, [number], weak if number < 5 else ALIKE)
        index.append(ledger.tenants[""].index)
    assert len({*index}) > 2 and caplog.text.count("audits allow") == 1
    now = LOG_S
    for number in range(300, 310):
        count_all(ledger, [number])
    assert caplog.text.count("audits allow") == 2
    assert f"audits allow τ = {ledger.rules.default.rule.tau:g}" in caplog.text
    caplog.clear()
    served = made(store)
    served.model.manifest = served.model.manifest.model_copy(update={"exit_layers": [3]})
    served.rules = Rules(served.model.manifest, Settings(guarantee=0.1))
    ledger = served_ledger(coordinator_of(guarantee=0.1), served)
    count_all(ledger, range(300), ([None], [False]))
    assert ledger.tenants[""].index > 0 and not caplog.text  # τ means nothing without early exits


def test_the_speedup_is_that_of_the_audits_at_each_tenants_tau(store: Path) -> None:
    """Half of the texts exit at layer 0 above τ = 0; the others above τ = 0.9, with another answer."""
    hard: tuple[list[float | None], list[bool]] = ([0.9, None, None, None], [True, False, False, False])
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


TOKENS = Tokens(np.array([[1, 2]]), np.array([[0, 0]]), truncated=False)
STATES = np.ones((3, 4), np.float32)


class Answering(Auditor):
    """An auditor of stand-ins for jobs, whose audits run when a test says so.

    Attributes:
        waiting: the tenants and entries whose audit has not run.
        counted: for each call, number of texts, and whether τ may rise.
        settled: the texts that were counted.
        kept: the records for learning.
        is_behind: nothing is drawn.
    """

    PASSED: ClassVar = [read(layer, [1.0, 0.0], None) for layer in range(4)]

    def __init__(self, served: Any, learns: bool = False, asks: bool = False, **options: Any) -> None:
        """asks: an upstream answers the audits."""
        self.waiting, self.counted = list[Any](), list[tuple[int, bool]]()
        self.settled, self.kept, self.is_behind = list[Settled](), list[Record](), False
        on, ask = Settings(**{"audit_share": 1.0} | options), unused if asks else None
        learn = self.kept.extend if learns else None
        super().__init__(served, on, lambda _: None, self._note, lambda: self.is_behind, learn, ask=ask)

    def _note(self, settled: Sequence[Settled]) -> None:
        self.settled += settled
        self.counted.append((sum(o.texts for o in settled), settled[-1].may_rise))

    def _enqueue(self, tenant: Any, entry: Any, *_: Any) -> None:
        self.waiting.append((tenant, entry))

    def answer(
        self,
        *is_drawn: float,
        tau: float = TAU,
        exits: int = 1,
        epoch: int = 0,
        fails: bool = False,
        tenant: str = "",
        tokens: Tokens = TOKENS,
    ) -> None:
        """Answer a request; a text is drawn with a share of more than 1 - is_drawn.

        exits: number of exits passed. epoch: begins before the answer. fails: there is no answer.
        """
        texts, passed = iter(is_drawn), self.PASSED[:exits]
        outcome = SimpleNamespace(windows=None, reason="", passed=passed, reading=passed[-1], tokens=1)
        item = {"text": None, "asks_all_exits": False, "is_deep": False, "outcome": outcome, "states": STATES}
        items = [SimpleNamespace(progress=SimpleNamespace(tokens=tokens), **item) for _ in is_drawn]
        choice = SimpleNamespace(rule=SimpleNamespace(tau=tau))
        request, options = SimpleNamespace(tenant=tenant, is_private=False), NO_OPTIONS
        job: Any = SimpleNamespace(client="one", items=items, choice=choice, request=request, options=options)
        self._random = SimpleNamespace(random=lambda: 1.0 - next(texts))  # type: ignore[assignment]
        draw = self.draw(job)
        if fails:
            assert draw is not None
            self.abandon(job, draw)
            return
        self.apply(Standing(epoch, 0, {}))
        self.answered(job, draw)

    def run_audit(self, index: int, **result: Any) -> None:
        fields = {"is_dropped": False, "error": None, "passed": self.PASSED, "model_s": 0.0}
        audit: Any = SimpleNamespace(**fields | {"tokens": TOKENS, "states": STATES} | result)
        self._done(audit, *self.waiting.pop(index), "client", self.PASSED[0])


def test_texts_are_counted_in_order_and_tau_may_rise_after_the_last_of_a_request(store: Path) -> None:
    """So the evidence does not depend on which audits are quick."""
    one = Answering(made(store))
    one.answer(False)
    one.answer(False, True, True, True)
    one.answer(False)
    one.run_audit(2)
    assert one.counted == [(1, True), (1, False)] and one.pending == 2
    one.run_audit(0)
    assert one.counted[2:] == [(1, False)]
    one.run_audit(0)
    assert one.counted[3:] == [(3, True)] and one.pending == 0


def test_texts_that_were_drawn_before_a_reset_or_with_share_0_do_not_count(store: Path) -> None:
    """Nor are exits learned from them."""
    one = Answering(made(store), learns=True)
    one.answer(False, True)
    assert one.counted == [(1, False)] and one.pending == 1
    one.answer(True, False, epoch=1)
    assert len(one.waiting) == 1
    one.run_audit(0)
    assert not one.kept
    one.is_behind = True
    one.answer(True, False, epoch=1)
    assert not one.waiting and one.pending == 0
    one.is_behind = False
    one.answer(False, epoch=1)
    assert one.counted[1:] == [(1, True)]


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_an_answer_at_full_depth_is_its_own_audit(store: Path, tau: float) -> None:
    one = Answering(made(store))
    one.answer(True, False, True, tau=tau, exits=4)
    assert one.counted == [(3, True)] and one.audits == 2
    one.answer(True, tau=tau, fails=True)
    assert not one.waiting and one.pending == 0


def test_an_audit_that_fails_counts_as_a_disagreement_and_a_dropped_one_not_at_all(store: Path) -> None:
    one = Answering(made(store))
    one.answer(True, True, False)
    one.run_audit(0, error=RuntimeError("broken"))
    one.run_audit(0, is_dropped=True)
    assert sum(each.skipped for each in one.settled) == 0  # nor later texts, which were not drawn
    one._tenant("").discard_waiting()
    (worst,) = [each for each in one.settled if each.scores]
    assert (worst.scores, worst.differs) == ([[None, None, 0.0, None]], [[False, False, True, False]])
    assert worst.served == 1
    assert one.pending == 0 and one.audits == one.disagreements == 1


@pytest.mark.parametrize("dropped", [0.0, 0.5, 0.8])
def test_dropped_audits_do_not_change_the_share_of_early_answers_among_the_counted(
    store: Path, dropped: float
) -> None:
    """An upstream that drops audits may still answer the texts that are sent to it anyway, which agree.

    This holds for their records, too, to which exits are fitted, and which test them.
    """
    one, rng = Answering(made(store), learns=True, asks=True), random.Random(4)
    unlike = [*one.PASSED[:-1], read(3, [0.0, 1.0], None)]
    for number in range(3000):
        one.answer(True, exits=1 if rng.random() < 0.5 else 4)
        if number % 2 and one.waiting:
            one.run_audit(0, is_dropped=rng.random() < dropped, passed=unlike)
    audits, early = sum(len(each.scores) for each in one.settled), sum(each.served for each in one.settled)
    assert len(one.kept) == audits > 100
    assert 0.45 < early / audits < 0.6


def test_a_dropped_audit_discards_the_texts_since_the_audit_before_it_and_no_later_audit(store: Path) -> None:
    """Texts after it, which need no audit, wait for the next one, so dropped audits alone prove nothing."""
    one = Answering(made(store), learns=True)
    for exits in (1, 4, 4, 1, 4, 1, 4):
        one.answer(True, exits=exits)
    one.run_audit(1, is_dropped=True)
    one.run_audit(1)
    assert not one.counted and not one.kept  # until the first audit has run
    one.run_audit(0)
    assert sum(len(each.scores) for each in one.settled) == len(one.kept) == 4
    one.answer(True)
    one.answer(True, exits=4)
    one.run_audit(0, is_dropped=True)
    assert len(one.kept) == 4
    one.answer(True)
    one.run_audit(0)
    assert len(one.kept) == 6


def test_at_full_depth_texts_count_at_once_but_not_those_that_still_wait(store: Path) -> None:
    one = Answering(made(store), asks=True)
    one.answer(True, exits=4)
    assert not one.counted  # until an answer of the model is audited
    one.answer(True, False, tau=0.0, exits=4)
    assert one.counted == [(2, True)] and one.pending == 0


@pytest.mark.parametrize("is_dropped", [False, True])
def test_texts_that_wait_for_an_audit_are_limited(
    store: Path, monkeypatch: pytest.MonkeyPatch, is_dropped: bool
) -> None:
    """If no answer of the model is drawn for long, they count, unless the last audit was dropped."""
    monkeypatch.setattr("de3.server.audit.auditor.ENTRY_TEXTS", 1)
    one = Answering(made(store), asks=True)
    one.answer(True)
    one.run_audit(0, is_dropped=is_dropped)
    before = sum(texts for texts, _ in one.counted)
    assert before == (not is_dropped)
    for _ in range(MAX_HELD + 5):
        one.answer(True, exits=4)  # of a guard that redacts, say
    counted = sum(texts for texts, _ in one.counted) - before
    assert counted == (0 if is_dropped else MAX_HELD + 1)
    assert one._tenant("").size == (MAX_HELD if is_dropped else 4)
    one.answer(True)
    one.run_audit(0)
    counted = sum(texts for texts, _ in one.counted) - before
    assert counted == (MAX_HELD + 1 if is_dropped else MAX_HELD + 6)


def test_texts_drawn_under_load_count_with_the_share_in_force(store: Path) -> None:
    """Each disagreement counts for 1/q texts, where q is the share in force, not --audit-share."""
    one = Answering(made(store))
    for share, pending in ((1.0, 0), (0.5, ROOM // 8), (0.25, ROOM // 4)):
        one._tenant("").pending = pending
        one.answer(0.99 - share)
        one.answer(1.01 - share, exits=4)  # drawn
    counted = [(each.share, each.skipped) for each in one.settled]
    assert counted == [(q, rest) for q in (1.0, 0.5, 0.25) for rest in (1, 0)]


def test_pending_audits_are_limited_for_each_tenant(store: Path) -> None:
    auditor, shares = Answering(made(store)), []
    tenant = auditor._tenant("")
    for pending in range(2 * ROOM + 1):
        tenant.pending = pending
        shares.append(auditor.share)
    assert shares[0] == 1.0 and shares[ROOM] == 2**-8 and shares[-1] == 0.0
    assert shares == sorted(shares, reverse=True)
    other = auditor._tenant("other")
    assert auditor._share_of(other, TAU) == 1.0  # it has half of the room
    other.pending = ROOM // 2
    assert auditor._share_of(other, TAU) == 2**-8 > auditor._share_of(tenant, TAU) == 0.0
    for number in range(1000):
        auditor._tenant(str(number)).pending = 1
    assert auditor._share_of(auditor._tenant("new"), TAU) == 1.0


# For each entry: the keys of its texts, whether the last was drawn, and whether its answer differs.
texts_of_entry = st.lists(st.integers(0, 9), min_size=1, max_size=4)
entries = st.lists(st.tuples(texts_of_entry, st.booleans(), st.booleans()))


@settings(max_examples=20)
@given(entries)
def test_copies_count_only_against_a_higher_tau(
    store: Path, entries: list[tuple[list[int], bool, bool]]
) -> None:
    """The report's e-values are those of the distinct texts; of these, at least the last MOST_SEEN / 2 are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("de3.server.audit.ledger.MOST_SEEN", 8)
        ledger = served_ledger(coordinator_of(guarantee=0.2), made(store))
        expected, fresh = Evidence(ledger.taus), list[int]()

        def is_new(key: int) -> bool:
            newer = 4 * (len(fresh) // 4)
            known = fresh[max(0, newer - 4) :]  # the older half is forgotten when 8 are known
            if key not in fresh[newer:]:
                fresh.append(key)
            return key not in known

        for keys, is_drawn, differs in entries:
            one = settled_in(ledger, 0.5)
            one.skipped = len(keys) - is_drawn
            if is_drawn:
                one.add(keys[-1], *(UNLIKE if differs else ALIKE), differs)
                row = profiles(one.scores, one.differs, range(4), ledger.taus)
                if is_new(keys[-1]):
                    expected.add(0.5, row)
                else:
                    expected.add_repeats(0.5, row.differs)
            ledger.count([one])
        if not any(ledger.num_resets.values()) and ledger.tenants:
            rows = report(ledger, Live(1.0, 0, {}), ledger.rules.default)["taus"]
            assert [row["e_value"] for row in rows] == pytest.approx(expected.e_values(0.2).tolist())


def test_tenants_with_pending_audits_have_equal_shares_of_the_time(store: Path) -> None:
    """Whatever the number of their audits, and the length of the texts."""
    timing = SimpleNamespace(full_depth_s=lambda tokens: 1.0 + tokens)
    served = SimpleNamespace(group_s=lambda _: 0.0, model=jobs.NO_MODEL, timing=timing)
    threads = audit_engine.AuditThreads(1, WorkQueue(10), lambda _: None)
    threads._threads = [SimpleNamespace(ident=1)]  # type: ignore[list-item]
    for tenant, texts in (("loud", 5), ("quiet", 2), ("loud", 5)):
        threads.put([Audit(served, None, [], print, tenant=tenant) for _ in range(texts)])  # type: ignore[arg-type]
    order = [threads._next(True)[0].tenant for _ in range(12)]
    assert order == ["loud", "quiet"] * 2 + ["loud"] * 8
    for tenant, tokens in (("long", 2), ("short", 0)):  # 3 s and 1 s
        threads.put([Audit(served, None, [0] * tokens, print, tenant=tenant) for _ in range(4)])  # type: ignore[arg-type]
    order = [threads._next(True)[0].tenant for _ in range(8)]
    assert order == ["long", "short", "short", "short", "long", "short", "long", "long"]
    threads.put([Audit(served, None, [], print, tenant=tenant) for tenant in "aab"])  # type: ignore[arg-type]
    threads.drop([served])  # type: ignore[list-item]
    assert threads._pending == {}


def test_many_tenants_share_the_room_for_hashes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.audit.ledger.MAX_SEEN", 40)
    ledger = served_ledger(coordinator_of(guarantee=0.2), made(store))
    for key in range(40):
        for name in map(str, range(10)):
            count_all(ledger, [key], tenant=name)
    for tenant in ledger.tenants.values():
        assert 2 <= len(tenant._seen._older | tenant._seen._newer) <= 4


@pytest.mark.parametrize(
    ("value", "is_kept"), [(6e4, True), (7e4, False), (-7e4, False), (float("nan"), False)]
)
def test_records_have_only_finite_values(store: Path, value: float, is_kept: bool) -> None:
    one, states = Answering(made(store), learns=True, audit_share=0.5), STATES.copy()
    states[1, 2] = value
    one.answer(True, True, True)
    one.run_audit(0, states=states)
    one.run_audit(0, passed=[*one.PASSED[:-1], read(3, [1.0, value], None)])
    assert len(one.kept) == int(is_kept) + int(np.isfinite(value))
    one.run_audit(0, tokens=Tokens(TOKENS.ids, np.array([[0, 1]]), truncated=False))  # a pair of texts
    assert one.kept[-1].key not in {each.key for each in one.kept[:-1]}
    assert (one.kept[-1].client, one.kept[-1].share, one.kept[-1].states.dtype) == ("client", 0.5, np.float16)


def test_an_audited_text_near_to_a_fitted_one_has_no_key(store: Path) -> None:
    """So it counts only against the exits, in whichever process it was audited; see test_copies_count_only_against."""
    texts = [
        Tokens(np.array([[9, *ids, 9]]), np.zeros((1, 0)), truncated=False) for ids in ([1, 2, 3], [4, 5, 6])
    ]
    found = []
    for fitted in (None, FittedTexts(pieces_of(texts[0])[None])):
        one = Answering(made(store), guarantee=0.2)
        one.served.model.fitted = fitted
        for text in texts:
            one.answer(True, exits=4, tokens=text)
        found.append([key for each in one.settled for key in each.keys])
    assert None not in found[0] and len({*found[0]}) == 2 and found[1] == [None, found[0][1]]


def test_texts_that_are_settled_together_have_one_share(store: Path) -> None:
    auditor = Answering(made(store))
    tenant = auditor._tenant("one")
    for share in (1.0, 1.0, 0.5):
        auditor._open(tenant, Settled("one", 0, share), False).settled.skipped += 1
    auditor._settle(tenant)
    assert [(one.share, one.skipped) for one in auditor.settled] == [(1.0, 2), (0.5, 1)]
    for _ in range(ENTRY_TEXTS + 1):  # an entry does not grow for ever behind a pending audit
        auditor._open(tenant, Settled("one", 0, 1.0), False).settled.skipped += 1
    assert [one.settled.texts for one in tenant.entries] == [ENTRY_TEXTS, 1]


def test_a_pending_audit_of_one_tenant_delays_no_other(store: Path) -> None:
    one = Answering(made(store), guarantee=0.2)
    one.answer(True, tenant="slow")
    one.answer(False, True, tenant="other", exits=4)
    assert one.counted == [(2, True)] and one.settled[0].tenant == "other"
    # A tenant's reset discards only its own texts.
    one.apply(Standing(0, 0, {"slow": InForce(7, None, None)}))
    one.answer(False, tenant="other")
    one.run_audit(0)
    assert one.counted == [(2, True), (1, True)] and one.pending == 0


def test_after_a_reset_exits_are_learned_fast_again(store: Path) -> None:
    served, traffic, shares = made(store), Traffic(1), []
    on = Settings(audit_share=0.1)
    auditor = Auditor(served, on, lambda _: None, lambda *_: None, traffic=traffic)
    for num_changes in (0, 0, 1):
        traffic.texts = traffic.texts or 3 * LEARN_TEXTS
        auditor.apply(Standing(num_changes, num_changes, {}))
        shares.append(auditor.share)
    assert shares == [0.25, 0.25, 1.0]


def test_nothing_is_drawn_while_too_many_texts_wait(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.audit.auditor.MAX_ENTRIES", 6)
    monkeypatch.setattr("de3.server.audit.auditor.LEAST_ENTRIES", 1)
    auditor, shares = Answering(made(store)), []
    tenant, other = auditor._tenant("one"), auditor._tenant("other")
    for _ in range(4):
        shares.append(auditor._share_of(tenant, TAU))
        auditor._open(tenant, Settled("one", 0, 1.0), True)
    assert shares == [1, 1, 1, 0] and auditor._share_of(other, TAU) == 1
