"""Altered copies: the requested number, never empty, made from the given neighbours."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from de3.data.examples import Example
from de3.training.augment import augment, neighbours
from tests.fixtures import save_encoder

words = st.lists(st.sampled_from("good bad film plot the".split()), min_size=1, max_size=8).map(" ".join)  # noqa: SIM905


@given(st.lists(words | st.tuples(words, words), min_size=1, max_size=6), st.integers(0, 3), st.integers())
def test_copies_of_texts_and_pairs(texts: list[str | tuple[str, str]], copies: int, seed: int) -> None:
    near = {"good": ["fine"], "film": ["movie"]}
    altered = augment([Example(t, 0) for t in texts], near, copies, seed)
    assert len(altered) == copies * len(texts)
    known = set("good bad film plot the fine movie , and but .".split())  # noqa: SIM905
    for i, text in enumerate(altered):
        assert isinstance(text, tuple) == isinstance(texts[i // copies], tuple)
        for part in (text,) if isinstance(text, str) else text:
            assert part and set(part.split()) <= known
    assert augment([Example(t, 0) for t in texts], near, copies, seed) == altered


def test_words_are_replaced_by_neighbours_and_texts_joined() -> None:
    altered = augment([Example("good film", 0)] * 50, {"good": ["fine"], "film": ["movie"]}, 2, 0)
    assert all(set(text.split()) & {"fine", "movie", "good", "film"} for text in altered)
    assert {"fine", "movie", "and", "but"} <= {word for text in altered for word in text.split()}


def test_neighbours_are_the_nearest_words_of_the_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_encoder(tmp_path))
    table = torch.randn(60, 8)
    good, great, bad = (tokenizer.encode(w, add_special_tokens=False)[0] for w in ("good", "great", "bad"))
    table[great] = table[good] + 0.01
    table[bad] = -table[good]
    near = neighbours(["good bad", ("great", "unknownword")], tokenizer, table, k=1)
    assert near["good"] == ["great"] and near["great"] == ["good"]
