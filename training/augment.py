"""Data augmentation for distillation: altered copies of the training texts, which the teacher labels.

A fine-tuned teacher is confident about nearly every text it was trained on, so its logits add little to the labels
there. Altered copies show the student where the teacher's decision changes.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from de3.data.examples import Example
from de3.data.tables import TextOrPair

JOINTS = (" ", " , ", " and ", " but ", " . ")
JOINED, REPLACED, DELETED = 0.5, 0.2, 0.05  # shares of texts joined, and of words replaced and deleted


def neighbours(
    texts: Sequence[TextOrPair], tokenizer: Any, table: torch.Tensor, k: int = 10
) -> dict[str, list[str]]:
    """For each word in `texts`, the k nearest other words in `texts`, by cosine similarity of their embeddings.

    table: the encoder's word embeddings, (vocabulary, width). Only alphabetic words that are a single token are
    considered. Neighbours are synonyms and antonyms alike; the teacher tells them apart.
    """
    ids_of = {w: tokenizer.encode(w, add_special_tokens=False) for t in texts for w in _words(t)}
    words = [w for w, ids in ids_of.items() if len(ids) == 1 and w.isalpha()]
    vectors = torch.nn.functional.normalize(table[[ids_of[w][0] for w in words]].float(), dim=-1)
    nearest_words = {}
    for start in range(0, len(words), 1000):
        nearest = (vectors[start : start + 1000] @ vectors.T).topk(min(k + 1, len(words))).indices.tolist()
        for word, indices in zip(words[start : start + 1000], nearest, strict=True):
            nearest_words[word] = [words[i] for i in indices if words[i] != word]
    return nearest_words


def augment(
    examples: Sequence[Example], nearest_words: dict[str, list[str]], copies: int, seed: int
) -> list[TextOrPair]:
    """`copies` altered texts per example: words are replaced or deleted.

    Half of the single texts are first joined to another text in the data. nearest_words: the result of `neighbours`.
    """
    rng = random.Random(seed)

    def alter(text: str) -> str:
        words = []
        for word in text.split():
            chance = rng.random()
            if chance < REPLACED and nearest_words.get(word):
                words.append(rng.choice(nearest_words[word]))
            elif chance < 1 - DELETED:
                words.append(word)
        return " ".join(words) or text

    altered: list[TextOrPair] = []
    for example in [e for e in examples for _ in range(copies)]:
        if isinstance(example.text, tuple):
            altered.append((alter(example.text[0]), alter(example.text[1])))
            continue
        text = example.text
        other = rng.choice(examples).text
        if rng.random() < JOINED and isinstance(other, str):
            text = text + rng.choice(JOINTS) + other
        altered.append(alter(text))
    return altered


def _words(text: TextOrPair) -> list[str]:
    return (text if isinstance(text, str) else " ".join(text)).split()
