"""Choice of an artifact's signal and τ, and certification of both, on held-out samples."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.data.split import groups_of
from de3.exits import calibration, placement, risk
from de3.exits.bound import CONFIDENCE, CROSSED
from de3.exits.calibration import FINE_TAUS, Samples, TradeOff
from de3.exits.flags import Flag
from de3.exits.formulas import Floats
from de3.exits.guarantee import profiles
from de3.exits.kinds import Classes, Labels, Value
from de3.exits.recorded import Recorded
from de3.exits.reference import quantiles
from de3.exits.signals import SIGNALS, Risk, Signal, signal_label
from de3.exits.trade_offs import TradeOffs
from de3.model_store.manifest import Calibration, Defaults, Missed, RiskWeights
from de3.progress import console, empty_table
from de3.runtime.flags import Wanted

CHOICES = ("auto", *SIGNALS)
MIN_CERTIFY = 850  # groups
MIN_GAIN = 1.05  # minimum speed-up, relative to that of risk, at which another signal is preferred


@dataclass(frozen=True)
class CalibrationPart:
    """Recorded held-out samples.

    Attributes:
        is_whole: (n,), false for fragments. Fragments are used to fit the risk, but not to choose or certify a signal,
            as clients send whole texts.
    """

    samples: Samples
    is_whole: NDArray[np.bool_]

    @classmethod
    def of(cls, recorded: Recorded, examples: Sequence[Example]) -> "CalibrationPart":
        """The part with these examples and their recorded outputs, in the same order."""
        is_whole = np.array([not e.is_fragment for e in examples])
        return cls(Samples(recorded, groups_of(examples)), is_whole)

    @property
    def whole(self) -> Samples:
        """The whole texts."""
        return self.samples.rows(self.is_whole)

    def joined(self, other: "CalibrationPart") -> "CalibrationPart":
        """The samples of two parts, whose groups are distinct (see `Recorded.joined`)."""
        parts = self.samples, other.samples
        groups = np.concatenate([parts[0].groups, parts[1].groups + parts[0].groups.max() + 1])
        recorded = Recorded.joined([one.recorded for one in parts])
        return CalibrationPart(Samples(recorded, groups), np.concatenate([self.is_whole, other.is_whole]))


@dataclass(frozen=True)
class Calibrated:
    """The fields of a manifest that a calibration sets."""

    calibration: Calibration
    risk: Risk
    defaults: Defaults
    missed: Missed | None = None

    def fields(self) -> dict[str, Any]:
        """The fields by name, to update a manifest."""
        weights = [
            RiskWeights(layer=m, weights=list(w)) for m, w in enumerate(self.risk.weights) if w is not None
        ]
        found = {"calibration": self.calibration, "risk": weights, "defaults": self.defaults}
        return found if self.missed is None else found | {"missed": self.missed}


def calibrate(
    tune: CalibrationPart,
    certify: CalibrationPart | None,
    max_loss: float,
    wanted: str = "auto",
    self_labelled: bool = False,
    may_pool: bool = True,
    guard: tuple[Wanted, Flag] | None = None,
    exit_cost: float = 0.0,
) -> Calibrated:
    """Fit the risk, choose a signal on the tuning samples, and certify it and its rivals on the certifying samples.

    The default τ is the largest on a fixed grid for which the loss, at it and every smaller τ, is below max_loss with
    95% confidence; with a guard, it is not above the largest τ that keeps the first of MISSED_LIMITS which can be
    certified, and 0 if none can. If there are fewer than MIN_CERTIFY certifying groups and may_pool is true, both parts
    tune and certify, cross-fitted: each is scored by a risk fitted on the other.

    certify: None: the tuning samples certify, too, cross-fitted. max_loss: limit on the accuracy lost against full
    depth, as a fraction. wanted: the default signal, or auto. self_labelled: true if the labels are the original
    model's answers, or full depth's. guard: the flag for which missed texts are certified, by name and of this model;
    None: none. exit_cost: see `placement.unused_exits`.

    Raises ValueError for a signal that the model does not have.
    """
    if wanted not in CHOICES:
        raise ValueError(f"--signal must be one of {', '.join(CHOICES)}, got {wanted!r}")
    tune_size, fitting, fold = len(tune.is_whole), tune, None
    if may_pool and certify is not None and certify.whole.num_groups < MIN_CERTIFY:
        console.print(
            f"fewer than {MIN_CERTIFY} independent groups of certifying samples: the tuning samples are also used to "
            "certify, and each part is scored by a risk model fitted on the other",
            soft_wrap=True,
            highlight=False,
        )
        # Exits are not chosen by samples that certify, except where they are fitted again to all (lab/docs/import.md).
        fold = np.repeat([0, 1], [tune_size, len(certify.is_whole)])
        fitting, certify, exit_cost = tune.joined(certify), None, 0.0
    fitting, crossed = _placed(fitting, exit_cost, fold)
    _report_unused(fitting.whole.recorded)
    fitted = risk.fit(fitting.samples.recorded, fitting.samples.groups)
    signals = _rivals(tune.whole, fitted, crossed[: tune.is_whole.sum()])
    name = _choose(signals) if wanted == "auto" else wanted
    if name not in signals:
        raise ValueError(f"--signal {name}: not available for this model; give {' or '.join(signals)}")
    tables, missed, samples = {}, None, (fitting if certify is None else certify).whole
    confidence = CROSSED if certify is None else CONFIDENCE
    for signal, _ in signals.values():
        scores = crossed if certify is None and isinstance(signal, Risk) else signal.scores(samples.recorded)
        tables[signal.name] = calibration.trade_off(samples, signal, FINE_TAUS, scores, confidence)
        if guard is not None and signal.name == name:
            missed = _missed(samples, scores, confidence, *guard)
    default = calibration.within_loss(tables[name], max_loss)
    if missed is not None:
        default = _within_missed(tables[name], default, missed)
    recorded = samples.recorded
    _report(tables, default, samples, self_labelled, guard is not None)
    calibrated = Calibration.model_validate(
        {
            "tune_size": tune_size,
            "certify_size": len(recorded.labels),
            "groups": samples.num_groups,
            "cross_fitted": certify is None,
            "max_loss": max_loss,
            "self_labelled": self_labelled,
            "original_disagreement": None
            if recorded.original is None
            else round(float(recorded.differs[:, -1].mean()), 6),
            "exit_accuracy": recorded.correct.mean(0).tolist(),
            "default": as_fields(default),
            "table": [as_fields(row) for table in tables.values() for row in table],
            "references": references(recorded),
            "tokens": None if recorded.tokens is None else quantiles(recorded.tokens),
        }
    )
    defaults = Defaults.model_validate({"tau": default.tau, "signal": default.signal, "lam": default.lam})
    return Calibrated(calibrated, fitted, defaults, missed)


def _placed(
    part: CalibrationPart, exit_cost: float, fold: NDArray[np.int64] | None
) -> tuple[CalibrationPart, Floats]:
    """The part with the exits to be used, and the cross-fitted risk of its whole texts, (n, exits).

    fold: see `risk.cross_fit`.
    """
    recorded = part.samples.recorded
    scores = risk.cross_fit(recorded, part.samples.groups, fold)[part.is_whole]
    unused = placement.unused_exits(part.whole.recorded, scores, exit_cost)
    scores[:, sorted(unused)] = 1.0
    return replace(part, samples=replace(part.samples, recorded=replace(recorded, unused=unused))), scores


def _report_unused(recorded: Recorded) -> None:
    unused = [str(recorded.exit_layers[j]) for j in sorted(recorded.unused)]
    if unused:
        console.print(
            f"exits that risk does not use, as they take more time than they save: {', '.join(unused)}"
        )


def _missed(samples: Samples, scores: Floats, confidence: float, wanted: Wanted, flag: Flag) -> Missed:
    """Certify the rate of missed texts at each τ, and report what it allows."""
    taus = sorted(FINE_TAUS)
    count, bounds = calibration.missed_bounds(samples, flag, scores, taus, confidence)
    recorded, allowed = samples.recorded, []
    safe = ~recorded.flagged(flag)[:, -1]
    blocked = recorded.blocked(flag)[safe]
    costs = profiles(
        scores[safe], recorded.differs[safe], recorded.exit_costs, np.array(taus), blocked
    ).layers
    for limit in calibration.DISAGREEMENTS:
        index = bisect_right(bounds, limit) - 1
        if index and len(costs):
            speed = calibration.speedup(recorded.exit_costs[-1], float(costs[:, index].mean()))
            allowed.append(f"{100 * limit:g}%: {calibration.times(speed)}")
        else:
            needed = math.ceil(math.log(1 - confidence) / math.log1p(-limit))
            allowed.append(f"{100 * limit:g}%: none (needs at least {needed} flagged samples)")
    console.print(
        f"flagged by full depth: {count} of the certifying samples. Speed-up in layers of the others, by the share of "
        f"flagged texts that are missed, certified with 95% confidence: {', '.join(allowed)}",
        soft_wrap=True,
        highlight=False,
    )
    fields = dict(zip(Wanted._fields, (list(wanted.labels), *wanted[1:]), strict=True))
    rounded = [math.ceil(one * 1e6) / 1e6 for one in bounds]
    return Missed.model_validate(fields | {"flagged": count, "taus": taus, "bounds": rounded})


def _within_missed(table: list[TradeOff], default: TradeOff, missed: Missed) -> TradeOff:
    """The row of the default τ, or of the largest one below it that keeps a guard's limit; prints the limit."""
    if (most := missed.limit) is None:
        how = "no τ above 0 is certified, so by default no text exits early"
    else:
        how = f"the default τ keeps the limit of {100 * most:g}%, as --max-missed {most:g} does"
    console.print(how, highlight=False)
    tau = min(default.tau, missed.taus[missed.row_within(most or 0.0)])
    return next(row for row in table if row.tau == tau)


