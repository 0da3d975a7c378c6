"""The results of audits, as GET /v1/models/{name}/audit returns them."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from de3.exits.calibration import speedup
from de3.exits.guarantee import CONFIDENCE
from de3.exits.promises import NEWCOMER, Promises
from de3.server.audit.auditor import Auditor


def report(auditor: Auditor) -> dict[str, Any]:
    """The audit results of one model: evidence by τ, the promise and its current state, and the resets."""
    evidence, signal, promises = auditor.evidence.copy(), auditor.signal, auditor.promises
    manifest = auditor.served.model.manifest
    lower, upper = evidence.bounds()
    rates, layers = evidence.rates(), evidence.mean_layers()
    in_force = auditor.in_force()
    here = int(np.searchsorted(auditor.taus, in_force["tau"]))
    e_values = None
    if promises is not None:
        main = promises.deciding(next(iter(promises.tracked()), NEWCOMER)).evidence.copy()
        e_values = main.e_values(promises.rate)

    def row(k: int) -> dict[str, Any]:
        known: dict[str, Any] = {
            "tau": float(auditor.taus[k]),
            "disagreement": _number(rates[k]),
            "lower": float(lower[k]),
            "upper": float(upper[k]),
            "mean_exit_layer": _number(layers[k]),
            "speedup": None if np.isnan(layers[k]) else speedup(manifest.num_layers, float(layers[k])),
        }
        if e_values is not None:
            known["e_value"] = float(e_values[k])
        return known

    expected = auditor.served.rules.default.expected
    return {
        "model": auditor.served.model.full_name,
        "signal": signal.name,
        "lambda": signal.lam,
        "since": _time(auditor.since),
        "share": auditor.share,
        "texts": evidence.texts,
        "audits": evidence.audits,
        "pending": auditor.pending,
        "excluded": auditor.excluded,
        "tau": in_force,
        "promise": None
        if auditor.promised is None
        else {
            "max_disagreement": auditor.promised,
            "confidence": CONFIDENCE,
            "reason": in_force["reason"],
            "clients": None if promises is None else [_client(promises, name) for name in promises.tracked()],
        },
        "measured": row(here) | {"confidence": CONFIDENCE, "as_served": evidence.served()},
        "calibrated": None
        if expected is None
        else {
            "disagreement": expected.disagreement,
            "disagreement_bound": expected.disagreement_bound,
            "speedup": expected.speedup,
        },
        "taus": [row(k) for k in range(len(auditor.taus))],
        "resets": [
            {"at": _time(r.at), "reason": r.reason, "tau": r.tau, "audits": r.audits} for r in auditor.resets
        ],
    }


def _client(promises: Promises, name: str) -> dict[str, Any]:
    tau, reason = promises.choose(name)
    return {"texts": promises.texts[name], "tau": tau, "reason": reason}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(round(seconds), UTC).isoformat()
