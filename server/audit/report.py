"""The results of audits, as GET /v1/models/{name}/audit returns them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.exits.bound import CONFIDENCE
from de3.exits.calibration import speedup
from de3.model_store.manifest import Manifest
from de3.runtime.choice import Choice
from de3.server.audit.ledger import Ledger, tau_row
from de3.server.audit.tenant import Bounded, Tenant


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


def report(ledger: Ledger, live: Live, in_force: Choice, reader: str | None = None) -> dict[str, Any]:
    """The audit results of one model for one of its tenants, and the state of each tenant that the reader may see.

    in_force: the choice for requests without options. reader: a tenant, which sees only its own data; None for a reader
    that may see everything, and gets the results of the tenant with the most texts.
    """
    signal, manifest, tenants = ledger.signal, ledger.manifest, dict(ledger.tenants)
    name = max(tenants, key=lambda one: tenants[one].evidence.texts, default="") if reader is None else reader
    tenant = tenants[name] if name in tenants else ledger.new_tenant()
    evidence, tau = tenant.evidence, _tau(tenant, in_force, manifest)
    costs = evidence.mean_layers()
    cost_name = "mean_exit_layer" if manifest.upstream is None else "upstream_share"
    first, *others = [_rates(one) for one in tenant.criteria]

    def row(k: int) -> dict[str, Any]:
        known: dict[str, Any] = {
            "tau": float(ledger.taus[k]),
            **{name: _number(values[k]) for name, values in first.items() if name != "e_value"},
            cost_name: _number(costs[k]),
            "speedup": None if np.isnan(costs[k]) else speedup(manifest.exit_costs[-1], float(costs[k])),
        }
        if "e_value" in first:
            known["e_value"] = float(first["e_value"][k])
        return known | {name: _number(values[k]) for one in others for name, values in one.items()}

    expected = ledger.rules.of_tenant(name).expected
    here = int(np.searchsorted(ledger.taus, tau["tau"]))
    visible = tenants if reader is None else {reader: tenant}
    return {
        "model": ledger.manifest.full_name,
        "tenant": name,
        "relative_to": "upstream" if manifest.upstream is not None else f"full depth in {manifest.precision}",
        "signal": signal.name,
        "lambda": signal.lam,
        "since": _time(tenant.since),
        "share": live.share,
        "texts": evidence.texts,
        "audits": evidence.audits,
        **{one.criterion.texts: one.evidence.audits for one in tenant.criteria[1:]},
        "pending": live.pending,
        "excluded": live.excluded,
        "tau": tau,
        "guarantee": _guarantee(ledger, tau["reason"]),
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
            {"at": _time(r.at), "reason": r.reason, "tau": r.tau, "audits": r.audits} for r in tenant.resets
        ],
        "tenants": [
            {
                "tenant": each,
                **_tau(one, in_force, manifest),
                "texts": one.evidence.texts,
                "audits": one.evidence.audits,
            }
            for each, one in sorted(visible.items())
        ],
    }


def _guarantee(ledger: Ledger, reason: str) -> dict[str, Any] | None:
    rates = {"max_disagreement": ledger.guaranteed_rate, "max_missed": ledger.limits.missed}
    known: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    known |= {"observed": True} if ledger.rules.observes else {}
    return known | {"confidence": CONFIDENCE, "reason": reason} if known else None


def _tau(tenant: Tenant, in_force: Choice, manifest: Manifest) -> dict[str, Any]:
    """A tenant's τ for requests without exit options, and the reason for it."""
    if (guarantee := tenant.strictest) is None or len(manifest.exit_layers) == 1:
        return tau_row(in_force, manifest)
    return {"tau": float(tenant.taus[guarantee.index]), "reason": guarantee.reason}


def _rates(one: Bounded) -> dict[str, NDArray[np.float64]]:
    """The rate of a criterion at each τ, its bounds and, with a guarantee, its e-values."""
    name, guarantee = one.criterion.name, one.guarantee
    start = "" if one.criterion.of_all else f"{name}_"
    lower, upper = one.evidence.bounds()
    rates = {name: one.evidence.rates(), f"{start}lower": lower, f"{start}upper": upper}
    if guarantee is not None:
        rates[f"{start}e_value"] = guarantee.evidence.e_values(guarantee.rate)
    return rates


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(round(seconds), UTC).isoformat()
