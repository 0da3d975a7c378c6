"""The search for a server's capacity: with a stub that has known limits, and on a real server."""

import math
from pathlib import Path
from typing import Any

import pytest

from de3.loadtest import capacity
from de3.loadtest.client import Answer, Run, Target
from de3.loadtest.texts import Sample
from tests.commands import de3
from tests.fixtures import make_rows


@pytest.mark.parametrize(
    ("slow_above", "refuses_above", "silent_above", "slo_ms", "found"),
    [(500, 900, 900, 50, 500), (500, 300, 900, 50, 300), (500, 900, 400, 50, 400), (500, 900, 900, 5, 0)],
)
def test_the_search_finds_the_limit(
    monkeypatch: pytest.MonkeyPatch,
    slow_above: int,
    refuses_above: int,
    silent_above: int,
    slo_ms: int,
    found: int,
) -> None:
    def send(_: Any, samples: list[Sample], seconds: float, rate: float | None = None, **__: Any) -> Run:
        """rate: None: a closed loop, which has 800 answers per second."""
        ok = Answer(0, 0.0, 0.0, done=0.08 if rate and rate > slow_above else 0.01, status=200)
        answers = [ok] * round((rate or 800) * seconds)
        if rate and rate > refuses_above:
            answers[:4] = [Answer(0, 0.0, 0.0, done=0.001, status=503)] * 4
        if rate and rate > silent_above:
            answers = []
        return Run(samples, answers, seconds, rate, 1, 0.0)

    monkeypatch.setattr(capacity, "send_traffic", send)
    steps = list[capacity.Step]()
    limit = capacity.capacity(Target("http://x"), [Sample("a")], slo_ms, 1, steps.append)
    assert limit == pytest.approx(found, rel=0.03)
    assert any(step.unanswered == 1 and step.p99_ms == math.inf for step in steps) == (silent_above < 900)


def test_advice_leaves_room_for_bursts() -> None:
    text = "\n".join(capacity.advice(500, 50, 10_000, 2))
    assert " 2 replicas of 2 cores" in "\n".join(capacity.advice(500, 50, 100, 2))  # one may be replaced
    assert "29 replicas of 2 cores" in text  # 10,000 / (0.7 * 500)
    assert "averageValue of de3_queue_texts: 6" in text and "target_requests=8" in text


@pytest.mark.slow
def test_on_a_real_server(store: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(text + "\n" for text, _ in make_rows(200, 9) if text.strip()))
    output = de3(
        f"loadtest capacity --texts {texts} --store {store} --model tiny --seconds 0.5 --slo-p99-ms 1000"
    )
    assert "one replica:" in output and "within 1000 ms" in output
