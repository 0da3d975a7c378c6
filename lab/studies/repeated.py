"""Texts that a guard no longer flags once something is repeated in front of them or behind them."""

from collections.abc import Sequence

from de3.data.examples import Example
from de3.export.record import record
from de3.model_store.model import Model
from de3.model_store.store import Artifact


def lost(
    artifact: Artifact, texts: Sequence[str], label: str, added: Sequence[str], times: int
) -> tuple[int, list[tuple[str, bool, int, int]]]:
    """The number of texts flagged at full depth, and how many of them no longer are with something added.

    added: each is repeated `times` times. The list has one row for each of these, and for special tokens as characters
    and as tokens: what was added, True for tokens, and the texts lost with it behind and in front.
    """
    rows, flagged = [], list[str]()
    for as_tokens in (False, True):
        model = Model(artifact, special_tokens=as_tokens)
        number = model.manifest.labels.index(label)
        flagged = _flagged(model, texts, number)
        for one in added:
            more = " ".join([one] * times)
            behind = _flagged(model, [f"{text} {more}" for text in flagged], number)
            ahead = _flagged(model, [f"{more} {text}" for text in flagged], number)
            rows.append((one, as_tokens, len(flagged) - len(behind), len(flagged) - len(ahead)))
    return len(flagged), rows


def _flagged(model: Model, texts: Sequence[str], number: int) -> list[str]:
    """The texts whose full-depth answer is a label."""
    recorded = record(model, [Example(text, number) for text in texts])
    answers = recorded.logits[:, -1].argmax(axis=1)
    return [text for text, answer in zip(texts, answers, strict=True) if answer == number]
