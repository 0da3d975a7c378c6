"""Exit signals: the uncertainty of a sample, from its readings at the exits passed so far.

To add a signal, write a class here with the members of `Signal` and list it in `SIGNALS`. Requests and manifests may
then name it, and it is served layer by layer. To run it in the kernels, which pass short texts through several layers
in one call, give it a `code` in `native/rule.h` and a case in `native/rule.c: score`. To calibrate it, add it to
`candidates` in `exits/calibration.py`. The web page has a display name for each: `SIGNALS` in
`server/http/page/page.js`.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import exp, nan
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from de3.exits import formulas
from de3.exits.kinds import CLASSES, Kind, Labels, Spans, Value
from de3.exits.reading import Reading, Weights
from de3.exits.recorded import Recorded

MAX_LAM = 100.0
DEFAULT_LAM = 1.0
FEATURES = 5  # number of Risk's features at each exit
UNUSED: Weights = (50.0, 0.0, 0.0, 0.0, 0.0)  # of Risk at an exit that is not used: always 1


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """The properties of a model that determine its signals.

    Attributes:
        name: name of the model, for messages.
        kind: what an answer is.
        risk: weights of Risk by layer; None if the model does not have this signal.
    """

    name: str = "the model"
    kind: Kind = CLASSES
    risk: tuple[Weights | None, ...] | None = None

    def check_has_classes(self, signal: str, exclusive: bool) -> None:
        """Raise ValueError for a regression model, a token classifier and, if `exclusive`, a multi-label model."""
        match self.kind:
            case Spans():
                raise ValueError(f"{signal} needs one answer for a text, and {self.name} finds spans")
            case Value():
                raise ValueError(
                    f"{signal} needs classes, and {self.name} is a regression model, whose answer is a number"
                )
            case Labels() if exclusive:
                raise ValueError(
                    f"{signal} needs mutually exclusive classes, and {self.name} is a multi-label model"
                )
            case _:
                pass


CLASSIFIER = ModelTraits()


class Signal(Protocol):
    """Scores a sample at an exit: 0 is certain, 1 is uncertain.

    Attributes:
        name: the name in requests and artifacts.
        code: number of the signal in `native/rule.h`; None if the kernels do not have it.
        lam: EDR's λ; None for any other signal.
        table: parameters for the kernels, as float64 bytes; None if there are none.
        state_weights: weights of each exit's pooled state, float32 (num_layers + 1, hidden); None if there are none.
    """

    name: ClassVar[str]
    code: ClassVar[int | None]

    @property
    def lam(self) -> float | None:
        """EDR's λ; None for any other signal."""

    @property
    def table(self) -> bytes | None:
        """Parameters for the kernels; None if there are none."""

    @property
    def state_weights(self) -> NDArray[np.float32] | None:
        """Weights of each exit's pooled state; None if there are none."""

    @classmethod
    def of(cls, model: ModelTraits, lam: float | None) -> Self:
        """The signal for a model; raises ValueError with the reason if the model cannot have it.

        lam: EDR's λ, 1 if None; always None for other signals.
        """

    def may_exit(self, layer: int) -> bool:
        """False if no sample exits at this layer, so that its exit need not be computed."""

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The score of one sample, in [0, 1], from its readings up to this exit; None if the exit has no score."""

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The scores of recorded samples at every exit, (n, exits); NaN at exits without a score."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The local signal: the normalized entropy."""

    name: ClassVar[str] = "entropy"
    code: ClassVar[int | None] = 0
    lam: ClassVar[float | None] = None
    table: ClassVar[bytes | None] = None
    state_weights: ClassVar[NDArray[np.float32] | None] = None

    @classmethod
    def of(cls, model: ModelTraits, lam: float | None) -> Self:
        """The signal for a model; raises ValueError for a regression model and a token classifier."""
        model.check_has_classes(cls.name, exclusive=False)
        return cls()

    def may_exit(self, layer: int) -> bool:
        """True: all exits are used."""
        return True

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The normalized entropy at this exit."""
        entropy = readings[-1].entropy
        return nan if entropy is None else entropy

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The normalized entropy of recorded samples, (n, exits)."""
        return recorded.entropy


@dataclass(frozen=True, slots=True)
class Edr:
    """Entropy and distance ratio fused (Eq. 12): EDR = (λ + 1)/(λ/DR + 1/Entropy), λ in (0, 100]."""

    lam: float
    name: ClassVar[str] = "edr"
    code: ClassVar[int | None] = 1
    table: ClassVar[bytes | None] = None
    state_weights: ClassVar[NDArray[np.float32] | None] = None

    @classmethod
    def of(cls, model: ModelTraits, lam: float | None) -> Self:
        """The signal for a model; raises ValueError unless its classes are mutually exclusive."""
        model.check_has_classes(cls.name, exclusive=True)
        return cls(DEFAULT_LAM if lam is None else lam)

    def may_exit(self, layer: int) -> bool:
        """True: all exits are used."""
        return True

    def score(self, readings: Sequence[Reading]) -> float | None:
        """EDR at this exit; None if the exit has no prototypes."""
        return edr(readings[-1], self.lam)

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """EDR of recorded samples, (n, exits); NaN at exits without prototypes."""
        return formulas.edr(recorded.entropy, recorded.distance_ratio, self.lam)


def edr(reading: Reading, lam: float) -> float | None:
    """EDR of one exit (Eq. 12), for λ above 0; None if the exit has no prototypes."""
    entropy, ratio = reading.entropy, reading.distance_ratio
    if entropy is None or ratio is None:
        return None
    # Multiplied out, so that nothing is divided by a signal that is 0.
    denominator = lam * entropy + ratio
    return (lam + 1.0) * entropy * ratio / denominator if denominator else 0.0


