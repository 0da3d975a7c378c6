"""Trade-offs over HTTP: speed-up, certified disagreement, latency budgets on slow layers, OOD texts, drift."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.model_store.segments import OnnxLayers
from de3.model_store.store import Store
from de3.runtime.engine.job import REPLY_S, REPLY_TEXT_S, Item, Job
from de3.runtime.ood import WINDOW
from de3.runtime.rules import Rules
from de3.server.settings import Settings
from tests.fixtures import make_rows
from tests.serving import Gate, serving, until

TEXTS = [text for text, _ in make_rows(60, 21)]
LAYER_S = 0.03


class Clock:
    """The engine's clock: it stands still, except that the embeddings and each layer of a text take LAYER_S.

    Attributes:
        ended: the time at which each text was finished, by its job and its index.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.perf_counter()
        self.ended: dict[tuple[Job, int], float] = {}
        init, finish = Job.__post_init__, Job.finish

        def slowed(run: Callable[..., Any]) -> Callable[..., Any]:
            def slow(*arguments: Any) -> Any:
                self.now += LAYER_S
                return run(*arguments)

            return slow

        def submitted_now(job: Job) -> None:
            job.submitted = self.now
            init(job)

        def finished(job: Job, item: Item, result: Any) -> bool:
            self.ended[job, item.index] = self.now
            return finish(job, item, result)

        for name in ("embed", "run"):
            monkeypatch.setattr(OnnxLayers, name, slowed(getattr(OnnxLayers, name)))
        monkeypatch.setattr(Job, "__post_init__", submitted_now)
        monkeypatch.setattr(Job, "finish", finished)
        clocks = [
            f"{name}.perf_counter"
            for name in ("engine.run", "engine.deadlines", "engine.engine", "fair_queue")
        ]
        for clock in (*clocks, "engine.timing.perf_counter", "engine.timing.thread_time"):
            monkeypatch.setattr(f"de3.runtime.{clock}", lambda: self.now)
        monkeypatch.setattr("de3.server.service.run_longest", lambda _: None)  # by each thread as it starts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def budget_ms(layers: float, texts: int = 1) -> float:
    """A budget in which one thread can run this many layers, those of all texts together."""
    return 1000 * (layers * LAYER_S + REPLY_S + texts * REPLY_TEXT_S)


def test_an_answer_leaves_at_its_deadline(store: Path, clock: Clock) -> None:
    with serving(store, models=["tiny"], threads=1, tau=0) as server:
        full = server.classify(input=TEXTS[0], explain=True).json()["data"][0]
        for layers, deepest in ((0.5, 0), (1.5, 0), (2.5, 1), (3.5, 2), (4.5, 3)):
            wish = {"latency_budget_ms": budget_ms(layers), "best_effort": True}
            row = server.classify(input=TEXTS[0], explain=True, **wish).json()["data"][0]
            assert row["exit"]["layer"] == deepest
            assert row["exit"]["reason"] == ("last_layer" if deepest == 3 else "deadline")
            assert row["layers"] == full["layers"][: deepest + 1]  # bit for bit
        assert server.metric("de3_exit_layer_count", model="tiny:1", reason="deadline") == 4
        refused = server.classify(input=TEXTS[0], latency_budget_ms=0.01)  # no exit can meet it
        error = refused.json()["error"]
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert error["param"] == "latency_budget_ms" and "would take about" in error["message"]


