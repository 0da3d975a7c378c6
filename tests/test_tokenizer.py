"""Tokenizing in pieces: the same tokens as in one go, for every kind of tokenizer, and never a long piece."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from de3.export.classifier import Stock, convert
from de3.model_store.encoder import Encoders
from de3.model_store.manifest import base_of
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.special_tokens import encode_as_characters, special_names
from de3.model_store.store import Store
from de3.model_store.tokenizer import MAX_CHARS_PER_TOKEN, PIECE, Pair, TextTokenizer
from de3.runtime.loading import load
from de3.runtime.settings import RuntimeSettings
from tests.fixtures import save_encoder

WORDS = ["good", "film", "not", "bad", "a", "the", "plot", "dull", "x1", "qxzj", "scene", "long", "very"]
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=12)) + " é中?!" for i in range(200)]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return tokenizer  # without special tokens around a text


MADE = {kind.__name__: kind() for kind in (wordpiece, byte_level, unigram)}


def whole(tokenizer: Tokenizer, text: str, pair: str | None, limit: int) -> tuple[list[int], list[int]]:
    """Ids and type ids of a text that is encoded in one go; the tokenizer itself truncates it, longest first."""
    tokenizer.enable_truncation(limit, strategy="longest_first")
    try:
        encoding = tokenizer.encode(text) if pair is None else tokenizer.encode(text, pair)
        return encoding.ids, encoding.type_ids
    finally:
        tokenizer.no_truncation()


ODD = ["é", "中文", "👍🏽", "...", "?!", "\n", "  ", "pdf\x0cpage", "\x85x\x1c"]
ODD += ["aaaa" * 30, "qxzj" * 25, "x" * 150]


def joined(words: list[str]) -> str:
    """The words, some without a space between them, but with one at least every PIECE characters.

    Only there do pieces split a text such that no tokenizer's tokens change.
    """
    text = ""
    for word in words:
        text += word
        text += " " if len(word) % 3 or len(text) - text.rfind(" ") > PIECE - 200 else ""
    return text + "end"


texts = st.lists(st.sampled_from([*WORDS, *ODD]), min_size=1, max_size=700).map(joined)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=25)
@given(text=texts, pair=st.none() | texts, room=st.sampled_from([12, 60, 510]))
def test_tokens_in_pieces_are_those_in_one_go(kind: str, text: str, pair: str | None, room: int) -> None:
    """This holds if the window has room for an even number of tokens.

    If the number is odd, the tokenizer gives the extra token to the longer text, which is unknown until both are
    tokenized completely; TextTokenizer gives it to the first.
    """
    tokenizer = MADE[kind]
    limit = room + tokenizer.num_special_tokens_to_add(pair is not None)
    most = MAX_CHARS_PER_TOKEN * limit
    tokens = TextTokenizer(tokenizer, limit).start(text, pair, True).all()
    ids, types = whole(tokenizer, text[:most], pair and pair[:most], limit)
    assert tokens.ids[0].tolist() == ids
    assert tokens.type_ids[0].tolist() == types
    full = tokenizer.encode(text) if pair is None else tokenizer.encode(text, pair)
    if len(full) > limit:
        assert tokens.truncated
    elif len(text) <= most and (pair is None or len(pair) <= most):
        assert not tokens.truncated


def test_no_piece_is_long_and_text_beyond_the_window_is_not_tokenized() -> None:
    pieces = list[int]()

    class Counting(TextTokenizer):
        def encode(self, texts: Sequence[Pair], *options: bool, **named: bool) -> list[Encoding]:
            pieces.extend(len(a) + len(b or "") for a, b in texts)
            return super().encode(texts, *options, **named)

    tokenizer = Counting(MADE["wordpiece"], 64)
    for text in ("a " * 3200, "." * 6400, " " * 6399 + "a", "中" * 6400, ("qxzj" * 25 + " ") * 63):
        pieces.clear()
        for pair in (None, text):
            work = tokenizer.start(text, pair, True)
            steps = 1
            while work.step() is None:
                steps += 1
            assert steps <= len(text) // PIECE * 2 + 2
        assert max(pieces) <= 2 * PIECE
    # The first piece has just as many tokens as a window has room for.
    work = Counting(MADE["wordpiece"], 60).start("good     " * 400, None, True)
    assert any(work.step() for _ in range(9))
    pieces.clear()
    # This run of characters cannot be cut. It takes little time, because a tokenizer does not try every part of it.
    tokenizer.start("x" * 6400, None, True).all()
    assert pieces == [6400]
    for pair in (None, "good film " * 640):
        pieces.clear()
        tokenizer.start("good film " * 640, pair, True).all()
        assert len(pieces) == (1 if pair is None else 2)  # a piece has more tokens than the model's maximum


MARKS = ".€。中\u0301\x0cカ'\uf900\u3000\xa0\x85\u200b👍"
RUNS = ("a", "good", "qxzj" * 25, "x" * 99, "y" * 150, "z" * 700)
runs = st.lists(st.sampled_from([*MARKS, *RUNS]), min_size=1, max_size=300).map("".join)


@settings(max_examples=60)
@given(text=runs, room=st.sampled_from([60, 510]))
def test_wordpiece_has_the_same_tokens_without_white_space_too(text: str, room: int) -> None:
    tokenizer, limit = MADE["wordpiece"], room + 2
    tokens = TextTokenizer(tokenizer, limit).start(text, None, True).all()
    assert tokens.ids[0].tolist() == whole(tokenizer, text[: MAX_CHARS_PER_TOKEN * limit], None, limit)[0]


def test_an_odd_token_goes_to_the_longer_text_or_to_the_second() -> None:
    tokenizer = TextTokenizer(MADE["wordpiece"], 64)  # room for 61 tokens of a pair
    for first, second, kept in (
        ("good " * 50, "film " * 40, 31),
        ("good " * 40, "film " * 50, 30),
        ("good " * 50, "film " * 50, 30),
        ("scene " * 1000, "a " * 2000, 31),  # texts that are not read to the end are compared by characters
        ("a " * 2000, "scene " * 1000, 30),
    ):
        tokens = tokenizer.start(first, second, True).all()
        assert isinstance(tokens, Tokens) and len(tokens) == 64
        assert (tokens.type_ids == 0).sum() == kept + 2


def test_a_text_that_is_too_long_is_refused_without_truncation() -> None:
    tokenizer = TextTokenizer(MADE["wordpiece"], 64)
    for text, says in (
        ("good film " * 60, "has 122 tokens; the maximum is 64"),
        ("good film " * 400, "has more than 64 tokens; the maximum is 64"),
        ("good film " * 700, "has more than 6400 characters, the maximum"),
    ):
        with pytest.raises(ValueError, match=says):
            tokenizer.start(text, None, False).all()
    assert len(tokenizer.start("good film " * 20, None, False).all()) == 42


def test_a_tokenizer_that_leaves_no_room_or_whose_texts_cannot_be_cut_is_refused() -> None:
    assert TextTokenizer(MADE["wordpiece"], 5).start("good", "film", True).all()
    with pytest.raises(ValueError, match="leave no room"):
        TextTokenizer(MADE["wordpiece"], 4)
    tokenizer = wordpiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] $A", pair="$A [SEP] $B:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    with pytest.raises(ValueError, match="truncation would break"):
        TextTokenizer(tokenizer, 64)


def words_alone() -> Tokenizer:
    """A tokenizer whose model has the special tokens as words, and that does not mark them as special."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[", "]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(["[SEP]", "x1"])
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    return tokenizer


