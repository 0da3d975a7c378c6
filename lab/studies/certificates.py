"""The speed that the certificates of imports cost, and how often their limits are exceeded.

Measured on random splits of recorded states of a stock classifier's texts; the exits are in float32.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from de3.exits import calibration, placement, risk
from de3.exits.bound import CONFIDENCE, CROSSED
from de3.exits.calibration import DISAGREEMENTS, FINE_TAUS, Samples
from de3.exits.guarantee import profiles
from de3.exits.kinds import CLASSES
from de3.exits.recorded import Recorded
from de3.exits.signals import Risk
from de3.export import fit, states
from de3.export.calibrate import MIN_CERTIFY
from de3.export.classifier import Stock
from de3.export.importing import base
from de3.export.training_set import Target, TrainingSet
from de3.progress import track

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
QUANTILES = np.linspace(0, 1, 2000)  # of the scores: the τ of hindsight


@dataclass(frozen=True)
class Texts:
    """n texts, run through a stock classifier.

    Attributes:
        texts: states in int8, and the answers that exits are fitted to.
        original: the classifier's answers in float32, (n,).
        num_layers: of the encoder.
        cost: time of an exit, in layers.
    """

    texts: TrainingSet
    original: NDArray[np.int64]
    num_layers: int
    cost: float

    @classmethod
    def of(cls, stock: Stock, texts: Sequence[str], work: Path) -> "Texts":
        """Run texts through the classifier; results are kept in the folder `work`."""
        shutil.rmtree(work / "base", ignore_errors=True)
        reference, quantized = base(stock, work / "base", "fp32"), base(stock, work / "base", "int8")
        computed = states.compute(quantized, texts, work, "int8")
        original = states.compute(reference, texts, work, "fp32", ()).logits.argmax(-1)
        layers = range(stock.num_layers)
        loaded = {(p, m): computed.states(p, m).astype(np.float16) for p in states.POOLINGS for m in layers}
        manifest = quantized.manifest
        cost = placement.exit_cost(
            manifest.hidden_size, manifest.encoder.inner, len(manifest.labels), manifest.hidden_size, False
        )
        known = TrainingSet(
            Target(computed.logits, CLASSES), np.arange(len(texts)), lambda p, m: loaded[p, m]
        )
        return cls(known, original, stock.num_layers, cost)

    def recorded(self, exits: fit.Exits, rows: Rows) -> Recorded:
        """The outputs of exits for the texts at these rows."""
        return self.compared(exits.recorded(self.texts.part(rows)), rows)

    def compared(self, recorded: Recorded, rows: Rows) -> Recorded:
        """Recorded outputs of these texts, compared with the original's answers."""
        return replace(recorded, original=self.original[rows])


@dataclass(frozen=True)
class Scheme:
    """A fit and its certificate.

    Attributes:
        exits: that are served.
        risk: that is served.
        samples: that certify.
        scores: their risk, (n, exits), by which they certify.
        confidence: of the bound.
    """

    exits: fit.Exits
    risk: Risk
    samples: Samples
    scores: Floats
    confidence: float = CONFIDENCE


def three_parts(texts: Texts, rows: Rows, seed: int) -> Scheme:
    """60% fit the exits; 20% each tune and certify, each scored by the risk of the other if they are few.

    Imports were certified in this way before.
    """
    train, tune, certify = np.split(rows, [int(0.6 * len(rows)), int(0.8 * len(rows))])
    exits = fitted(texts.texts.part(train), texts.num_layers, seed)
    first, second = texts.recorded(exits, tune), texts.recorded(exits, certify)
    if len(certify) >= MIN_CERTIFY:
        unused = placement.unused_exits(first, risk.cross_fit(first), texts.cost)
        found = risk.fit(replace(first, unused=unused))
        return Scheme(exits, found, Samples.independent(second), found.scores(second))
    both = Recorded.joined([first, second])
    scores = np.concatenate([risk.fit(second).scores(first), risk.fit(first).scores(second)])
    return Scheme(exits, risk.fit(both), Samples.independent(both), scores)


def fitted(texts: TrainingSet, num_layers: int, seed: int) -> fit.Exits:
    """Exits fitted to texts, without cross-fitting."""
    axes: fit.Axes = {}
    pooling, ridges, start = fit.choose(num_layers, texts, seed, axes)
    return fit.fit_with(texts, pooling, ridges, seed, start, axes)


def crossed(texts: Texts, rows: Rows, seed: int, is_certifying: bool) -> tuple[fit.Exits, Recorded, Floats]:
    """Exits fitted to all of these texts; of the texts, outputs of exits fitted without them, and cross-fitted risk.

    is_certifying: the texts also certify, so risk predicts disagreement with the original; otherwise with int8's full
    depth.
    """
    exits, recorded = fit.fit(texts.num_layers, texts.texts.part(rows), seed, lambda one: one)
    if is_certifying:
        recorded = texts.compared(recorded, rows)
    scores = risk.cross_fit(recorded)
    unused = placement.unused_exits(recorded, scores, texts.cost)
    scores[:, sorted(unused)] = 1.0
    return exits, replace(recorded, unused=unused), scores


