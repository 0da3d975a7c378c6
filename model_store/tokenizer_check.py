"""Check of a tokenizer.json, which is untrusted, before the tokenizers library loads it.

Only components of the supported encoders' tokenizers are allowed, with limits on those that are slow or lengthen a
text: three normalizers in a row that each replace a letter with a thousand letters would exhaust memory on one text.
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
# Regular expressions can take exponential time. These do not, and match at least one character.
REGEXES = (r"\s{2,}|[\n\r\t]", " {2,}")  # DeBERTa's, and XLM-RoBERTa's
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
MAX_PARTS = 16  # limit on the parts of a Sequence, including nested ones
MAX_CONTENT = 4  # characters inserted by a Replace or Prepend
MAX_GROWTH = 4  # length of the normalized text relative to the original
MAX_WORD_CHARS = 200  # WordPiece's time is quadratic in this
MAX_CHARS = 200  # limit for any string: vocabulary entries, added and special tokens, names
MAX_MERGE_CHARS = 2 * MAX_CHARS + 1  # two entries and a space
MAX_ADDED_TOKENS = 10_000
MAX_VALUES = 2**22  # limit for a JSON file; 64 MiB of empty lists would take 2 GB
MAX_SPECIAL_TOKENS = 16  # limit around a text or a pair; also for the ids of one special token


class TokenizerError(ValueError):
    """An invalid tokenizer; the message gives the reason."""


def check_tokenizer(data: bytes) -> None:
    """Raise TokenizerError for a tokenizer.json that must not be loaded."""
    check_values(data)
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
        raise TokenizerError(
            "normalizer: a Precompiled may not be combined with components that lengthen a text"
        )
    if growth > MAX_GROWTH:
        raise TokenizerError(f"normalizer: a text may become at most {MAX_GROWTH} times as long")
    _check_model(parts["model"])
    _check_added(parts.get("added_tokens") or [])


def check_values(data: bytes) -> None:
    """Raise TokenizerError for JSON with more than MAX_VALUES commas and opening brackets, including those in texts."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise TokenizerError(f"more than {MAX_VALUES} values")


def _check_table(component: dict[str, Any]) -> None:
    """Check the table of a Precompiled and remove it, as it is longer than other strings may be."""
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
            raise TokenizerError(f"{kind}: {name} may insert at most {MAX_CONTENT} characters")
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
    """Largest factor by which a component can lengthen a text, which may be as short as one character."""
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
    # Old files have no type; the library then tries all model types in turn.
    if (name := model.get("type", "WordPiece")) not in MODELS:
        raise TokenizerError(f"model: {str(name)[:50]!r} is not one of {', '.join(MODELS)}")
    if model.get("dropout"):
        raise TokenizerError("model: dropout would give a text different tokens each time")
    most = model.get("max_input_chars_per_word", 0)
    if not isinstance(most, int) or most > MAX_WORD_CHARS:
        raise TokenizerError(f"model: max_input_chars_per_word may be at most {MAX_WORD_CHARS}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises TokenizerError for a duplicate key, as the library and Python may keep different values."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise TokenizerError("an object has a duplicate key")
    return fields


def _check_strings(part: Any, most: int) -> None:
    """Raise TokenizerError for a string (or key) of more than `most` characters."""
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
    """Raise TokenizerError unless a pattern is a literal string, or one of REGEXES in a Replace."""
    only = isinstance(pattern, dict) and len(pattern) == 1
    text = pattern.get("String") if only else None
    if isinstance(text, str) and text:
        return
    if not only or name != "Replace" or pattern.get("Regex") not in REGEXES:
        raise TokenizerError(
            f"{kind}: the pattern of {name} must be a non-empty string, or a known regular expression"
        )


def _components(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a component and, if it is a Sequence, those in it; raises TokenizerError for a malformed one."""
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
