"""Exit signals: how unsure a sample is, from what the exits passed so far said.

To add a signal: a class here with the members of `Signal`, and a case for its code in `native/rule.c`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from exits import formulas
from exits.reading import Reading
from exits.recorded import Recorded

MAX_LAM = 100.0


class Signal(Protocol):
    """Scores a sample at an exit: 0 is sure, 1 is unsure.

    Attributes:
        code: the signal's number in `native/rule.h`.
    """

    code: ClassVar[int]

    @property
    def lam(self) -> float:
        """EDR's λ; 0 for a signal without one."""

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The score in [0, 1] of one sample, from the readings of the exits passed so far, the last one's
        included; None where this exit cannot tell."""

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The scores of recorded samples at every exit, (n, exits); NaN where an exit cannot tell."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The local signal alone."""

    code: ClassVar[int] = 0
    lam: ClassVar[float] = 0.0

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The last exit's normalized entropy."""
        return readings[-1].entropy

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The same of recorded samples."""
        return recorded.entropy


@dataclass(frozen=True, slots=True)
class Edr:
    """Entropy and distance ratio fused (Eq. 12): EDR = (λ + 1)/(λ/DR + 1/Entropy), λ in (0, 100]."""

    lam: float
    code: ClassVar[int] = 1

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The last exit's EDR; None at an exit without prototypes."""
        entropy, ratio = readings[-1].entropy, readings[-1].distance_ratio
        if ratio is None:
            return None
        # The same mean with its fractions cleared: no division by a signal that is 0, unless both are.
        below = self.lam * entropy + ratio
        return (self.lam + 1.0) * entropy * ratio / below if below else 0.0

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The same of recorded samples."""
        return formulas.edr(recorded.entropy, recorded.distance_ratio, self.lam)


def signal_of(lam: float) -> Signal:
    """The signal that a request's or an artifact's λ stands for: λ = 0 is entropy alone.

    Raises ValueError for a λ outside [0, 100].
    """
    if not 0 <= lam <= MAX_LAM:
        raise ValueError(f"lambda must be in [0, {MAX_LAM:g}], got {lam}")
    return Edr(lam) if lam else Entropy()
