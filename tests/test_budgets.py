"""Trade-offs over HTTP: speed-up, certified disagreement, latency budgets on slow layers, OOD texts, drift."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.model_store.manifest import TradeOff
from de3.model_store.segments import OnnxSegment
from de3.model_store.store import Store
from de3.server.engine import timing
from de3.server.errors import RequestError
from de3.server.models import load
from de3.server.ood import WINDOW
from de3.server.rules import MAX_LOAD_LOSS, Choice, Rules
from de3.server.settings import ExitOptions, Settings
from tests.fixtures import make_rows
from tests.serving import Server, serving, until

TEXTS = [text for text, _ in make_rows(60, 21)]
LAYER_S = 0.03
NOISE_S = 0.05  # tolerance for the client's own time
ATTEMPTS = 30  # on a busy machine, a check of timing is retried


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny", "tiny-int8"], threads=2) as running:
        yield running


@pytest.fixture(scope="module")
def rows(store: Path) -> list[TradeOff]:
    """The calibration rows of tiny for its default signal, by ascending τ."""
    manifest = Store(store).open("tiny").manifest
    return manifest.trade_offs()[manifest.defaults.signal, manifest.defaults.lam]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every layer take LAYER_S longer, as in a large model."""
    run = OnnxSegment.run

    def later(self: OnnxSegment, *arguments: Any) -> Any:
        time.sleep(LAYER_S)
        return run(self, *arguments)

    monkeypatch.setattr(OnnxSegment, "run", later)
    monkeypatch.setattr(timing, "thread_time", time.perf_counter)  # thread_time does not count sleep


def eventually(attempt: Callable[[], bool]) -> None:
    """Call `attempt`, which asserts invariants itself, until it returns True; fails the test after ATTEMPTS calls."""
    assert any(attempt() for _ in range(ATTEMPTS)), f"not once in {ATTEMPTS} attempts"


def test_a_speed_up_is_looked_up(server: Server, rows: list[TradeOff]) -> None:
    for wanted in (1, 1.5, 2.5):
        answer = server.classify(input=TEXTS[:3], target_speedup=wanted, explain=True).json()
        row = next(r for r in rows if r.speedup >= wanted)
        assert [r["exit"]["tau"] for r in answer["data"]] == [row.tau] * 3
        assert answer["tau_choice"] == {
            "by": "target_speedup",
            "wanted": wanted,
            "tau": row.tau,
            "signal": row.signal,
            "lambda": row.lam,
            "expected": {
                "accuracy": row.accuracy,
                "speedup": row.speedup,
                "disagreement": row.disagreement,
                "disagreement_bound": row.disagreement_bound,
            },
        }
    assert "tau_choice" not in server.classify(input=TEXTS[0], target_speedup=2).json()


def test_a_certificate_comes_with_the_answer(server: Server, rows: list[TradeOff]) -> None:
    answer = server.classify(input=TEXTS[0], max_disagreement=0.1).json()
    row = [r for r in rows if r.disagreement_bound <= 0.1][-1]
    assert answer["data"][0]["exit"]["tau"] == row.tau > 0
    assert answer["certificate"] == {
        "max_disagreement": 0.1,
        "bound": row.disagreement_bound,
        "confidence": 0.95,
        "samples": 600,  # with so few, both held-out parts certify
    }
    exact = server.classify(input=TEXTS[0], max_disagreement=0).json()
    assert exact["data"][0]["exit"]["tau"] == 0 and exact["certificate"]["bound"] == 0


def test_explain_says_where_tau_came_from(server: Server) -> None:
    assert server.classify(input="a film", explain=True).json()["tau_choice"]["by"] == "default"
    assert server.classify(input="a film", explain=True, tau=0.2).json()["tau_choice"]["by"] == "tau"
    budget = server.classify(input="a film", explain=True, latency_budget_ms=5000).json()["tau_choice"]
    assert (budget["by"], budget["wanted"]) == ("latency_budget_ms", 5000)


