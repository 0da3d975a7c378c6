"""Keep two parts of the data back: one to tune on, one to certify with."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from training.data import Example, Text

SHORTEST_FRAGMENT = 3  # words; shorter ones are everybody's


@dataclass(frozen=True)
class Split:
    """Train, and the two parts of it that training never sees: one to tune, one to certify."""

    train: list[Example]
    tune: list[Example]
    certify: list[Example]


def split(
    examples: Sequence[Example], seed: int, held_back: int | None = None, fragments: bool = False
) -> Split:
    """Keep two parts of examples back, chosen by seed, about `held_back` samples each.

    Default size: a tenth each, at most 4,000. A text that occurs twice falls into one part only. With
    `fragments` (the data holds fragments of its own texts, as SST-2's phrases) so do a text and its
    fragments: a fragment of texts in several parts is left out, or stays in train if it has fewer than 3
    words. Without that, a model is judged on texts whose sentences it has seen.
    """
    size = min(len(examples) // 10, 4000) if held_back is None else held_back
    if size < 1 or 2 * size >= len(examples):
        raise ValueError(f"cannot keep back 2 x {size} of {len(examples)} samples; set --held-back")
    texts = {e.text for e in examples}
    whole = whole_texts(texts) if fragments else {text: {text} for text in texts}
    members: dict[Text, list[Example]] = defaultdict(list)
    for example in examples:
        if len(whole[example.text]) == 1 or not _is_short(example.text):
            members[min(whole[example.text], key=repr)].append(example)

    def rank(text: Text) -> bytes:
        return hashlib.sha256(f"{seed}\0{text!r}".encode()).digest()

    # Whole texts in an order drawn by seed, each bringing its fragments: tune is filled first, then certify.
    part_of: dict[Text, int] = {}
    filled = 0
    for text in sorted({w for found in whole.values() for w in found}, key=rank):
        part_of[text] = min(filled // size, 2)
        filled += len(members[text])
    parts: tuple[list[Example], ...] = ([], [], [])
    for example in sorted(examples, key=lambda e: rank(e.text)):
        found = {part_of[w] for w in whole[example.text]}
        if len(found) == 1:
            parts[found.pop()].append(example)
        elif _is_short(example.text):
            parts[2].append(example)
    tune, certify, train = parts
    if not (tune and certify and train):
        raise ValueError("too few distinct texts to keep two parts back")
    random.Random(seed).shuffle(train)
    return Split(train=train, tune=tune, certify=certify)


def whole_texts(texts: set[Text]) -> dict[Text, set[Text]]:
    """For each text the longest texts that contain it, word for word; itself if none does (or a pair)."""
    by_words = {tuple(t.split()): t for t in texts if isinstance(t, str)}
    lengths = {len(words) for words in by_words}
    inside: dict[Text, set[Text]] = defaultdict(set)
    for words, text in by_words.items():
        for length in lengths:
            for start in range(len(words) - length + 1) if length < len(words) else ():
                fragment = by_words.get(words[start : start + length])
                if fragment is not None:
                    inside[fragment].add(text)
    return {text: {w for w in inside[text] if not inside[w]} or {text} for text in texts}


def _is_short(text: Text) -> bool:
    return isinstance(text, str) and len(text.split()) < SHORTEST_FRAGMENT
