"""What a guarantee or a certificate bounds: criteria, each with the texts that it is about and what a failure is.

The rate of each criterion is the share of its texts that fail, and each rate has to be within the limit. To add one,
write a class here and give it to a kind in `criteria_of`; evidence, state, reports and fits follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import Kind, Spans, differs
from de3.exits.reading import Answer

# The exits at which a text fails, by exit; None if the criterion is not about the text.
Failures = list[bool] | None


class Criterion(Protocol):
    """Which texts are counted, and which exits fail.

    Attributes:
        name: the name of its rate in reports and state files.
        texts: the name of the number of audited texts that it is about, in reports.
        of_all: it is about all texts.
    """

    name: ClassVar[str]
    texts: ClassVar[str]
    of_all: ClassVar[bool]

    def failures(self, answers: Sequence[Any]) -> Failures:
        """The exits at which a text fails. answers: of all exits, full depth's last."""


@dataclass(frozen=True)
class Disagreement:
    """An answer must not differ from full depth's."""

    kind: Kind
    name: ClassVar[str] = "disagreement"
    texts: ClassVar[str] = "audits"
    of_all: ClassVar[bool] = True

    def failures(self, answers: Sequence[Answer]) -> Failures:
        """The exits whose answer differs from the last one's."""
        return [differs(self.kind, one, answers[-1]) for one in answers]


@dataclass(frozen=True)
class MissedSpan:
    """No span that full depth finds may be missed; about the texts in which it finds one."""

    name: ClassVar[str] = "missed"
    texts: ClassVar[str] = "audits_with_spans"
    of_all: ClassVar[bool] = False

    def failures(self, answers: Sequence[frozenset[Any]]) -> Failures:
        """The exits that miss a span of the last one."""
        return [bool(answers[-1] - one) for one in answers] if answers[-1] else None


def criteria_of(kind: Kind) -> list[Criterion]:
    """What is bounded for a kind of answers; the first criterion is about all texts."""
    return [Disagreement(kind), *([MissedSpan()] if isinstance(kind, Spans) else [])]


def counted(failures: Sequence[Failures], exits: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The indices of the texts that a criterion is about, (m,), and where they fail, (m, exits)."""
    rows = [i for i, one in enumerate(failures) if one is not None]
    return np.array(rows, np.int64), np.array([failures[i] for i in rows], np.bool_).reshape(len(rows), exits)
