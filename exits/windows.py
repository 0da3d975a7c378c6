"""Texts longer than a model's window: the windows, their combined answer, and when it is settled.

- Mutually exclusive classes: probabilities are the mean over the windows, each weighted by its number of tokens
  that are in no earlier window.
- Multi-label: the probability of a label is its highest in any window, as a single passage may justify the label.
- Regression: the mean of the values, weighted as for classes.
- Spans: those of the whole text, made once from the tokens of all windows.
- With a flag: the answer of the window that is closest to it or farthest above it. It is settled at the first window
  that is flagged. (Several labels of a multi-label model are combined as without a flag.)
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Any, NamedTuple, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from de3.exits.flags import Flag
from de3.exits.kinds import Classes, Kind, Labels, Spans, Value
from de3.exits.reading import (
    ClassReading,
    LabelsReading,
    Reading,
    SpansReading,
    TextReading,
    ValueReading,
)
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


class Combination(Protocol):
    """The combined answer of the windows of a text that have run so far.

    Attributes:
        decisive: index of the window that gave the answer; None if several did.
    """

    decisive: int | None

    def add(self, reading: Any) -> None:
        """Add the answer of the next window."""

    def is_settled(self, change: float = 1.0) -> bool:
        """True if the remaining windows cannot change the answer.

        change: assumed effect of the remaining windows, as a share of their largest possible effect. Used only for
        mutually exclusive classes, as one part of a text says nothing about the labels of another.
        """

    def reading(self, last: Any) -> Reading:
        """The combined answer of the windows that have run, with the signals of `last`, the last window's reading."""


def combination(kind: Kind, windows: Sequence[Span], flag: Flag | None = None) -> Combination:
    """The combination of a text's windows."""
    weights = [window.new for window in windows]
    match kind:
        case Spans():
            return _Spans([(window.start, window.end) for window in windows])
        case Classes() | Labels() | Value() if flag is not None and (
            len(flag.labels) == 1 or isinstance(kind, Classes)
        ):
            return _Flagged(len(windows), flag)
        case Classes():
            return _Classes(weights)
        case Labels():
            return _Labels(len(windows), kind)
        case Value():
            return _Value(weights)
        case _:
            assert_never(kind)


class WindowExits(NamedTuple):
    """The exits of a text in windows: the answers that some τ gives, the deepest windows' last.

    Attributes:
        readings: the combined answers.
        scores: the text exits there at every τ above this score, down to the next one's; None: full depth's.
        costs: mean cost over the windows that run.
    """

    readings: list[Reading]
    scores: list[float | None]
    costs: list[int]


def exits_of(
    kind: Kind,
    windows: Sequence[Span],
    flag: Flag | None,
    passed: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[float | None]],
    costs: Sequence[int],
) -> WindowExits:
    """What each τ makes of a text whose windows ran to full depth.

    With a flag, windows after the first that full depth flags may be missing: at a τ that misses this one, a later one
    might still be flagged, but is not counted on.

    passed, scores: the readings of all exits, and their scores, by window that ran. costs: those of the exits.
    """
    steps = sorted({one for row in scores for one in row[:-1] if one is not None}, reverse=True)
    found = WindowExits([], [], [])
    before: tuple[Any, ...] = ()
    for step in [None, *reversed(steps)]:  # from full depth up; an exit that changes nothing is left out
        answer, ran, cost = combination(kind, windows, flag), 0, 0
        for readings, row in zip(passed, scores, strict=True):
            last = len(readings) - 1
            is_sure = (step is not None and one is not None and one <= step for one in row[:last])
            at = next((j for j, sure in enumerate(is_sure) if sure), last)
            at = last if flag is not None and flag.blocks(readings[at]) else at
            answer.add(readings[at])
            ran, cost = ran + 1, cost + costs[at]
            if answer.is_settled(1.0 if step is None else EXPECTED_CHANGE):
                break
        reading = answer.reading(readings[at])
        now = reading.answer, flag is not None and flag.is_raised(reading), round(cost / ran)
        if now != before:
            found.readings.append(reading)
            found.scores.append(step)
            found.costs.append(now[-1])
        before = now
    return WindowExits(found.readings[::-1], found.scores[::-1], found.costs[::-1])


