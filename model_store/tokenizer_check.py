"""What a tokenizer.json may hold. A model may come from anywhere, so this is checked before anything runs it.

The components that the encoders' own tokenizers are made of are allowed, with bounds on what makes a text
longer
or slow: a normalizer that replaces a letter by a thousand, three times over, would fill any memory with one
text.
"""

import json
from collections.abc import Iterator
from typing import Any

from de3.model_store.charsmap import check_charsmap

_NORMALIZERS = (
    "BertNormalizer Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Sequence Strip StripAccents"
)
_PRE_TOKENIZERS = "BertPreTokenizer ByteLevel Digits Metaspace Punctuation Sequence Split" + (
    " Whitespace WhitespaceSplit"
)
_POST_PROCESSORS = "BertProcessing ByteLevel RobertaProcessing Sequence TemplateProcessing"
PARTS = {
    "normalizer": frozenset(_NORMALIZERS.split()),
    "pre_tokenizer": frozenset(_PRE_TOKENIZERS.split()),
    "post_processor": frozenset(_POST_PROCESSORS.split()),
}
# A regular expression can take for ever on a text made for it. These cannot, and match one character or more.
REGEXES = (r"\s{2,}|[\n\r\t]", " {2,}")  # DeBERTa's, and XLM-RoBERTa's
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
MAX_PARTS = 16  # of a Sequence, with all inside it
MAX_CONTENT = 4  # characters that a Replace or Prepend may put in
MAX_GROWTH = 4  # times the characters that a text had, by all of them together
MAX_WORD_CHARS = 200  # of which WordPiece tries each part
MAX_CHARS = 200  # of any string: an entry of the vocabulary, an added or special token, a name
MAX_MERGE_CHARS = 2 * MAX_CHARS + 1  # two entries and a space
MAX_ADDED_TOKENS = 10_000
MAX_SPECIAL_TOKENS = 16  # around a text or a pair; also, that one of them stands for


class TokenizerError(ValueError):
    """A tokenizer that is not run; the message says why."""


def check_tokenizer(data: bytes) -> None:
    """Raise TokenizerError for a tokenizer.json that may not be run."""
    try:
        parts = json.loads(data, object_pairs_hook=_object)
    except TokenizerError:
        raise
    except (ValueError, RecursionError):
        raise TokenizerError("not JSON in UTF-8") from None
    if not isinstance(parts, dict) or not isinstance(parts.get("model"), dict):
        raise TokenizerError("not a tokenizer: it has no model")
    checked = [c for c in _components(parts.get("normalizer")) if c.get("type") == "Precompiled"]
    if len(checked) > 1:
        raise TokenizerError("normalizer: more than one Precompiled")
    for component in checked:
        _check_table(component)
    _check_strings({**parts, "model": {**parts["model"], "merges": None}}, MAX_CHARS)
    _check_strings(parts["model"].get("merges"), MAX_MERGE_CHARS)
    growth = 1.0
    for kind, allowed in PARTS.items():
        components = list(_components(parts.get(kind)))
        if len(components) > MAX_PARTS:
            raise TokenizerError(f"{kind}: more than {MAX_PARTS} parts")
        for component in components:
            name = component.get("type")
            if not isinstance(name, str) or name not in allowed:
                raise TokenizerError(f"{kind}: {str(name)[:50]!r} is not one of {', '.join(sorted(allowed))}")
            _check_component(kind, component)
            growth *= _growth(component)
    if checked and growth > 1:
        raise TokenizerError("normalizer: a Precompiled may not go with what makes a text longer")
    if growth > MAX_GROWTH:
        raise TokenizerError(f"normalizer: a text may become at most {MAX_GROWTH} times as long")
    _check_model(parts["model"])
    _check_added(parts.get("added_tokens") or [])


def _check_table(component: dict[str, Any]) -> None:
    """Check the table of a Precompiled, and take it out: it is longer than any other string may be."""
    table = component.pop("precompiled_charsmap", None)
    if not isinstance(table, str):
        raise TokenizerError("normalizer: Precompiled has no precompiled_charsmap")
    try:
        check_charsmap(table)
    except ValueError as error:
        raise TokenizerError(f"normalizer: Precompiled: {error}") from None