def test_the_calibration_is_published(server: Server, rows: list[TradeOff]) -> None:
    answer = httpx.get(server.url + "/v1/models/tiny/calibration").json()
    assert (answer["object"], answer["model"], answer["confidence"]) == ("calibration", "tiny:1", 0.95)
    assert [r for r in answer["table"] if (r["signal"], r["lambda"]) == (rows[0].signal, rows[0].lam)] == [
        r.model_dump(by_alias=True, mode="json") for r in rows
    ]
    missing = httpx.get(server.url + "/v1/models/other/calibration")
    assert missing.status_code == 404
    assert "there are: tiny:1, tiny-int8:1" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    ("setting", "by"),
    [
        ({"tau": 0.3}, "default"),
        ({"target_speedup": 2}, "target_speedup"),
        ({"max_disagreement": 0.1}, "max_disagreement"),
    ],
)
def test_a_setting_applies_to_requests_without_exit_options(
    store: Path, setting: dict[str, float], by: str
) -> None:
    with serving(store, models=["tiny"], **setting) as server:
        choice = server.classify(input="a film", explain=True).json()["tau_choice"]
        assert choice["by"] == by
        if "tau" in setting:
            assert choice["tau"] == 0.3
        own = server.classify(input="a film", tau=0.5, explain=True).json()["tau_choice"]
        assert (own["by"], own["tau"]) == ("tau", 0.5)


def test_the_settings_tau_applies_if_a_request_only_limits_the_layer(store: Path) -> None:
    with serving(store, models=["tiny"], tau=0) as server:
        assert server.classify(input="a film", max_layer=2).json()["data"][0]["exit"]["tau"] == 0
        manifest = server.service.artifacts[0].manifest
        other = next(name for name in ("risk", "entropy") if name != manifest.defaults.signal)
        tau = server.classify(input="a film", signal=other).json()["data"][0]["exit"]["tau"]
        row = next(r for r in manifest.trade_offs()[other, None] if r.tau == tau)
        assert row.disagreement == 0  # as cautious as the setting's τ = 0, which is for the default signal
        refused = server.classify(input="a film", **{"lambda": 50})  # the calibration has no rows for this λ
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "tau")


def test_the_tau_in_force_is_a_metric(store: Path) -> None:
    with serving(store, models=["tiny"], target_speedup=2) as server:
        tau = server.classify(input="a film").json()["data"][0]["exit"]["tau"]
        assert server.metric("de3_tau", model="tiny:1") == tau != 0


def test_a_setting_that_a_model_cannot_meet_prevents_the_start(store: Path) -> None:
    artifact = Store(store).open("tiny")
    with pytest.raises(ValueError, match="a setting cannot be met: target_speedup: at most"):
        load(artifact, Settings(store=store, target_speedup=5000))


def test_settings_choose_tau_in_one_way_only(store: Path) -> None:
    with pytest.raises(ValueError, match="target_speedup: cannot be combined with tau"):
        Settings(store=store, tau=0.1, target_speedup=2)


def test_an_answer_leaves_at_its_deadline(store: Path, slow: None) -> None:
    with serving(store, models=["tiny"], threads=2, tau=0) as server:
        full = server.classify(input=TEXTS[0], explain=True).json()["data"][0]
        assert full["exit"]["layer"] == 3
        for budget_ms, deepest in (
            (20, 0),
            (1.5 * 1000 * LAYER_S, 1),
            (2.5 * 1000 * LAYER_S, 2),
            (10_000, 3),
        ):
            wish = {"latency_budget_ms": budget_ms, "best_effort": True}  # not refused on a busy machine

            def in_time(wish: dict[str, Any] = wish, deepest: int = deepest) -> bool:
                started = time.perf_counter()
                row = server.classify(input=TEXTS[0], explain=True, **wish).json()["data"][0]
                took = time.perf_counter() - started
                layer = row["exit"]["layer"]
                assert layer <= deepest  # a busy machine may stop earlier, never later
                assert row["exit"]["reason"] == ("last_layer" if layer == 3 else "deadline")
                assert row["layers"] == full["layers"][: layer + 1]  # the same layers bit for bit, but fewer
                if deepest == 3:
                    return bool(layer == 3)
                return took < wish["latency_budget_ms"] / 1000 + LAYER_S + NOISE_S

            eventually(in_time)
        assert server.metric("de3_exit_layer_count", model="tiny:1", reason="deadline") >= 1


def test_a_budget_covers_every_text_of_a_batch(store: Path, slow: None) -> None:
    with serving(store, models=["tiny"], threads=2, tau=0) as server:
        budget_s = 8 * LAYER_S  # 10 texts of 3 layers on two threads would take 15 layer times
        wish = {"latency_budget_ms": 1000 * budget_s, "best_effort": True}

        def in_time() -> bool:
            started = time.perf_counter()
            data = server.classify(input=TEXTS[:10], **wish).json()["data"]
            took = time.perf_counter() - started
            layers = [row["exit"]["layer"] for row in data]
            assert len(layers) == 10 and sum(layers) <= 16
            assert {row["exit"]["reason"] for row in data} <= {"deadline", "last_layer"}
            # The first texts did not use up the budget.
            return took < budget_s + LAYER_S + NOISE_S and sum(layers[5:]) >= 4

        eventually(in_time)


