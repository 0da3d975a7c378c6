"""Finds the τ that meets a target in the calibration table of one signal."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

MIN_GAIN = 1.1  # minimum speed-up of a row of `under_load` relative to the previous one


class TradeOffs:
    """The rows of a calibration table for one signal, by ascending τ; raises ValueError without full depth (τ = 0).

    A row is an exits.calibration.TradeOff, or a manifest's TradeOff, which has the same fields.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = sorted(rows, key=lambda row: row.tau)
        if not self.rows or self.rows[0].tau != 0:
            raise ValueError("a calibration table begins with τ = 0")
        # Both ascend: a larger τ never exits later, and the bounds are running maxima.
        self._speedups = [row.speedup for row in self.rows]
        self._bounds = [row.disagreement_bound for row in self.rows]

    def at_speedup(self, wanted: float) -> Any | None:
        """The row of the smallest τ with at least this speed-up; None if no row is fast enough."""
        index = bisect_left(self._speedups, wanted)
        return self.rows[index] if index < len(self.rows) else None

    def at_disagreement(self, most: float) -> Any:
        """The row of the largest τ up to which the measured disagreement is at most `most`."""
        within = takewhile(lambda row: not row.disagreement > most, self.rows[1:])
        return [self.rows[0], *within][-1]

    def within_disagreement(self, most: float) -> Any:
        """The row of the largest τ whose disagreement is certified to be at most `most`; τ = 0 if none is."""
        return self.rows[max(0, bisect_right(self._bounds, most) - 1)]

    def under_load(self, tau: float, min_accuracy: float) -> list[Any]:
        """The rows to which a server under load may raise τ from `tau`, by ascending τ.

        Each is at least MIN_GAIN times as fast as the one before it; the first is compared with the fastest row up to
        `tau`. The list ends before the first such row below min_accuracy.
        """
        steps: list[Any] = []
        speed = max((row.speedup for row in self.rows if row.tau <= tau), default=1.0)
        for row in self.rows:
            if row.tau <= tau or row.speedup < MIN_GAIN * speed:
                continue
            if row.accuracy < min_accuracy:
                break
            steps.append(row)
            speed = row.speedup
        return steps
