"""What a guarantee or a certificate bounds: criteria, each with the texts that it is about and what a failure is.

The rate of each criterion is the share of its texts that fail, and each rate has to be within the limit. To add one,
write a class here and give it to a kind in `criteria_of`; evidence, state, reports and fits follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from de3.exits.flags import Flag
from de3.exits.kinds import Kind, Spans, differs
from de3.exits.reading import Reading, SpansReading

# Limits on the share of flagged texts that are missed: a default τ that is certified for one of them keeps a limit.
MISSED_LIMITS = (0.02, 0.05)
# The exits at which a text fails, by exit; None if the criterion is not about the text.
Failures = list[bool] | None


class Criterion(Protocol):
    """Which texts are counted, and which exits fail.

    Attributes:
        name: the name of its rate in reports and state files.
        texts: the name of the number of audited texts that it is about, in reports.
        of_all: it is about all texts.
        limit: the guaranteed rate; None: it is only measured.
    """

    name: ClassVar[str]
    texts: ClassVar[str]
    of_all: ClassVar[bool]

    @property
    def limit(self) -> float | None:
        """See the attributes."""

    def failures(self, passed: Sequence[Any]) -> Failures:
        """The exits at which a text fails. passed: the readings of all exits, full depth's last."""


@dataclass(frozen=True)
class Disagreement:
    """An answer must not differ from full depth's."""

    kind: Kind
    limit: float | None = None
    name: ClassVar[str] = "disagreement"
    texts: ClassVar[str] = "audits"
    of_all: ClassVar[bool] = True

    def failures(self, passed: Sequence[Reading]) -> Failures:
        """The exits whose answer differs from the last one's."""
        last = passed[-1].answer
        return [differs(self.kind, one.answer, last) for one in passed]


@dataclass(frozen=True)
class MissedSpan:
    """No span that full depth finds may be missed; about the texts in which it finds one."""

    limit: float | None = None
    name: ClassVar[str] = "missed"
    texts: ClassVar[str] = "audits_with_spans"
    of_all: ClassVar[bool] = False

    def failures(self, passed: Sequence[SpansReading]) -> Failures:
        """The exits that miss a span of the last one."""
        expected = passed[-1].answer
        return [bool(expected - one.answer) for one in passed] if expected else None


@dataclass(frozen=True)
class MissedFlag:
    """No text that full depth flags may leave early as safe; about the texts that it flags."""

    flag: Flag
    limit: float | None = None
    name: ClassVar[str] = "missed_flagged"
    texts: ClassVar[str] = "audits_flagged"
    of_all: ClassVar[bool] = False

    def failures(self, passed: Sequence[Reading]) -> Failures:
        """The exits whose answer is safe, if the last one's is flagged."""
        if not self.flag.is_raised(passed[-1]):
            return None
        return [*(not self.flag.blocks(one) for one in passed[:-1]), False]


@dataclass(frozen=True)
class Limits:
    """The guaranteed rates, and the flag; None: none.

    Attributes:
        differing: of answers that differ and, for spans, of texts in which one is missed.
        missed: of the flagged texts that are missed.
    """

    differing: float | None = None
    missed: float | None = None
    flag: Flag | None = None

    @property
    def are_set(self) -> bool:
        """True if there is a guarantee."""
        return (self.differing, self.missed) != (None, None)


NO_LIMITS = Limits()


def criteria_of(kind: Kind, limits: Limits = NO_LIMITS) -> list[Criterion]:
    """What is bounded for a kind of answers; the first criterion is about all texts."""
    criteria: list[Criterion] = [Disagreement(kind, limits.differing)]
    if isinstance(kind, Spans):
        criteria.append(MissedSpan(limits.differing))
    if limits.flag is not None:
        criteria.append(MissedFlag(limits.flag, limits.missed))
    return criteria
