"""From what a caller wants to τ, by the calibration table of one λ."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

LEAST_GAIN = 1.1  # of one step under load over the last


class Wishes:
    """The rows of a table at one λ by ascending τ, the first being full depth (τ = 0).

    Rows have the fields of exits.calibration.Outcome, as does a manifest's TradeOff.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = sorted(rows, key=lambda row: row.tau)
        if not self.rows or self.rows[0].tau != 0:
            raise ValueError("a table begins with τ = 0")
        # A larger τ never leaves later, so both ascend.
        self._speedups = [row.speedup for row in self.rows]
        self._bounds = [row.disagreement_bound for row in self.rows]

    def at_speedup(self, wanted: float) -> Any | None:
        """The smallest τ that is at least so much faster than full depth; None: no τ is."""
        at = bisect_left(self._speedups, wanted)
        return self.rows[at] if at < len(self.rows) else None

    def within_disagreement(self, most: float) -> Any:
        """The largest τ that is certified to answer unlike full depth at a rate of at most `most`."""
        return self.rows[max(0, bisect_right(self._bounds, most) - 1)]

    def under_load(self, tau: float, min_accuracy: float, max_disagreement: float) -> list[Any]:
        """What a server under load may raise τ to, each faster than the last, within both floors."""
        found: list[Any] = []
        speed = max((row.speedup for row in self.rows if row.tau <= tau), default=1.0)
        for row in self.rows:
            if row.tau <= tau or row.speedup < LEAST_GAIN * speed:
                continue
            if row.accuracy < min_accuracy or row.disagreement > max_disagreement:
                break
            found.append(row)
            speed = row.speedup
        return found
