"""Texts longer than a model's window: the windows, their combined answer, and when it is settled.

Classes that exclude each other: the answer's probabilities are the mean of the windows' probabilities, each window
weighted by the tokens that no window before it has. A multi-label model: a label's probability is the highest that any
window gives it, as a text may say in one place only what a label is for. A regression model: the mean of the windows'
values, weighted alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import NamedTuple

from de3.exits.reading import Reading

MAX_WINDOWS = 16
MAX_TOKENS = 16 * 512  # in all windows: fewer of a model that takes long texts, but two
OVERLAP = 0.25  # of a window's tokens, also in the next one
# At τ > 0: of what the windows that are left could change, the part that they are expected to change at most. Measured
# on product reviews (lab/docs/experiments.md).
EXPECTED_CHANGE = 0.75
ROUNDING = 1e-9  # of the weight of all windows: more than sums of probabilities are off
SMALLEST = 1e-300  # of what a logarithm is taken


class Span(NamedTuple):
    """The tokens [start, end) of a text, the last `new` of which are in no window before."""

    start: int
    end: int
    new: int


def most_windows(max_tokens: int) -> int:
    """The most windows of a text for a model that takes so many tokens."""
    return min(MAX_WINDOWS, max(2, MAX_TOKENS // max_tokens))


def capacity(room: int, windows: int) -> int:
    """The most tokens that fit in so many windows of `room` tokens."""
    return room + (windows - 1) * _step(room)


def spans(tokens: int, room: int, overlap: float = OVERLAP) -> list[Span]:
    """The windows of a text with this many tokens, in order: all have `room` tokens but the last."""
    windows, end = [Span(0, min(tokens, room), min(tokens, room))], min(tokens, room)
    while end < tokens:
        start, before = len(windows) * _step(room, overlap), end
        end = min(tokens, start + room)
        windows.append(Span(start, end, end - before))
    return windows


def _step(room: int, overlap: float = OVERLAP) -> int:
    return room - int(overlap * room)


class Combination:
    """The combined answer of the windows that ran, of one text."""

    def __init__(self, weights: Sequence[int], thresholds: Sequence[float] | None = None) -> None:
        """weights: new tokens of every window, in the order in which they run. thresholds: of a multi-label model, as
        logits; None: classes exclude each other."""
        self._total = self._left = sum(weights)
        self._weights = iter(weights)
        self._thresholds = thresholds
        self._probs: list[float] = []  # weighted sums, or that of values; of a multi-label model the highest
        self._logits: list[float] = []  # of a multi-label model, the highest

    def add(self, reading: Reading) -> None:
        """Add the answer of the next window."""
        weight = next(self._weights)
        self._left -= weight
        if self._thresholds is None:
            values = reading.probs if reading.value is None else [reading.value]
            sums = self._probs or [0.0] * len(values)
            self._probs = [s + weight * p for s, p in zip(sums, values, strict=True)]
        else:
            self._probs = _highest(self._probs, reading.probs)
            self._logits = _highest(self._logits, reading.logits)

    def is_settled(self, change: float = 1.0) -> bool:
        """Whether the windows that are left cannot change the label, or of a multi-label model the decision on any.

        change: below 1: whether they cannot by so much of the most that they could change. Of classes that exclude
        each other only, as no part of a text says what labels another has. A value is settled by the last window.
        """
        if self._left == 0:
            return True
        if self._thresholds is not None:  # a label that is given stays given, and any other may still be
            return all(x > limit for x, limit in zip(self._logits, self._thresholds, strict=True))
        if len(self._probs) == 1:  # a value, which a window may change by any amount
            return False
        best, second = sorted(self._probs, reverse=True)[:2]
        return best - second > change * self._left + ROUNDING * self._total

    def reading(self, last: Reading) -> Reading:
        """The combined answer of the windows that ran, with the signals of the last one's exit.

        The logits are those of the combined probabilities.
        """
        if self._thresholds is not None:
            logits = self._logits
            given = [k for k, limit in enumerate(self._thresholds) if logits[k] > limit]
            label = logits.index(max(logits))
            return replace(last, logits=logits, probs=self._probs, label=label, labels=given)
        if last.value is not None:
            value = self._probs[0] / (self._total - self._left)
            return replace(last, logits=[value], value=value)
        total = sum(self._probs)
        probs = [s / total for s in self._probs]
        logits = [log(max(p, SMALLEST)) for p in probs]
        return replace(last, logits=logits, probs=probs, label=probs.index(max(probs)))


def _highest(before: list[float], now: list[float]) -> list[float]:
    return [max(pair) for pair in zip(before or now, now, strict=True)]