KINDS = {**MADE, "words_alone": words_alone()}
NAMES = ["[CLS]", "[SEP]", "<s>", "</s>", "＜s＞", "［SEP］", "[[SEP]]", "[CLS", "s>"]
in_texts = st.lists(st.sampled_from([*WORDS, *NAMES, " ", "  "]) | st.text(max_size=2), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(text=in_texts.map("".join) | in_texts.map(" ".join))
def test_special_tokens_in_a_text_are_characters(kind: str, text: str) -> None:
    before = KINDS[kind]
    tokenizer = Tokenizer.from_str(before.to_str())
    encode_as_characters(tokenizer)
    names = ("[CLS]", "[SEP]", "<s>", "</s>")
    special = {before.token_to_id(name) for name in names}
    found = tokenizer.encode(text, add_special_tokens=False)
    assert not special.intersection(found.ids)
    assert all(0 <= start <= end <= len(text) for start, end in found.offsets)
    assert found.offsets == sorted(found.offsets)
    plain = before.encode(text, add_special_tokens=False)
    if not special.intersection(plain.ids) and not any(name in text for name in names):
        assert (found.ids, found.offsets) == (plain.ids, plain.offsets)
    assert tokenizer.encode("good", "film").ids == before.encode("good", "film").ids


def test_a_special_token_between_the_texts_of_a_pair_is_none_in_a_text() -> None:
    tokenizer = words_alone()
    tokenizer.add_tokens(["bad"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A bad $B", special_tokens=[("bad", tokenizer.token_to_id("bad"))]
    )
    assert special_names(tokenizer) == {"bad"}
    encode_as_characters(tokenizer)
    assert tokenizer.token_to_id("bad") not in tokenizer.encode("good bad film").ids


def test_words_that_were_added_to_the_vocabulary_stay_words() -> None:
    tokenizer = words_alone()
    encode_as_characters(tokenizer)
    assert tokenizer.encode("goodx1 [SEP]", add_special_tokens=False).tokens == ["good", "x1", "[", "[UNK]"]


def test_models_that_read_special_tokens_as_such(tmp_path: Path) -> None:
    """An import or a server can ask for them; models that read texts differently do not share a tokenizer."""
    folder, store = save_encoder(tmp_path / "stock", labels=2), Store(tmp_path)
    for name in ("characters", "tokens"):
        stock = Stock.open(name, folder, special_tokens=name == "tokens")
        convert(stock, store, name, "fp32")
    assert "special_tokens" not in (store.open("characters").path / "manifest.json").read_text()
    encoders = Encoders()
    loaded = {name: Model(store.open(name), encoders=encoders) for name in ("characters", "tokens")}
    served = load(store.open("characters"), RuntimeSettings(special_tokens=True)).model
    assert base_of(loaded["tokens"].manifest) != base_of(loaded["characters"].manifest)
    separator = 3
    every = {**loaded, "served": served}
    counts = {
        name: (model.tokenize("good [SEP] film").ids == separator).sum() for name, model in every.items()
    }
    assert counts == {"characters": 1, "tokens": 2, "served": 2}
