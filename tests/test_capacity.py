"""The search for a server's capacity: with a stub that has a known limit, and on a real server."""

import math
from pathlib import Path
from typing import Any

import pytest

from de3.loadtest import capacity
from de3.loadtest.client import Answer, Run, Target
from de3.loadtest.texts import Sample
from tests.commands import de3
from tests.fixtures import make_rows


def test_the_search_finds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Warm:
        answers, seconds = [0] * 1600, 2.0  # 800 requests/s

    def tried(_: Any, __: Any, rate: float, ___: float) -> capacity.Step:
        return capacity.Step(rate, 10 if rate < 500 else 80, 0.0)

    monkeypatch.setattr(capacity, "send_traffic", lambda *_, **__: Warm())
    monkeypatch.setattr(capacity, "_try", tried)
    assert capacity.capacity(Target("http://x"), [], 50, 1) == pytest.approx(500, rel=0.03)
    assert capacity.capacity(Target("http://x"), [], 5, 1) == 0


def test_requests_without_an_answer_count_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Answer(0, 0.0, 0.0, done=0.5, status=200), Answer(0, 0.0, 0.0, done=0.1, status=503)]
    run = Run([Sample("a")], answers, 1.0, 2.0, 1, 0.0)
    monkeypatch.setattr(capacity, "send_traffic", lambda *_, **__: run)
    step = capacity._try(Target("http://x"), [], 2.0, 1)
    assert step == capacity.Step(2.0, 500.0, 0.5) and not step.keeps(1000)
    answers.pop(0)
    assert capacity._try(Target("http://x"), [], 2.0, 1) == capacity.Step(2.0, math.inf, 1.0)


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
