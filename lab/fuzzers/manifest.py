"""Fuzzer of manifest.json: edits of two valid manifests.

A manifest must be refused with a StoreError, or it must survive writing and reading, and the server must be able to
build its rules and its OOD monitor from it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from de3.model_store.manifest import Manifest
from de3.model_store.store import MANIFEST, MAX_MESSAGE, StoreError, read_manifest
from de3.runtime.errors import RequestError
from de3.runtime.ood import OodMonitor
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.server.settings import Settings
from lab.fuzzers.edits import edited, spliced
from lab.fuzzers.run import Finding, Fuzzer
from lab.fuzzers.seeds import demo, new_folder, tiny

SETTINGS: tuple[dict[str, Any], ...] = ({}, {"guarantee": 0.02}, {"ood_policy": "deepen", "tau": 0.5})
FRAGMENTS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\ud800",
    b"\\u0000",
    b"\xff",
    b"1e999",
    b"NaN",
    b"-0",
    b"\xef\xbb\xbf",
)


@cache
def _valid() -> list[Any]:
    """The manifest of the demo model, and one without a calibration."""
    return [json.loads((artifact.path / MANIFEST).read_text()) for artifact in (demo(), tiny("int8"))]


@cache
def _folder() -> Path:
    return new_folder()


@st.composite
def _manifests(draw: st.DrawFn) -> bytes:
    value = draw(edited(draw(st.sampled_from(_valid())), draw(st.sampled_from([1, 1, 2, 5]))))
    data = json.dumps(value).encode()
    return draw(spliced(data, FRAGMENTS)) if draw(st.integers(0, 9)) == 0 else data


def check(data: bytes) -> tuple[dict[str, float], str]:
    """Read a manifest, and use it as a server does when it loads the model."""
    (_folder() / MANIFEST).write_bytes(data)
    try:
        manifest = read_manifest(_folder())
    except StoreError as error:
        if len(str(error)) > 6 * MAX_MESSAGE + 1:  # each character may be escaped
            raise Finding(f"a message of {len(str(error))} characters") from None
        return {}, "refused"
    if Manifest.model_validate_json(manifest.model_dump_json()) != manifest:
        raise Finding("it changes when it is written and read")
    _use(manifest)
    return {"rows": float(len(manifest.calibration.table) if manifest.calibration else 0)}, "accepted"


def _use(manifest: Manifest) -> None:
    for given in SETTINGS:
        settings = Settings(**given)
        try:
            rules = Rules(manifest, settings)
        except RequestError:  # a setting that the model cannot meet
            continue
        for options in (
            ExitOptions(target_speedup=2.0),
            ExitOptions(max_disagreement=0.02),
            ExitOptions(tau=0.1),
        ):
            try:
                choice = rules.choose(options)
            except RequestError:
                continue
            if not 0 <= choice.rule.tau <= 1:
                raise Finding(f"τ = {choice.rule.tau}")
        OodMonitor(manifest, settings.ood_policy)


FUZZER = Fuzzer(_manifests(), check, _valid)
