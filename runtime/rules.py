"""Chooses τ: maps a request's options to its exit rule."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from de3.exits.bound import CONFIDENCE
from de3.exits.criteria import MISSED_LIMITS, Limits
from de3.exits.guarantee import Reason
from de3.exits.kinds import Labels
from de3.exits.rule import ExitRule
from de3.exits.signals import Signal, signal_of, signals_of
from de3.exits.trade_offs import TradeOffs
from de3.model_store.manifest import Manifest, Missed, TradeOff
from de3.runtime.choice import Choice, Standing
from de3.runtime.errors import RequestError
from de3.runtime.flags import Wanted, certified_flag, flag_of, parsed
from de3.runtime.options import CALIBRATED, NEED_AN_EXIT, NO_OPTIONS, ExitOptions
from de3.runtime.settings import GUARANTEES, RuntimeSettings

MAX_NAMED = 20  # signals or labels in a message
EXPLICIT = ("tau", "target_speedup", "max_disagreement")  # options that choose τ for any flag
T = TypeVar("T")
MAX_LOAD_LOSS = 0.02  # accuracy that raising τ under load may cost, without --min-accuracy


class Key(NamedTuple):
    """Name of a signal and its λ (None without one), which identify it among the signals of a model."""

    name: str
    lam: float | None

    def __str__(self) -> str:
        return self.name if self.lam is None else f"{self.name} with lambda {self.lam:g}"


def _key(signal: Signal) -> Key:
    return Key(signal.name, signal.lam)


def flag_setting(manifest: Manifest, settings: RuntimeSettings) -> Wanted | None:
    """The flag of a model: in the settings or, without one, of its calibration; None if it has none."""
    return _of_model(dict(parsed(one) for one in settings.flags), manifest) or certified_flag(manifest)


def _of_model(settings: Mapping[str, T], manifest: Manifest) -> T | None:
    """A model's setting by one of its names or, without one, that of all models."""
    source = manifest.source or ""
    names = manifest.name, manifest.full_name, source, source.partition("@")[0], ""
    return next((settings[name] for name in names if name in settings), None)


def _limits_of(wanted: Wanted | None, manifest: Manifest, settings: RuntimeSettings) -> Limits:
    """The guarantee for a model, and its flag; raises RequestError if the model cannot have the flag, or has none."""
    if wanted is None and settings.guarantee_missed is not None and settings.guarantee is None:
        raise RequestError(
            f"guarantee_missed: {manifest.name} has no flag; give --flag {manifest.name}=LABEL, or --guarantee",
            "guarantee_missed",
        )
    if wanted is None:
        return Limits(settings.guarantee)
    if manifest.upstream is not None:
        raise RequestError(f"flag: {manifest.name} has an upstream; only requests may have a flag", "flag")
    return Limits(settings.guarantee, settings.guarantee_missed, flag_of(wanted, manifest, manifest.kind))


def _needs_an_exit(options: ExitOptions, last: int | None) -> str | None:
    """Name of the first option that needs an exit before full depth; None if full depth meets the options.

    last: the layer at full depth; None: full depth is an upstream.
    """
    if last is None and options.max_layer is not None:  # no text with max_layer goes to an upstream
        return "max_layer"
    is_last = options.max_layer is not None and options.max_layer == last
    if options.tau == 0 or is_last or options.target_speedup == 1:
        return None
    name = next((name for name in NEED_AN_EXIT if getattr(options, name) is not None), None)
    return "lambda" if name == "lam" else name


def _in_full(choice: Choice) -> Choice:
    """The choice of all layers instead, without promises, which would be about exits."""
    rule = replace(choice.rule, tau=0.0)
    return replace(choice, rule=rule, expected=None, certificate=None, guarantee=None)


