"""How good answers are, for each kind of answer: the names of the measures, and their values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import Classes, Kind, Labels, Spans, Value
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """The measures of a kind of answer.

    Attributes:
        right_if: when an answer is right, as the name of a column.
        answer: what is counted as different from full depth's.
        more: names of further measures.
        values: these measures of each exit, from the answers (n, exits, …) and the labels (n, …): (measures, exits).
        trained: index in `more` of the measure that training maximizes; None: the share of right answers.
    """

    right_if: str = "accuracy"
    answer: str = "labels"
    more: tuple[str, ...] = ()
    values: Callable[[NDArray[Any], NDArray[Any]], list[Floats]] = lambda _, __: []
    trained: int | None = None

    def of(self, recorded: Recorded) -> list[Floats]:
        """The further measures of each exit alone, (measures, exits)."""
        return self.values(recorded.answers, recorded.labels)

    def at_tau(self, recorded: Recorded, scores: Floats, tau: float) -> list[float]:
        """The further measures when exiting at score < τ."""
        rows, index = np.arange(len(scores)), exit_index(scores, tau)
        return [float(one[0]) for one in self.values(recorded.answers[rows, index][:, None], recorded.labels)]


def measures_of(kind: Kind) -> Measures:
    """The measures of a kind of answer."""
    match kind:
        case Classes() | Spans():
            return Measures()
        case Labels():
            return Measures("all labels right", "answers", ("micro F1", "macro F1"), f1, trained=0)
        case Value(tolerance):
            return Measures(f"within {tolerance:g}", "answers", ("Pearson", "Spearman"), correlations)
        case _:
            assert_never(kind)


def f1(answers: NDArray[np.bool_], labels: NDArray[np.bool_]) -> list[Floats]:
    """Micro and macro F1 of answers (n, exits, K) to labels (n, K), each (exits,); a label without hits has 0."""
    labels = labels[:, None]
    hits = (answers & labels).sum(0).astype(np.float64)  # (exits, K)
    given = answers.sum(0) + labels.sum(0)
    micro = 2 * hits.sum(-1) / np.maximum(given.sum(-1), 1)
    return [micro, (2 * hits / np.maximum(given, 1)).mean(-1)]


def correlations(answers: Floats, labels: Floats) -> list[Floats]:
    """Pearson's and Spearman's correlation of values (n, exits) with labels (n,), each (exits,)."""
    pairs = [correlation(values, labels) for values in answers.T]
    return [np.array([p for p, _ in pairs]), np.array([s for _, s in pairs])]


def correlation(values: Floats, labels: Floats) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of values with labels, each (n,); NaN if either does not vary."""
    if not (np.ptp(values) and np.ptp(labels)):
        return float("nan"), float("nan")
    pearson, spearman = (
        np.corrcoef(*pair)[0, 1] for pair in ((values, labels), (ranks(values), ranks(labels)))
    )
    return float(pearson), float(spearman)


def ranks(values: Floats) -> Floats:
    """The rank of each value, from 1; equal values share their mean rank."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[number])
