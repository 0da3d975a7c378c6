"""Exit signals: the uncertainty of a sample, from its readings at the exits passed so far.

To add a signal, write a class here with the members of `Signal` and select it in `signal_of`. That is enough to serve
it, layer by layer. For the kernels, which run short texts through all layers in one call, also give it a code of its
own: in `native/rule.h`, with a case in `native/rule.c: score`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import ClassVar, Literal, Protocol

import numpy as np

from de3.exits import formulas
from de3.exits.reading import Reading
from de3.exits.recorded import Recorded

MAX_LAM = 100.0
SMALLEST = 1e-12  # of what a logarithm is taken
FEATURES = 5  # of Risk, at each exit

SignalName = Literal["entropy", "edr", "risk"]
Weights = tuple[float, ...]


class Signal(Protocol):
    """Scores a sample at an exit: 0 is certain, 1 is uncertain.

    Attributes:
        name: what requests and artifacts call it.
        code: its number in `native/rule.h`; None: the kernels do not have it.
        table: parameters for the kernels, float64; None: it has none.
    """

    name: ClassVar[SignalName]
    code: ClassVar[int | None]

    @property
    def lam(self) -> float | None:
        """EDR's λ; None for a signal without one."""

    @property
    def table(self) -> bytes | None:
        """See the class."""

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The score of one sample, in [0, 1], from its readings up to and including this exit; None if this
        exit has no score."""

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The scores of recorded samples at every exit, (n, exits); NaN at exits without a score."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The local signal alone."""

    name: ClassVar[SignalName] = "entropy"
    code: ClassVar[int | None] = 0
    lam: ClassVar[float | None] = None
    table: ClassVar[bytes | None] = None

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
    name: ClassVar[SignalName] = "edr"
    code: ClassVar[int | None] = 1
    table: ClassVar[bytes | None] = None

    def score(self, readings: Sequence[Reading]) -> float | None:
        """EDR at this exit; None if it has no prototypes."""
        return edr(readings[-1], self.lam)

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """EDR of recorded samples, (n, exits)."""
        return formulas.edr(recorded.entropy, recorded.distance_ratio, self.lam)


def edr(reading: Reading, lam: float) -> float | None:
    """EDR of one exit (Eq. 12), λ above 0; None if it has no prototypes."""
    entropy, ratio = reading.entropy, reading.distance_ratio
    if ratio is None:
        return None
    # Multiplied out, so that nothing is divided by a signal that is 0.
    denominator = lam * entropy + ratio
    return (lam + 1.0) * entropy * ratio / denominator if denominator else 0.0


@dataclass(frozen=True, slots=True)
class Risk:
    """The probability that this exit's answer is not that of full depth.

    At each exit a logistic regression: 1/(1 + exp(−z)), z = w0 + w1·margin + w2·entropy + w3·log entropy
    + w4·log DR, where margin is the highest logit minus the second (of a multi-label model: the distance of the logit
    nearest to its threshold). Of a regression model z = w0 + w1·value + w2·value². Fitted by `exits.risk` on samples
    that were not trained on, without their labels. Unlike entropy and EDR it is comparable between exits.

    Attributes:
        weights: by layer, (w0, …, w4); None at layers without an exit, and at the last. w4 of classes is 0 at an exit
            without prototypes.
    """

    weights: tuple[Weights | None, ...]
    table: bytes | None = field(init=False, repr=False, compare=False)
    name: ClassVar[SignalName] = "risk"
    code: ClassVar[int | None] = 2
    lam: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        rows = [weights or (np.nan,) * FEATURES for weights in self.weights]
        object.__setattr__(self, "table", np.array(rows, np.float64).tobytes())

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The risk at this exit; None at the last one."""
        reading = readings[-1]
        w = self.weights[reading.layer]
        if w is None:
            return None
        if reading.value is not None:
            return _logistic(w[0] + w[1] * reading.value + w[2] * (reading.value * reading.value))
        h = SMALLEST if reading.entropy < SMALLEST else reading.entropy
        z = w[0] + w[1] * reading.margin + w[2] * reading.entropy + w[3] * log(h)
        if w[4] != 0.0:
            if reading.distance_ratio is None:
                return None
            ratio = SMALLEST if reading.distance_ratio < SMALLEST else reading.distance_ratio
            z += w[4] * log(ratio)
        return _logistic(z)

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The risk of recorded samples, (n, exits)."""
        features = recorded.risk_features
        weights = [self.weights[layer] or (np.nan,) * FEATURES for layer in recorded.exit_layers]
        z = (features * np.array(weights)).sum(-1)
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -700.0, 700.0))))


def _logistic(z: float) -> float:
    return 1.0 / (1.0 + exp(-min(max(z, -700.0), 700.0)))  # in this order NaN stays NaN


def signal_of(
    name: SignalName, lam: float | None = None, weights: tuple[Weights | None, ...] | None = None
) -> Signal:
    """The signal of a name; λ for edr (0 is entropy alone), weights for risk.

    Raises ValueError for a λ outside [0, 100], or with a signal that has none, and for risk without weights.
    """
    if lam is not None and not 0 <= lam <= MAX_LAM:
        raise ValueError(f"lambda must be in [0, {MAX_LAM:g}], got {lam}")
    if name == "risk":
        if weights is None:
            raise ValueError("the model has no risk; de3 calibrate adds it")
        if lam is not None:
            raise ValueError("lambda goes with the signal edr only")
        return Risk(weights)
    if name == "entropy":
        if lam:
            raise ValueError("lambda goes with the signal edr only")
        return Entropy()
    if lam is None:
        raise ValueError("the signal edr needs lambda")
    return Edr(lam) if lam else Entropy()