class Rules:
    """Chooses the exit rule of each request to one model.

    Attributes:
        max_missed: limit on the share of flagged texts that early exits miss, for requests without options; None: there
            is no flag or no limit.
    """

    def __init__(self, manifest: Manifest, settings: RuntimeSettings) -> None:
        self._manifest, self._exits = manifest, manifest.exit_layers
        self._traits = manifest.traits
        self._kind = manifest.kind
        self.flag = flag_setting(manifest, settings)
        self.limits = _limits_of(self.flag, manifest, settings)
        self.long = _of_model(dict(settings.long), manifest)
        self.observes = settings.observe
        self.name = manifest.full_name
        table = manifest.calibration.table if manifest.calibration else []
        self._rows = {(row.tau, row.signal, row.lam): row for row in table}
        self._signal = manifest.default_signal
        self._certified = {Key(*key): TradeOffs(rows) for key, rows in manifest.trade_offs().items()}
        self._signals = {_key(signal): signal for signal in signals_of(self._traits)}
        self._names = " or ".join(key.name for key in self._signals)
        self._signals |= {key: signal_of(*key, self._traits) for key in self._certified}
        self.trade_offs = self._certified.get(_key(self._signal))
        tau = manifest.defaults.tau if settings.tau is None else settings.tau
        if len(self._exits) == 1:
            self._at_full_depth(settings.options)
        default = self._at_tau(tau, self._signal, "default")
        self.default = self._by_target(replace(settings.options, tau=None), default)
        self._epoch = 0
        self._by_tenant: dict[str, Choice] = {}  # used with a guarantee
        if self.limits.are_set:
            self.default = self._start = self._guaranteed(0.0, "start")
        self.max_missed = self._max_missed(settings)
        is_certified = self.max_missed is not None and not self.limits.are_set
        self.default = replace(self.default, one_window=is_certified)
        self.steps = self._steps(settings) if manifest.calibration else []

    def _steps(self, settings: RuntimeSettings) -> list[Choice]:
        """Choices that replace the default under load, from level 1 up.

        Empty if a target or a guarantee sets the default, if it keeps a limit on what is missed, without a calibration,
        or with an upstream.
        """
        targets = (*CALIBRATED, *GUARANTEES)
        has_upstream = self._manifest.upstream is not None  # fewer calls do not relieve the engine
        if (
            self.trade_offs is None
            or has_upstream
            or self.max_missed is not None
            or any(getattr(settings, name) is not None for name in targets)
        ):
            return []
        least = settings.min_accuracy
        if least is None:
            least = self.trade_offs.rows[0].accuracy - MAX_LOAD_LOSS
        rows = self.trade_offs.under_load(self.default.rule.tau, least)
        budget_s = self.default.budget_s
        return [replace(self._at_row(row, "overload"), budget_s=budget_s, is_degraded=True) for row in rows]

    def _max_missed(self, settings: RuntimeSettings) -> float | None:
        """See the attributes. Without a setting, the smallest of MISSED_LIMITS that the default τ is certified for."""
        rule, certified = self.default.rule, self._certified_missed
        if rule.flag is None:
            return None
        if self.limits.are_set and not self.observes:
            return self.limits.missed
        if settings.max_missed is not None:
            return settings.max_missed
        if rule.tau == 0 or len(self._exits) == 1:
            return 0.0
        if certified is None or rule.signal is not self._signal:
            return None
        index = bisect_left(certified.taus, rule.tau)
        bound = certified.bounds[index] if index < len(certified.taus) else 1.0
        return next((most for most in MISSED_LIMITS if bound <= most), None)

    @property
    def _certified_missed(self) -> Missed | None:
        """The certificate of missed texts; None without one for the flag."""
        certified = certified_flag(self._manifest)
        if certified is None or flag_of(certified, self._manifest, self._kind) != self.limits.flag:
            return None
        return self._manifest.missed

    def apply(self, standing: Standing) -> None:
        """With a guarantee, take each tenant's τ for requests without options from the Standing of the model's ledger.

        `default` becomes the choice of the tenant with the median τ.
        """
        if not self.limits.are_set:
            return
        if standing.epoch != self._epoch:
            self._epoch, self._by_tenant = standing.epoch, {}
        for name, (_, tau, reason) in standing.tenants.items():
            if tau is not None and reason is not None:
                self._by_tenant[name] = self._guaranteed(tau, reason)
        ordered = sorted(self._by_tenant.values(), key=lambda choice: choice.rule.tau)
        self.default = ordered[(len(ordered) - 1) // 2] if ordered else self._start

    def _guaranteed(self, tau: float, reason: Reason) -> Choice:
        tau = 0.0 if self.observes else tau
        differing, missed = self.limits.differing, self.limits.missed
        rates = {"max_disagreement": differing, "max_missed": missed}
        row: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
        row |= {"confidence": CONFIDENCE, "reason": reason}
        requested = missed if differing is None else differing
        return replace(self._at_tau(tau, self._signal, "guarantee", requested), guarantee=row)

    def of_tenant(self, tenant: str) -> Choice:
        """The choice for a tenant's requests without options, unless load changes it."""
        return self._by_tenant.get(tenant, self._start) if self.limits.are_set else self.default

    def base(self, level: int, tenant: str) -> Choice:
        """The choice for a tenant's requests without options at a load level."""
        return self.of_tenant(tenant) if self.limits.are_set else self.in_force(level)

    def in_force(self, level: int) -> Choice:
        """The choice for requests without options at a load level."""
        return self.steps[min(level, len(self.steps)) - 1] if level and self.steps else self.default

    def _at_tau(
        self,
        tau: float,
        signal: Signal,
        set_by: str,
        requested: float | None = None,
        max_layer: int | None = None,
    ) -> Choice:
        expected = self._rows.get((tau, *_key(signal))) if max_layer is None else None
        rule = ExitRule(tau, signal, max_layer, self._kind, self.limits.flag)
        return Choice(rule, set_by, requested, expected)

    def _at_row(self, row: TradeOff, set_by: str, requested: float | None = None) -> Choice:
        """The choice for a row of the calibration table."""
        signal = self._signals[Key(row.signal, row.lam)]
        return Choice(ExitRule(row.tau, signal, None, self._kind, self.limits.flag), set_by, requested, row)

    def with_flag(self, choice: Choice, options: ExitOptions, flag: Wanted | None) -> Choice:
        """A choice for a request with a flag of its own, if it has one.

        A certificate for exits with any answer holds for one-sided exits, too (see exits.flags), unless it counts
        differences from an original model, from which full depth differs. But audits of one flag's exits, and a
        certificate of what they miss, say nothing about those of another: its texts run to full depth.

        Raises RequestError for an unknown label, and for max_missed in the options with another flag than the model's.
        """
        if flag is None:
            return choice
        found = flag_of(flag, self._manifest, choice.rule.kind)
        if options.max_missed is not None and found != self.limits.flag:
            raise RequestError(
                f"flag: max_missed is certified for the model's own flag only: {self.flag}", "flag"
            )
        is_promised = self.limits.are_set or self.max_missed is not None
        if is_promised and self.limits.flag not in (None, found) and choice.set_by not in EXPLICIT:
            choice = _in_full(choice)
        return self._one_sided(replace(choice, rule=replace(choice.rule, flag=found)))

    def _one_sided(self, choice: Choice) -> Choice:
        """A choice with a flag, without a certificate that does not hold for it."""
        calibration = self._manifest.calibration
        if calibration is None or calibration.original_disagreement is None or choice.set_by == "max_missed":
            return choice
        return replace(choice, certificate=None)

    def choose(self, options: ExitOptions, level: int = 0, tenant: str = "") -> Choice:
        """The choice for a request's options; raises RequestError if they cannot be met.

        level: load level. tenant: the request's tenant; with a guarantee, each has its own τ.
        """
        is_full_depth = len(self._exits) == 1
        choice = self._at_full_depth(options) if is_full_depth else self._by_options(options, level, tenant)
        if choice.guarantee is not None and options != NO_OPTIONS:  # requests with options are not audited
            choice = replace(choice, guarantee=None)
        if options.thresholds is None:
            return choice
        # By the server's default: max_missed of a request cannot be combined with thresholds.
        if choice.one_window:
            choice = _in_full(choice)
        rule = replace(choice.rule, kind=self._labels_above(options.thresholds))
        if choice.set_by in CALIBRATED and choice.set_by != "max_missed":
            raise RequestError(
                f"thresholds: cannot be combined with this server's {choice.set_by}, which was calibrated with the "
                "model's own thresholds; give tau",
                "thresholds",
            )
        return replace(choice, rule=rule, expected=None)  # the calibration does not cover other thresholds

    def _at_full_depth(self, options: ExitOptions) -> Choice:
        """The choice for a model without early exits; raises RequestError for options that need them."""
        has_upstream = self._manifest.upstream is not None
        field = _needs_an_exit(options, None if has_upstream else self._exits[-1])
        if field is not None and has_upstream:
            raise RequestError(f"{field}: {self.name} has no exits yet, so only its upstream answers", field)
        if field is not None:
            raise RequestError(
                f"{field}: {self.name} has no exits before its last layer, so it always runs at full depth; the "
                "server's operator can add exits with de3 import",
                field,
            )
        return self._at_tau(0.0, self._signal, "default" if options.tau is None else "tau")

    def _labels_above(self, wanted: float | Mapping[str, float]) -> Labels:
        """The kind with a request's thresholds, one for all labels or by label.

        Raises RequestError if the model cannot use them.
        """
        labels, kind = self._manifest.labels, self._kind
        if not isinstance(kind, Labels):
            message = f"thresholds: {self.name} is not a multi-label model: {kind.why}"
            raise RequestError(message, "thresholds")
        if not isinstance(wanted, Mapping):
            return Labels.of([wanted] * len(labels))
        own = dict(zip(labels, self._manifest.thresholds or (), strict=True))
        unknown = next((name for name in wanted if name not in own), None)
        if unknown is not None:
            there_are = ", ".join(labels[:MAX_NAMED])
            raise RequestError(
                f"thresholds: {self.name} has no label {unknown[:100]!r}; available: {there_are}",
                "thresholds",
            )
        return Labels.of(list({**own, **wanted}.values()))

    def _by_options(self, options: ExitOptions, level: int, tenant: str) -> Choice:
        signal = self._signal_of(options)
        if options.tau is not None or options.max_layer is not None:
            return self._explicit(options.tau, signal, options.max_layer, tenant)
        if signal is self._signal:
            return self._by_target(options, self.base(level, tenant))
        targets = [name for name in CALIBRATED if getattr(options, name) is not None]
        return self._by_target(options, self._default_with(signal, tenant, *targets))

    def _signal_of(self, options: ExitOptions) -> Signal:
        """The signal that a request names, or the model's default; raises RequestError if it is not supported."""
        name, lam = options.signal or "edr", options.lam
        if options.signal is None and lam is None:
            return self._signal
        if lam == 0:
            name, lam = "entropy", None
        if name == "edr" and lam is None:
            certified = (key.lam for key in self._certified if key.name == "edr")
            lam = self._signal.lam or next(certified, None)
        key = Key(name, lam)
        if key == _key(self._signal):
            return self._signal
        try:
            return self._signals.get(key) or signal_of(name, lam, self._traits)
        except ValueError as error:
            field = "lambda" if options.signal is None else "signal"
            instead = f"; give {self._names}" if self._names else ""
            raise RequestError(f"{field}: {error}{instead}", field) from None

    def _default_with(self, signal: Signal, tenant: str, field: str = "tau") -> Choice:
        """The choice for a request that names a signal other than the model's default, and no τ.

        Its τ is the largest up to which the calibrated disagreement is at most the default's. Raises RequestError,
        which names `field`, if the signal is not calibrated.
        """
        trade_offs = self._table(signal, field)
        expected = self.of_tenant(tenant).expected
        row = trade_offs.at_disagreement(expected.disagreement if expected is not None else 0.0)
        return self._at_row(row, "default")

    def _by_target(self, options: ExitOptions, otherwise: Choice) -> Choice:
        """The choice for options without τ; `otherwise` if they set no target.

        Raises RequestError if the target cannot be met.
        """
        signal = otherwise.rule.signal
        if options.latency_budget_ms is not None:
            # Running until the deadline is more accurate than a predicted earlier exit (lab/docs/budgets.md).
            budget = options.latency_budget_ms
            field, seconds = "latency_budget_ms", budget / 1000
            return replace(otherwise, set_by=field, requested=budget, budget_s=seconds, certificate=None)
        if options.target_speedup is not None and self._manifest.upstream is not None:
            raise RequestError(
                f"target_speedup: {self.name} has an upstream, which is not a layer; give tau or max_disagreement",
                "target_speedup",
            )
        if options.target_speedup is not None:
            trade_offs = self._table(signal, "target_speedup")
            row = trade_offs.at_speedup(options.target_speedup)
            if row is None:
                most = trade_offs.rows[-1].speedup
                raise RequestError(f"target_speedup: at most {most:g} with {self.name}", "target_speedup")
            return self._at_row(row, "target_speedup", options.target_speedup)
        if options.max_disagreement is not None:
            row = self._table(signal, "max_disagreement").within_disagreement(options.max_disagreement)
            if row.disagreement_bound > options.max_disagreement:
                raise RequestError(
                    f"max_disagreement: at least {row.disagreement_bound:g} with {self.name}: even full depth "
                    "sometimes differs from the original model, because of int8: import it with --quantize none",
                    "max_disagreement",
                )
            calibration = self._manifest.calibration
            certificate = {
                "max_disagreement": options.max_disagreement,
                "bound": row.disagreement_bound,
                "confidence": CONFIDENCE,
                "samples": calibration.certify_size if calibration else 0,
                **self._how_certified,
            }
            choice = self._at_row(row, "max_disagreement", options.max_disagreement)
            choice = replace(choice, certificate=certificate)
            return choice if self.limits.flag is None else self._one_sided(choice)
        if options.max_missed is not None:
            return self._within_missed(options.max_missed, signal)
        return otherwise

    def _within_missed(self, most: float, signal: Signal) -> Choice:
        """The choice of the largest τ at which at most this share of flagged texts is missed, as certified."""
        missed = self._certified_missed
        if missed is None:
            own = certified_flag(self._manifest)
            what = "without a flag" if own is None else f"with the flag {own}, not with {self.flag}"
            raise RequestError(
                f"max_missed: {self.name} was calibrated {what}; use de3 calibrate --flag",
                "max_missed",
            )
        if signal is not self._signal:
            raise RequestError(
                f"max_missed: is certified for {_key(self._signal)}, not for {_key(signal)}", "max_missed"
            )
        index = missed.row_within(most)
        certificate = {
            "max_missed": most,
            "bound": missed.bounds[index],
            "confidence": CONFIDENCE,
            "flagged": missed.flagged,
            **self._how_certified,
        }
        choice = self._at_tau(missed.taus[index], signal, "max_missed", most)
        return replace(choice, expected=None, certificate=certificate, one_window=True)

    @property
    def _how_certified(self) -> dict[str, bool]:
        calibration = self._manifest.calibration
        return {"cross_fitted": True} if calibration is not None and calibration.cross_fitted else {}

    def _explicit(self, tau: float | None, signal: Signal, max_layer: int | None, tenant: str) -> Choice:
        if max_layer is not None and not self._exits[0] <= max_layer <= self._exits[-1]:
            raise RequestError(
                f"max_layer: must be from {self._exits[0]} to {self._exits[-1]}, got {max_layer}",
                "max_layer",
            )
        if tau is not None:
            return self._at_tau(tau, signal, "tau", tau, max_layer)
        default = self.of_tenant(tenant) if signal is self._signal else self._default_with(signal, tenant)
        choice = self._at_tau(default.rule.tau, signal, "default", None, max_layer)
        return replace(choice, one_window=default.one_window)  # the layers up to max_layer keep max_missed

    def _table(self, signal: Signal, field: str) -> TradeOffs:
        """The trade-offs of a signal; raises RequestError, which names `field`, if the signal was not calibrated."""
        trade_offs = self._certified.get(_key(signal))
        if trade_offs is not None:
            return trade_offs
        if not self._certified:
            raise RequestError(f"{field}: {self.name} was exported without a calibration; give tau", field)
        certified = ", ".join(str(key) for key in islice(self._certified, MAX_NAMED))
        raise RequestError(
            f"{field}: {self.name} has no calibration for {_key(signal)}; give tau, or a signal that has one: "
            f"{certified}",
            field,
        )