class _Flagged:
    """The answer of the window with the highest degree of the flag; its logits are those of that window."""

    def __init__(self, count: int, flag: Flag) -> None:
        self._flag, self._left = flag, count
        self._best: TextReading | None = None
        self._ran = 0
        self.decisive: int | None = 0

    def add(self, reading: TextReading) -> None:
        if self._best is None or self._flag.degree(reading) > self._flag.degree(self._best):
            self._best, self.decisive = reading, self._ran
        self._ran += 1
        self._left -= 1

    def is_settled(self, change: float = 1.0) -> bool:
        """True once a window is flagged, even if a later one may have a higher degree."""
        return self._left == 0 or (self._best is not None and self._flag.is_raised(self._best))

    def reading(self, last: TextReading) -> Reading:
        match last, self._best:
            case ValueReading(), ValueReading(value=value):
                return replace(last, value=value)
            case LabelsReading(), LabelsReading() as best:
                return replace(
                    last, logits=best.logits, probs=best.probs, label=best.label, labels=best.labels
                )
            case ClassReading(), ClassReading() as best:
                return replace(last, logits=best.logits, probs=best.probs, label=best.label)
            case _:
                raise TypeError("the windows of a text have answers of one kind")


class _Classes:
    """The mean of the probabilities; its logits are their logarithms."""

    decisive: int | None = None

    def __init__(self, weights: Sequence[int]) -> None:
        self._total = self._left = sum(weights)
        self._weights = iter(weights)
        self._sums: list[float] = []

    def add(self, reading: ClassReading) -> None:
        weight = next(self._weights)
        self._left -= weight
        sums = self._sums or [0.0] * len(reading.probs)
        self._sums = [s + weight * p for s, p in zip(sums, reading.probs, strict=True)]

    def is_settled(self, change: float = 1.0) -> bool:
        if self._left == 0:
            return True
        best, second = sorted(self._sums, reverse=True)[:2]
        return best - second > change * self._left + ROUNDING * self._total

    def reading(self, last: ClassReading) -> ClassReading:
        total = sum(self._sums)
        probs = [s / total for s in self._sums]
        logits = [log(max(p, SMALLEST)) for p in probs]
        return replace(last, logits=logits, probs=probs, label=probs.index(max(probs)))


class _Labels:
    """The highest probability of each label in any window."""

    decisive: int | None = None

    def __init__(self, count: int, kind: Labels) -> None:
        self._left, self._kind = count, kind
        self._probs: list[float] = []
        self._logits: list[float] = []

    def add(self, reading: LabelsReading) -> None:
        self._left -= 1
        self._probs = _highest(self._probs, reading.probs)
        self._logits = _highest(self._logits, reading.logits)

    def is_settled(self, change: float = 1.0) -> bool:
        """True if all labels are assigned: an assigned label stays; any other may still be assigned."""
        return self._left == 0 or len(self._kind.assigned(self._logits)) == len(self._logits)

    def reading(self, last: LabelsReading) -> LabelsReading:
        logits = self._logits
        label, labels = logits.index(max(logits)), self._kind.assigned(logits)
        return replace(last, logits=logits, probs=self._probs, label=label, labels=labels)


class _Value:
    """The mean of the values, settled only after the last window, which may change it by any amount."""

    decisive: int | None = None

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights, self._left = iter(weights), len(weights)
        self._sum = self._total = 0.0

    def add(self, reading: ValueReading) -> None:
        weight = next(self._weights)
        self._left -= 1
        self._sum, self._total = self._sum + weight * reading.value, self._total + weight

    def is_settled(self, change: float = 1.0) -> bool:
        return self._left == 0

    def reading(self, last: ValueReading) -> ValueReading:
        return replace(last, value=self._sum / self._total)


def _highest(before: list[float], now: list[float]) -> list[float]:
    return [max(pair) for pair in zip(before or now, now, strict=True)]


class _Spans:
    """The spans of a text's windows: those of one long text, with the tokens of all windows that have run.

    Windows overlap: of a token in two windows, the logits are those of the window in which it is farther from the edge
    that cuts the text.
    """

    decisive: int | None = None

    def __init__(self, windows: Sequence[tuple[int, int]]) -> None:
        """windows: the tokens [start, end) of the text in each window, without special tokens."""
        self._windows = windows
        self._ran: list[TokenReading] = []

    def add(self, reading: SpansReading) -> None:
        assert reading.tokens is not None
        self._ran.append(reading.tokens)

    def is_settled(self, change: float = 1.0) -> bool:
        """True if all windows have run: one part of a text says nothing about the spans of another."""
        return len(self._ran) == len(self._windows)

    def reading(self, last: SpansReading) -> SpansReading:
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
