"""Samples to send, read from a file."""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, its correct label if known, whether it was made long, the requested τ, and what it is related by."""

    text: str
    label: str | None = None
    long: bool = False
    tau: float | None = None
    group: str | None = None


def read(
    path: Path,
    text_column: str,
    label_column: str,
    label_names: Sequence[str],
    group_column: str | None = None,
) -> list[Sample]:
    """The samples of a tsv, csv or jsonl file with named columns, or of a txt file with one text per line.

    Labels that are numbers index label_names; a file without label_column gives samples without labels. Fragments, as
    `de3 train` marks them in the parts that it holds out, are left out, unless group_column says what they are part of.
    Raises ValueError naming the file and what is missing.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".txt":
            rows = [{text_column: line.strip()} for line in file]
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        elif path.suffix == ".tsv":
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            raise ValueError(f"{path}: must end in .tsv, .csv, .jsonl or .txt")
    samples = []
    for row in rows:
        if row.get("fragment") and group_column is None:
            continue
        if text_column not in row:
            raise ValueError(f"{path}: no column {text_column!r}; it has {', '.join(map(str, row))}")
        label = row.get(label_column)
        if label is not None:
            label = str(label)
            label = label_names[int(label)] if label.isdigit() and label_names else label
        if str(row[text_column]).strip():
            group = str(row[group_column]) if group_column is not None and row.get(group_column) else None
            samples.append(Sample(str(row[text_column]), label, group=group))
    if not samples:
        raise ValueError(f"{path}: contains no text")
    return samples


def with_long(samples: list[Sample], share: float, words: int, seed: int = 0) -> list[Sample]:
    """The samples, with a share of them replaced by texts of `words` words, joined from other samples."""
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
    """Each sample once with every τ."""
    return [replace(sample, tau=tau) for sample in samples for tau in taus] if taus else samples
