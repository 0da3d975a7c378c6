"""What is chosen for a request: its exit rule, and the τ that a tenant's evidence allows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from de3.exits.guarantee import Reason
from de3.exits.rule import ExitRule
from de3.model_store.manifest import TradeOff


class InForce(NamedTuple):
    """The τ that the audits of a tenant allow.

    Attributes:
        epoch: identifies the tenant's evidence; texts that were drawn in an earlier epoch do not count.
        tau: the tenant's τ, and the reason for it; None without a guarantee.
    """

    epoch: int
    tau: float | None
    reason: Reason | None


class Standing(NamedTuple):
    """The part of a ledger's state that the processes need.

    Attributes:
        epoch: the epoch of tenants that have sent no texts. Each new ledger, and each reset of all tenants, begins a
            new one.
        num_changes: see Ledger.
        tenants: the state of some tenants, by name; after a new epoch, of all.
    """

    epoch: int
    num_changes: int
    tenants: dict[str, InForce]


@dataclass(frozen=True, slots=True)
class Choice:
    """An exit rule, and how it was chosen.

    Attributes:
        set_by: the option that set the rule; without one, default or overload.
        requested: value of that option; None without one.
        expected: row of the calibration table for this signal and τ; None if none applies.
        budget_s: latency budget, seconds; None if there is none.
        is_degraded: τ was raised under load.
        certificate: with max_disagreement, the certified bound, its confidence and the number of samples; cross_fitted,
            if these were also fitted to; else None.
        one_window: τ is certified not to miss flagged texts in one window; those in several run to full depth.
        guarantee: with a guarantee, the guaranteed rate, its confidence and the reason for τ; None without one, and for
            requests with options.
    """

    rule: ExitRule
    set_by: str
    requested: float | None = None
    expected: TradeOff | None = None
    budget_s: float | None = None
    is_degraded: bool = False
    certificate: Mapping[str, Any] | None = None
    one_window: bool = False
    guarantee: Mapping[str, Any] | None = None

    def share(self, num_layers: int) -> float:
        """Expected time of a text, as a share of its time at full depth; 1 if nothing is known."""
        if self.expected is None:
            return 1.0
        # Tokenizer and embeddings cost about as much as one layer.
        return (self.expected.mean_exit_layer + 1) / (num_layers + 1)

    def row(self) -> dict[str, Any]:
        """The choice as JSON, for `explain`."""
        signal = self.rule.signal
        row: dict[str, Any] = {
            "set_by": self.set_by,
            "tau": self.rule.tau,
            "signal": signal.name,
            "lambda": signal.lam,
        }
        if self.requested is not None:
            row["requested"] = self.requested
        if self.expected is not None:
            fields = ("accuracy", "speedup", "disagreement", "disagreement_bound")
            row["expected"] = {name: getattr(self.expected, name) for name in fields}
        if self.guarantee is not None:
            row["guarantee"] = self.guarantee
        return row
