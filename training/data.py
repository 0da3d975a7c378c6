"""Labelled texts: read from files or `datasets`, saved, tokenized and batched."""

import csv
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from de3.exits.recorded import Recorded
from de3.training.progress import track

Text = str | tuple[str, str]
Label = int | float | tuple[int, ...]
SEPARATOR = "|"  # between the labels of a text in a cell of a file
JOINT = "\x1f"  # between them in a row: unlike a cell, a list in JSON may have labels with | in them
MAX_SHARED = 0.05  # share of the certifying texts that may be in the tuning file: real traffic repeats texts


@dataclass(frozen=True)
class Example:
    """A labelled text or pair of texts.

    Attributes:
        label: an index into the label names; of a multi-label model a tuple of those that are right, ascending; of a
            regression model the right value, a float.
        group: samples of a group are related (parts of one text, document or user) and stay in one part of the data;
            None: the text is related to its own copies only.
        is_fragment: it is part of another text of the data, and not what the model will be asked.
        original: the answer of the classifier that was imported, as label; None: not imported.
    """

    text: Text
    label: Label
    group: str | None = field(default=None, compare=False)
    is_fragment: bool = field(default=False, compare=False)
    original: Label | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Columns:
    """The columns of a file's texts and labels: names, or numbers from 0 if it has no header.

    Attributes:
        label: None: the texts have no labels; then a .txt file with a text on each line can be read too.
        quotes: whether quotation marks delimit fields or are part of the text (as in GLUE's tsv files);
            None: they delimit fields unless the file is a .tsv.
        multi_label: a text has any number of labels: in a cell with | between them, or as a list in JSON. Rows have
            JOINT between them.
        regression: a text has a value instead of a label.
        delimiter: between fields; None: a comma in .csv, a tab in .tsv, and .jsonl has none.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str | None = "label"
    header: bool = True
    quotes: bool | None = None
    delimiter: str | None = None
    multi_label: bool = False
    regression: bool = False


def read_rows(path: Path, columns: Columns) -> list[tuple[Text, str]]:
    """The (text, label) rows of a .tsv, .csv or .jsonl file, or of any file with a delimiter; "" for no label.

    Raises ValueError, naming file, line and column, when a column or a value is missing.
    """
    try:
        rows = [_row(record, columns, f"{path}:{line}") for line, record in _records(path, columns)]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error}); convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _row(record: Any, columns: Columns, where: str) -> tuple[Text, str]:
    """The text or pair, and the label, of one record; raises ValueError with `where` and the reason."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not an object with named columns")

    def cell(column: str, option: str) -> Any:
        if column not in record:
            names = list(record)
            hint = "; is it separated by semicolons or tabs? Give --delimiter" if len(names) == 1 else ""
            raise ValueError(
                f"{where}: no column {column!r}; it has {', '.join(map(repr, names))}: set {option}{hint}"
            )
        value = record[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{where}: {column} is empty; remove the row, or fill it in")
        return value

    def text(column: str, option: str) -> str:
        value = cell(column, option)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {column} must be text, got {value!r:.50}")
        return value.strip()

    if columns.multi_label and columns.label in record:
        label = record[columns.label]
        if isinstance(label, list) and all(isinstance(one, str | int) for one in label):
            label = JOINT.join(map(str, label))  # "" is no label
        elif label is None:
            raise ValueError(f"{where}: {columns.label} is missing; of a text without a label leave it empty")
        elif isinstance(label, str):
            label = label.replace(SEPARATOR, JOINT)
    else:
        label = "" if columns.label is None else cell(columns.label, "--label-column")
    if columns.regression:
        if columns.label is not None and not _is_number(label):
            raise ValueError(f"{where}: {columns.label} must be a finite number, got {label!r:.50}")
    elif isinstance(label, list | dict | float):
        raise ValueError(
            f"{where}: {columns.label} must be a label, text or a whole number, got {label!r:.50}"
            f"{'; only a multi-label model has several labels a text' if isinstance(label, list) else ''}"
        )
    first = text(columns.text, "--text-column")
    return ((first, text(columns.text_pair, "--pair-column")) if columns.text_pair else first), str(label)


def _is_number(value: Any) -> bool:
    """Whether a cell is a finite number, in JSON or as text."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _records(path: Path, columns: Columns) -> Iterator[tuple[int, Any]]:
    suffix = path.suffix
    if suffix == ".txt" and columns.delimiter is None and columns.label is None:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((i, {columns.text: line}) for i, line in enumerate(file, 1) if line.strip())
        return
    if columns.delimiter is None and suffix not in (".tsv", ".csv", ".jsonl"):
        raise ValueError(
            f"{path}: expected a .tsv, .csv or .jsonl file; of another one give --delimiter: tab, ; or ,"
        )
    delimiter = {"tab": "\t", "\\t": "\t", None: "\t" if suffix == ".tsv" else ","}.get(
        columns.delimiter, columns.delimiter
    )
    if len(str(delimiter)) != 1:
        raise ValueError(f"--delimiter must be one character or tab, got {delimiter!r}")
    # "-sig": some files begin with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".jsonl" and columns.delimiter is None:
            for i, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield i, json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{i}: not JSON: {error}") from None
            return
        quoted = suffix != ".tsv" if columns.quotes is None else columns.quotes
        reader = csv.reader(
            file,
            delimiter=str(delimiter),
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        csv.field_size_limit(2**24)
        try:
            names = next(reader, None) if columns.header else None
            for row in reader:
                if names is not None and len(row) > len(names):
                    raise ValueError(
                        f"{path}:{reader.line_num}: has {len(row)} fields, the header {len(names)}: are texts with "
                        f"{delimiter!r} in quotation marks? A file with one text a line is a .txt"
                    )
                if row:
                    columns_of_row = names or list(map(str, range(len(row))))
                    missing = dict.fromkeys(columns_of_row[len(row) :])  # a row that is short
                    yield reader.line_num, dict(zip(columns_of_row, row, strict=False)) | missing
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def read_column(path: Path, columns: Columns, name: str) -> list[str]:
    """One more column of a file, a row for each of `read_rows`; raises ValueError if a row lacks it."""
    return [_cell(record, name, f"{path}:{line}") for line, record in _records(path, columns)]


def _cell(record: dict[str, Any], name: str, where: str) -> str:
    """A column's value as text; raises ValueError if there is none."""
    value = record.get(name)
    if value is None or not str(value).strip():
        problem = "is empty" if name in record else f"is missing; there are {', '.join(map(repr, record))}"
        raise ValueError(f"{where}: the column {name!r} {problem}")
    return str(value).strip()


def read_dataset(name: str, split: str, columns: Columns) -> list[tuple[Text, str]]:
    """The (text, label) rows of a `datasets` data set, "path" or "path:config".

    Label numbers are replaced by their names where the data set has names.
    """
    from datasets import ClassLabel

    data = _open_dataset(name, split)
    feature = data.features.get(columns.label)
    named = getattr(feature, "feature", feature) if columns.multi_label else feature  # of a list's items
    rows = []
    for i, record in enumerate(data):
        text, label = _row(record, columns, f"{name}, row {i}")
        if isinstance(named, ClassLabel):
            numbers = labels_in(label, columns.multi_label)
            label = JOINT.join(named.int2str(int(number)) for number in numbers)
        rows.append((text, label))
    return rows


def read_dataset_column(name: str, split: str, column: str) -> list[str]:
    """One more column of a data set, a row for each of `read_dataset`; raises ValueError if a row lacks it."""
    return [_cell(record, column, f"{name}, row {i}") for i, record in enumerate(_open_dataset(name, split))]


def _open_dataset(name: str, split: str) -> Any:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    return load_dataset(path, config or None, split=split)


def label_order(rows: Sequence[tuple[Text, str]], multi_label: bool = False) -> list[str]:
    """The distinct labels of rows, in numeric order if all are whole numbers, else alphabetically."""
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
    """With the answers of the classifier that was imported, if they are known of every sample."""
    answers = [e.original for e in examples if e.original is not None]
    if len(answers) < len(examples):
        return recorded
    return replace(recorded, original=label_array(answers, recorded.logits.shape[-1]))


def labels_in(cell: str, multi_label: bool) -> list[str]:
    """The labels of a row: the one, or each once."""
    if not multi_label:
        return [cell]
    return list(dict.fromkeys(name.strip() for name in cell.split(JOINT) if name.strip()))


def label_of(row: NDArray[Any] | np.generic) -> Label:
    """One row of label_array as a label."""
    values = np.asarray(row)
    if values.ndim:
        return tuple(np.flatnonzero(values).tolist())
    return float(values) if values.dtype.kind == "f" else int(values)


def to_examples(
    rows: Sequence[tuple[Text, str]],
    names: Sequence[str],
    multi_label: bool = False,
    regression: bool = False,
) -> list[Example]:
    """Rows as examples, each label as its index in `names`; raises ValueError for any other label.

    regression: the labels are values instead, 0 where there is none.
    """
    if regression:
        return [Example(text, float(label or 0)) for text, label in rows]
    index = {label: i for i, label in enumerate(names)}
    cells = [labels_in(label, multi_label) for _, label in rows]
    unknown = sorted({label for cell in cells for label in cell} - index.keys())
    if unknown:
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
    rows: Sequence[tuple[Text, str]], label_names: str | None, multi_label: bool = False
) -> list[tuple[Text, str]]:
    """Rows with their labels renamed to the comma-separated label_names, in sorted order of the labels."""
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
    """Write examples as jsonl: text, text_pair of pairs, label (its name), and what else is known of them."""
    with path.open("w", encoding="utf-8") as file:
        for e in examples:
            text, pair = e.text if isinstance(e.text, tuple) else (e.text, None)
            row: dict[str, Any] = {"text": text, **({} if pair is None else {"text_pair": pair})}
            row["label"] = _named(e.label, names)
            if e.original is not None:
                row["original"] = _named(e.original, names)
            if e.group is not None:
                row["group"] = e.group
            if e.is_fragment:
                row["fragment"] = True
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _named(label: Label, names: Sequence[str]) -> str | float | list[str]:
    if isinstance(label, float):
        return label
    return [names[k] for k in label] if isinstance(label, tuple) else names[label]


