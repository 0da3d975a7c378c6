"""Guarantees on live traffic, and their cost: simulated streams of texts whose true rates are known.

A stream draws its texts at random from recorded texts, whose rate of disagreement at each τ is therefore the true rate.
Each stream runs through the server's own code (`exits.guarantee`), text by text.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import Guarantee, Profiles
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Signal
from de3.loadtest import report
from de3.progress import track

Kind = Literal["stationary", "switch", "drift", "bursts"]
KINDS: tuple[Kind, ...] = ("stationary", "switch", "drift", "bursts")
EARLY = 1200  # audits after which the speed-up is compared with the oracle's
BURST, BURST_EVERY = 2_000, 10_000  # number of texts
POINTS = 200  # number of plotted points of a stream
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Texts at each τ of the grid: whether the answer differs from full depth's, and the exit layer, each (n, taus)."""

    differs: NDArray[np.bool_]
    layers: NDArray[np.int64]

    @classmethod
    def of(cls, recorded: Recorded, signal: Signal) -> "Population":
        """Apply the exit rule to recorded texts at each τ of the grid."""
        scores, rows = signal.scores(recorded), np.arange(len(recorded.labels))
        index = np.stack([exit_index(scores, tau) for tau in FINE_TAUS], 1)
        layers = np.asarray(recorded.exit_layers)[index]
        return cls(recorded.differs[rows[:, None], index], layers)


@dataclass(frozen=True)
class Setting:
    """The parameters that all simulated streams share.

    Attributes:
        home, away: the populations; a stream begins with texts of home.
        rate: guaranteed rate of disagreement.
        share: share of texts that are audited while τ is above 0.
        texts, change_at: number of texts in a stream, and before the switch or the drift.
        start_layers: cost of tokenizer, embeddings and their exit, in layers.
    """

    home: Population
    away: Population
    rate: float
    share: float
    texts: int
    change_at: int
    start_layers: float

    def away_share(self, kind: Kind, text: int) -> float:
        """Share of texts from `away` at a text's place in the stream."""
        if kind == "switch":
            return float(text >= self.change_at)
        if kind == "drift":
            return min(1.0, max(0.0, (text - self.change_at) / (self.texts - self.change_at) * 2))
        if kind == "bursts":
            return float(text % BURST_EVERY >= BURST_EVERY - BURST)
        return 0.0

    def truth(self, kind: Kind, text: int, which: Callable[[Population], Floats]) -> Floats:
        """The mean of a quantity over home and away, weighted by their shares at a text's place in the stream."""
        share = self.away_share(kind, text)
        return (1 - share) * which(self.home) + share * which(self.away)


def run(kind: Kind, setting: Setting, seed: int) -> dict[str, Any]:
    """Simulate one stream; returns its results.

    The guarantee is broken while the true rate at the τ in force exceeds `setting.rate`. `above` is the share of texts
    during which it is broken, `wrong` the mean rate, and `cost` the mean cost of a text in layers. `early` and `last`
    are the indices of τ after EARLY audits and at the end. `broken` is True if the guarantee was broken after
    `change_at`. `to_restore` is the number of texts from then until the guarantee first held again; None if it was not
    broken, or not restored.
    """
    rng = np.random.default_rng(seed)
    guarantee = Guarantee(setting.rate, np.array(FINE_TAUS))
    rates = {id(p): p.differs.mean(0) for p in (setting.home, setting.away)}
    costs = {id(p): p.layers.mean(0) + setting.start_layers for p in (setting.home, setting.away)}

    def rate_at(text: int) -> Floats:
        return setting.truth(kind, text, lambda p: rates[id(p)])

    text, audits, wrong, above, cost, resets = 0, 0, 0.0, 0, 0.0, 0
    ever_above, broken_at, restored_at, early = False, None, None, None
    points: list[tuple[float, float, int]] = []
    every = setting.texts / POINTS
    while text < setting.texts:
        share = 1.0 if guarantee.index == 0 else setting.share
        skipped = int(rng.geometric(share)) - 1
        now, index = rate_at(text), guarantee.index
        here = float(now[index])
        count = skipped + 1
        wrong += here * count
        cost += float(setting.truth(kind, text, lambda p: costs[id(p)])[index]) * count
        if here > setting.rate:
            ever_above, above = True, above + count
            broken_at = text if broken_at is None and text >= setting.change_at else broken_at
        elif broken_at is not None and restored_at is None:
            restored_at = text
        while len(points) * every <= text:
            points.append((here, float(guarantee.tau), audits))
        from_away = rng.random() < setting.away_share(kind, text + skipped)
        texts = setting.away if from_away else setting.home
        k = int(rng.integers(len(texts.differs)))
        guarantee.count(share, Profiles(texts.differs[k, None], texts.layers[k, None]))
        guarantee.advance()
        resets += guarantee.reason == "change" and guarantee.evidence.audits == 0
        text, audits = text + count, audits + 1
        if audits == EARLY:
            early = guarantee.index
    early = guarantee.index if early is None else early
    return {
        "ever_above": ever_above,
        "above": above / text,
        "wrong": wrong / text,
        "cost": cost / text,
        "audits": audits,
        "resets": resets,
        "early": early,
        "last": guarantee.index,
        "broken": broken_at is not None,
        "to_restore": None if restored_at is None or broken_at is None else restored_at - broken_at,
        "points": points[:POINTS],
    }