def test_concurrent_budgets_are_all_kept_and_overtake_a_loaded_queue(
    store: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(store, models=["tiny"], threads=1, tau=0) as server, ThreadPoolExecutor(4) as pool:
        queue = server.service.engine.queue

        def ask(layers: float) -> Future[httpx.Response]:
            before = len(queue)
            wish = {"latency_budget_ms": budget_ms(layers, 10)} if layers else {}
            asked = pool.submit(server.classify, input=TEXTS[:10], **wish)
            until(lambda: asked.done() or len(queue) == before + 10, "the texts to be pending, or refused")
            return asked

        # Ten texts take ten times LAYER_S to their first exits. Each batch alone could use its whole budget.
        asked = [ask(layers) for layers in (0, 15.5, 15.5, 25.5, 35.5)]
        gate.open()
        assert [one.result(60).status_code for one in asked] == [200, 200, 503, 200, 200]
    kept = {at: job for (job, _), at in clock.ended.items() if job.deadline is not None}
    assert all(at <= (job.deadline or 0) for at, job in kept.items())
    assert max(kept) < min(at for (job, _), at in clock.ended.items() if job.deadline is None)
    answers = [one.result().json().get("data", []) for one in asked[1:]]
    layers = [row["exit"]["layer"] for rows in answers for row in rows]
    assert len(layers) == 30 and sum(layers) >= 4  # the time that was left was used for more layers


FAR = "zzz qqq xxx"  # none of these words is in the vocabulary


def test_ood_texts_are_flagged_or_go_deeper(store: Path) -> None:
    texts = [*TEXTS, FAR, *(" ".join([w] * 30) for w in ("the", "film", "good", "plot"))]
    found = {}
    for policy in ("off", "flag", "deepen"):
        with serving(store, models=["tiny-int8"], ood_policy=policy, tau=0.5) as server:
            found[policy] = rows = server.classify(input=texts, ood=True).json()["data"]
            flagged = sum(row.get("out_of_distribution", False) for row in rows)
            assert flagged == server.metric("de3_ood_texts_total", model="tiny-int8:1")
            assert (flagged > 0) == (policy != "off")
            # Each text has its own score, whatever is in its batch, and only on request.
            row = server.classify(input=FAR, ood=True).json()["data"][0]
            assert 0 <= row.pop("ood_score") == rows[len(TEXTS)]["ood_score"] < 1
            assert server.classify(input=FAR).json()["data"][0] == row
            # At full depth, too, texts are flagged.
            full = server.classify(input=FAR, tau=0).json()["data"][0]
            assert full["exit"]["layer"] == 3
            assert full.get("out_of_distribution", False) == (policy != "off")
    assert any(row["exit"]["tau"] == 0.25 for row in found["deepen"])
    for off, flag, deepen in zip(found["off"], found["flag"], found["deepen"], strict=True):
        is_far = flag.pop("out_of_distribution", False)
        assert flag == off
        if is_far:
            assert deepen["exit"]["layer"] >= off["exit"]["layer"]
            assert deepen["exit"]["tau"] in (0.25, 0.5)  # it may have been OOD only at its exit
        elif not deepen.get("out_of_distribution"):
            assert deepen == off


def test_drift_is_a_metric_once_the_window_is_full(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_PER_S", 1e9), ("STATISTICS_S", 0.0)):  # every text, and now
        monkeypatch.setattr(f"de3.runtime.ood.{name}", value)
    with serving(store, models=["tiny-int8"], tau=0.3) as server:

        def drift(statistic: str) -> float | None:
            labels = {"model": "tiny-int8:1", "signal": "nearest", "statistic": statistic}
            return server.service.metrics.registry.get_sample_value("de3_drift", labels)

        like = [text for text, _ in make_rows(WINDOW, 77)]
        server.classify(input=like[:250])
        assert drift("psi") is None
        server.classify(input=like[250:])
        psi, ks = drift("psi"), drift("ks")
        assert psi is not None and ks is not None and psi < 0.25
        server.classify(input=[FAR] * 250)
        assert (drift("psi") or 0) > 1 and (drift("ks") or 0) > ks


def test_the_expected_time_of_a_text_counts_its_layers_and_the_tokenizer(store: Path) -> None:
    known = Rules(Store(store).open("tiny").manifest, Settings(store=store, target_speedup=1.5)).default
    assert known.set_by == "target_speedup" and known.expected is not None
    choice = replace(known, expected=known.expected.model_copy(update={"mean_exit_layer": 2.5}))
    assert (choice.share(6), replace(choice, expected=None).share(6)) == (0.5, 1)