@dataclass(frozen=True, slots=True)
class Risk:
    """The probability that this exit's answer differs from full depth's.

    A logistic regression for each exit: 1/(1 + exp(−z)), z = w0 + w1·margin + w2·entropy + w3·log entropy
    + w4·log DR. The margin is the highest logit minus the second highest; in a multi-label model it is the smallest
    distance of a logit from its threshold. In a regression model z = w0 + w1·value + w2·value². In a token classifier
    z = w0 + w1·log largest + w2·log total + w3·log tokens + w4·found (see exits.spans.Unsure). `exits.risk` fits the
    weights on held-out samples, without their labels. Unlike entropy and EDR, risk is comparable across exits.

    With mutually exclusive classes, z may have a further term v·h, where h is the exit's pooled state (h^(m) in the
    paper): what its classifier overlooks, such as a negation in a mean of embeddings, may still show in the state.

    Attributes:
        weights: (w0, …, w4) by layer, followed by v if there is one, as float32 values; None at layers without an exit,
            and at full depth. w4 is 0 at an exit without prototypes of a model with classes.
    """

    weights: tuple[Weights | None, ...]
    table: bytes | None = field(init=False, repr=False, compare=False)
    state_weights: NDArray[np.float32] | None = field(init=False, repr=False, compare=False)
    name: ClassVar[str] = "risk"
    code: ClassVar[int | None] = 2
    lam: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        rows = [(weights or (np.nan,) * FEATURES)[:FEATURES] for weights in self.weights]
        object.__setattr__(self, "table", np.array(rows, np.float64).tobytes())
        of_states, size = None, max(len(weights or ()) for weights in self.weights) - FEATURES
        if size > 0:
            of_states = np.zeros((len(self.weights), size), np.float32)
            for row, weights in zip(of_states, self.weights, strict=True):
                row[:] = (weights or ())[FEATURES:] or 0.0
        object.__setattr__(self, "state_weights", of_states)

    @classmethod
    def of(cls, model: ModelTraits, lam: float | None) -> Self:
        """The signal for a model; raises ValueError if the model was not calibrated with it."""
        if model.risk is None:
            raise ValueError(f"{model.name} has no risk; de3 calibrate adds it")
        return cls(model.risk)

    def may_exit(self, layer: int) -> bool:
        """False for an exit that is not used."""
        return self.weights[layer] != UNUSED

    def score(self, readings: Sequence[Reading]) -> float | None:
        """The risk at this exit; None at the last exit, and at one without the prototypes that its weights need."""
        reading = readings[-1]
        weights = self.weights[reading.layer]
        z = None if weights is None else reading.risk(weights)
        return None if z is None else _logistic(z + reading.state_term)

    def scores(self, recorded: Recorded) -> formulas.Floats:
        """The risk of recorded samples, (n, exits); NaN at the last exit."""
        features = recorded.risk_features
        scores = np.full(features.shape[:2], np.nan)
        # With an upstream, full depth is a layer above those of the model.
        for j, layer in enumerate(recorded.exit_layers):
            weights = self.weights[layer] if layer < len(self.weights) else None
            if weights is not None:
                states = recorded.states_at(j) if len(weights) > FEATURES else None
                scores[:, j] = probabilities(np.array(weights), features[:, j], states)
        return scores


def probabilities(
    weights: formulas.Floats, features: formulas.Floats, states: NDArray[np.float32] | None
) -> formulas.Floats:
    """The risk of n samples at an exit, (n,). features: (n, 5). states: (n, hidden), needed if they have weights."""
    z = (features * weights[:FEATURES]).sum(-1)
    if len(weights) > FEATURES:
        assert states is not None
        z += states @ weights[FEATURES:].astype(np.float32)
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -700.0, 700.0))))


def _logistic(z: float) -> float:
    return 1.0 / (1.0 + exp(-min(max(z, -700.0), 700.0)))  # in this order NaN stays NaN


# Every signal, by the name that requests, artifacts and commands use.
SIGNALS: dict[str, type[Signal]] = {"entropy": Entropy, "edr": Edr, "risk": Risk}


def check_name(name: str) -> str:
    """Validate a signal's name, and return it; raises ValueError if there is no such signal."""
    if name not in SIGNALS:
        raise ValueError(f"must be one of {', '.join(SIGNALS)}")
    return name


def signal_of(name: str, lam: float | None = None, model: ModelTraits = CLASSIFIER) -> Signal:
    """The signal of this name. lam: the λ of edr, 1 if None; 0 is entropy alone.

    model: traits of the model; by default, of one that has mutually exclusive classes and no risk.

    Raises ValueError for an unknown name, a signal that the model cannot have, a λ outside [0, 100], and a λ given
    with a signal other than edr, except 0 with entropy.
    """
    if lam is not None and not 0 <= lam <= MAX_LAM:
        raise ValueError(f"lambda must be in [0, {MAX_LAM:g}], got {lam}")
    if lam == 0 and name in ("edr", "entropy"):
        name, lam = "entropy", None
    if lam is not None and name != "edr":
        raise ValueError("lambda is only valid with the signal edr")
    return SIGNALS[check_name(name)].of(model, lam)


def signals_of(model: ModelTraits) -> list[Signal]:
    """Every signal that a model can have, EDR with the default λ."""
    signals = []
    for kind in SIGNALS.values():
        with suppress(ValueError):
            signals.append(kind.of(model, None))
    return signals


def signal_label(name: str, lam: float | None) -> str:
    """Display name of a signal. lam: the λ of edr; None for other signals."""
    return name if lam is None else f"EDR λ={lam:g}"