def test_concurrent_budgets_are_all_kept(store: Path, slow: None) -> None:
    """Each batch alone could use its whole budget; together they share the threads."""
    with serving(store, models=["tiny"], threads=2, tau=0) as server, ThreadPoolExecutor(12) as pool:
        budget_s = 8 * LAYER_S

        def ask(texts: list[str]) -> tuple[int, float, list[int]]:
            started = time.perf_counter()
            answer = server.classify(input=texts, latency_budget_ms=1000 * budget_s)
            took = time.perf_counter() - started
            layers = [row["exit"]["layer"] for row in answer.json().get("data", [])]
            return answer.status_code, took, layers

        def all_in_time() -> bool:
            long = [pool.submit(server.classify, input=TEXTS[:20]) for _ in range(2)]  # without a budget
            asked = [pool.submit(ask, TEXTS[10 * i : 10 * i + 10]) for i in range(5)]
            found = [one.result(30) for one in asked]
            kept = [(took, layers) for status, took, layers in found if status == 200]
            assert {status for status, _, _ in found} <= {200, 503}
            assert all(one.result(60).status_code == 200 for one in long)
            in_time = all(took < budget_s + LAYER_S + NOISE_S for took, _ in kept)
            depth = sum(sum(layers) for _, layers in kept)  # the time that was left was used for more layers
            return in_time and len(kept) >= 3 and depth >= 5

        eventually(all_in_time)


def test_the_tokenizer_is_predicted_too(server: Server) -> None:
    measured = server.service.models.all[0].timing
    short, long = (measured.predict_first_exit(len("a film " * n)) for n in (50, 500))
    assert measured.first_exit_s(900) == measured.first_exit_s(64)  # limited to the model's maximum
    assert long > 2 * short


def test_a_budget_that_no_exit_can_meet_is_refused_unless_best_effort(server: Server) -> None:
    refused = server.classify(input=TEXTS[0], latency_budget_ms=0.01)
    error = refused.json()["error"]
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert error["param"] == "latency_budget_ms" and "would take about" in error["message"]
    row = server.classify(input=TEXTS[0], latency_budget_ms=0.01, best_effort=True, model="tiny").json()
    assert row["data"][0]["exit"]["layer"] == 0
    assert row["data"][0]["exit"]["reason"] in ("deadline", "threshold")


def test_a_deadline_overtakes_a_loaded_queue(store: Path, slow: None) -> None:
    with serving(store, models=["tiny"], threads=2, tau=0) as server, ThreadPoolExecutor(8) as pool:
        lists = [pool.submit(server.classify, input=TEXTS[:30]) for _ in range(4)]  # seconds of work
        until(lambda: len(server.service.engine.queue) > 60, "a full queue")
        for _ in range(5):
            assert server.classify(input=TEXTS[1], latency_budget_ms=10_000).status_code == 200
            assert len(server.service.engine.queue) > 0  # the others are still pending
        threading.Thread(target=server.service.engine.stop).start()
        assert all(found.result(60).status_code == 200 for found in lists)


FAR = "zzz qqq xxx"  # none of these words is in the vocabulary


@pytest.mark.parametrize("name", ["tiny", "tiny-int8"])
def test_ood_texts_are_flagged_or_go_deeper(store: Path, name: str) -> None:
    texts = [*TEXTS, FAR, *(" ".join([w] * 30) for w in ("the", "film", "good", "plot"))]
    found = {}
    for policy in ("off", "flag", "deepen"):
        with serving(store, models=[name], ood_policy=policy, tau=0.5) as server:
            found[policy] = server.classify(input=texts, ood=True).json()["data"]
            far = server.metric("de3_ood_texts_total", model=f"{name}:1")
        flagged = [row.get("out_of_distribution", False) for row in found[policy]]
        assert sum(flagged) == far and (far > 0) == (policy != "off")
    for off, flag, deepen in zip(found["off"], found["flag"], found["deepen"], strict=True):
        is_far = flag.pop("out_of_distribution", False)
        assert flag == off
        if is_far:
            assert deepen["exit"]["layer"] >= off["exit"]["layer"]
            assert deepen["exit"]["tau"] in (
                0.25,
                0.5,
            )  # it may have been OOD only at its exit
        elif not deepen.get("out_of_distribution"):
            assert deepen == off