def _rivals(whole: Samples, fitted: Risk, scores: Floats) -> dict[str, tuple[Signal, float]]:
    """The signals by name (EDR at its best λ), each with its mean speed-up on the tuning samples.

    scores: their cross-fitted risk, (n, exits).
    """
    tables = [
        (signal, calibration.trade_off(whole, signal, FINE_TAUS))
        for signal in calibration.candidates(whole.recorded)
    ]
    tables.append((fitted, calibration.trade_off(whole, fitted, FINE_TAUS, scores)))
    best: dict[str, tuple[Signal, float]] = {}
    for signal, table in tables:
        mean_speedup = calibration.mean_speedup(table)
        if signal.name not in best or mean_speedup > best[signal.name][1]:
            best[signal.name] = signal, mean_speedup
    return best


def _choose(signals: dict[str, tuple[Signal, float]]) -> str:
    """The name of the best signal: risk, whose τ is a probability, unless another one is clearly faster."""
    name = max(signals, key=lambda name: signals[name][1])
    return name if signals[name][1] > MIN_GAIN * signals["risk"][1] else "risk"


def _report(
    tables: dict[str, list[TradeOff]],
    default: TradeOff,
    samples: Samples,
    self_labelled: bool,
    has_flag: bool,
) -> None:
    """Print the trade-offs. With a flag, too, they are those without it: then they hold for any."""
    count = f"{len(samples.recorded.labels)} certifying samples"
    if len(samples.recorded.failures()) > 1:
        count += f", {len(samples.recorded.failures()[1][1])} with spans"
    reference = "full depth" if samples.recorded.original is None else "the original model"
    columns = ("signal", "1%", "2%", "5%", "certified: 1%", "2%", "5%")
    title = f"Speed-up in layers by disagreement with {reference}, {count}"
    if has_flag:
        title += ", if flagged answers exited early, too"
    table = empty_table(columns, title)
    for rows in sorted(tables.values(), key=calibration.mean_speedup, reverse=True):
        mark = "  (default)" if rows[0].signal == default.signal else ""
        certified = TradeOffs(rows)
        speeds = [calibration.times(calibration.speed_within(rows, d)) for d in calibration.DISAGREEMENTS]
        guaranteed = [(d, certified.within_disagreement(d)) for d in calibration.DISAGREEMENTS]
        speeds += [
            "–" if row.disagreement_bound > most else calibration.times(row.speedup)
            for most, row in guaranteed
        ]
        table.add_row(signal_label(rows[0].signal, rows[0].lam) + mark, *speeds)
    console.print(table)
    measure = f"agreement with {reference}" if self_labelled else "accuracy"
    if isinstance(kind := samples.recorded.kind, Value):
        target = reference if self_labelled else "the labels"
        measure = f"answers within {kind.tolerance:g} of {target}"
    limited = "τ limits the loss of accuracy, not the answers that differ (max_disagreement limits those)"
    console.print(
        f"default: {signal_label(default.signal, default.lam)}, τ = {default.tau:g}: {meaning(default)}. "
        f"On the certifying samples: {measure} {100 * default.accuracy:.2f}% "
        f"({100 * default.accuracy_interval[0]:.2f} … {100 * default.accuracy_interval[1]:.2f}), loss against full "
        f"depth {100 * default.loss:+.2f} points "
        f"(at most {100 * calibration.upper_loss(default):+.2f} with 95% confidence), mean exit layer "
        f"{default.mean_exit_layer:.2f}, speed-up {calibration.times(default.speedup)}; "
        f"{100 * default.disagreement:.2f}% differ from {reference} (at most {100 * default.disagreement_bound:.2f}%)"
        f"{'' if self_labelled else f'. {limited}'}",
        soft_wrap=True,
    )
    full = tables[default.signal][0]
    if full.disagreement > 0:  # because of int8
        console.print(
            f"full depth differs from {reference} in {100 * full.disagreement:.2f}% (at most "
            f"{100 * full.disagreement_bound:.2f}%, the smallest max_disagreement that can be guaranteed; 0% with "
            "--quantize none)",
            soft_wrap=True,
        )


