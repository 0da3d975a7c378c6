"""The accuracy of each exit, and accuracy against speed-up for each exit signal, as tables and a plot."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from de3.exits import calibration, formulas
from de3.exits.kinds import Classes, Labels
from de3.exits.recorded import Recorded
from de3.exits.reference import LEVELS
from de3.exits.rule import exit_index
from de3.exits.signals import Edr, Signal, signal_label
from de3.exits.trade_offs import TradeOffs
from de3.progress import empty_table
from de3.training.measures import measures_of

SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
HINDSIGHT = (0.01, 0.02, 0.03, 0.05)  # rates of disagreement
SURE = 0.9  # probability at which an application might act without review
OUTCOME_COLUMNS = ("in layers", "in time", "differ", "loss ± 95%")
TARGET_SPEEDUPS, TARGET_DISAGREEMENTS = (2, 3, 4, 5), (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Curve:
    """Accuracy against speed-up for one signal, both (points,); speed-up ascends."""

    name: str
    speedup: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    def at(self, speedup: float) -> float:
        """Accuracy at a speed-up, interpolated linearly between points; NaN outside the curve."""
        if not self.speedup[0] <= speedup <= self.speedup[-1]:
            return float("nan")
        return float(np.interp(speedup, self.speedup, self.accuracy))


def curves(recorded: Recorded, lams: Sequence[float], risk: Signal | None = None) -> list[Curve]:
    """The curves of entropy, distance ratio, EDR at each λ and risk, except the signals that the model lacks."""
    scores = {"entropy": recorded.entropy} if isinstance(recorded.kind, Classes | Labels) else {}
    if len(recorded.exit_layers) > 1 and isinstance(recorded.kind, Classes):
        scores["distance ratio"] = recorded.distance_ratio
        scores |= {f"EDR λ={lam:g}": Edr(lam).scores(recorded) for lam in lams}
    if risk is not None:
        scores["risk"] = risk.scores(recorded)
    return [_curve(name, values, recorded) for name, values in scores.items()]


def _curve(name: str, scores: NDArray[np.float64], recorded: Recorded) -> Curve:
    """Sweep τ over the quantiles of the scores, so that the curves of all signals have equal resolution."""
    early = scores[:, :-1].ravel()
    taus = [0.0, *np.unique(np.quantile(early, np.linspace(0, 1, 200))), 1.1] if early.size else [0.0]
    layers = np.asarray(recorded.exit_layers)
    correct, rows = recorded.correct, np.arange(len(recorded.labels))
    points: dict[float, float] = {}
    for tau in taus:
        index = exit_index(scores, float(tau))
        points[calibration.speedup(int(layers[-1]), float(layers[index].mean()))] = float(
            correct[rows, index].mean()
        )
    speedups = sorted(points)
    return Curve(name, np.array(speedups), np.array([points[s] for s in speedups]))


def exit_table(recorded: Recorded, what: str = "") -> Table:
    """The accuracy of every exit, with its 95% interval, and the further measures of the kind of answer.

    what: kind of samples in the title, such as "tuning ".
    """
    measures = measures_of(recorded.kind)
    scores = measures.of(recorded)
    title = f"Accuracy of each exit alone ({len(recorded.labels)} {what}samples)"
    table = empty_table(("layer", measures.right_if, "95% interval", *measures.more), title)
    for j, (layer, right) in enumerate(zip(recorded.exit_layers, recorded.correct.T, strict=True)):
        low, high = calibration.wilson(int(right.sum()), len(right))
        more = [f"{100 * score[j]:.2f}" for score in scores]
        table.add_row(str(layer), f"{100 * right.mean():.2f}", f"{100 * low:.2f} … {100 * high:.2f}", *more)
    return table


def exit_scores(recorded: Recorded) -> tuple[str, NDArray[np.float64]]:
    """The score that training maximizes: its name, such as accuracy, and its value at every exit, (exits,)."""
    measures = measures_of(recorded.kind)
    if measures.trained is None:
        return "accuracy", np.asarray(recorded.correct.mean(0))
    return measures.more[measures.trained].lower().replace(" ", "_"), measures.of(recorded)[measures.trained]


def weaknesses(recorded: Recorded, names: Sequence[str]) -> list[str]:
    """Warnings about an evaluation: few samples, or a model no better than the most frequent label.

    For a multi-label model: only labels that it never assigns. For a regression model and a token classifier: none.
    """
    n, warnings = len(recorded.labels), list[str]()
    if isinstance(recorded.kind, Labels):
        return _labels_never_given(recorded, names)
    if not isinstance(recorded.kind, Classes):
        return warnings
    counts = np.bincount(recorded.labels, minlength=len(names))
    most, right = int(counts.argmax()), int(recorded.correct[:, -1].sum())
    low, high = calibration.wilson(right, n)
    if high - low > 0.1:
        warnings.append(
            f"only {n} samples: the accuracy at full depth is between {100 * low:.0f}% and {100 * high:.0f}% "
            "(95% confidence)"
        )
    if low <= counts[most] / n:
        warnings.append(
            f"full depth is right for {100 * right / n:.1f}%, and {names[most]!r} alone would be right for "
            f"{100 * counts[most] / n:.1f}%: the model has learned little"
        )
    return warnings


def _labels_never_given(recorded: Recorded, names: Sequence[str]) -> list[str]:
    """A warning about labels that a multi-label model never assigns at full depth, though some samples have them."""
    missing = np.flatnonzero(recorded.labels.any(0) & ~recorded.answers[:, -1].any(0))
    if not len(missing):
        return []
    shown = ", ".join(names[k] for k in missing[:5]) + (" …" if len(missing) > 5 else "")
    return [
        f"full depth assigns {len(missing)} of {len(names)} labels to none of {len(recorded.labels)} samples, though "
        f"they are correct for some: {shown}; they need more rows, longer training, or lower thresholds"
    ]


def curve_table(curves: Sequence[Curve]) -> Table:
    """The accuracy of every signal at each of SPEEDUPS."""
    columns = ("signal", *(f"{s:g}×" for s in SPEEDUPS))
    table = empty_table(columns, "Accuracy at a speed-up of M / mean exit layer")
    for curve in curves:
        cells = [f"{100 * curve.at(s):.2f}" if not np.isnan(curve.at(s)) else "–" for s in SPEEDUPS]
        table.add_row(curve.name, *cells)
    return table


@dataclass(frozen=True)
class Times:
    """CPU time of a text that runs alone, in seconds: intercept and slope over its number of tokens.

    Attributes:
        full: time at τ = 0 (tokenizer, embeddings, all layers and the last exit), (2,).
        exits: time to each exit, with every exit up to it evaluated, (exits, 2).
    """

    full: NDArray[np.float64]
    exits: NDArray[np.float64]

    def speedup(self, index: NDArray[np.int64], tokens: NDArray[np.int64]) -> float:
        """The speed-up in time of texts (n,) with these exit indices and numbers of tokens.

        It is Σ T(nᵢ) / Σ t_eᵢ(nᵢ): text i has nᵢ tokens and exits at eᵢ, T is the time at τ = 0, t_e the time to
        exit e. Unlike M / mean exit layer, it includes the tokenizer, the embeddings and every exit passed. If
        the tokenizer and embeddings take s, a layer l and an exit c, texts that exit at layer m have a speed-up of
        (s + M·l + c) / (s + m·l + (m + 1)·c). Exits are timed, not counted in multiply-adds: on 11 tokens, an exit with
        150 classes has 1% of a layer's multiply-adds but takes a third of the layer's time, because every weight is
        read from memory for a single row (lab/docs/experiments/time.md).
        """
        full = self.full[0] + self.full[1] * tokens
        early = self.exits[index, 0] + self.exits[index, 1] * tokens
        return float(full.sum() / early.sum())


def in_time(recorded: Recorded, scores: NDArray[np.float64], tau: float, times: Times) -> float:
    """The speed-up in time of exiting at score < τ; recorded: from an artifact, with token counts."""
    assert recorded.tokens is not None
    return times.speedup(exit_index(scores, tau), recorded.tokens)


def reference_of(recorded: Recorded) -> str:
    """What disagreement is counted against."""
    return "full depth" if recorded.original is None else "the original"


def default_line(recorded: Recorded, tau: float, signal: Signal, times: Times) -> str:
    """The outcome of an artifact's default signal and τ on these samples, as text."""
    samples = calibration.Samples.independent(recorded)
    scores = signal.scores(recorded)
    o = calibration.outcome(samples, scores, tau, signal)
    low, high = (100 * x for x in o.accuracy_interval)
    measures, reference = measures_of(recorded.kind), reference_of(recorded)
    further = zip(measures.more, measures.at_tau(recorded, scores, tau), measures.of(recorded), strict=True)
    more = "".join(f"{name} {100 * x:.2f} (full depth {100 * of[-1]:.2f}), " for name, x, of in further)
    return (
        f"Default {signal_label(signal.name, signal.lam)}, τ = {tau:g}: "
        f"{measures.right_if} {100 * o.accuracy:.2f}% ({low:.2f} … {high:.2f}), "
        f"full depth {100 * (o.accuracy + o.loss):.2f}%, loss {100 * o.loss:+.2f} points "
        f"({100 * o.loss_interval[0]:+.2f} … {100 * o.loss_interval[1]:+.2f}), "
        f"{more}{100 * o.disagreement:.2f}% of {measures.answer} differ from {reference}, "
        f"mean exit layer {o.mean_exit_layer:.2f}, speed-up {calibration.times(o.speedup)}, "
        f"{calibration.times(in_time(recorded, scores, tau, times))} in time (with tokenizer, embeddings and exits)\n"
        f"Exits at layer {', '.join(str(m) for m in recorded.exit_layers)}: "
        f"{', '.join(f'{100 * x:.1f}%' for x in o.histogram)}{_probability_line(recorded, exit_index(scores, tau))}"
    )


