"""Exit signals: the uncertainty of a sample, from its readings at the exits passed so far.

To add a signal, write a class here with the members of `Signal` and select it in `signal_of`. Add its code to
`native/rule.h`, a case to `native/rule.c: score`, and the signal to `exits/calibration.py: SIGNALS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from exits import formulas
from exits.reading import Reading
from exits.recorded import Recorded

MAX_LAM = 100.0


class Signal(Protocol):
    """Scores a sample at an exit: 0 is certain, 1 is uncertain.

    Attributes:
        code: the signal's number in `native/rule.h`.
    """

    code: ClassVar[int]

    @property
    def lam(self) -> float:
        """EDR's λ; 0 for a signal without one."""

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The score of one sample, in [0, 1], from its readings up to and including this exit; None if this
        exit has no score."""

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The scores of recorded samples at every exit, (n, exits); NaN at exits without a score."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The local signal alone."""

    code: ClassVar[int] = 0
    lam: ClassVar[float] = 0.0

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The normalized entropy at this exit."""
        return readings[-1].entropy

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The normalized entropy of recorded samples, (n, exits)."""
        return recorded.entropy


@dataclass(frozen=True, slots=True)
class Edr:
    """Entropy and distance ratio fused (Eq. 12): EDR = (λ + 1)/(λ/DR + 1/Entropy), λ in (0, 100]."""

    lam: float
    code: ClassVar[int] = 1

    def score(self, readings: Sequence[Reading]) -> float | None:
        """EDR at this exit; None if it has no prototypes."""
        entropy, ratio = readings[-1].entropy, readings[-1].distance_ratio
        if ratio is None:
            return None
        # Multiplied out, so that nothing is divided by a signal that is 0.
        denominator = self.lam * entropy + ratio
        return (self.lam + 1.0) * entropy * ratio / denominator if denominator else 0.0

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """EDR of recorded samples, (n, exits)."""
        return formulas.edr(recorded.entropy, recorded.distance_ratio, self.lam)


def signal_of(lam: float) -> Signal:
    """The signal for a request's or an artifact's λ; λ = 0 is entropy alone.

    Raises ValueError for λ outside [0, 100].
    """
    if not 0 <= lam <= MAX_LAM:
        raise ValueError(f"lambda must be in [0, {MAX_LAM:g}], got {lam}")
    return Edr(lam) if lam else Entropy()
