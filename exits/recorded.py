"""The outputs of every exit for every sample, for evaluation and calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from de3.exits import formulas
from de3.exits.flags import Flag
from de3.exits.kinds import CLASSES, Kind, Spans, TextKind, Value
from de3.exits.reading import SpansReading

# Fields of Recorded with a row for each sample.
ARRAYS = ("logits", "distances", "labels", "tokens", "original")
MIN_TOLERANCE, MAX_TOLERANCE = 1e-3, 1e9  # limits for regression models


@dataclass(frozen=True)
class Recorded:
    """The outputs of all exits for n samples that were run to full depth.

    Attributes:
        exit_layers: the layers of the exits, ascending; the last is M.
        logits: (n, exits, K).
        distances: cosine distances to the prototypes, (n, exits, K); NaN at exits without prototypes.
        labels: true classes, (n,); in a multi-label model the true labels, (n, K) bool; in a regression model the
            true values, (n,) float64.
        tokens: number of tokens of each sample, (n,); None if not recorded.
        original: answers of the model before quantization or fine-tuning, shaped like labels; if None, full depth's are
            used.
        kind: what an answer is.
        costs: cost of an answer at each exit, for speed-ups; None: its layer.
        unused: indices of the exits that are not used: their risk is 1.
        states: returns the pooled states of an exit but the last, (n, hidden), by its index. They may be read from a
            file, so that only one exit's are in memory. None: not recorded.
    """

    exit_layers: list[int]
    logits: NDArray[np.float32]
    distances: NDArray[np.float32]
    labels: NDArray[Any]
    tokens: NDArray[np.int64] | None = None
    original: NDArray[Any] | None = None
    kind: Kind = CLASSES
    costs: list[int] | None = None
    unused: frozenset[int] = frozenset()
    states: Callable[[int], NDArray[np.float32]] | None = None

    ARRAYS: ClassVar[Sequence[str]] = ARRAYS

    def rows(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Recorded":
        """The samples at these rows: a mask, (n,), or indices."""
        arrays: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else x[which] for name in self.ARRAYS
        }
        states = self.states
        return replace(self, **arrays, states=None if states is None else lambda j: states(j)[which])

    @staticmethod
    def joined(parts: Sequence["Recorded"]) -> "Recorded":
        """The samples of several parts of one model, with what is optional only if every part has it."""
        arrays: dict[str, Any] = {}
        for name in parts[0].ARRAYS:
            values = [getattr(part, name) for part in parts]
            arrays[name] = None if any(x is None for x in values) else np.concatenate(values)
        if all(part.states is not None for part in parts):
            arrays["states"] = lambda j: np.concatenate([part.states_at(j) for part in parts])
        else:
            arrays["states"] = None
        return replace(parts[0], **arrays)

    def states_at(self, j: int) -> NDArray[np.float32]:
        """The pooled states of exit j, not the last, (n, hidden); raises ValueError if they are not recorded."""
        if self.states is None:
            raise ValueError("risk needs the pooled states of these samples")
        return self.states(j)

    @property
    def _text_kind(self) -> TextKind:
        assert not isinstance(self.kind, Spans)  # see RecordedSpans
        return self.kind

    @property
    def exit_costs(self) -> list[int]:
        """Cost of an answer at each exit."""
        return self.exit_layers if self.costs is None else self.costs

    @cached_property
    def answers(self) -> NDArray[Any]:
        """The answer of each exit: a class or a value, (n, exits), or the assigned labels, (n, exits, K) bool."""
        return self._text_kind.answers(self.logits)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """True where an exit's answer is correct, in every label or within the tolerance, (n, exits)."""
        return ~self.differs_from(self.labels)

    @cached_property
    def differs(self) -> NDArray[np.bool_]:
        """True where an exit's answer differs from full depth's, or from the original's if it is known, (n, exits)."""
        return self.differs_from(self.answers[:, -1] if self.original is None else self.original)

    def differs_from(self, expected: NDArray[Any]) -> NDArray[np.bool_]:
        """True where an exit's answer differs from the expected one, (n, exits). expected: shaped like labels."""
        return self.kind.differ(self.answers, expected[:, None])

    def failures(self, flag: Flag | None = None) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
        """For each criterion (exits.criteria), where its samples fail, (m, exits), and their indices, (m,)."""
        found = [(self.differs, np.arange(len(self.differs)))]
        if flag is not None:
            rows = np.flatnonzero(self.flagged(flag)[:, -1])
            is_safe = ~self.blocked(flag)[rows]
            is_safe[:, -1] = False
            found.append((is_safe, rows))
        return found

    def flagged(self, flag: Flag) -> NDArray[np.bool_]:
        """True where an exit's answer is flagged, (n, exits)."""
        return flag.raised(self._text_kind, self.logits)

    def blocked(self, flag: Flag) -> NDArray[np.bool_]:
        """True where no text exits early, because its answer is flagged, (n, exits)."""
        return self.flagged(flag)

    @property
    def entropy(self) -> formulas.Floats:
        """The local signal (entropy), (n, exits); raises ValueError for a regression model."""
        if isinstance(self.kind, Value | Spans):
            raise ValueError("entropy needs classes")
        return self.kind.entropy(self.logits)

    @property
    def distance_ratio(self) -> formulas.Floats:
        """The global signal (distance ratio), (n, exits); NaN at exits without prototypes."""
        return formulas.distance_ratio(self.logits, self.distances)

    @property
    def risk_features(self) -> formulas.Floats:
        """The features of `exits.signals.Risk`, (n, exits, 5)."""
        return self._text_kind.risk_features(self.logits, self.distances)