def _probability_line(recorded: Recorded, index: NDArray[np.int64]) -> str:
    """A line on how exits change the top probability of texts; "" for a regression model. index: exit indices, (n,)."""
    if not isinstance(recorded.kind, Classes | Labels):
        return ""
    if isinstance(recorded.kind, Classes):
        top = formulas.softmax(recorded.logits).max(-1)
    else:  # the sigmoid, which this form computes without overflow
        top = (1 + np.tanh(recorded.logits.max(-1).astype(np.float64) / 2)) / 2
    early, full = top[np.arange(len(index)), index], top[:, -1]
    only_one = (early >= SURE) != (full >= SURE)
    return (
        f"\nTop probability: differs from full depth's by {np.abs(early - full).mean():.4f} on average; for "
        f"{100 * only_one.mean():.2f}% of texts, only one of the two is at least {SURE:g}"
    )


def target_table(recorded: Recorded, signals: Sequence[tuple[Signal, TradeOffs]], times: Times) -> Table:
    """The outcome of each target on these samples, for each signal, at the τ that the calibration gives the target.

    signals: each with the rows of its calibration table. Targets that no row meets are left out.
    """
    title = f"Targets: a speed-up, or a limit on the answers that differ from {reference_of(recorded)}"
    measures = measures_of(recorded.kind)
    columns = ("signal", "target", "τ", *OUTCOME_COLUMNS, *measures.more)
    table = empty_table(columns, f"{title} ({len(recorded.labels)} samples)", no_wrap=True)
    for signal, trade_offs in signals:
        rows = [(f"{s:g}×", trade_offs.at_speedup(s)) for s in TARGET_SPEEDUPS]
        rows += [(f"≤ {100 * d:g}%", trade_offs.within_disagreement(d)) for d in TARGET_DISAGREEMENTS]
        scores = signal.scores(recorded)
        for target, row in rows:
            if row is None:
                continue
            cells = _outcome_cells(recorded, scores, row.tau, signal, times)
            further = measures.at_tau(recorded, scores, row.tau)
            name = signal_label(signal.name, signal.lam)
            table.add_row(name, target, f"{row.tau:.4f}", *cells, *(f"{100 * x:.2f}" for x in further))
        table.add_section()
    return table


