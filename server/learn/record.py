"""Texts of live traffic to which exits are fitted, or that test them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from de3.model_store.fitted import Pieces


@dataclass(frozen=True, slots=True)
class Record:
    """A text that was drawn for an audit, or answered by an upstream, and that ran to full depth.

    Attributes:
        client: name of the API key, or a hash of the client's network on a server without keys.
        share: probability with which the text was drawn, before anything about it was known; 1 if it is extra.
        is_extra: it was not drawn; see model_store.records.Records.
        key: hash of its tokens.
        pieces, spread: see model_store.fitted.Marks.
        states: mean hidden state of the tokens after each layer but the last, (num_layers, hidden) float16; of a token
            classifier, after layer 0 only, (1, hidden).
        logits: logits of the last layer, (K,) float32; (0,) of a token classifier.
        ids: of a token classifier, its tokens as model_store.records.packed returns them; otherwise empty, int32.
    """

    client: str
    share: float
    key: int
    pieces: Pieces
    spread: float
    states: NDArray[np.float16]
    logits: NDArray[np.float32]
    is_extra: bool = False
    ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
