"""Labelled texts: examples made from rows, saved and loaded. Does not import PyTorch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.data.tables import JOINT, Columns, TextOrPair, labels_in, pair_of, records, row_of
from de3.exits.recorded import Recorded

Label = int | float | tuple[int, ...]
MAX_SHARED = 0.05  # share of the certifying texts that may be in the tuning file: real traffic repeats texts


@dataclass(frozen=True)
class Example:
    """A labelled text or pair of texts.

    Attributes:
        label: index into the label names; for a multi-label model a tuple of the correct indices, ascending; for a
            regression model the correct value, a float.
        group: examples of a group are related (parts of one text, document or user) and stay in one part of the data;
            None: the example is related only to copies of the same text.
        is_fragment: the text is part of another text in the data, and unlike the texts that the model will serve.
        original: the imported classifier's answer, as a label; None: unknown.
    """

    text: TextOrPair
    label: Label
    group: str | None = field(default=None, compare=False)
    is_fragment: bool = field(default=False, compare=False)
    original: Label | None = field(default=None, compare=False)


def label_order(rows: Sequence[tuple[TextOrPair, str]], multi_label: bool = False) -> list[str]:
    """The distinct labels of rows: first whole numbers, in numeric order, then the others, alphabetically."""
    labels = {label for _, cell in rows for label in labels_in(cell, multi_label)}
    return sorted(labels, key=lambda x: (0, int(x), x) if re.fullmatch("-?[0-9]+", x) else (1, 0, x))


def label_array(labels: Sequence[Label], count: int) -> NDArray[Any]:
    """Labels as an array: (n,) indices or values, or (n, count) bool if a text may have several of `count` labels."""
    if any(isinstance(label, float) for label in labels):
        return np.array(labels, np.float64)
    if not any(isinstance(label, tuple) for label in labels):
        return np.array(labels, np.int64)
    rows = np.zeros((len(labels), count), np.bool_)
    for row, label in zip(rows, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else [int(label)]] = True
    return rows


def with_original(recorded: Recorded, examples: Sequence[Example]) -> Recorded:
    """`recorded` with the imported classifier's answers, if they are known for every sample; otherwise unchanged."""
    answers = [e.original for e in examples if e.original is not None]
    if len(answers) < len(examples):
        return recorded
    return replace(recorded, original=label_array(answers, recorded.logits.shape[-1]))


def answered(examples: Sequence[Example], answers: Sequence[Label], labelled: bool) -> list[Example]:
    """Examples with the imported classifier's answers, which are also the labels unless the examples have their own."""
    both = zip(examples, answers, strict=True)
    return [replace(e, original=answer, label=e.label if labelled else answer) for e, answer in both]


def labels_of(example: Example) -> tuple[int, ...]:
    """The indices of an example's labels: one, or any number in multi-label data."""
    return example.label if isinstance(example.label, tuple) else (int(example.label),)


def label_of(row: NDArray[Any] | np.generic) -> Label:
    """Convert a row of the result of `label_array` back to a label."""
    values = np.asarray(row)
    if values.ndim:
        return tuple(np.flatnonzero(values).tolist())
    return float(values) if values.dtype.kind == "f" else int(values)


def to_examples(
    rows: Sequence[tuple[TextOrPair, str]],
    names: Sequence[str],
    multi_label: bool = False,
    regression: bool = False,
) -> list[Example]:
    """Rows as examples, each label as its index in `names`; raises ValueError for any other label.

    multi_label: a row has any number of labels; see `labels_in`. regression: the labels are values instead of names;
    a missing label becomes 0.
    """
    if regression:
        return [Example(text, float(label or 0)) for text, label in rows]
    index = {label: i for i, label in enumerate(names)}
    cells = [labels_in(label, multi_label) for _, label in rows]
    if unknown := sorted({label for cell in cells for label in cell} - index.keys()):
        raise ValueError(
            f"labels {unknown[:5]} are not among {list(index)[:20]}; if the data uses other names, "
            "give --label-names in the order of its sorted labels"
        )
    texts = [text for text, _ in rows]
    if multi_label:
        both = zip(texts, cells, strict=True)
        return [Example(text, tuple(sorted({index[name] for name in cell}))) for text, cell in both]
    return [Example(text, index[cell[0]]) for text, cell in zip(texts, cells, strict=True)]