def _check_component(kind: str, component: dict[str, Any]) -> None:
    name = component["type"]
    if name in ("Prepend", "Replace"):
        content = component.get("prepend" if name == "Prepend" else "content")
        if not isinstance(content, str) or len(content) > MAX_CONTENT:
            raise TokenizerError(f"{kind}: {name} may put in at most {MAX_CONTENT} characters")
    if name in ("Replace", "Split"):
        _check_pattern(kind, component.get("pattern"), name)
    if name == "TemplateProcessing":
        for form in ("single", "pair"):
            pieces = component.get(form)
            if not isinstance(pieces, list) or len(pieces) > MAX_SPECIAL_TOKENS:
                raise TokenizerError(f"{kind}: more than {MAX_SPECIAL_TOKENS} parts around a text")
        special = component.get("special_tokens")
        for token in special.values() if isinstance(special, dict) else ():
            for name in ("ids", "tokens"):
                entries = token.get(name) if isinstance(token, dict) else None
                if not isinstance(entries, list) or len(entries) > MAX_SPECIAL_TOKENS:
                    raise TokenizerError(
                        f"{kind}: a special token with more than {MAX_SPECIAL_TOKENS} {name}"
                    )


def _growth(component: dict[str, Any]) -> float:
    """How many times as long a Replace or Prepend can make a text; that may be of one character."""
    match component["type"]:
        case "Replace":
            return max(1.0, len(component["content"]) / len(component["pattern"].get("String", "x")))
        case "Prepend":
            return 1.0 + len(component["prepend"])
    return 1.0


def _check_added(added: Any) -> None:
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
        raise TokenizerError(f"added_tokens: more than {MAX_ADDED_TOKENS}")
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content:
            raise TokenizerError(f"added_tokens: each must have 1 to {MAX_CHARS} characters")


def _check_model(model: dict[str, Any]) -> None:
    # Old files have no type; then the library tries them in turn.
    if (name := model.get("type", "WordPiece")) not in MODELS:
        raise TokenizerError(f"model: {str(name)[:50]!r} is not one of {', '.join(MODELS)}")
    if model.get("dropout"):
        raise TokenizerError("model: dropout would give a text other tokens each time")
    most = model.get("max_input_chars_per_word", 0)
    if not isinstance(most, int) or most > MAX_WORD_CHARS:
        raise TokenizerError(f"model: max_input_chars_per_word may be at most {MAX_WORD_CHARS}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key occurs twice: the library might take another of them than Python."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise TokenizerError("an object has a key twice")
    return fields


def _check_strings(part: Any, most: int) -> None:
    """No string in it, keys included, may have more than `most` characters."""
    parts = [part]
    while parts:
        match parts.pop():
            case str() as text if len(text) > most:
                raise TokenizerError(f"{text[:20]!r}…: no string may have more than {most} characters")
            case dict() as inside:
                parts += inside
                parts += inside.values()
            case list() as inside:
                parts += inside


def _check_pattern(kind: str, pattern: Any, name: str) -> None:
    """A literal string, or one of REGEXES in a Replace."""
    only = isinstance(pattern, dict) and len(pattern) == 1
    text = pattern.get("String") if only else None
    if isinstance(text, str) and text:
        return
    if not only or name != "Replace" or pattern.get("Regex") not in REGEXES:
        raise TokenizerError(
            f"{kind}: the pattern of {name} must be a string that is not empty, or a regular expression that is known"
        )


def _components(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """A component and, if it is a Sequence, those inside it."""
    if part is None:
        return
    if not isinstance(part, dict) or depth > 4:
        raise TokenizerError("a component is not an object, or is nested too deeply")
    yield part
    if part.get("type") == "Sequence":
        for key in ("normalizers", "pretokenizers", "processors"):
            inside = part.get(key) or []
            if not isinstance(inside, list) or len(inside) > MAX_PARTS:
                raise TokenizerError(f"a Sequence has more than {MAX_PARTS} parts")
            for one in inside:
                yield from _components(one, depth + 1)
