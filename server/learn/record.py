"""Texts of live traffic to which exits are fitted, and held-out texts that test the exits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Record:
    """A text that was drawn for an audit, or answered by an upstream, and that ran to full depth.

    Attributes:
        client: name of the API key, or a hash of the client's network on a server without keys.
        share: probability with which the text was drawn, before anything about it was known; 1 if it is extra.
        is_extra: it was not drawn; see model_store.records.Records.
        key: hash of its tokens.
        states: mean hidden state of the tokens after each layer but the last, (num_layers, hidden) float16; (0, 0) of a
            token classifier.
        logits: logits of the last layer, (K,) float32; (0,) of a token classifier.
        ids: of a token classifier, its tokens as model_store.records.packed returns them; otherwise empty, int32.
    """

    client: str
    share: float
    key: int
    states: NDArray[np.float16]
    logits: NDArray[np.float32]
    is_extra: bool = False
    ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text that was held out of a fit.

    Attributes:
        client, key: see Record.
        number: position of the text in the traffic, as in Records.
        scores: the signal's score at each exit; None at an exit where it is not defined.
        differs: for each exit, true if its answer disagrees with the last exit's.
        missed: see server.audit.tenant.Settled; None also for models that are no token classifiers.
        is_repeat: it was also recorded before the fit, perhaps for another tenant, so it counts only against the exits.
    """

    client: str
    key: int
    number: int
    scores: Sequence[float | None]
    differs: Sequence[bool]
    is_repeat: bool = False
    missed: Sequence[bool] | None = None
