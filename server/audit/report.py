"""The results of audits, as GET /v1/models/{name}/audit returns them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from de3.exits.calibration import speedup
from de3.exits.guarantee import CONFIDENCE
from de3.exits.promises import NEWCOMER, Promises
from de3.server.audit.ledger import Ledger, tau_row
from de3.server.rules import Choice


class Live(NamedTuple):
    """The current state of a model's audits, in one process or over all processes of a server.

    Attributes:
        share: probability that the next text is drawn for an audit.
        pending: number of audits that have not run yet.
        excluded: number of texts that are not audited, by reason.
    """

    share: float
    pending: int
    excluded: Mapping[str, int]


def report(ledger: Ledger, live: Live, in_force: Choice) -> dict[str, Any]:
    """The audit results of one model: evidence by τ, the promise and its current state, and the resets.

    in_force: the choice for requests without options.
    """
    evidence, signal, promises = ledger.evidence.copy(), ledger.signal, ledger.promises
    manifest, tau = ledger.manifest, tau_row(in_force)
    lower, upper = evidence.bounds()
    rates, layers = evidence.rates(), evidence.mean_layers()
    here = int(np.searchsorted(ledger.taus, tau["tau"]))
    e_values = None
    if promises is not None:
        main = promises.deciding(next(iter(promises.tracked()), NEWCOMER)).evidence.copy()
        e_values = main.e_values(promises.rate)

    def row(k: int) -> dict[str, Any]:
        known: dict[str, Any] = {
            "tau": float(ledger.taus[k]),
            "disagreement": _number(rates[k]),
            "lower": float(lower[k]),
            "upper": float(upper[k]),
            "mean_exit_layer": _number(layers[k]),
            "speedup": None if np.isnan(layers[k]) else speedup(manifest.num_layers, float(layers[k])),
        }
        if e_values is not None:
            known["e_value"] = float(e_values[k])
        return known

    expected = ledger.rules.default.expected
    return {
        "model": ledger.full_name,
        "signal": signal.name,
        "lambda": signal.lam,
        "since": _time(ledger.since),
        "share": live.share,
        "texts": evidence.texts,
        "audits": evidence.audits,
        "pending": live.pending,
        "excluded": live.excluded,
        "tau": tau,
        "promise": None
        if ledger.promised_rate is None
        else {
            "max_disagreement": ledger.promised_rate,
            "confidence": CONFIDENCE,
            "reason": tau["reason"],
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
        "taus": [row(k) for k in range(len(ledger.taus))],
        "resets": [
            {"at": _time(r.at), "reason": r.reason, "tau": r.tau, "audits": r.audits} for r in ledger.resets
        ],
    }


def _client(promises: Promises, name: str) -> dict[str, Any]:
    tau, reason = promises.choose(name)
    return {"texts": promises.texts[name], "tau": tau, "reason": reason}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(round(seconds), UTC).isoformat()
