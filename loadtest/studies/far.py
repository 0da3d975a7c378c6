"""Texts from elsewhere: which score tells them apart, what caution buys, how soon drift shows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exits import calibration, reference
from exits.reading import Reading, read
from exits.recorded import Recorded
from exits.rule import ExitRule, exit_index
from exits.signals import signal_of
from loadtest.studies.samples import NO_LABEL, nearest
from model_store.manifest import Manifest
from server.ood import WINDOW, Drift, OodMonitor

ALARM = 0.25  # of the PSI, as the usual reading has it
Floats = NDArray[np.float64]


def auroc(home: Floats, away: Floats) -> float:
    """The chance that a text from elsewhere scores higher than one from home (ties count half)."""
    ordered = np.sort(home)
    below = np.searchsorted(ordered, away, "left") + np.searchsorted(ordered, away, "right")
    return float(below.mean()) / (2 * len(home))


def scores(manifest: Manifest, like: Recorded) -> dict[str, Callable[[Recorded], Floats]]:
    """Scores of texts by name, each over the exits that a text passes at the default rule: (n,).

    like: samples from home, which the scores that need more than the manifest are fitted on.
    """
    tau, signal = manifest.defaults.tau, signal_of(manifest.defaults.lam)

    def left(found: Recorded) -> NDArray[np.int64]:
        return exit_index(signal.scores(found), tau)

    def at_exit(value: Callable[[Recorded], Floats]) -> Callable[[Recorded], Floats]:
        def score(found: Recorded) -> Floats:
            index = left(found)
            return np.asarray(value(found)[np.arange(len(index)), index])

        return score

    def over_exits(value: Callable[[Recorded], Floats]) -> Callable[[Recorded], Floats]:
        """Mean over the exits passed of −ln of the share of `like` at least so large."""
        levels = [np.sort(column) for column in value(like).T]

        def score(found: Recorded) -> Floats:
            values = value(found)
            tails = np.stack(
                [
                    1 - np.searchsorted(level, column, "left") / len(level)
                    for level, column in zip(levels, values.T, strict=True)
                ],
                1,
            )
            passed = np.arange(values.shape[1]) <= left(found)[:, None]
            logs = np.where(passed & ~np.isnan(values), -np.log(np.maximum(tails, reference.LEAST_TAIL)), 0.0)
            return np.asarray(logs.sum(1) / np.maximum(1, (passed & ~np.isnan(values)).sum(1)))

        return score

    def entropy(found: Recorded) -> Floats:
        return found.entropy

    def energy(found: Recorded) -> Floats:
        top = found.logits.max(-1)
        return np.asarray(-(top + np.log(np.exp(found.logits - top[..., None]).sum(-1))), np.float64)

    def mahalanobis(found: Recorded) -> Floats:
        """From `like`'s mean of its nearest class, in the space of distances to every prototype."""
        columns = [np.full(len(found.labels), np.nan) for _ in found.exit_layers]
        for e in range(len(found.exit_layers)):
            x, y = like.distances[:, e].astype(np.float64), found.distances[:, e].astype(np.float64)
            if np.isnan(x).any():
                continue
            groups = x.argmin(1)
            means = np.stack(
                [x[groups == k].mean(0) if (groups == k).any() else x.mean(0) for k in range(x.shape[1])]
            )
            inverse = np.linalg.pinv(np.cov((x - means[groups]).T) + 1e-6 * np.eye(x.shape[1]))
            off = y - means[y.argmin(1)]
            columns[e] = np.einsum("nk,kl,nl->n", off, inverse, off)
        return np.stack(columns, 1)

    return {
        "nearest distance, mean of −ln tail over exits passed (ood_score)": over_exits(nearest),
        "nearest distance at the first exit": lambda found: nearest(found)[:, 0],
        "nearest distance where it left": at_exit(nearest),
        "Mahalanobis of distances, where it left": at_exit(mahalanobis),
        "Mahalanobis of distances, mean of −ln tail": over_exits(mahalanobis),
        "entropy where it left": at_exit(entropy),
        "entropy, mean of −ln tail": over_exits(entropy),
        "energy where it left": at_exit(energy),
        "energy, mean of −ln tail": over_exits(energy),
    }


def readings(found: Recorded) -> list[list[Reading]]:
    """What a server reads, of every sample at every exit."""
    logits, distances = found.logits.tolist(), found.distances.tolist()
    missing: NDArray[np.bool_] = np.asarray(np.isnan(found.distances).any(-1))
    return [
        [
            read(logits[n][e], None if missing[n, e] else distances[n][e])
            for e in range(len(found.exit_layers))
        ]
        for n in range(len(found.labels))
    ]


def policy(manifest: Manifest, found: Recorded, name: str, full_depth: bool = False) -> dict[str, float]:
    """Accuracy, speed-up and share of far texts under an --ood-policy; full_depth: far texts never leave."""
    monitor, rule = (
        OodMonitor(manifest, name),
        ExitRule(manifest.defaults.tau, signal_of(manifest.defaults.lam)),
    )
    right, layers, far_texts = 0, 0, 0
    for label, row in zip(found.labels, readings(found), strict=True):
        cautious, far = rule, False
        for i, (layer, reading) in enumerate(zip(found.exit_layers, row, strict=True), 1):
            if not far and monitor.is_far(layer, reading):
                far, cautious = True, replace(rule, tau=0.0 if full_depth else rule.tau * monitor.caution)
            if layer == found.exit_layers[-1] or cautious.exits(cautious.signal.score(row[:i])):
                right, layers = right + (reading.label == label), layers + layer
                break
        far_texts += far
    n = len(found.labels)
    return {
        "accuracy": right / n if (found.labels != NO_LABEL).all() else float("nan"),
        "speedup": calibration.speedup(manifest.num_layers, layers / n),
        "far": far_texts / n,
    }


def drift(manifest: Manifest, home: Recorded, away: Recorded, switches: int, seed: int = 0) -> dict[str, Any]:
    """The drift metric over home texts drawn at random, and after a switch to texts from elsewhere.

    Returns the PSI of the nearest distance at the first exit at every 50th text of a stream of 100 windows
    (its median and maximum, and the share above ALARM), and how many texts after a switch it alarms.
    """
    calibrated = manifest.calibration
    if calibrated is None:
        raise ValueError("the model has no calibration")
    generator = np.random.default_rng(seed)
    here, there = ([row[0] for row in readings(found)] for found in (home, away))

    def psi(window: Drift) -> float:
        return window.statistics()["nearest", "psi"]

    def filled() -> Drift:
        window = Drift(calibrated.references[0])
        for i in generator.integers(len(here), size=WINDOW):
            window.add(here[i])
        return window

    window, seen = filled(), []
    for i in range(100 * WINDOW):
        window.add(here[generator.integers(len(here))])
        if i % 50 == 49:
            seen.append(psi(window))
    waits = []
    for _ in range(switches):
        window, count = filled(), 0
        while psi(window) <= ALARM and count < 10 * WINDOW:
            window.add(there[generator.integers(len(there))])
            count += 1
        waits.append(count)
    return {
        "psi_median": float(np.median(seen)),
        "psi_max": max(seen),
        "false_alarms": float(np.mean(np.array(seen) > ALARM)),
        "texts_to_alarm_median": float(np.median(waits)),
        "texts_to_alarm_max": max(waits),
    }
