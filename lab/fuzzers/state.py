"""Fuzzer of a tenant's state file of audits: edits of a state that a server with a guarantee saved.

Reading a file must not raise. If it is refused, it must be set aside, and audits must start from zero. If it is
accepted, the ledger must count audits of old and new tenants, report, and save a state that restores to the same state.
"""

import json
import logging
from functools import cache
from typing import Any

from hypothesis import strategies as st

from de3.exits.guarantee import Audited
from de3.runtime.rules import Rules
from de3.server.audit.ledger import Ledger
from de3.server.audit.report import Live, report
from de3.server.audit.state import StateDir, restore, state_of
from de3.server.audit.tenant import Settled
from de3.server.settings import Settings
from lab.fuzzers.edits import edited, spliced
from lab.fuzzers.run import Finding, Fuzzer
from lab.fuzzers.seeds import demo, new_folder

SETTINGS: dict[str, Any] = {"guarantee": 0.02}
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
TENANTS = ("", "a", "b", "new")


def _ledger() -> Ledger:
    """A ledger with a guarantee for the demo model."""
    manifest, settings = demo().manifest, Settings(**SETTINGS)
    return Ledger(manifest, Rules(manifest, settings), "kernels", 1.0, settings)


def _count(ledger: Ledger, tenants: tuple[str, ...], texts: int) -> None:
    """Count audits of some tenants; a few of the texts disagree with full depth at τ above 0.5."""
    exits = len(ledger.manifest.exit_layers)
    for number in range(texts):
        for name in tenants:
            settled = Settled(name, ledger.tenant(name).epoch, (1.0, 0.05)[number % 2], may_rise=True)
            settled.skipped += 3
            differs = [number % 40 == 0] + [False] * (exits - 1)
            settled.add(number % 97, Audited([0.5] + [None] * (exits - 1), [differs]), False)
            ledger.count([settled])


@cache
def _valid() -> Any:
    """The state of a tenant, with evidence and a reset."""
    ledger = _ledger()
    ledger.tenant("a")
    ledger.reset()
    _count(ledger, ("a",), 100)
    return json.loads(state_of(ledger, "a").model_dump_json())


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
    path = folder._file(ledger, "a")
    aside = path.with_suffix(".json.old")
    aside.unlink(missing_ok=True)
    path.write_bytes(data)
    folder.read(ledger)
    if aside.exists():
        if ledger.tenants:
            raise Finding("a refused state changed the ledger")
        return {}, "refused"
    if list(ledger.tenants) != ["a"]:
        raise Finding(f"it was read as the state of {list(ledger.tenants)}")
    audits = ledger.audits
    _compare(ledger)
    _count(ledger, TENANTS, 10)
    _compare(ledger)
    for tenant in ledger.tenants.values():
        if tenant.strictest is None or tenant.strictest.tau not in ledger.taus:
            raise Finding("a tenant's τ is not in the grid")
    json.dumps(report(ledger, Live(1.0, 0, {}), ledger.rules.default), allow_nan=False)
    if ledger.audits < min(10, audits):
        raise Finding("audits are lost")
    return {"audits": float(min(1000, audits))}, "accepted"


def _compare(ledger: Ledger) -> None:
    """Raise Finding unless saved states restore to the same states."""
    states, other = [state_of(ledger, name) for name in ledger.tenants], _ledger()
    for state in states:
        restore(other, type(state).model_validate_json(state.model_dump_json()))
    if (again := [state_of(other, name) for name in ledger.tenants]) != states:
        raise Finding(f"they read as other states: {again} instead of {states}"[:2000])


FUZZER = Fuzzer(_states(), check, _valid)
