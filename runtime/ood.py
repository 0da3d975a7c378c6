"""Detects out-of-distribution texts and drift, by comparing the traffic with the calibration's texts."""

import math
from collections import deque
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from de3.exits import reference
from de3.exits.reading import Reading
from de3.model_store.manifest import Manifest, Reference

WINDOW = 500  # texts; with fewer, a change is hard to distinguish from noise
STATISTICS_S = 2.0  # the processes' metrics are read twice a second
MAX_PER_S = 200  # texts sampled for drift each second: enough, and cheap under any load
# Factor applied to τ from the first exit at which a text is far from every prototype. Running such texts to full depth
# would halve the speed-up in their domain, and was measured to be hardly more accurate (lab/docs/experiments/drift.md).
OOD_TAU_FACTOR = 0.5


class Drift:
    """A sliding window of readings at the first exit, compared with the calibration.

    Every text reaches the first exit; deeper exits see a biased sample.
    """

    def __init__(self, expected: Reference) -> None:
        self.layer = expected.layer
        self._expected = {name: getattr(expected, name) for name in ("entropy", "distance_ratio", "nearest")}
        self._window: deque[Reading] = deque(maxlen=WINDOW)
        self._next = 0.0
        self._statistics: dict[tuple[str, str], float] = {}
        self._computed = -math.inf

    def wants(self) -> bool:
        """True if it is time to sample another text."""
        now = perf_counter()
        if now < self._next:
            return False
        self._next = now + 1 / MAX_PER_S
        return True

    def add(self, reading: Reading) -> None:
        """Add a text's reading at the first exit."""
        self._window.append(reading)

    def statistics(self) -> dict[tuple[str, str], float]:
        """The drift by signal and statistic (psi, ks), at most STATISTICS_S old; empty until the window is full."""
        readings, now = list(self._window), perf_counter()
        if len(readings) < WINDOW or now < self._computed + STATISTICS_S:
            return self._statistics
        statistics = {}
        for signal, expected in self._expected.items():
            values = [float(getattr(r, signal)) for r in readings]
            statistics[signal, "psi"] = reference.psi(values, expected)
            statistics[signal, "ks"] = reference.ks(values, expected)
        self._computed, self._statistics = now, statistics  # complete, as scrapes may run in several threads
        return statistics


class OodMonitor:
    """Flags a model's out-of-distribution texts, computes OOD scores, and samples texts for drift.

    Attributes:
        limits: by layer, the distance to the nearest prototype above which a text is flagged, (layers + 1,) float64;
            inf at layers without prototypes. None: nothing is flagged.
        tau_factor: factor applied to the τ of flagged texts; 1: texts are only flagged.
        drift: measures drift; None for a model without calibration, or without prototypes at its first exit.
    """

    def __init__(self, manifest: Manifest, policy: str) -> None:
        references = manifest.calibration.references if manifest.calibration else []
        self._nearest = {r.layer: r.nearest for r in references if r.nearest is not None}
        self.drift = Drift(references[0]) if references and references[0].nearest is not None else None
        self.tau_factor = OOD_TAU_FACTOR if policy == "deepen" else 1.0
        self.limits: NDArray[np.float64] | None = None
        if policy != "off":
            limits = [math.inf] * (manifest.num_layers + 1)
            for layer, quantiles in self._nearest.items():
                limits[layer] = reference.far(quantiles)
            self.limits = np.array(limits)

    def samples(self) -> bool:
        """True if the next text is to be sampled for drift."""
        return self.drift is not None and self.drift.wants()

    def sample(self, reading: Reading) -> None:
        """Add the first reading of a text to the drift sample, unless the text skipped the model's first exit."""
        if self.drift is not None and reading.layer == self.drift.layer:
            self.drift.add(reading)

    def is_far(self, reading: Reading) -> bool:
        """True if a text is farther from every prototype at this exit than 99% of the calibration's texts.

        Always False without `limits`, and at exits without prototypes.
        """
        if self.limits is None or reading.nearest is None:
            return False
        return reading.nearest > float(self.limits[reading.layer])

    def score(self, passed: list[Reading]) -> float | None:
        """The OOD score of a text, in [0, 1), from the exits that it passed.

        None if none of them has prototypes, or if there is no calibration.
        """
        known = [
            (r.nearest, self._nearest[r.layer])
            for r in passed
            if r.nearest is not None and r.layer in self._nearest
        ]
        return reference.ood_score([x for x, _ in known], [q for _, q in known])
