"""The speed-up in time of `de3 evaluate`: it counts the tokenizer, the embeddings and every exit that a text passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from de3.commands import timing
from de3.commands.timing import Engine, measure_times
from de3.data.examples import Example
from de3.model_store.store import Store
from de3.runtime.loading import load
from de3.server.settings import Settings
from de3.training.evaluate import Times
from tests.fixtures import make_rows


def test_a_speedup_in_time_is_the_ratio_of_the_summed_times() -> None:
    times = Times(np.array([10.0, 1.0]), np.array([[2.0, 0.0], [4.0, 0.5], [13.0, 1.0]]))
    found = times.speedup(np.array([0, 1, 2]), np.array([10, 20, 30]))
    assert found == pytest.approx((20 + 30 + 40) / (2 + 14 + 43))


def test_times_of_passes_count_what_comes_before_the_layers_and_every_exit(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = load(Store(store).open("tiny-int8"), Settings(runtime="onnxruntime"))
    start, exit_cost, token = 30.0, 7.0, 2.0  # costs of a text, of an exit, and of a token in a layer
    clock, outcomes = [0.0], []

    def classify(engine: Engine, text: Any, choice: Any) -> None:
        outcome = original(engine, text, choice)
        exits = outcome.layer + 1 if choice.rule.tau else 1  # at τ = 0 only the last exit
        length = len(served.model.tokenize(text.text))
        clock[0] += start + token * length * outcome.layer + exit_cost * exits
        outcomes.append((choice.rule.max_layer, outcome.layer))

    original = Engine.classify
    monkeypatch.setattr(Engine, "classify", classify)
    monkeypatch.setattr(timing, "thread_time", lambda: clock[0])
    times = measure_times(served, [Example(text, 0) for text, _ in make_rows(60, 3)], count=40)
    assert {layer for _, layer in outcomes} == {0, 1, 2, 3}
    assert all(layer == (3 if asked is None else asked) for asked, layer in outcomes)
    assert times.full == pytest.approx([start + exit_cost, 3 * token])
    expected = [[start + exit_cost * (m + 1), m * token] for m in range(4)]
    assert times.exits == pytest.approx(np.array(expected), abs=1e-6)
    # (s + M·l + e) / (s + m·l + (m + 1)·e) for an exit at layer m; s, l, e: costs of a text, a layer and an exit
    full = start + exit_cost + 3 * token * 20
    early = start + 2 * exit_cost + token * 20
    assert times.speedup(np.array([1]), np.array([20])) == pytest.approx(full / early)
