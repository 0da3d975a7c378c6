"""The choice of τ: from a request's options to its exit rule."""

from dataclasses import dataclass, replace
from typing import Any

from exits.guarantee import CONFIDENCE
from exits.rule import ExitRule
from exits.signals import signal_of
from exits.trade_offs import TradeOffs
from model_store.manifest import Manifest, TradeOff
from server.errors import RequestError
from server.settings import ExitOptions, Settings

MAX_LOAD_LOSS = 0.02  # of accuracy under load, where no floor is set


@dataclass(frozen=True, slots=True)
class Choice:
    """An exit rule, and why it is this one.

    Attributes:
        by: the option that decided, or default, or overload.
        wanted: that field's value, if there is one.
        expected: the row of the calibration's table for this τ and λ; None if they are not in it.
        budget_s: the latency budget, if one was asked for.
        is_degraded: whether τ was raised under load.
    """

    rule: ExitRule
    by: str
    wanted: float | None = None
    expected: TradeOff | None = None
    budget_s: float | None = None
    is_degraded: bool = False

    def share(self, num_layers: int) -> float:
        """The share of the full-depth time that a text is expected to take."""
        if self.expected is None:
            return 1.0
        # The embeddings and the tokenizer cost about a layer.
        return (self.expected.mean_exit_layer + 1) / (num_layers + 1)

    def row(self) -> dict[str, Any]:
        """How τ was chosen, as `explain` shows it."""
        row: dict[str, Any] = {"by": self.by, "tau": self.rule.tau, "lambda": self.rule.signal.lam}
        if self.wanted is not None:
            row["wanted"] = self.wanted
        if self.expected is not None:
            fields = ("accuracy", "speedup", "disagreement", "disagreement_bound")
            row["expected"] = {name: getattr(self.expected, name) for name in fields}
        return row


class Rules:
    """Chooses the exit rule of each request to one model."""

    def __init__(self, manifest: Manifest, settings: Settings) -> None:
        self._defaults, self._exits = manifest.defaults, manifest.exit_layers
        self.name = f"{manifest.name}:{manifest.version}"
        table = manifest.calibration.table if manifest.calibration else []
        self._samples = manifest.calibration.certify_size if manifest.calibration else 0
        self._rows = {(row.tau, row.lam): row for row in table}
        rows = [row for row in table if row.lam == manifest.defaults.lam]
        self.trade_offs = TradeOffs(rows) if rows else None
        tau = self._defaults.tau if settings.tau is None else settings.tau
        default = self._choice(tau, self._defaults.lam, "default")
        self.default = self._of(replace(settings.options, tau=None), default)
        self.steps = self._steps(settings) if manifest.calibration else []

    def _steps(self, settings: Settings) -> list[Choice]:
        """What the default may become under load, level 1 first; none if the default is itself a guarantee."""
        promises = (settings.target_speedup, settings.max_disagreement)
        if self.trade_offs is None or any(value is not None for value in promises):
            return []
        least = settings.min_accuracy
        if least is None:
            least = self.trade_offs.rows[0].accuracy - MAX_LOAD_LOSS
        rows = self.trade_offs.under_load(self.default.rule.tau, least, settings.max_load_disagreement)
        budget_s = self.default.budget_s
        return [replace(self.at(row, "overload"), budget_s=budget_s, is_degraded=True) for row in rows]

    def in_force(self, level: int) -> Choice:
        """The choice for requests without options, at a load level."""
        return self.steps[min(level, len(self.steps)) - 1] if level and self.steps else self.default

    def _choice(
        self, tau: float, lam: float, by: str, wanted: float | None = None, max_layer: int | None = None
    ) -> Choice:
        expected = self._rows.get((tau, lam)) if max_layer is None else None
        return Choice(ExitRule(tau, signal_of(lam), max_layer), by, wanted, expected)

    def at(self, row: TradeOff, by: str, wanted: float | None = None) -> Choice:
        """The choice that a row of the calibration's table stands for."""
        return Choice(ExitRule(row.tau, signal_of(row.lam)), by, wanted, row)

    def of(self, options: ExitOptions, level: int = 0) -> Choice:
        """The choice that fulfils a request's options, or the one in force; raises RequestError."""
        if options.lam is not None or options.max_layer is not None or options.tau is not None:
            return self._explicit(options.tau, options.lam, options.max_layer)
        return self._of(options, self.in_force(level))

    def _of(self, options: ExitOptions, otherwise: Choice) -> Choice:
        """The choice that fulfils options without τ."""
        if options.latency_budget_ms is not None:
            # Going on to the deadline beats leaving earlier by prediction (docs/budgets.md).
            budget = options.latency_budget_ms
            return replace(otherwise, by="latency_budget_ms", wanted=budget, budget_s=budget / 1000)
        if options.target_speedup is not None:
            trade_offs = self._table("target_speedup")
            row = trade_offs.at_speedup(options.target_speedup)
            if row is None:
                most = trade_offs.rows[-1].speedup
                raise RequestError(f"target_speedup: at most {most:g} with {self.name}", "target_speedup")
            return self.at(row, "target_speedup", options.target_speedup)
        if options.max_disagreement is not None:
            row = self._table("max_disagreement").within_disagreement(options.max_disagreement)
            return self.at(row, "max_disagreement", options.max_disagreement)
        return otherwise

    def certificate(self, choice: Choice) -> dict[str, Any] | None:
        """What is promised on the rate of answers that differ from full depth, if that was asked for."""
        if choice.by != "max_disagreement" or choice.expected is None:
            return None
        return {
            "max_disagreement": choice.wanted,
            "bound": choice.expected.disagreement_bound,
            "confidence": CONFIDENCE,
            "samples": self._samples,
        }

    def _explicit(self, tau: float | None, lam: float | None, max_layer: int | None) -> Choice:
        if max_layer is not None and not self._exits[0] <= max_layer <= self._exits[-1]:
            raise RequestError(
                f"max_layer: must be from {self._exits[0]} to {self._exits[-1]}, got {max_layer}",
                "max_layer",
            )
        # The server's default τ; with a λ of another scale the model's.
        default = self.default.rule.tau if lam in (None, self._defaults.lam) else self._defaults.tau
        return self._choice(
            default if tau is None else tau,
            self._defaults.lam if lam is None else lam,
            "default" if tau is None else "tau",
            tau,
            max_layer,
        )

    def _table(self, field: str) -> TradeOffs:
        if self.trade_offs is None:
            raise RequestError(f"{field}: {self.name} was exported without a calibration; give tau", field)
        return self.trade_offs
