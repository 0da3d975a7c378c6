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
    ("above", "slo_ms", "found"),
    [("slow", 50, 500), ("refuses", 50, 500), ("silent", 50, 500), ("slow", 5, 0)],
)
def test_the_search_finds_the_limit(
    monkeypatch: pytest.MonkeyPatch, above: str, slo_ms: int, found: int
) -> None:
    def send(_: Any, samples: list[Sample], seconds: float, rate: float | None = None, **__: Any) -> Run:
        """rate: None: a closed loop, which has 800 answers per second."""
        how = above if rate and rate > 500 else ""
        ok = Answer(0, 0.0, 0.0, done=0.08 if how == "slow" else 0.01, status=200)
        answers = [ok] * round((rate or 800) * seconds)
        if how == "refuses":
            answers[:4] = [Answer(0, 0.0, 0.0, done=0.001, status=503)] * 4
        return Run(samples, [] if how == "silent" else answers, seconds, rate, 1, 0.0)

    monkeypatch.setattr(capacity, "send_traffic", send)
    steps = list[capacity.Step]()
    limit = capacity.capacity(Target("http://x"), [Sample("a")], slo_ms, 1, steps.append)
    assert limit == pytest.approx(found, rel=0.03)
    assert any(step.unanswered == 1 and step.p99_ms == math.inf for step in steps) == (above == "silent")


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