def _outcome_cells(
    recorded: Recorded, scores: NDArray[np.float64], tau: float, signal: Signal, times: Times
) -> list[str]:
    """The cells of OUTCOME_COLUMNS for exiting at score < τ."""
    o = calibration.outcome(calibration.Samples.independent(recorded), scores, tau, signal)
    low, high = (100 * x for x in o.loss_interval)
    return [
        calibration.times(o.speedup),
        calibration.times(in_time(recorded, scores, tau, times)),
        f"{100 * o.disagreement:.2f}%",
        f"{100 * o.loss:+.2f} ± {(high - low) / 2:.2f}",
    ]


def hindsight_table(recorded: Recorded, signals: Sequence[Signal]) -> Table:
    """Each signal's highest speed-up within each disagreement rate in HINDSIGHT, with τ chosen in hindsight."""
    samples = calibration.Samples.independent(recorded)
    columns = ("signal", *(f"{100 * d:g}%" for d in HINDSIGHT))
    table = empty_table(
        columns, "Speed-up in layers within a rate of disagreement, at the best τ in hindsight"
    )
    for signal in signals:
        scores = signal.scores(recorded)
        taus = np.unique(np.nanquantile(scores[:, :-1], np.linspace(0, 1, 500)))
        rows = [calibration.outcome(samples, scores, float(tau), signal) for tau in [0.0, *taus]]
        best = [max((r.speedup for r in rows if r.disagreement <= d), default=None) for d in HINDSIGHT]
        name = signal_label(signal.name, signal.lam)
        table.add_row(name, *("–" if speed is None else calibration.times(speed) for speed in best))
    return table