def oracle(population: Population, rate: float, start_layers: float) -> float:
    """The lowest cost, in layers, of a τ whose true rate is within the guarantee."""
    fits = population.differs.mean(0) <= rate
    return float(population.layers.mean(0)[fits].min()) + start_layers


def audit(
    setting: Setting, kinds: Sequence[Kind], streams: int, other_streams: int
) -> tuple[list[dict[str, Any]], dict[str, list[list[tuple[float, float, int]]]]]:
    """Simulate streams; returns a row for each kind of stream, and the points of its streams for the plot.

    streams: number of stationary streams. other_streams: number of streams of each other kind. A point is the true rate
    at the τ in force, this τ, and the number of audits so far.
    """
    rows: list[dict[str, Any]] = []
    points: dict[str, list[list[tuple[float, float, int]]]] = {}
    full = float(setting.home.layers.max()) + setting.start_layers
    costs = setting.home.layers.mean(0) + setting.start_layers
    best = oracle(setting.home, setting.rate, setting.start_layers)
    for kind in kinds:
        count = streams if kind == "stationary" else other_streams
        with ProcessPoolExecutor() as pool:
            what = f"{kind}, guaranteed {100 * setting.rate:g}%"
            results = list(
                track(pool.map(partial(run, kind, setting), range(count), chunksize=4), what, count)
            )
        delays = [r["to_restore"] for r in results if r["to_restore"] is not None]
        rows.append(
            {
                "kind": kind,
                "guaranteed": setting.rate,
                "streams": count,
                "ever_above": float(np.mean([r["ever_above"] for r in results])),
                "above": float(np.mean([r["above"] for r in results])),
                "wrong_mean": float(np.mean([r["wrong"] for r in results])),
                "wrong_worst": float(np.max([r["wrong"] for r in results])),
                "speedup_oracle": full / best,
                "speedup_early": full / float(np.median([costs[r["early"]] for r in results])),
                "of_oracle_early": float(np.median([best / costs[r["early"]] for r in results])),
                "of_oracle_last": float(np.median([best / costs[r["last"]] for r in results])),
                "speedup": full / float(np.median([r["cost"] for r in results])),
                "resets": float(np.mean([r["resets"] for r in results])),
                "broken": float(np.mean([r["broken"] for r in results])),
                "restored": len(delays) / max(1, sum(r["broken"] for r in results)),
                "restore_median": float(np.median(delays)) if delays else None,
                "restore_worst": max(delays, default=None),
            }
        )
        points[kind] = [r["points"] for r in results]
    return rows, points


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = ["streams", "guaranteed", "ever above", "time above", "disagreement, mean (worst)", "speed-up"]
    columns += [f"of the oracle's at {EARLY} audits", "at the end", "changes detected"]
    columns += ["broken", "restored", "texts until then: median, worst"]

    def cells(r: dict[str, Any]) -> list[Any]:
        delays = "–" if r["restore_worst"] is None else f"{r['restore_median']:.0f}, {r['restore_worst']}"
        is_stationary = r["kind"] == "stationary"
        return [
            *(f"{r['streams']} {r['kind']}", f"{100 * r['guaranteed']:g}%", f"{100 * r['ever_above']:.1f}%"),
            f"{100 * r['above']:.2f}%",
            f"{100 * r['wrong_mean']:.2f}% ({100 * r['wrong_worst']:.2f}%)",
            f"{r['speedup']:.2f}×",
            *([f"{r[key]:.2f}" if is_stationary else "–" for key in ("of_oracle_early", "of_oracle_last")]),
            f"{r['resets']:.2f}",
            "–" if is_stationary else f"{100 * r['broken']:.0f}%",
            *(
                ["–", "–"]
                if r["kind"] in ("stationary", "bursts")
                else [f"{100 * r['restored']:.0f}%", delays]
            ),
        ]

    return columns, [cells(r) for r in rows]


def plot(path: Path, setting: Setting, points: dict[str, list[list[tuple[float, float, int]]]]) -> None:
    """Plot the true rate at the τ in force along each kind of stream: median, 90% of streams, and the highest."""
    figure, axes = report.panels(
        len(points), f"True rate of disagreement, {100 * setting.rate:g}% guaranteed", "texts"
    )
    x = np.arange(POINTS) * setting.texts / POINTS
    for axis, (kind, streams) in zip(axes, points.items(), strict=True):
        rates = 100 * np.array([[point[0] for point in stream] for stream in streams])
        low, middle, high = np.percentile(rates, [5, 50, 95], axis=0)
        axis.fill_between(x, low, high, alpha=0.25, label="90% of streams")
        axis.plot(x, middle, label="median")
        axis.plot(x, rates.max(0), linewidth=0.7, color="gray", label="highest of all")
        axis.axhline(100 * setting.rate, linestyle=":", color="black", label="guaranteed")
        axis.set_ylabel(f"{kind}, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
