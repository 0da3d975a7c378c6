"""Splits data into training data and two held-out parts: one to tune on, one to certify on."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example, labels_of
from de3.data.tables import TextOrPair

SHORTEST_FRAGMENT = 3  # words; shorter fragments occur everywhere


@dataclass(frozen=True)
class Split:
    """The training samples and the two held-out parts."""

    train: list[Example]
    tune: list[Example]
    certify: list[Example]


def split(
    examples: Sequence[Example], seed: int, held_back: int | None = None, fragments: bool = False
) -> Split:
    """Hold out two parts of examples, chosen by seed, of about `held_back` samples each.

    By default, each is a tenth of the examples, at most 4,000. Identical texts, and examples of one group, go to the
    same part.

    fragments: the data contains fragments of its own texts, such as SST-2's phrases. Then the examples' groups are
    ignored, and a text and its fragments go to the same part, because the evaluation must not use sentences seen in
    training. A fragment of texts in several parts is dropped, or kept in train if it has fewer than 3 words. In the
    held-out parts, fragments are marked, and `group` is set to the whole text.

    Raises ValueError if there are too few samples or distinct texts.
    """
    size = min(len(examples) // 10, 4000) if held_back is None else held_back
    if size < 1 or 2 * size >= len(examples):
        raise ValueError(f"cannot hold out 2 x {size} of {len(examples)} samples; set --held-back")
    texts = {e.text for e in examples}
    whole = whole_texts(texts) if fragments else {t: {one} for t, one in related(examples).items()}
    members: dict[TextOrPair, list[Example]] = defaultdict(list)
    for example in examples:
        if len(whole[example.text]) == 1 or not _is_short(example.text):
            members[min(whole[example.text], key=repr)].append(example)

    # Whole texts with their fragments, in an order given by the seed, fill tune first, then certify.
    part_of: dict[TextOrPair, int] = {}
    filled = 0
    for text in sorted({text for texts in whole.values() for text in texts}, key=partial(_rank, seed)):
        part_of[text] = min(filled // size, 2)
        filled += len(members[text])
    parts: tuple[list[Example], ...] = ([], [], [])
    for example in sorted(examples, key=lambda e: _rank(seed, e.text)):
        indices = {part_of[text] for text in whole[example.text]}
        if len(indices) == 1:
            parts[indices.pop()].append(example)
        elif _is_short(example.text):
            parts[2].append(example)
    tune, certify, train = parts
    if not (tune and certify and train):
        raise ValueError("too few distinct texts or groups to hold out two parts")
    random.Random(seed).shuffle(train)
    if fragments:
        tune, certify = ([_in_its_text(e, whole[e.text]) for e in part] for part in (tune, certify))
    return Split(train=train, tune=tune, certify=certify)


def with_fragments(examples: Sequence[Example]) -> list[Example]:
    """The examples with fragments marked, each in its whole text's group; fragments of several texts are left out."""
    whole = whole_texts({e.text for e in examples})
    return [_in_its_text(e, whole[e.text]) for e in examples if len(whole[e.text]) == 1]


def _in_its_text(example: Example, whole: set[TextOrPair]) -> Example:
    return replace(example, group=str(min(whole, key=repr)), is_fragment=whole != {example.text})


def groups_of(examples: Sequence[Example], fragments: bool = False) -> NDArray[np.int64]:
    """The number of each example's group, (n,); with `fragments`, a text and its fragments form a group."""
    if fragments:
        whole = whole_texts({e.text for e in examples})
        one_of = {text: min(texts, key=repr) for text, texts in whole.items()}
    else:
        one_of = related(examples)
    return np.unique([repr(one_of[e.text]) for e in examples], return_inverse=True)[1].astype(np.int64)


def are_whole(examples: Sequence[Example], fragments: bool) -> NDArray[np.bool_]:
    """True for the examples that are no fragments of others, (n,); without `fragments`, for all."""
    if not fragments:
        return np.ones(len(examples), np.bool_)
    whole = whole_texts({e.text for e in examples})
    return np.array([whole[e.text] == {e.text} for e in examples])


def stratified(examples: Sequence[Example], seed: int) -> NDArray[np.float64]:
    """A position in (0, 1) for each example, (n,), for splitting: any interval has about its share of each label.

    Related examples have the same position, and count once, for the label that the fewest such groups have.
    """
    one_of = related(examples)
    found: dict[TextOrPair, set[int]] = defaultdict(set)
    for example in examples:
        found[one_of[example.text]].update(labels_of(example))
    counts = Counter(label for labels in found.values() for label in labels)
    members: dict[int, list[TextOrPair]] = defaultdict(list)
    for text, labels in found.items():
        members[min(labels, key=lambda label: (counts[label], label), default=-1)].append(text)
    position = dict[TextOrPair, float]()
    for texts in members.values():
        texts.sort(key=lambda text: _rank(seed, text))
        position |= {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
    return np.array([position[one_of[example.text]] for example in examples])


def _rank(seed: int, text: TextOrPair) -> bytes:
    return hashlib.sha256(f"{seed}\0{text!r}".encode()).digest()


def related(examples: Sequence[Example]) -> dict[TextOrPair, TextOrPair]:
    """For each text, a representative of the texts related to it by shared groups, directly or through others."""
    parent: dict[TextOrPair, TextOrPair] = {e.text: e.text for e in examples}

    def root(text: TextOrPair) -> TextOrPair:
        while parent[text] != text:
            parent[text] = text = parent[parent[text]]
        return text

    first: dict[str, TextOrPair] = {}
    for example in examples:
        if example.group is not None:
            parent[root(example.text)] = root(first.setdefault(example.group, example.text))
    return {text: root(text) for text in parent}


def whole_texts(texts: set[TextOrPair]) -> dict[TextOrPair, set[TextOrPair]]:
    """For each text, the longest texts that contain it word for word; itself if it is a pair or in no other text."""
    by_words = {tuple(t.split()): t for t in texts if isinstance(t, str)}
    lengths = {len(words) for words in by_words}
    inside: dict[TextOrPair, set[TextOrPair]] = defaultdict(set)
    for words, text in by_words.items():
        for length in lengths:
            for start in range(len(words) - length + 1) if length < len(words) else ():
                fragment = by_words.get(words[start : start + length])
                if fragment is not None:
                    inside[fragment].add(text)
    return {text: {whole for whole in inside[text] if not inside[whole]} or {text} for text in texts}


def _is_short(text: TextOrPair) -> bool:
    return isinstance(text, str) and len(text.split()) < SHORTEST_FRAGMENT