def meaning(row: TradeOff | Defaults) -> str:
    """Explanation of the τ of a row, for messages."""
    if row.tau == 0:
        return "never exit early, as no larger τ can be certified on these samples"
    if row.signal == "risk":
        return f"exit when the probability that full depth differs is below {100 * row.tau:.3g}%"
    return "exit when the score is below τ"


def references(certified: Recorded) -> list[dict[str, Any]]:
    """Quantiles of each exit's signals on the certifying samples, as fields of a manifest's Reference."""
    references, has_classes = [], isinstance(certified.kind, Classes | Labels)
    for j, layer in enumerate(certified.exit_layers):
        has_prototypes = not np.isnan(certified.distances[0, j]).any()
        reference = {
            "layer": layer,
            "entropy": quantiles(certified.entropy[:, j]) if has_classes else None,
            "distance_ratio": quantiles(certified.distance_ratio[:, j]) if has_prototypes else None,
            "nearest": quantiles(certified.distances[:, j].min(-1)) if has_prototypes else None,
        }
        references.append(reference)
    return references


def as_fields(outcome: TradeOff) -> dict[str, Any]:
    """The fields of an outcome, rounded to six decimals, which is finer than their precision."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [rounded(item) for item in value]
        return round(value, 6) if isinstance(value, float) else value

    return {k: rounded(v) for k, v in asdict(outcome).items()}