def rename(
    rows: Sequence[tuple[TextOrPair, str]], label_names: str | None, multi_label: bool = False
) -> list[tuple[TextOrPair, str]]:
    """Rows with their labels renamed.

    label_names: the new names, comma-separated, in the order of `label_order`; None keeps the labels. Raises ValueError
    unless there is one name for each label, and all names differ.
    """
    if label_names is None:
        return list(rows)
    order = label_order(rows, multi_label)
    names = [name.strip() for name in label_names.split(",")]
    if len(names) != len(order) or len(set(names)) != len(names):
        raise ValueError(f"the data has the labels {order}; --label-names must name each once, got {names}")
    new_names = dict(zip(order, names, strict=True))
    return [
        (text, JOINT.join(new_names[label] for label in labels_in(cell, multi_label))) for text, cell in rows
    ]


def save_examples(path: Path, examples: Sequence[Example], names: Sequence[str]) -> None:
    """Write examples as jsonl: text, text_pair, label, group and fragment, each if it is set.

    A label is written as its name, as a list of names, or as a value.
    """
    with path.open("w", encoding="utf-8") as file:
        for e in examples:
            text, pair = pair_of(e.text)
            row: dict[str, Any] = {"text": text, **({} if pair is None else {"text_pair": pair})}
            row["label"] = _named(e.label, names)
            if e.group is not None:
                row["group"] = e.group
            if e.is_fragment:
                row["fragment"] = True
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _named(label: Label, names: Sequence[str]) -> str | float | list[str]:
    if isinstance(label, float):
        return label
    return [names[k] for k in label] if isinstance(label, tuple) else names[label]


def load_examples(
    path: Path, names: Sequence[str], multi_label: bool = False, regression: bool = False
) -> list[Example]:
    """Read a file that `save_examples` wrote, or one like it; raises ValueError if it is missing or invalid.

    multi_label: each text has a list of labels, or a string of labels separated by |. regression: each has a value.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    columns = Columns(multi_label=multi_label, regression=regression)
    rows = list(records(path, replace(columns, label=None)))  # also reads .txt, for the error below
    for where, record in rows:
        if isinstance(record, dict) and not {"text", "label"} <= record.keys():
            raise ValueError(
                f'{where}: each sample needs "text" and "label"; for texts without labels, use de3 calibrate --texts'
            )
    if isinstance(rows[0][1], dict) and "text_pair" in rows[0][1]:
        columns = replace(columns, text_pair="text_pair")
    labelled = [row_of(record, columns, where) for where, record in rows]
    examples = to_examples(labelled, names, multi_label, regression)
    return [
        replace(
            e,
            group=None if record.get("group") is None else str(record["group"]),
            is_fragment=record.get("fragment") is True,
        )
        for e, (_, record) in zip(examples, rows, strict=True)
    ]


def check_disjoint(
    tune: Sequence[Example], certify: Sequence[Example], tune_file: Path, certify_file: Path
) -> None:
    """Raise ValueError if the share of the certifying texts that are also in the tuning file is above MAX_SHARED."""
    shared = len({e.text for e in tune} & {e.text for e in certify})
    if shared > MAX_SHARED * len(certify):
        raise ValueError(
            f"{certify_file}: {shared} of its texts are in {tune_file} too; guarantees need samples that "
            "were not used to choose the signal"
        )


def input_of(examples: Sequence[Example]) -> str:
    """Kind of model input in these samples: "text" or "pair"."""
    return "pair" if isinstance(examples[0].text, tuple) else "text"


def check_input(examples: Sequence[Example], expected: str | None, where: str) -> None:
    """Raise ValueError for single texts if the model takes pairs, or vice versa; if `expected` is None, do nothing."""
    if expected is not None and input_of(examples) != expected:
        takes, has, hint = "single texts", "pairs", "drop --pair-column"
        if expected == "pair":
            takes, has, hint = (
                "pairs of texts",
                "single texts",
                "give --pair-column, the column of the second text",
            )
        raise ValueError(f"{where}: the model was trained on {takes}, but these are {has}: {hint}")
