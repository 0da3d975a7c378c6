"""Checks of the data before training, so that hours are not spent on a useless model."""

import json
import re
from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer

from de3.data.examples import Example, labels_of
from de3.data.split import Split
from de3.data.tables import SEPARATOR, TextOrPair, pair_of
from de3.model_store.part import MAX_LABEL
from de3.model_store.special_tokens import special_names

MAX_LABELS = 1000
FEW = 5  # labels with fewer rows cause a warning
BEGINNING = 10_000  # characters of a text; all tokens of long texts would take too much memory
MAX_UNKNOWN, WARN_UNKNOWN = 0.2, 0.02  # shares of unknown tokens


def labels(counts: Counter[str], rows: int | None = None) -> list[str]:
    """Warnings about the labels of the data; raises ValueError if no classifier can be trained on them.

    counts: rows of each label. rows: number of rows of multi-label data; None: every row has one label.
    """
    total = counts.total() if rows is None else rows
    if len(counts) < 2 and rows is not None:
        raise ValueError(
            f"a multi-label model needs at least 2 labels; the data has {', '.join(map(repr, counts)) or 'none'}"
        )
    if len(counts) < 2:
        raise ValueError(
            f"a classifier needs at least 2 labels; every row has the label {next(iter(counts))!r}"
        )
    if all(map(_is_number, counts)) and not all(map(_is_whole, counts)):
        raise ValueError(
            f"the labels are numbers such as {', '.join(list(counts)[:3])}: scores, not classes. Group them "
            "into classes first, or import a transformers regression model: de3 import --tolerance"
        )
    if len(counts) > MAX_LABELS or len(counts) > total / 2:
        raise ValueError(
            f"{len(counts)} labels in {total} rows: is --label-column the right one? "
            f"At most {MAX_LABELS} labels, with at least two rows each on average, can be trained"
        )
    if (longest := max(map(len, counts))) > MAX_LABEL:
        raise ValueError(
            f"a label has {longest} characters: is --label-column the right one? At most {MAX_LABEL} are allowed"
        )
    warnings = []
    joined = [name for name in counts if SEPARATOR in name]
    if rows is None and len(joined) > len(counts) / 2:
        warnings.append(f"labels such as {joined[0]!r}: if a text may have several labels, use --multi-label")
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(" ".join(name.split()).casefold(), []).append(name)
    for same in spellings.values():
        if len(same) > 1:
            shown = ", ".join(f"{name!r} ({counts[name]})" for name in sorted(same))
            warnings.append(f"{shown} are different labels that differ only in capitals or spaces")
    rare = sorted((name for name, count in counts.items() if count < FEW), key=lambda name: counts[name])
    if rare:
        shown = ", ".join(f"{name!r} ({counts[name]})" for name in rare[:5])
        have = "label has" if len(rare) == 1 else "labels have"
        warnings.append(f"{len(rare)} {have} fewer than {FEW} rows, too few to learn from: {shown}")
    return warnings


def label_counts(examples: Sequence[Example]) -> list[str]:
    """A warning if every text of multi-label data has one label: the labels seem to be mutually exclusive."""
    if any(len(labels_of(e)) != 1 for e in examples):
        return []
    return [
        "every text has one label: if labels are mutually exclusive, train without --multi-label; it exits earlier"
    ]


def held_out(parts: Split, names: Sequence[str]) -> list[str]:
    """Warnings about a split; raises ValueError if a label has no sample to train on."""
    trained = Counter(label for example in parts.train for label in labels_of(example))
    if missing := [name for i, name in enumerate(names) if not trained[i]]:
        raise ValueError(
            f"no sample of {', '.join(missing[:5])} is left to train on: give more rows of each label, or remove it"
        )
    size = len(parts.certify)
    if size >= 300:
        return []
    return [
        f"only {size} certifying samples: the reported accuracy will be uncertain by ±{98 / size**0.5:.0f} points"
    ]


def unknown_tokens(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    """Warnings about unknown tokens in the first 2,000 examples; raises ValueError if there are too many.

    Also raises ValueError if the texts have no tokens at all.
    """
    unknown = _unknown(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [text[:BEGINNING] for e in examples[:2000] for text in pair_of(e.text) if text is not None]
    ids = [i for one in tokenizer.encode_batch(texts, add_special_tokens=False) for i in one.ids]
    if not ids:
        raise ValueError(
            "the tokenizer produces no tokens for the texts: are its files (tokenizer.json) in the folder?"
        )
    share = ids.count(unknown) / len(ids) if unknown is not None else 0.0
    message = f"{100 * share:.0f}% of the texts' tokens are unknown to the encoder's tokenizer"
    if share > MAX_UNKNOWN:
        raise ValueError(
            f"{message}: are its files (tokenizer.json, vocab.txt) in the folder, and is it for the texts' language?"
        )
    return [message] if share > WARN_UNKNOWN else []


def special_tokens(tokenizer: Tokenizer, texts: Sequence[TextOrPair]) -> list[str]:
    """A warning if a text contains a special token, which is encoded as characters."""
    pattern = re.compile("|".join(map(re.escape, sorted(special_names(tokenizer)))) or "(?!)")
    found = [match for text in texts for part in pair_of(text) if (match := pattern.search(part or ""))]
    if not found:
        return []
    return [
        f"{len(found)} texts contain special tokens, such as {found[0].group()}, which are encoded as characters; if "
        "the classifier was trained with them, give --special-tokens"
    ]


def _unknown(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None if there is none, as in a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _is_whole(label: str) -> bool:
    return float(label).is_integer()
