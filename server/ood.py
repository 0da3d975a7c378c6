"""Out-of-distribution texts, one by one, and drift of all of them, against the calibration's texts."""

import math
from collections import deque
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from de3.exits import reference
from de3.exits.reading import Reading
from de3.model_store.manifest import Manifest, Reference

WINDOW = 500  # texts; with fewer, a change is hard to tell from chance
MAX_PER_S = 200  # texts sampled: enough, and cheap under any load
# τ is multiplied by this from the first exit on at which a text is far from every prototype. Full depth for
# such texts would cost half the speed-up of their domain, and measured no more accurate (docs/budgets.md).
CAUTION = 0.5


class Drift:
    """A sliding window of the first exit's readings, against calibration.

    Every text reaches the first exit; deeper ones see only those that stayed.
    """

    def __init__(self, expected: Reference) -> None:
        assert expected.entropy is not None
        assert expected.distance_ratio is not None and expected.nearest is not None
        self.layer = expected.layer
        self._expected = {
            "entropy": expected.entropy,
            "distance_ratio": expected.distance_ratio,
            "nearest": expected.nearest,
        }
        self._window: deque[Reading] = deque(maxlen=WINDOW)
        self._next = 0.0

    def wants(self) -> bool:
        """Whether it is time to sample another text."""
        now = perf_counter()
        if now < self._next:
            return False
        self._next = now + 1 / MAX_PER_S
        return True

    def add(self, reading: Reading) -> None:
        """Add the first exit's reading of a text."""
        self._window.append(reading)

    def statistics(self) -> dict[tuple[str, str], float]:
        """By signal and statistic (psi, ks); nothing until the window is full."""
        readings = list(self._window)
        if len(readings) < WINDOW:
            return {}
        statistics = {}
        for signal, expected in self._expected.items():
            values = [float(getattr(r, signal)) for r in readings]
            statistics[signal, "psi"] = reference.psi(values, expected)
            statistics[signal, "ks"] = reference.ks(values, expected)
        return statistics


class OodMonitor:
    """Flags a model's out-of-distribution texts, scores them and samples them for drift.

    Attributes:
        limits: the largest distance to the nearest prototype by layer, (layers + 1,) float64; inf where there
            are no prototypes. None: nothing is flagged.
        caution: what τ is multiplied by for a text beyond; 1: it is only flagged.
        drift: None for a model without calibration, or whose first exit has no prototypes.
    """

    def __init__(self, manifest: Manifest, policy: str) -> None:
        references = manifest.calibration.references if manifest.calibration else []
        self._nearest = {r.layer: r.nearest for r in references if r.nearest is not None}
        self.drift = Drift(references[0]) if references and references[0].nearest is not None else None
        self.caution = CAUTION if policy == "deepen" else 1.0
        self.limits: NDArray[np.float64] | None = None
        if policy != "off":
            limits = [math.inf] * (manifest.num_layers + 1)
            for layer, quantiles in self._nearest.items():
                limits[layer] = reference.far(quantiles)
            self.limits = np.array(limits)

    def samples(self) -> bool:
        """Whether the next text should count for drift."""
        return self.drift is not None and self.drift.wants()

    def sample(self, reading: Reading) -> None:
        """Add a text's first reading to the sample, if it is of the model's first exit."""
        if self.drift is not None and reading.layer == self.drift.layer:
            self.drift.add(reading)

    def is_far(self, reading: Reading) -> bool:
        """Whether a text is further from every prototype of this exit than 99% of the calibration's."""
        if self.limits is None or reading.nearest is None:
            return False
        return reading.nearest > float(self.limits[reading.layer])

    def score(self, passed: list[Reading]) -> float | None:
        """The ood score of a text, by the exits that it passed; None if none of them has prototypes."""
        known = [
            (r.nearest, self._nearest[r.layer])
            for r in passed
            if r.nearest is not None and r.layer in self._nearest
        ]
        return reference.ood_score([x for x, _ in known], [q for _, q in known])