@pytest.mark.parametrize("name", ["tiny", "tiny-int8"])
def test_ood_texts_are_flagged_at_full_depth_too_and_explain_changes_nothing(store: Path, name: str) -> None:
    texts = [*TEXTS, FAR]
    with serving(store, models=[name], ood_policy="flag", tau=0) as server:
        plain = server.classify(input=texts).json()["data"]
        explained = server.classify(input=texts, explain=True).json()["data"]
    flags = [row.get("out_of_distribution", False) for row in plain]
    assert any(flags)
    assert flags == [row.get("out_of_distribution", False) for row in explained]
    assert {row["exit"]["layer"] for row in plain} == {3}


def test_the_ood_score_is_optional_and_independent_of_the_batch(server: Server) -> None:
    row = server.classify(input=TEXTS[0], tau=0, ood=True).json()["data"][0]
    assert 0 <= row["ood_score"] < 1
    assert "ood_score" not in server.classify(input=TEXTS[0]).json()["data"][0]
    # Each text has its own score, whatever is in its batch.
    many = server.classify(input=TEXTS, tau=0.3, ood=True, model="tiny-int8").json()["data"]
    alone = [server.classify(input=t, tau=0.3, ood=True, model="tiny-int8").json()["data"][0] for t in TEXTS]
    assert [r["ood_score"] for r in many] == [r["ood_score"] for r in alone]


def test_drift_is_a_metric_once_the_window_is_full(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.server.ood.MAX_PER_S", 1e9)  # sample every text
    with serving(store, models=["tiny-int8"], tau=0.3) as server:

        def drift(statistic: str) -> float | None:
            labels = {"model": "tiny-int8:1", "signal": "nearest", "statistic": statistic}
            return server.service.metrics.registry.get_sample_value("de3_drift", labels)

        like = [text for text, _ in make_rows(WINDOW, 77)]
        server.classify(input=like[:200])
        assert drift("psi") is None
        for start in range(0, WINDOW, 250):
            server.classify(input=like[start : start + 250])
        psi, ks = drift("psi"), drift("ks")
        assert psi is not None and ks is not None and psi < 0.25
        for _ in range(2):
            server.classify(input=[FAR] * 250)
        assert (drift("psi") or 0) > 1 and (drift("ks") or 0) > ks


def test_under_load_tau_is_raised_in_the_steps_of_the_calibration(store: Path, rows: list[TradeOff]) -> None:
    manifest = Store(store).open("tiny").manifest
    manifest = manifest.model_copy(update={"defaults": manifest.defaults.model_copy(update={"tau": 0.0})})
    rules = Rules(manifest, Settings(latency_budget_ms=50))
    assert len(rules.steps) > 1
    assert rules.in_force(0) is rules.default
    for level in range(1, len(rules.steps) + 3):
        assert rules.in_force(level) is rules.steps[min(level, len(rules.steps)) - 1]
    for step in rules.steps:
        assert (step.by, step.is_degraded, step.budget_s) == ("overload", True, 0.05)  # the budget is kept
        assert step.expected is not None and step.expected.accuracy >= rows[0].accuracy - MAX_LOAD_LOSS
    free = Rules(manifest, Settings(min_accuracy=0, max_load_disagreement=1))
    assert len(free.steps) > len(rules.steps)


def test_the_expected_time_of_a_text_counts_its_layers_and_one_for_the_tokenizer(
    rows: list[TradeOff],
) -> None:
    rule = ExitRule(0.5, Entropy())
    assert Choice(rule, "default").share(6) == 1
    row = rows[0].model_copy(update={"mean_exit_layer": 2.5})
    assert Choice(rule, "default", expected=row).share(6) == 0.5


def test_max_layer_is_at_least_the_first_exit_and_is_not_calibrated(store: Path) -> None:
    manifest = Store(store).open("tiny").manifest
    rules = Rules(manifest.model_copy(update={"exit_layers": [1, 2, 3]}), Settings())
    tau = rules.default.rule.tau
    assert rules.of(ExitOptions(tau=tau)).expected is not None
    for layer in (1, 3):
        choice = rules.of(ExitOptions(tau=tau, max_layer=layer))
        assert choice.rule.max_layer == layer and choice.expected is None
    for layer in (0, 4):
        with pytest.raises(RequestError, match=f"must be from 1 to 3, got {layer}"):
            rules.of(ExitOptions(max_layer=layer))
