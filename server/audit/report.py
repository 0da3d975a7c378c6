"""The results of audits, as GET /v1/models/{name}/audit returns them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from de3.exits.calibration import speedup
from de3.exits.guarantee import CONFIDENCE
from de3.server.audit.ledger import Ledger, tau_row
from de3.server.audit.tenant import Tenant
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
    """The audit results of one model: evidence by τ, the promise, and each tenant's state and resets.

    in_force: the choice for requests without options.
    """
    signal, manifest, tau = ledger.signal, ledger.manifest, tau_row(in_force)
    tenants = dict(ledger.tenants)
    evidence = ledger.total(tau["tau"])
    lower, upper = evidence.bounds()
    rates, layers = evidence.rates(), evidence.mean_layers()
    e_values = None
    if len(tenants) == 1 and (promise := next(iter(tenants.values())).promise) is not None:
        e_values = promise.evidence.e_values(promise.rate)

    def row(k: int) -> dict[str, Any]:
        return {
            "disagreement": _number(rates[k]),
            "lower": float(lower[k]),
            "upper": float(upper[k]),
            "mean_exit_layer": _number(layers[k]),
            "speedup": None if np.isnan(layers[k]) else speedup(manifest.num_layers, float(layers[k])),
        }

    def at(k: int) -> dict[str, Any]:
        proof = {} if e_values is None else {"e_value": float(e_values[k])}
        return {"tau": float(ledger.taus[k]), **row(k), **proof}

    expected = ledger.rules.default.expected
    return {
        "model": ledger.full_name,
        "signal": signal.name,
        "lambda": signal.lam,
        "since": _time(min((tenant.since for tenant in tenants.values()), default=ledger.since)),
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
        },
        "measured": row(-1) | {"confidence": CONFIDENCE, "as_served": evidence.served()},
        "calibrated": None
        if expected is None
        else {
            "disagreement": expected.disagreement,
            "disagreement_bound": expected.disagreement_bound,
            "speedup": expected.speedup,
        },
        "taus": [at(k) for k in range(len(ledger.taus))],
        "tenants": [_tenant(name, tenant, tau) for name, tenant in sorted(tenants.items())],
    }


def _tenant(name: str, tenant: Tenant, tau: dict[str, Any]) -> dict[str, Any]:
    """The state of a tenant. tau: the τ in force without a guarantee."""
    evidence, promise = tenant.evidence, tenant.promise
    if promise is not None:
        tau = {"tau": promise.tau, "reason": promise.reason}
    index = int(np.searchsorted(tenant.taus, tau["tau"]))
    lower, upper = evidence.bounds(slice(index, index + 1))
    return {
        "tenant": name,
        **tau,
        "texts": evidence.texts,
        "audits": evidence.audits,
        "disagreement": _number(evidence.rates()[index]),
        "lower": float(lower[0]),
        "upper": float(upper[0]),
        "resets": [
            {"at": _time(r.at), "reason": r.reason, "tau": r.tau, "audits": r.audits} for r in tenant.resets
        ],
    }


def seen_by(found: dict[str, Any], tenant: str | None) -> dict[str, Any]:
    """A report as a tenant may see it, without the rows of others. tenant: None: all rows."""
    return found | {"tenants": [row for row in found["tenants"] if tenant in (None, row["tenant"])]}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(round(seconds), UTC).isoformat()