def two_parts(texts: Texts, rows: Rows, seed: int) -> Scheme:
    """60% fit exits and, cross-fitted, risk; the others certify: `de3 import` with many texts."""
    train, certify = np.split(rows, [int(0.6 * len(rows))])
    exits, recorded, _ = crossed(texts, train, seed, False)
    found, others = risk.fit(recorded), texts.recorded(exits, certify)
    return Scheme(exits, found, Samples.independent(others), found.scores(others))


def one_part(texts: Texts, rows: Rows, seed: int) -> Scheme:
    """All texts fit and certify, cross-fitted: `de3 import` with few texts."""
    exits, recorded, scores = crossed(texts, rows, seed, True)
    return Scheme(exits, risk.fit(recorded), Samples.independent(recorded), scores, CROSSED)


SCHEMES: dict[str, Callable[[Texts, Rows, int], Scheme]] = {
    "60, 20, 20": three_parts,
    "60, 40": two_parts,
    "100": one_part,
}


@dataclass(frozen=True)
class Outcome:
    """Of one scheme on one split at one limit, on unseen texts.

    Attributes:
        rate: of disagreement, at the certified τ; NaN if the limit cannot be certified.
        certified: layers at the certified τ.
        empirical: layers at the largest τ whose rate on the certifying samples is within the limit.
        grid: layers at the best τ of the grid in hindsight.
        hindsight: layers at the best τ in hindsight.
        time: at the certified τ, in layers, exits included.
    """

    rate: float
    certified: float
    empirical: float
    grid: float
    hindsight: float
    time: float


def outcomes(texts: Texts, scheme: Scheme, unseen: Rows) -> list[Outcome]:
    """Outcomes of a scheme at DISAGREEMENTS."""
    table = calibration.trade_off(scheme.samples, scheme.risk, FINE_TAUS, scheme.scores, scheme.confidence)
    recorded = texts.recorded(scheme.exits, unseen)
    scores, differs = scheme.risk.scores(recorded), recorded.differs
    used = [j for j in range(texts.num_layers) if scheme.risk.may_exit(recorded.exit_layers[j])]
    exits = [*used, texts.num_layers]
    scores, differs = scores[:, exits], differs[:, exits]
    layers = [recorded.exit_layers[j] for j in exits]
    times = [layer + texts.cost * (i + 1) for i, layer in enumerate(layers)]

    def at(taus: Floats, costs: Sequence[float]) -> tuple[Floats, Floats]:
        found = profiles(scores, differs, np.array(costs), taus)
        return found.differs.mean(0), found.layers.mean(0)

    grid = np.array(FINE_TAUS)
    rates, costs = at(grid, layers)
    seconds = at(grid, times)[1]
    every = np.unique([0.0, *np.nanquantile(scores[:, :-1], QUANTILES)])
    all_rates, all_costs = at(every, layers)
    result = []
    for limit in DISAGREEMENTS:
        certified = _last([row.disagreement_bound for row in table], limit)
        empirical = _last([row.disagreement for row in table], limit)
        best = float(costs[rates <= limit].min(initial=layers[-1]))
        perfect = min(best, float(all_costs[all_rates <= limit].min(initial=layers[-1])))
        is_refused = table[certified].disagreement_bound > limit
        rate = np.nan if is_refused else float(rates[certified])
        found = (float(costs[certified]), float(costs[empirical]), best, perfect, float(seconds[certified]))
        result.append(Outcome(rate, *found))
    return result


def _last(values: Sequence[float], limit: float) -> int:
    """The number of values, less 1, from the first to the last before one above the limit; 0 if there is none."""
    above = np.flatnonzero(np.array(values) > limit)
    return max(0, int(above[0]) - 1) if len(above) else len(values) - 1


def run(
    texts: Texts, size: int, repetitions: int, names: Sequence[str], first: int = 0
) -> dict[str, list[list[Outcome]]]:
    """Outcomes by scheme, repetition and limit. size: number of texts of an import; the others are unseen."""
    found: dict[str, list[list[Outcome]]] = {name: [] for name in names}
    for repetition in track(range(first, first + repetitions), "Importing"):
        order = np.random.default_rng(repetition).permutation(len(texts.original))
        rows, unseen = order[:size], order[size:]
        for name in names:
            found[name].append(outcomes(texts, SCHEMES[name](texts, rows, repetition), unseen))
    return found


def table(
    found: dict[str, list[list[Outcome]]], num_layers: int, cost: float
) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table: speed-ups are of the mean number of layers over the repetitions."""
    columns = [
        "texts, %",
        "limit",
        "above it",
        "rate",
        "certified",
        "without bound",
        "grid",
        "hindsight",
        "time",
    ]
    rows = []
    for name, repetitions in found.items():
        for i, limit in enumerate(DISAGREEMENTS):
            all_of = [one[i] for one in repetitions]
            rates = np.array([one.rate for one in all_of])
            certified = rates[~np.isnan(rates)]
            shares = [f"{100 * (rates > limit).mean():.1f}%", "–"]
            if len(certified):
                shares[1] = f"{100 * certified.mean():.2f}%"
            speedups = [
                calibration.speedup(num_layers, float(np.mean([getattr(one, field) for one in all_of])))
                for field in ("certified", "empirical", "grid", "hindsight")
            ]
            speedups.append((num_layers + cost) / float(np.mean([one.time for one in all_of])))
            rows.append([name, f"{100 * limit:g}%", *shares, *(f"{speedup:.2f}×" for speedup in speedups)])
    return columns, rows
