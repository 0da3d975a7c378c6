"""Dashboards and alerts: a real Prometheus, which has scraped a real server under load, evaluates every expression."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from de3.deploy.grafana import generate
from de3.deploy.grafana.panels import ALL_MODELS, DASHBOARDS
from de3.model_store.store import Store
from tests.fixtures import make_rows
from tests.prometheus import CONFIG, Prometheus, needs_prometheus, scraping
from tests.serving import until
from tests.stock import token_classifier, with_random_exits
from tests.upstream import LABELS, chat, model_of, opinion, served, service

TESTS = Path("tests/alerts_test.yml").absolute()
EXPRESSIONS = {q.expr for board in DASHBOARDS for panel in board.panels for q in panel.queries}


def rules() -> list[dict[str, Any]]:
    """The rules and alerts of Prometheus."""
    texts = [(CONFIG / name).read_text() for name in ("rules.yml", "alerts.yml")]
    return [rule for text in texts for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_committed_dashboards_are_those_that_the_code_generates() -> None:
    for path, text in generate.files().items():
        assert path.read_text() == text, "run python -m de3.deploy.grafana.generate"
    assert set(generate.FOLDER.glob("*")) == set(generate.files())


@needs_prometheus
def test_alert_rules() -> None:
    for arguments in (["check", "config", "--lint-fatal", "prometheus.yml"], ["test", "rules", TESTS]):
        command = ["promtool", *arguments]
        done = subprocess.run(command, check=False, cwd=CONFIG, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_to_stay_silent() -> None:
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    tested = {(case["alertname"], bool(case.get("exp_alerts"))) for case in cases}
    assert tested == {
        (rule["alert"], fires) for rule in rules() if "alert" in rule for fires in (True, False)
    }


@pytest.fixture(scope="module")
def prometheus(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a server while the server answers, audits and refuses texts."""
    texts = [text for text, _ in make_rows(400, 5)]
    stop = threading.Event()
    folder = tmp_path_factory.mktemp("upstream")
    store = Path(shutil.copytree(store, folder / "store"))
    with_random_exits(token_classifier("bert"), Store(store), "tags", "fp32")
    with (
        service(opinion) as upstream,
        served(
            folder,
            store,
            model_of(folder, LABELS, {**chat(upstream.url), "price_per_call": 1}),
            models=["tiny", "tags"],
            default_model="tiny",
            slo_p99_ms=1000,
            ood_policy="flag",
            guarantee=0.1,
            guarantee_missed=0.2,
            flags=["tiny=negative"],
            learn=True,
            state_dir=tmp_path_factory.mktemp("state"),
        ) as server,
        scraping(server.port, tmp_path_factory.mktemp("prometheus")) as running,
    ):

        def load() -> None:
            for i in range(10_000):
                if stop.is_set():
                    return
                server.classify(input=texts[i % 350 : i % 350 + 50])
                server.classify(input=texts[i % 400], tau=7 if i % 5 == 0 else 0.1)
                for model in ("tickets", "tags", f"unknown-{i}"):  # the last ones become no label values
                    server.classify(input=texts[i % 400], model=model)
                httpx.request(f"M{i}", f"{server.url}/path-{i}")

        thread = threading.Thread(target=load)
        thread.start()
        try:
            yield running
        finally:
            stop.set()
            thread.join()


def numbers(rows: list[dict[str, Any]]) -> bool:
    """True if there are rows, and all of their values are numbers."""
    return bool(rows) and all(row["value"][1] != "NaN" for row in rows)


@pytest.mark.slow
@needs_prometheus
def test_panels_and_rules_have_data_and_no_alert_fires(prometheus: Prometheus) -> None:
    empty = EXPRESSIONS | {rule["record"] for rule in rules() if "record" in rule}

    def all_have_data() -> bool:
        for expr in list(empty):
            asked = expr.replace("$__rate_interval", "5s").replace("$__range", "30s")
            rows = prometheus.query(asked.replace("$model", ALL_MODELS))
            if rows and all(row["value"][1] != "NaN" for row in rows):
                empty.remove(expr)
        return not empty

    try:
        until(all_have_data, "every panel and rule to have data")
    except AssertionError:
        pytest.fail("no data for:\n" + "\n".join(sorted(empty)))
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    (row,) = prometheus.query("de3_info")
    assert row["metric"]["job"] == "de3"


@pytest.mark.slow
@needs_prometheus
def test_label_values_are_bounded(prometheus: Prometheus) -> None:
    """None of our metrics has more than 100 series per model, although requests name many models, methods and paths."""
    rows = prometheus.query('count by (__name__) ({__name__=~"de3_.+", job="de3"})')
    counts = {row["metric"]["__name__"]: float(row["value"][1]) for row in rows}
    assert len(counts) > 20
    assert max(counts.values()) <= 400, max(counts, key=lambda name: counts[name])
