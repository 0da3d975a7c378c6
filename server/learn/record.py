"""Texts of live traffic to which exits are fitted, and held-out texts that test the exits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from de3.exits.criteria import Failures
from de3.model_store.fitted import Pieces


@dataclass(frozen=True, slots=True)
class Record:
    """A text that was drawn for an audit, or answered by an upstream, and that ran to full depth.

    Attributes:
        client: name of the API key, or a hash of the client's network on a server without keys.
        share: probability with which the text was drawn, before anything about it was known; 1 if it is extra.
        is_extra: it was not drawn; see model_store.records.Records.
        key: hash of its tokens.
        pieces: its word pieces; see model_store.fitted.pieces_of.
        states: mean hidden state of the tokens after each layer but the last, (num_layers, hidden) float16; (0, 0) of a
            token classifier.
        logits: logits of the last layer, (K,) float32; (0,) of a token classifier.
        ids: of a token classifier, its tokens as model_store.records.packed returns them; otherwise empty, int32.
    """

    client: str
    share: float
    key: int
    pieces: Pieces
    states: NDArray[np.float16]
    logits: NDArray[np.float32]
    is_extra: bool = False
    ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text that is evidence about the exits of a fit: it arrived after the last text that the fit could read.

    Raises ValueError for a text that arrived before.

    Attributes:
        client: see Record.
        key: see Record; None if the text is near to one that the exits were fitted to (see model_store.fitted), so it
            counts only against them.
        number: position of the text in the traffic, as in Records.
        cut: position of the last text that the fit could read; see model_store.manifest.Learned.
        scores: the signal's score at each exit; None at an exit where it is not defined.
        failures: by criterion of the model, the exits at which the text fails; see exits.criteria.
    """

    client: str
    key: int | None
    number: int
    cut: int
    scores: Sequence[float | None]
    failures: Sequence[Failures]

    def __post_init__(self) -> None:
        if self.number <= self.cut:
            raise ValueError(f"text {self.number} could be read by the fit, which ends at {self.cut}")
