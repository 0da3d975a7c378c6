"""Fuzzer of the state file of audits: edits of a state that a server with a guarantee saved.

Reading a file must not raise. If it is refused, it must be set aside, and audits must start from zero. If it is
accepted, the ledger must count audits of old and new clients, report, and save a state that restores to the same state.
"""

import json
import logging
from functools import cache
from typing import Any

from hypothesis import strategies as st

from de3.exits.promises import Promises
from de3.server.audit.ledger import Audited, Ledger, Settled
from de3.server.audit.report import Live, report
from de3.server.audit.state import StateDir, restore, state_of
from de3.server.rules import Rules
from de3.server.settings import Settings
from lab.fuzzers.edits import edited, spliced
from lab.fuzzers.run import Finding, Fuzzer
from lab.fuzzers.seeds import demo, new_folder

SETTINGS: dict[str, Any] = {"guarantee": 0.02, "guarantee_start": "calibrated"}
FRAGMENTS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\ud800",
    b"\xff",
    b"1e999",
    b"NaN",
    b"-",
    b"e5",
    b"9" * 20,
)
CLIENTS = ("a", "b", "c", "new")


def _ledger() -> Ledger:
    """A ledger with a guarantee for the demo model."""
    manifest, settings = demo().manifest, Settings(**SETTINGS)
    return Ledger(manifest, Rules(manifest, settings), "kernels", 1.0, settings)


def _promises(ledger: Ledger) -> Promises:
    assert ledger.promises is not None
    return ledger.promises


def _count(ledger: Ledger, clients: tuple[str, ...], texts: int) -> None:
    """Count audits of some clients; a few of the texts disagree with full depth at τ above 0.5."""
    for number in range(texts):
        audit = Audited([0.5, None], [number % 40 == 0, False], [1, 6], False)
        keys = [number % 7, number, number + 1, number + 2]
        share = (1.0, 0.05)[number % 2]
        settled = [Settled(client, share, 3, keys, audit) for client in clients]
        ledger.count(settled, ledger.standing.epoch, True)


@cache
def _valid() -> Any:
    """A state with the evidence of three clients and a reset."""
    ledger = _ledger()
    ledger.reset()
    _count(ledger, CLIENTS[:3], 100)
    return json.loads(state_of(ledger).model_dump_json())


@cache
def _state_dir() -> StateDir:
    logging.getLogger("de3").setLevel(logging.ERROR)
    return StateDir(new_folder())


@st.composite
def _states(draw: st.DrawFn) -> bytes:
    data = json.dumps(draw(edited(_valid(), draw(st.sampled_from([0, 1, 1, 2, 5]))))).encode()
    return draw(spliced(data, FRAGMENTS)) if draw(st.integers(0, 9)) == 0 else data


def check(data: bytes) -> tuple[dict[str, float], str]:
    """Read a state as a server does at startup, and continue from it."""
    folder, ledger = _state_dir(), _ledger()
    path = folder._file(ledger)
    aside = path.with_suffix(".json.old")
    aside.unlink(missing_ok=True)
    path.write_bytes(data)
    fresh = state_of(ledger)
    folder.read(ledger)
    if aside.exists():
        if state_of(ledger).model_copy(update={"since": 0}) != fresh.model_copy(update={"since": 0}):
            raise Finding("a refused state changed the ledger")
        return {}, "refused"
    audits = ledger.evidence.audits
    _compare(ledger)
    _count(ledger, CLIENTS, 10)
    _compare(ledger)
    for client in CLIENTS:
        tau, _ = _promises(ledger).choose(client)
        if tau not in ledger.taus:
            raise Finding(f"τ = {tau} is not in the grid")
    json.dumps(report(ledger, Live(1.0, 0, {}), ledger.rules.default), allow_nan=False)
    if ledger.evidence.audits < min(10, audits):
        raise Finding("audits are lost")
    return {"promises": float(len(_promises(ledger).by_left_out))}, "accepted"


def _compare(ledger: Ledger) -> None:
    """Raise Finding unless a saved state restores to the same state."""
    state, other = state_of(ledger), _ledger()
    restore(other, type(state).model_validate_json(state.model_dump_json()))
    again = state_of(other)
    if again != state:
        raise Finding(f"it reads as another state: {again} instead of {state}"[:2000])


FUZZER = Fuzzer(_states(), check, _valid)