@dataclass(frozen=True)
class RecordedSpans(Recorded):
    """The outputs of a token classifier; answers are sets of spans, and logits and distances are empty.

    Attributes:
        labels, original: sets of spans, (n,).
        unsure: see exits.spans.Unsure, (n, exits, 4).
        spans: the set of spans of each exit, (n, exits).
    """

    unsure: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0, 4)))
    spans: NDArray[np.object_] = field(default_factory=lambda: np.zeros((0, 0), np.object_))

    ARRAYS: ClassVar[Sequence[str]] = (*ARRAYS, "unsure", "spans")

    @classmethod
    def of(
        cls,
        kind: Spans,
        exit_layers: list[int],
        readings: Sequence[Sequence[SpansReading]],
        tokens: Sequence[int],
    ) -> "RecordedSpans":
        """The readings of every exit, for n texts, with the numbers of tokens; full depth's answers are the labels."""
        count = len(readings), len(exit_layers)
        unsure, spans = np.zeros((*count, 4)), np.empty(count, np.object_)
        for i, passed in enumerate(readings):
            for j, reading in enumerate(passed):
                unsure[i, j], spans[i, j] = reading.unsure, reading.answer
        empty = np.full((*count, 1), np.nan, np.float32)
        fields: dict[str, Any] = {"tokens": np.array(tokens), "kind": kind, "unsure": unsure, "spans": spans}
        return cls(exit_layers, empty, empty, spans[:, -1], **fields)

    @property
    def answers(self) -> NDArray[np.object_]:
        """The set of spans of each exit, (n, exits)."""
        return self.spans

    def failures(self, flag: Flag | None = None) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
        """Texts whose set of spans differs; those with one missed, where full depth finds one; and flagged texts."""
        expected = self.answers[:, -1] if self.original is None else self.original
        rows = np.flatnonzero([bool(one) for one in expected])
        missed = [[bool(expected[i] - one) for one in self.spans[i]] for i in rows]
        first, *flagged = super().failures(flag)
        return [first, (np.array(missed, np.bool_).reshape(len(rows), self.spans.shape[1]), rows), *flagged]

    def flagged(self, flag: Flag) -> NDArray[np.bool_]:
        """True where an exit finds a span, (n, exits)."""
        return self.spans.astype(np.bool_)

    def blocked(self, flag: Flag) -> NDArray[np.bool_]:
        """True where a token may be in a span, (n, exits)."""
        return self.unsure[..., 3] > 0

    @property
    def risk_features(self) -> formulas.Floats:
        """The features of `exits.signals.Risk`, (n, exits, 5)."""
        logs = np.log(np.maximum(self.unsure[..., :3], [1e-12, 1e-12, 1.0]))
        ones = np.ones((*self.unsure.shape[:2], 1))
        return np.asarray(np.concatenate([ones, logs, self.unsure[..., 3:]], -1))
