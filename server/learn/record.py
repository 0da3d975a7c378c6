"""Texts of live traffic from which exits learn, and texts that test them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Record:
    """A text that was drawn for an audit, at full depth.

    Attributes:
        client: as in audits.
        share: probability with which the text was drawn, before anything about it was known.
        key: hash of its tokens.
        states: mean of the tokens after each layer but the last, (num_layers, hidden) float16.
        logits: of the last layer, (K,) float32.
    """

    client: str
    share: float
    key: int
    states: NDArray[np.float16]
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text that was held out of a fit.

    Attributes:
        scores, differs: at each exit, as in audits.
    """

    client: str
    key: int
    scores: Sequence[float | None]
    differs: Sequence[bool]
