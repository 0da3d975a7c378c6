"""Texts longer than a model's window: the windows, their combined answer, and when it is settled.

- Mutually exclusive classes: probabilities are the mean over the windows, each weighted by its number of tokens
  that are in no earlier window.
- Multi-label: the probability of a label is its highest in any window, as a single passage may justify the label.
- Regression: the mean of the values, weighted as for classes.
- Spans: those of the whole text, made once from the tokens of all windows.
- With a flag (labels to watch for): the answer of the window where they are most probable. It is settled at the
  first window where the probability reaches the flag's threshold.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.exits.reading import Reading
from de3.exits.spans import Array, Layout, TokenReading

MAX_WINDOWS = 16
MAX_TOKENS = 16 * 512  # limit over all windows: a text has fewer windows if they are long, but at least two
OVERLAP = 0.25  # share of a window's tokens that are also in the next one
# At τ > 0: assumed effect of the remaining windows, as a share of their largest possible effect. Measured on product
# reviews (lab/docs/experiments/long-texts.md).
EXPECTED_CHANGE = 0.75
ROUNDING = 1e-9  # share of the total weight; exceeds the rounding error of summed probabilities
SMALLEST = 1e-300  # lower bound on the argument of a logarithm


class Span(NamedTuple):
    """The tokens [start, end) of a text, the last `new` of which are in no earlier window."""

    start: int
    end: int
    new: int


class Flag(NamedTuple):
    """Labels to watch for (their indices), and the minimum probability of any of them at which a text is flagged.

    Several labels must be mutually exclusive.
    """

    labels: Sequence[int]
    threshold: float

    def prob(self, reading: Reading) -> float:
        """The probability that one of the labels is right."""
        return sum(reading.probs[k] for k in self.labels)

    def is_raised(self, reading: Reading) -> bool:
        """True if the probability reaches the threshold."""
        return self.prob(reading) >= self.threshold


def most_windows(max_tokens: int) -> int:
    """Maximum number of windows of a text, for a model with windows of `max_tokens` tokens."""
    return min(MAX_WINDOWS, max(2, MAX_TOKENS // max_tokens))


def capacity(room: int, windows: int) -> int:
    """Maximum number of tokens in this many windows of `room` tokens."""
    return room + (windows - 1) * _step(room)


def spans(tokens: int, room: int, overlap: float = OVERLAP) -> list[Span]:
    """The windows of a text with this many tokens, in order; all but the last have `room` tokens."""
    windows, end = [Span(0, min(tokens, room), min(tokens, room))], min(tokens, room)
    while end < tokens:
        start, before = len(windows) * _step(room, overlap), end
        end = min(tokens, start + room)
        windows.append(Span(start, end, end - before))
    return windows


def _step(room: int, overlap: float = OVERLAP) -> int:
    return room - int(overlap * room)


class Combination:
    """The combined answer of the windows of a text that have run so far."""

    def __init__(
        self, weights: Sequence[int], thresholds: Sequence[float] | None = None, flag: Flag | None = None
    ) -> None:
        """weights: number of new tokens of each window, in execution order. thresholds: label thresholds of a
        multi-label model, as logits; None for other models. flag: the labels to watch for; None if there are none.
        """
        self._flag = flag
        self._best: Reading | None = None  # with a flag: the reading that gave the answer
        self.decisive = 0  # with a flag: index of the window that gave the answer
        self._count = 0
        self._total = self._left = sum(weights)
        self._weights = iter(weights)
        self._thresholds = thresholds
        self._probs: list[float] = []  # weighted sums of probabilities or of the value; multi-label: maxima
        self._logits: list[float] = []  # multi-label: maxima

    def add(self, reading: Reading) -> None:
        """Add the answer of the next window."""
        weight = next(self._weights)
        self._left -= weight
        if self._flag is not None:
            if self._best is None or self._flag.prob(reading) > self._flag.prob(self._best):
                self._best, self.decisive = reading, self._count
            self._count += 1
            return
        if self._thresholds is None:
            values = reading.probs if reading.value is None else [reading.value]
            sums = self._probs or [0.0] * len(values)
            self._probs = [s + weight * p for s, p in zip(sums, values, strict=True)]
        else:
            self._probs = _highest(self._probs, reading.probs)
            self._logits = _highest(self._logits, reading.logits)

    def is_settled(self, change: float = 1.0) -> bool:
        """True if the remaining windows cannot change the label, or any label of a multi-label model.

        With a flag: true once the flag is raised, even if its labels can still become more probable.

        change: assumed effect of the remaining windows, as a share of their largest possible effect. Used only for
        mutually exclusive classes, as one part of a text says nothing about the labels of another. A regression value
        is settled only after the last window.
        """
        if self._left == 0:
            return True
        if self._flag is not None:
            return self._best is not None and self._flag.is_raised(self._best)
        if self._thresholds is not None:  # an assigned label stays; any other may still be assigned
            return all(x > limit for x, limit in zip(self._logits, self._thresholds, strict=True))
        if len(self._probs) == 1:  # a window may change a value by any amount
            return False
        best, second = sorted(self._probs, reverse=True)[:2]
        return best - second > change * self._left + ROUNDING * self._total

    def reading(self, last: Reading) -> Reading:
        """The combined answer of the windows that have run, with the signals of `last`, the last window's reading.

        The logits are those of the combined probabilities; with a flag, those of the window that gave the answer.
        """
        if (best := self._best) is not None:
            return replace(last, logits=best.logits, probs=best.probs, label=best.label, labels=best.labels)
        if self._thresholds is not None:
            logits = self._logits
            assigned = [k for k, limit in enumerate(self._thresholds) if logits[k] > limit]
            label = logits.index(max(logits))
            return replace(last, logits=logits, probs=self._probs, label=label, labels=assigned)
        if last.value is not None:
            value = self._probs[0] / (self._total - self._left)
            return replace(last, logits=[value], value=value)
        total = sum(self._probs)
        probs = [s / total for s in self._probs]
        logits = [log(max(p, SMALLEST)) for p in probs]
        return replace(last, logits=logits, probs=probs, label=probs.index(max(probs)))


def _highest(before: list[float], now: list[float]) -> list[float]:
    return [max(pair) for pair in zip(before or now, now, strict=True)]


class SpanCombination:
    """The spans of a text's windows: those of one long text, with the tokens of all windows that have run.

    Windows overlap: of a token in two windows, the logits are those of the window in which it is farther from the edge
    that cuts the text.
    """

    decisive = 0  # as exits.windows.Combination

    def __init__(self, windows: Sequence[tuple[int, int]]) -> None:
        """windows: the tokens [start, end) of the text in each window, without special tokens."""
        self._windows = windows
        self._ran: list[TokenReading] = []

    def add(self, reading: Reading) -> None:
        """Add the answer of the next window."""
        assert reading.tokens is not None
        self._ran.append(reading.tokens)

    def is_settled(self, change: float = 1.0) -> bool:
        """True if all windows have run: one part of a text says nothing about the spans of another."""
        return len(self._ran) == len(self._windows)

    def reading(self, last: Reading) -> Reading:
        """The combined answer of the windows that have run, with the signals of `last`, the last window's reading."""
        windows, logits, layouts = self._windows[: len(self._ran)], list[Array](), list[Layout]()
        # The first token of each window that is taken from it, and not from the window before.
        cuts = [(end + start) // 2 for (_, end), (start, _) in pairwise(windows)]
        for (start, _), one, begin, end in zip(
            windows, self._ran, [windows[0][0], *cuts], [*cuts, windows[-1][1]], strict=True
        ):
            rows = np.flatnonzero(~one.layout.is_special)[begin - start : end - start]
            logits.append(one.logits[rows])
            layouts.append(one.layout.part(rows))
        whole = Layout(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, layouts), strict=True)))
        return replace(last, tokens=TokenReading(np.concatenate(logits), whole, self._ran[0].rule))


def _arrays(layout: Layout) -> tuple[NDArray[Any], ...]:
    return layout.offsets, layout.is_special, layout.is_subword
