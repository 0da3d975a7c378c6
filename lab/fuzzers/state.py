"""Fuzzer of the state file of audits: edits of a state that a server with a guarantee saved.

Reading a file must not raise. A refused file is set aside, and audits start from zero. After an accepted one, the
auditor counts audits of old and new clients, reports, and saves a state that restores to the same state.
"""

import json
import logging
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from de3.exits.promise import Profile
from de3.exits.promises import Promises
from de3.server.audit.auditor import Auditor
from de3.server.audit.report import report
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


def _auditor() -> Auditor:
    """An auditor with a guarantee for the demo model, of which only the manifest is loaded."""
    artifact = demo()
    settings = Settings(**SETTINGS)
    model = SimpleNamespace(manifest=artifact.manifest, full_name=artifact.full_name, runtime="kernels")
    served: Any = SimpleNamespace(
        model=model, rules=Rules(artifact.manifest, settings), monitor=SimpleNamespace(caution=1.0)
    )
    return Auditor(served, settings, lambda _: None, lambda served: served.rules.default)


def _promises(auditor: Auditor) -> Promises:
    assert auditor.promises is not None
    return auditor.promises


def _count(auditor: Auditor, clients: tuple[str, ...], texts: int) -> None:
    """Count audits of some clients; a few of them disagree with full depth at the higher τ."""
    taus, promises = auditor.taus, _promises(auditor)
    for number in range(texts):
        differs = (taus > 0.5) & (number % 40 == 0)
        audit = Profile(differs, np.where(taus > 0.5, 1, 6))
        share = (1.0, 0.05)[number % 2]
        auditor.evidence.skip(share, 3)
        auditor.evidence.add(share, audit, False)
        for client in clients:
            promises.skip(client, share, 3)
            promises.add(client, share, audit, is_repeat=number % 7 == 0)
    promises.advance()
    auditor.serve(auditor.served)


@cache
def _valid() -> Any:
    """A state with the evidence of three clients and a reset."""
    auditor = _auditor()
    auditor.reset()
    _count(auditor, CLIENTS[:3], 100)
    return json.loads(state_of(auditor).model_dump_json())


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
    folder, auditor = _state_dir(), _auditor()
    path = folder._file(auditor)
    aside = path.with_suffix(".json.old")
    aside.unlink(missing_ok=True)
    path.write_bytes(data)
    fresh = state_of(auditor)
    folder.read(auditor)
    if aside.exists():
        if state_of(auditor).model_copy(update={"since": 0}) != fresh.model_copy(update={"since": 0}):
            raise Finding("a refused state changed the auditor")
        return {}, "refused"
    audits = auditor.evidence.audits
    _compare(auditor)
    _count(auditor, CLIENTS, 10)
    _compare(auditor)
    for client in CLIENTS:
        tau, _ = _promises(auditor).choose(client)
        if tau not in auditor.taus:
            raise Finding(f"τ = {tau} is not in the grid")
    json.dumps(report(auditor), allow_nan=False)
    if auditor.evidence.audits < min(10, audits):
        raise Finding("audits are lost")
    return {"promises": float(len(_promises(auditor).by_left_out))}, "accepted"


def _compare(auditor: Auditor) -> None:
    """Raise Finding unless a saved state restores to the same state."""
    state, other = state_of(auditor), _auditor()
    restore(other, type(state).model_validate_json(state.model_dump_json()))
    again = state_of(other)
    if again != state:
        raise Finding(f"it reads as another state: {again} instead of {state}"[:2000])


FUZZER = Fuzzer(_states(), check, _valid)