def length_table(recorded: Recorded, tau: float, signal: Signal, times: Times) -> Table:
    """The outcome of the default signal and τ for each quarter of the samples, by number of tokens."""
    assert recorded.tokens is not None
    table = empty_table(("tokens", "samples", *OUTCOME_COLUMNS), "The default by length", no_wrap=True)
    order = np.argsort(recorded.tokens, kind="stable")
    for part in np.array_split(order, min(4, len(order))):
        some = recorded.rows(part)
        assert some.tokens is not None
        cells = _outcome_cells(some, signal.scores(some), tau, signal, times)
        table.add_row(f"{some.tokens.min()} to {some.tokens.max()}", str(len(part)), *cells)
    return table


def unlike_lengths(tokens: NDArray[np.int64], calibrated: Sequence[float] | None) -> list[str]:
    """A warning if the median text length is outside the interquartile range of the calibration texts.

    tokens: number of tokens of each text, (n,). calibrated: quantiles at LEVELS of the calibration texts' numbers
    of tokens; None: unknown, no warning.
    """
    if calibrated is None:
        return []
    low, middle, high = (calibrated[LEVELS.index(level)] for level in (0.25, 0.5, 0.75))
    median = float(np.median(tokens))
    if low <= median <= high:
        return []
    return [
        f"the median text has {median:.0f} tokens here, and {middle:.0f} in the calibration: the calibration's "
        "guarantees may not hold for these texts; see de3 calibrate"
    ]


def plot(recorded: Recorded, curves: Sequence[Curve], path: Path, title: str) -> None:
    """Plot accuracy by exit, and accuracy against speed-up, into one PNG."""
    # Importing matplotlib may log a warning about its cache, for example if the home folder is read-only.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5))
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    accuracy = 100 * recorded.correct.mean(0)
    bars = left.bar([str(m) for m in recorded.exit_layers], accuracy, color="#4c78a8")
    left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set(xlabel="exit layer (0: embeddings)", ylabel="accuracy, %", title="Each exit alone")
    left.set_ylim(max(0, min(accuracy) - 8), min(100, max(accuracy) + 4))
    for curve in curves:
        shown = curve.speedup <= 10
        style: dict[str, Any] = (
            {"linewidth": 2.4, "color": "crimson"} if curve.name == "risk" else {"linewidth": 1.2}
        )
        right.plot(curve.speedup[shown], 100 * curve.accuracy[shown], label=curve.name, **style)
    right.axhline(accuracy[-1], color="grey", linestyle=":", label="full depth")
    right.set(xlabel="speed-up: M / mean exit layer", ylabel="accuracy, %", title="Early exit")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
