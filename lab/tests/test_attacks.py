"""A short run of every attack: the server survives, and a well-behaved client is answered, even if late."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab import resilience
from lab.attacks import ATTACKS
from lab.cli import app as lab_app
from lab.well_behaved import Answer, Phase
from tests.commands import invoke
from tests.serving import free_port

PHASE = Phase(100, 2.0, 5.0, 9.0, refused=0, errors=0, unanswered=0, reopened=0)
MEMORY = resilience.Memory(limited=True, before_mb=150.0, peak_mb=300.0, after_mb=160.0, back_s=1.0)


def row() -> resilience.Row:
    phases = dict.fromkeys(("before", "during", "after"), PHASE)
    return resilience.Row("x", "what", 64, 20.0, phases=phases, memory=MEMORY, survived=True)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_well_behaved_client_is_answered_beside(attack: str, store: Path, tmp_path: Path) -> None:
    result = invoke(
        f"attack --store {store} --model tiny --only {attack} --seconds 1.25 --connections 16 "
        f"--memory-wait-s 1 --port {free_port()} --out {tmp_path}",
        lab_app,
    )
    (found,) = json.loads((tmp_path / "attacks.json").read_text())
    assert found["survived"], result.output
    assert found["sent"]["connections"] > 0 and found["sent"]["megabytes"] > 0
    assert list(found["phases"]) == ["before", "during", "after"]
    for phase in found["phases"].values():
        assert phase["requests"] > 0 == phase["errors"] == phase["unanswered"], found
        assert phase["refused"] == 0 or ATTACKS[attack].may_refuse, found
    memory = found["memory"]
    assert 0 < memory["before_mb"] <= 1.1 * memory["peak_mb"] < 1.1 * resilience.MEMORY_BYTES / 1e6
    asked, kept = found["budgets"] or (0, 0)
    assert (asked > 0) == ATTACKS[attack].with_budgets and kept <= asked


def test_a_row_fails_for_what_the_well_behaved_client_sees() -> None:
    def why(may_refuse: float = 0.0, **during: float) -> str:
        found = row()
        found.phases = found.phases | {"during": replace(PHASE, **during)}
        return "; ".join(resilience.problems(found, may_refuse))

    assert why() == "" == why(p99_ms=50.0)
    assert why(p99_ms=51.0) == "p99 of 51 ms during the attack, at most 50 allowed"
    assert why(p99_ms=float("nan")) == "no well-behaved request was answered 200"
    assert why(refused=1) == "1 of 100 well-behaved requests were refused"
    assert why(refused=10, may_refuse=0.1) == "" != why(refused=11, may_refuse=0.1)
    assert why(unanswered=1, errors=2) == "during: 1 well-behaved requests unanswered, 2 errors"


def test_a_row_fails_for_what_the_server_does() -> None:
    slow = row()  # a slow machine is allowed five times its own p99
    slow.phases = {"before": replace(PHASE, p99_ms=20.0), "during": replace(PHASE, p99_ms=99.0)}
    assert resilience.problems(slow, 0) == []
    dead, fat, unlimited = row(), row(), row()
    dead.survived = False
    assert resilience.problems(dead, 0) == [
        "did not survive: a valid request is no longer answered as before"
    ]
    fat.memory = replace(MEMORY, after_mb=250.0, back_s=None)
    assert resilience.problems(fat, 0) == ["memory 250 MB after, 150 before"]
    unlimited.memory = replace(MEMORY, limited=False, peak_mb=1200.0)
    assert resilience.problems(unlimited, 0) == ["memory peak 1200 MB, above the limit"]


def test_a_phase_counts_each_request_once() -> None:
    statuses = [200, 200, 429, 503, 500, 422, 0]
    phase = Phase.of([Answer(0.0, 10.0 * i, status) for i, status in enumerate(statuses)])
    assert phase == Phase(7, 10.0, 10.0, 10.0, refused=2, errors=2, unanswered=1, reopened=0)
