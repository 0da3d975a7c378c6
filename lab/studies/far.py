"""Out-of-distribution texts: scores that detect them, the effect of --ood-policy, the delay of the drift alarm."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits import calibration, reference
from de3.exits.reading import Reading, read
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule, exit_index
from de3.model_store.manifest import Manifest
from de3.runtime.ood import WINDOW, Drift, OodMonitor
from lab.studies.samples import NO_LABEL, nearest

ALARM = 0.25  # a higher PSI usually means that the inputs have shifted
Floats = NDArray[np.float64]


def auroc(home: Floats, away: Floats) -> float:
    """The probability that an out-of-distribution text scores higher than an in-distribution one (ties count half)."""
    ordered = np.sort(home)
    below = np.searchsorted(ordered, away, "left") + np.searchsorted(ordered, away, "right")
    return float(below.mean()) / (2 * len(home))


def scores(manifest: Manifest, like: Recorded) -> dict[str, Callable[[Recorded], Floats]]:
    """OOD scores by name; each maps recorded texts to scores (n,), with the exits that the default rule takes.

    like: in-distribution samples, for scores that must be fitted.
    """
    tau, signal = manifest.defaults.tau, manifest.default_signal

    def exits(texts: Recorded) -> NDArray[np.int64]:
        return exit_index(signal.scores(texts), tau)

    def at_exit(value: Callable[[Recorded], Floats]) -> Callable[[Recorded], Floats]:
        def score(texts: Recorded) -> Floats:
            index = exits(texts)
            return np.asarray(value(texts)[np.arange(len(index)), index])

        return score

    def over_exits(value: Callable[[Recorded], Floats]) -> Callable[[Recorded], Floats]:
        """A score: mean of −ln p over the exits passed, p being the share of `like` with values at least as large."""
        levels = [np.sort(column) for column in value(like).T]

        def score(texts: Recorded) -> Floats:
            values = value(texts)
            tails = np.stack(
                [
                    1 - np.searchsorted(level, column, "left") / len(level)
                    for level, column in zip(levels, values.T, strict=True)
                ],
                1,
            )
            passed = np.arange(values.shape[1]) <= exits(texts)[:, None]
            logs = np.where(passed & ~np.isnan(values), -np.log(np.maximum(tails, reference.MIN_TAIL)), 0.0)
            return np.asarray(logs.sum(1) / np.maximum(1, (passed & ~np.isnan(values)).sum(1)))

        return score

    def entropy(texts: Recorded) -> Floats:
        return texts.entropy

    def energy(texts: Recorded) -> Floats:
        top = texts.logits.max(-1)
        return np.asarray(-(top + np.log(np.exp(texts.logits - top[..., None]).sum(-1))), np.float64)

    def mahalanobis(texts: Recorded) -> Floats:
        """Squared Mahalanobis distance from the mean of the nearest prototype's class in `like`, (n, exits).

        A text is represented by its distances to all prototypes. NaN at exits without prototypes.
        """
        columns = [np.full(len(texts.labels), np.nan) for _ in texts.exit_layers]
        for e in range(len(texts.exit_layers)):
            fitted, distances = (r.distances[:, e].astype(np.float64) for r in (like, texts))
            if np.isnan(fitted).any():
                continue
            classes, nearest_class = range(fitted.shape[1]), fitted.argmin(1)
            groups = [fitted[nearest_class == k] for k in classes]
            means = np.stack([(group if len(group) else fitted).mean(0) for group in groups])
            covariance = np.cov((fitted - means[nearest_class]).T)
            inverse = np.linalg.pinv(covariance + 1e-6 * np.eye(len(classes)))
            offsets = distances - means[distances.argmin(1)]
            columns[e] = np.einsum("nk,kl,nl->n", offsets, inverse, offsets)
        return np.stack(columns, 1)

    return {
        "nearest distance, mean of −ln tail over exits passed (ood_score)": over_exits(nearest),
        "nearest distance at the first exit": lambda texts: nearest(texts)[:, 0],
        "nearest distance at the exit taken": at_exit(nearest),
        "Mahalanobis of distances, at the exit taken": at_exit(mahalanobis),
        "Mahalanobis of distances, mean of −ln tail": over_exits(mahalanobis),
        "entropy at the exit taken": at_exit(entropy),
        "entropy, mean of −ln tail": over_exits(entropy),
        "energy at the exit taken": at_exit(energy),
        "energy, mean of −ln tail": over_exits(energy),
    }


def readings(texts: Recorded) -> list[list[Reading]]:
    """The readings of every sample at every exit, as a server computes them."""
    logits, distances = texts.logits.tolist(), texts.distances.tolist()
    missing: NDArray[np.bool_] = np.asarray(np.isnan(texts.distances).any(-1))
    return [
        [
            read(layer, logits[n][e], None if missing[n, e] else distances[n][e])
            for e, layer in enumerate(texts.exit_layers)
        ]
        for n in range(len(texts.labels))
    ]


def policy(manifest: Manifest, texts: Recorded, name: str, full_depth: bool = False) -> dict[str, float]:
    """Accuracy (NaN unless every text has a label), speed-up in layers and share of far texts under an OOD policy.

    full_depth: far texts do not exit early.
    """
    monitor = OodMonitor(manifest, name)
    rule = ExitRule(manifest.defaults.tau, manifest.default_signal)
    correct, layers, far_texts = 0, 0, 0
    for label, row in zip(texts.labels, readings(texts), strict=True):
        cautious, far = rule, False
        for i, reading in enumerate(row, 1):
            layer = reading.layer
            if not far and monitor.is_far(reading):
                far, cautious = True, replace(rule, tau=0.0 if full_depth else rule.tau * monitor.tau_factor)
            if layer == texts.exit_layers[-1] or cautious.exits(cautious.signal.score(row[:i])):
                correct, layers = correct + (reading.answer == label), layers + layer
                break
        far_texts += far
    n = len(texts.labels)
    return {
        "accuracy": correct / n if (texts.labels != NO_LABEL).all() else float("nan"),
        "speedup": calibration.speedup(manifest.num_layers, layers / n),
        "far": far_texts / n,
    }


def drift(manifest: Manifest, home: Recorded, away: Recorded, switches: int, seed: int = 0) -> dict[str, Any]:
    """The drift metric on a random stream of in-distribution texts, and after a switch to other texts.

    The metric is the PSI of the nearest distance at the first exit. Returns its median, maximum and share above ALARM,
    measured every 50 texts of a stream of 100 windows, and the median and maximum number of texts from a switch to the
    alarm, at most 10 windows: a switch without an alarm by then counts as 10 windows.

    switches: number of simulated switches. Raises ValueError if the model has no calibration.
    """
    calibrated = manifest.calibration
    if calibrated is None:
        raise ValueError("the model has no calibration")
    generator = np.random.default_rng(seed)
    here, there = ([row[0] for row in readings(texts)] for texts in (home, away))

    def psi(window: Drift) -> float:
        return window.statistics()["nearest", "psi"]

    def filled() -> Drift:
        window = Drift(calibrated.references[0])
        for i in generator.integers(len(here), size=WINDOW):
            window.add(here[i])
        return window

    window, values = filled(), []
    for i in range(100 * WINDOW):
        window.add(here[generator.integers(len(here))])
        if i % 50 == 49:
            values.append(psi(window))
    delays = []
    for _ in range(switches):
        window, count = filled(), 0
        while psi(window) <= ALARM and count < 10 * WINDOW:
            window.add(there[generator.integers(len(there))])
            count += 1
        delays.append(count)
    return {
        "psi_median": float(np.median(values)),
        "psi_max": max(values),
        "false_alarms": float(np.mean(np.array(values) > ALARM)),
        "texts_to_alarm_median": float(np.median(delays)),
        "texts_to_alarm_max": max(delays),
    }
