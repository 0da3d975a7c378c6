"""The load controller, in a simulation with a fake clock and over HTTP."""

from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from de3.runtime.engine.engine import Engine
from de3.server import overload
from de3.server.admission import Admission
from de3.server.overload import CALM_S, CALM_STEP_S, TICK_S, Controller
from de3.server.settings import Settings
from tests import jobs
from tests.fixtures import make_rows
from tests.serving import Gate, in_event_loop, serving, until

OBJECTIVE_S, LEVELS, CAPACITY, GAIN = 0.05, 5, 1000.0, 0.06


class Simulation:
    """A server that answers CAPACITY texts/s at level 0, and GAIN · CAPACITY more for each level above it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.controller = Controller(OBJECTIVE_S, lambda: LEVELS, CAPACITY, threads=2, clock=lambda: self.now)
        self.in_flight = self.answered = self.shed = self.asked = self.worst_s = 0.0

    def tick(self, in_flight: int, rate: float) -> None:
        """A tick in which texts were answered at this rate."""
        self.now += TICK_S
        self.answered += rate * TICK_S
        self.controller.tick(in_flight, 0, round(self.answered))

    @property
    def capacity(self) -> float:
        return 1 / self.controller.predicted_s(3)  # of three texts on two threads, one waits

    def run(self, seconds: float, rate: float) -> list[int]:
        """Run with `rate` texts/s for some seconds; returns the level at the end of each tick."""
        levels, step = [], 0.005
        for _ in range(round(seconds / TICK_S)):
            for _ in range(round(TICK_S / step)):
                self.now += step
                self.asked += rate * step
                if self.controller.sheds(int(self.in_flight), lambda: int(self.in_flight)):
                    self.shed += rate * step
                else:
                    self.in_flight += rate * step
                speed = CAPACITY * (1 + GAIN * self.controller.level)
                done = min(self.in_flight, speed * step)
                self.in_flight -= done
                self.answered += done
                self.worst_s = max(self.worst_s, self.in_flight / speed)
            self.controller.tick(int(self.in_flight), int(self.in_flight), int(self.answered))
            levels.append(self.controller.level)
        return levels


@pytest.mark.parametrize(("load", "shed"), [(0.9, 0), (1.15, 0), (2, 1 - (1 + GAIN * LEVELS) / 2)])
def test_tau_is_raised_as_the_load_requires_and_the_excess_is_shed(load: float, shed: float) -> None:
    simulation = Simulation()
    levels = simulation.run(20, load * CAPACITY)
    assert max(levels) >= min(LEVELS, (load - 1) / GAIN)
    assert max(levels) == 0 or load > 1
    assert sum(a != b for a, b in pairwise(levels)) < 30  # in 400 ticks: it does not oscillate
    assert simulation.worst_s < OBJECTIVE_S
    assert simulation.shed / simulation.asked == pytest.approx(shed, abs=0.05 * (shed > 0))


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 200)), max_size=60))
@example([(5, 0)] * 6)
def test_the_level_stays_in_range_and_only_the_last_one_sheds(ticks: list[tuple[int, int]]) -> None:
    now, answered = 0.0, 0
    controller = Controller(OBJECTIVE_S, lambda: LEVELS, CAPACITY, threads=2, clock=lambda: now)
    for in_flight, more in ticks:
        now += TICK_S
        answered += more
        before = controller.level
        controller.tick(in_flight, in_flight, answered)
        assert abs(controller.level - before) <= 1
        assert 0 <= controller.level <= LEVELS
        before = controller.level
        if controller.predicted_s(5) <= overload.SHED_ABOVE * OBJECTIVE_S:  # not if nothing finishes for long
            assert not controller.sheds(5, lambda: pytest.fail("so few texts need not be counted"))
        assert controller.sheds(10**9, lambda: 10**9) == (before == LEVELS)
        assert controller.level == LEVELS
        controller.level = before  # undo the jump to the last level


def test_over_http_the_default_tau_rises_before_shedding_and_explicit_options_are_kept(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(overload, "CALM_S", 1e9)  # the level does not fall
    limits = {"slo_p99_ms": 100, "min_accuracy": 0, "max_queue": 4000}
    with serving(store, models=["tiny"], tau=0, threads=2, **limits) as server:
        texts, admission = [text for text, _ in make_rows(50, 5)], server.service.admission
        waiting = [Thread(target=server.classify, kwargs={"input": texts}) for _ in range(8)]
        for thread in waiting:
            thread.start()
        until(lambda: admission.level == len(server.service.models.all[0].rules.steps) > 0, "the last level")
        client = {"client": ("127.0.0.1", 1), "headers": []}
        until(lambda: server.frontend.sheds(client), "shedding")

        def shed() -> float:
            return server.metric("de3_rejected_total", cause="shed")

        until(lambda: admission.texts.total / 50 + shed() == 8, "all lists to be held or shed")
        before = shed()
        refused = server.classify(input="a film")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert shed() == before + 1
        assert server.metric("de3_tau", model="tiny:1") > 0
        gate.open()
        until(lambda: admission.texts.total < 5, "the queue to empty")
        degraded = server.metric("de3_degraded_texts_total", model="tiny:1")
        for options in ({}, {"tau": 0.01}, {"target_speedup": 2}):
            choice = server.classify(input="a film", explain=True, **options).json()["tau_choice"]
            assert choice["set_by"] == next(iter(options), "overload")
        assert server.metric("de3_degraded_texts_total", model="tiny:1") == degraded + 1
        for thread in waiting:
            thread.join()


def test_only_a_server_that_was_never_idle_lowers_its_capacity() -> None:
    ticking = Simulation()
    for _ in range(5):
        ticking.controller.sheds(0, lambda: 0)  # a request arrived while nothing was in flight
        ticking.tick(10, 20)
    assert ticking.capacity == pytest.approx(CAPACITY)
    for _ in range(5):
        ticking.tick(10, 20)
    assert ticking.capacity < CAPACITY / 2
    ticking.tick(0, 3 * CAPACITY)  # a high capacity is still noticed
    assert ticking.capacity == pytest.approx(3 * CAPACITY)


@pytest.mark.parametrize(("rate", "step_s"), [(0.8 * CAPACITY, CALM_STEP_S), (0.5 * CAPACITY, TICK_S)])
def test_tau_falls_slowly_if_the_load_is_near_the_capacity(rate: float, step_s: float) -> None:
    ticking = Simulation()
    ticking.controller.level = LEVELS
    while ticking.controller.level:
        ticking.tick(0, rate)
    assert ticking.now == pytest.approx(CALM_S + (LEVELS - 1) * step_s, abs=LEVELS * TICK_S)


@in_event_loop
async def test_a_text_waits_only_for_unfinished_ones_that_it_does_not_overtake() -> None:
    timing = SimpleNamespace(full_depth_s=lambda _: 0.1)  # so the 30 ms of the objective are less than a text
    manifest = SimpleNamespace(upstream=None, num_layers=6)
    rules = SimpleNamespace(default=SimpleNamespace(share=lambda _: 1.0), steps=[])
    served = SimpleNamespace(model=SimpleNamespace(manifest=manifest), rules=rules, timing=timing)
    models: Any = SimpleNamespace(all=[served])
    admission, engine = Admission(Settings(slo_p99_ms=100), models), Engine(2, 100)
    admission.start(engine)
    batch = jobs.job(["x"] * 10, [1e-6] * 9 + [60.0], client="busy")
    admission.admit(batch)
    assert admission.sheds(lambda: "busy")
    assert not admission.sheds(lambda: "new")  # this client has nothing in flight, and precedes the busy one
    assert admission.sheds(lambda: None)  # an unauthorized client
    for item in batch.items[:7]:
        batch.finish(item, ValueError())
    assert admission.sheds(lambda: "busy")
    engine.queue.put(batch)  # the last one is due later than a new text
    assert not admission.sheds(lambda: "busy")
    admission.release(batch)
    assert not admission.sheds(lambda: None)
