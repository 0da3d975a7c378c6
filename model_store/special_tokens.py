"""Special tokens that a text contains, such as "[SEP]": encoded as characters, so that only we put such tokens around
texts."""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

MOST = 1000
_PROBES = ("{}", "a {} b", "a{}b")


def special_names(tokenizer: Tokenizer) -> set[str]:
    """The tokens that a text must not contain: those marked as special, and those around texts.

    Words that a model's author added to the vocabulary are tokens of texts, as are the runs of white space of some
    tokenizers. So is the unknown token, which any text can have.
    """
    around = tokenizer.encode("a", "a")
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names |= {token for token, owner in zip(around.tokens, around.sequence_ids, strict=True) if owner is None}
    return names - {"", getattr(tokenizer.model, "unk_token", None)}


def encode_as_characters(tokenizer: Tokenizer) -> None:
    """Have special tokens that texts contain encoded as their characters; the offsets do not change.

    Not written by to_str() as a whole. A special token of a single character that is also a piece of the tokenizer's
    model remains a token. Raises ValueError for a model with more than MOST special tokens among its pieces.
    """
    names = special_names(tokenizer)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    unmarked = [name for name in names if name in added and not added[name].special]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unmarked])
    tokenizer.encode_special_tokens = True
    # The model itself can have the token as a piece: with Unigram, "<s>" is the likeliest piece of these characters. It
    # never sees the whole name if that is split after its first character.
    rests: dict[str, list[str]] = {}
    for name in sorted(name for name in _found(tokenizer, names) if len(name) > 1):
        rests.setdefault(re.escape(name[0]), []).append(re.escape(name[1:]))
    if sum(map(len, rests.values())) > MOST:  # each is tried at its first character
        raise ValueError(f"more than {MOST} special tokens are pieces of its model")
    if rests:
        pattern = "|".join(f"{first}(?={'|'.join(rest)})" for first, rest in rests.items())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _found(tokenizer: Tokenizer, names: Iterable[str]) -> set[str]:
    """The names that texts which contain them are encoded to."""
    ids = {name: tokenizer.token_to_id(name) for name in names}
    texts = [(name, probe.format(name)) for name in names for probe in _PROBES]
    encodings = tokenizer.encode_batch([text for _, text in texts], add_special_tokens=False)
    return {name for (name, _), one in zip(texts, encodings, strict=True) if ids[name] in one.ids}