def _original(name: Any, names: Sequence[str], regression: bool, where: str) -> Label:
    """A value, or the label of a name or of a list of names; raises ValueError for another."""
    if regression:
        if not _is_number(name):
            raise ValueError(f"{where}: original must be a finite number, got {name!r:.50}")
        return float(name)
    many = name if isinstance(name, list) else [str(name)]
    unknown = [one for one in many if one not in names]
    if unknown:
        raise ValueError(f"{where}: label {unknown[0]!r} is not among {list(names)[:20]}")
    indices = sorted({names.index(one) for one in many})
    return tuple(indices) if isinstance(name, list) else indices[0]


def load_examples(
    path: Path, names: Sequence[str], multi_label: bool = False, regression: bool = False
) -> list[Example]:
    """Read a file that `save_examples` wrote, or one like it; raises ValueError if it is missing.

    multi_label: each text has a list of labels, or several in one string with | between. regression: it has a value.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with path.open(encoding="utf-8") as file:
        is_pair = '"text_pair"' in file.readline()
    columns = Columns(text_pair="text_pair" if is_pair else None)
    records = [(f"{path}:{line}", record) for line, record in _records(path, columns)]
    rows = read_rows(path, replace(columns, multi_label=multi_label, regression=regression))
    examples = to_examples(rows, names, multi_label, regression)
    return [
        replace(
            e,
            group=None if record.get("group") is None else str(record["group"]),
            is_fragment=record.get("fragment") is True,
            original=None
            if record.get("original") is None
            else _original(record["original"], names, regression, where),
        )
        for e, (where, record) in zip(examples, records, strict=True)
    ]


def check_apart(
    tune: Sequence[Example], certify: Sequence[Example], tune_file: Path, certify_file: Path
) -> None:
    """Raise ValueError if many certifying texts are in the tuning file too."""
    shared = len({e.text for e in tune} & {e.text for e in certify})
    if shared > MAX_SHARED * len(certify):
        raise ValueError(
            f"{certify_file}: {shared} of its texts are in {tune_file} too; guarantees need samples that "
            "were not used to choose the signal"
        )


def input_of(examples: Sequence[Example]) -> str:
    """What a model of these samples takes: "text" or "pair"."""
    return "pair" if isinstance(examples[0].text, tuple) else "text"


def check_input(examples: Sequence[Example], expected: str | None, where: str) -> None:
    """Raise ValueError for single texts where a model takes pairs, or the reverse; expected None: not known."""
    if expected is not None and input_of(examples) != expected:
        hint = (
            "give --pair-column, the column of the second text"
            if expected == "pair"
            else "drop --pair-column"
        )
        takes, has = ("pairs of texts", "single texts") if expected == "pair" else ("single texts", "pairs")
        raise ValueError(f"{where}: the model was trained on {takes}, and these are {has}: {hint}")


@dataclass(frozen=True)
class Encoded:
    """Unpadded token ids of examples; `type_ids` is empty if the encoder has no token types."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    labels: torch.Tensor  # (n,) int64, (n, K) bool or (n,) float64

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], pad_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Padded model inputs, each (batch, tokens), and labels (batch,) of some rows."""

        def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(sequences[i]) for i in rows], batch_first=True, padding_value=fill
            )

        ids = padded(self.ids, pad_id)
        lengths = torch.tensor([len(self.ids[i]) for i in rows])
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }
        if self.type_ids:
            inputs["token_type_ids"] = padded(self.type_ids, 0)
        return inputs, self.labels[list(rows)]


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, what: str = "texts", num_labels: int = 0
) -> Encoded:
    """Tokenize examples, truncated to max_length tokens (pairs: the longer text first).

    num_labels: needed for multi-label examples only.
    """
    ids: list[list[int]] = []
    types: list[list[int]] = []
    step = 1000
    for i in track(range(0, len(examples), step), f"Tokenizing {what}"):
        texts = [e.text for e in examples[i : i + step]]
        first = [t[0] if isinstance(t, tuple) else t for t in texts]
        pair = [t[1] for t in texts if isinstance(t, tuple)] or None
        out = tokenizer(first, pair, truncation=True, max_length=max_length, padding=False)
        ids += out["input_ids"]
        types += out.get("token_type_ids", [])
    return Encoded(ids, types, torch.from_numpy(label_array([e.label for e in examples], num_labels)))


def training_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Batches of rows of similar length (little padding), in random order.

    Up to 4 is added to each length before sorting, so that batches differ from epoch to epoch.
    """
    rng = random.Random(seed)
    rows = sorted(range(len(lengths)), key=lambda i: lengths[i] + 4 * rng.random())
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows of similar length, shortest first."""
    rows = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
