"""Fuzzer of tokenizer.json: allowed components with parameters near their limits, and random edits of the result.

A tokenizer must be refused with a StoreError, or each of its steps must end in time, and its normalizer must lengthen
no ASCII text beyond the limit. Texts that cannot be tokenized do not count as findings.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer

from de3.model_store.store import StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.model_store.tokenizer_check import MAX_GROWTH, MODELS, PARTS, REGEXES
from lab.fuzzers.edits import edited
from lab.fuzzers.run import Finding, Fuzzer
from lab.fuzzers.seeds import WORDS

MAX_TOKENS = 64
MAX_STEP_S = 0.5
TEXTS = (
    *("a good film", "", "a" * 5000, "ab " * 2000, " " * 3000, "." * 3000, "A B" * 100, "[CLS] [SEP] [MASK]"),
    *(
        "\x00\x01\x7f",
        "é\u0301 ﷺ \u200b 中文 \U0001f600" * 50,
        "a\tb\nc\r\n  d",
        "1234567890" * 50,
        "▁a▁b",
        "aaa" * 300,
    ),
)
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
LETTERS = {letter: number for number, letter in enumerate(["[UNK]", "a", "b", "ab", "▁", " ", "o", "g", "d"])}
BASE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            **{
                "id": VOCABULARY[word],
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            },
            **{"normalized": False, "special": True},
        }
        for word in WORDS[:5]
    ],
    "decoder": None,
}
WORD_PIECE = {
    **{"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
    **{"max_input_chars_per_word": 100, "vocab": VOCABULARY},
}
MODEL_OF: dict[str, dict[str, Any]] = {
    "WordPiece": WORD_PIECE,
    "WordLevel": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": VOCABULARY},
    "BPE": {
        **{"type": "BPE", "dropout": None, "unk_token": "[UNK]", "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
        **{"vocab": LETTERS, "merges": [["a", "b"]]},
    },
    "Unigram": {
        **{"type": "Unigram", "unk_id": 0, "byte_fallback": False},
        "vocab": [[letter, -1.0 * number] for letter, number in LETTERS.items()],
    },
}
assert set(MODEL_OF) == set(MODELS)
_booleans, _short = (
    st.booleans(),
    st.sampled_from(["", "a", "ab", "abcd", "abcde", " ", "▁", "\u0301", "中", "[CLS]"]),
)
_pattern = st.one_of(
    _short.map(lambda text: {"String": text}),
    st.sampled_from([*REGEXES, ".", "(a+)+$", ""]).map(lambda text: {"Regex": text}),
)
_behaviors = st.sampled_from(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
_schemes = st.sampled_from(["always", "never", "first", "x"])
_special = st.tuples(_short, st.sampled_from([0, 1, 2, 3, 10**6, 2**32])).map(list)
_piece = st.one_of(
    st.tuples(st.sampled_from("ABC"), st.integers(0, 2)).map(
        lambda p: {"Sequence": {"id": p[0], "type_id": p[1]}}
    ),
    _short.map(lambda token: {"SpecialToken": {"id": token, "type_id": 0}}),
)
_ids = st.lists(st.sampled_from([0, 1, 2, 10**6]), max_size=17)
_tokens = st.dictionaries(
    _short,
    st.tuples(_short, _ids).map(lambda t: {"id": t[0], "ids": t[1], "tokens": ["[CLS]"] * len(t[1])}),
    max_size=3,
)
# The parameters of components; components not listed have none that matter.
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "BertNormalizer": {
        **{"clean_text": _booleans, "handle_chinese_chars": _booleans, "lowercase": _booleans},
        "strip_accents": st.none() | _booleans,
    },
    "Prepend": {"prepend": _short},
    "Replace": {"pattern": _pattern, "content": _short},
    "Strip": {"strip_left": _booleans, "strip_right": _booleans},
    "Precompiled": {"precompiled_charsmap": st.sampled_from(["", "AAAA", "AAAAAAAA", "a" * 300, "===="])},
    "ByteLevel": {"add_prefix_space": _booleans, "trim_offsets": _booleans, "use_regex": _booleans},
    "Digits": {"individual_digits": _booleans},
    "Metaspace": {"replacement": _short, "prepend_scheme": _schemes, "split": _booleans},
    "Punctuation": {"behavior": _behaviors},
    "Split": {"pattern": _pattern, "behavior": _behaviors, "invert": _booleans},
    "BertProcessing": {"sep": _special, "cls": _special},
    "RobertaProcessing": {
        **{"sep": _special, "cls": _special},
        **{"trim_offsets": _booleans, "add_prefix_space": _booleans},
    },
    "TemplateProcessing": {
        **{"single": st.lists(_piece, max_size=5), "pair": st.lists(_piece, max_size=17)},
        "special_tokens": _tokens,
    },
}
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def _components(kind: str) -> st.SearchStrategy[Any]:
    """None, a component, or nested Sequences of components."""
    names = sorted(PARTS[kind] - {"Sequence"})
    plain = st.sampled_from(names).flatmap(
        lambda name: st.fixed_dictionaries({"type": st.just(name), **PARAMETERS.get(name, {})})
    )
    several = st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=4).map(
            lambda parts: {"type": "Sequence", SEQUENCES[kind]: parts}
        ),
        max_leaves=8,
    )
    return st.none() | several


@st.composite
def _tokenizers(draw: st.DrawFn) -> bytes:
    parts = {kind: draw(_components(kind)) for kind in PARTS}
    value = BASE | parts | {"model": MODEL_OF[draw(st.sampled_from(MODELS))]}
    value = draw(edited(value, draw(st.sampled_from([0, 0, 1, 3]))))
    return json.dumps(value).encode()


def check(data: bytes) -> tuple[dict[str, float], str]:
    """Open a tokenizer as a server does, and tokenize texts of all kinds."""
    artifact: Any = SimpleNamespace(
        path=Path("artifact"),
        read=lambda _: data,
        manifest=SimpleNamespace(max_tokens=MAX_TOKENS, special_tokens=False),
    )
    try:
        with _within("opening"):
            tokenizer = TextTokenizer.of(artifact)
    except StoreError:
        return {}, "refused"
    raw = Tokenizer.from_str(data.decode())
    longest, failed = 0.0, 0
    for text in TEXTS:
        if raw.normalizer is not None and text.isascii() and text:
            longest = max(longest, len(raw.normalizer.normalize_str(text)) / len(text))
        for pair in (None, "b a"):
            try:
                tokenization = tokenizer.start(text, pair, True)
                done = None
                while done is None:
                    with _within("a step"):
                        done = tokenization.step()
            except (Finding, KeyboardInterrupt):
                raise
            except (
                BaseException
            ):  # fails one request; Rust panics are not Exceptions, and engine threads survive them
                failed += 1
    if longest > MAX_GROWTH:
        raise Finding(f"a text became {longest:g} times as long")
    return {"growth": longest}, "texts fail" if failed else "accepted"


@contextmanager
def _within(what: str) -> Iterator[None]:
    started = thread_time()
    yield
    if (took := thread_time() - started) > MAX_STEP_S:
        raise Finding(f"{what} took {took:.1f} s")


FUZZER = Fuzzer(_tokenizers(), check)
