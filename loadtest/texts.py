"""Texts to send, read from a file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from de3.data.tables import Columns, records, text_of

LONG_WORDS = 450  # more than 512 tokens: every server truncates a long text to 512


@dataclass(frozen=True, slots=True)
class Sample:
    """A text to send.

    Attributes:
        label: the correct label; None: unknown.
        long: the text was lengthened by with_long.
        tau: τ of the request; None: the server's default.
        group: name of a group of related texts; None: not in a group.
    """

    text: str
    label: str | None = None
    long: bool = False
    tau: float | None = None
    group: str | None = None


def read(
    path: Path,
    text_column: str,
    label_column: str = "label",
    label_names: str = "",
    group_column: str | None = None,
) -> list[Sample]:
    """The samples of a .tsv, .csv or .jsonl file with named columns, or of a .txt file with a text on each line.

    Numeric labels index label_names, which are comma-separated; if the file lacks label_column, samples have no labels.
    group_column: column of the group, such as the text that a fragment is part of. Without it, fragments, which
    `de3 train` marks in its held-out parts, are dropped. Raises ValueError, naming the file and the line, for a row
    that cannot be used, or if there are no texts.
    """
    names = [name.strip() for name in label_names.split(",") if name.strip()]
    samples = []
    for where, record in records(path, Columns(text_column, label=None)):
        text = text_of(record, text_column, where)
        if record.get("fragment") and group_column is None:
            continue
        label = record.get(label_column)
        if label is not None:
            label = str(label)
            if label.isdecimal() and names:
                if int(label) >= len(names):
                    raise ValueError(
                        f"{where}: label {label} is not an index of the {len(names)} label names"
                    )
                label = names[int(label)]
        group = record.get(group_column) if group_column is not None else None
        samples.append(Sample(text, label, group=str(group) if group else None))
    if not samples:
        raise ValueError(f"{path} has no texts that are not fragments")
    return samples


def with_long(samples: list[Sample], share: float, words: int = LONG_WORDS, seed: int = 0) -> list[Sample]:
    """The samples, with a share of them replaced by unlabelled texts of `words` words, joined from random samples."""
    rng = random.Random(seed)
    mixed = []
    for sample in samples:
        if rng.random() >= share:
            mixed.append(sample)
            continue
        joined: list[str] = []
        while len(joined) < words:
            joined += rng.choice(samples).text.split()
        mixed.append(Sample(" ".join(joined[:words]), None, long=True))
    return mixed


def with_taus(samples: list[Sample], taus: Sequence[float]) -> list[Sample]:
    """Each sample once for each τ; the samples unchanged if `taus` is empty."""
    return [replace(sample, tau=tau) for sample in samples for tau in taus] if taus else samples
