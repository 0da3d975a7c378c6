"""Texts and labels, read from .csv, .tsv, .jsonl and .txt files and from Hugging Face data sets. Needs no PyTorch."""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

from typer import Option

from de3.extras import install

TextOrPair = str | tuple[str, str]
SEPARATOR = "|"  # separates the labels of a text in a cell of a file
JOINT = "\x1f"  # separates the labels of a text in a row, because labels in a JSON list may contain |
PANEL = "Data"
MAX_LINE = 2**24  # maximum number of characters in a line, and in a row that spans several lines
MAX_DEPTH = 100  # levels of lists and objects; pyarrow can write 124
MAX_COLUMNS = 10_000  # limit for a .csv or .tsv file with a header
SHOWN = 1000  # number of characters kept from a bad row
data_option = partial(Option, rich_help_panel="Data")
TOO_LONG = "a line of more than"  # start of a problem
_SURROGATE = re.compile("[\ud800-\udfff]")
_BAD = re.compile("[\0\ud800-\udfff]")  # in a value that is not UTF-8


def pair_of(text: TextOrPair) -> tuple[str, str | None]:
    """The two texts of a pair; for a single text, the text and None."""
    return text if isinstance(text, tuple) else (text, None)


@dataclass(frozen=True)
class Columns:
    """The columns of a file's texts and labels: names, or numbers from 0 if it has no header.

    The annotated fields become options of the commands that read data (de3.commands.options.add_parameters).

    Attributes:
        quotes: true if quotation marks enclose fields. None: false for .tsv (as in GLUE's files), true otherwise.
        label: None if the texts have no labels; then .txt files with one text per line can be read, too.
        multi_label: a text has any number of labels: separated by | in a cell, or as a list in JSON. In the rows that
            this module returns, they are separated by JOINT.
        regression: a text has a number instead of a label.
    """

    text: Annotated[
        str, data_option("--text-column", help="Column of the text; with --no-header, its number from 0.")
    ] = "text"
    text_pair: Annotated[
        str | None, data_option("--pair-column", help="Column of the second text, for pairs.")
    ] = None
    label: Annotated[str | None, data_option("--label-column", help="Column of the label.")] = "label"
    header: Annotated[bool, data_option(help="The first row contains the column names.")] = True
    quotes: bool | None = None
    delimiter: Annotated[
        str | None,
        data_option(
            help="Separator of the fields: one character, or the word tab. The file may then have any "
            "extension. Default: by extension."
        ),
    ] = None
    multi_label: bool = False
    regression: bool = False


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and the reason.

    Attributes:
        content: the beginning of the row.
        columns: the values of a table's row by column, None where a value cannot be read; empty if none can be read.
    """

    reason: str
    content: str
    columns: Mapping[str, str | None] = field(default_factory=dict)


class Header(list[str]):
    """The column names of a table."""


def records(path: Path, columns: Columns, keeps_bad: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place, FILE:LINE. A row is a dict by column or, in .jsonl, a JSON value.

    Blank lines are skipped. Raises ValueError for a row that cannot be read, a file that cannot be read as a table, or
    a file without rows. keeps_bad: yield the Header of a table, a BadRow for a row that cannot be read, a row also for
    a blank line in .txt, and nothing for a file without rows.
    """
    line = 0
    for line, record in _records(path, columns, keeps_bad):
        if isinstance(record, BadRow) and not keeps_bad:
            raise ValueError(f"{path}:{line}: {record.reason}")
        yield f"{path}:{line}", record
    if not line and not keeps_bad:
        raise ValueError(f"{path} has no rows")


def _records(path: Path, columns: Columns, keeps_bad: bool) -> Iterator[tuple[int, Any]]:
    suffix, delimiter = path.suffix, columns.delimiter
    known = (".tsv", ".csv", ".jsonl", *([".txt"] if columns.label is None else []))
    if delimiter is None and suffix not in known:
        if suffix == ".txt":
            raise ValueError(
                f"{path}: a .txt file has no columns: leave out the label column, or give a .tsv file"
            )
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, not a file")
        raise ValueError(
            f"{path}: expected a file named {', '.join(known)}; rename it, or give --delimiter (tab, ; or ,)"
        )
    has_lines = delimiter is None and suffix in (".txt", ".jsonl")
    # Only \n ends a line of text, not \r; the csv module needs "". "-sig": some files begin with a byte order mark.
    newline = "\n" if has_lines else ""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if has_lines:
            for number, line, problem in _lines(file):
                if problem:
                    yield number, BadRow(problem, line[:SHOWN])
                elif line.strip() or (keeps_bad and suffix == ".txt"):
                    yield number, {columns.text: line.rstrip("\r\n")} if suffix == ".txt" else _json(line)
            return
        if delimiter is None:
            delimiter = "\t" if suffix == ".tsv" else ","
        delimiter = "\t" if delimiter in ("tab", "\\t") else delimiter
        if len(delimiter) != 1:
            raise ValueError(f"--delimiter must be one character or tab, got {delimiter!r}")
        quoted = suffix != ".tsv" if columns.quotes is None else columns.quotes
        for number, row in _delimited(file, path, columns, delimiter, quoted):
            if keeps_bad or not isinstance(row, Header):
                yield number, row


def _delimited(
    file: TextIO, path: Path, columns: Columns, delimiter: str, quoted: bool
) -> Iterator[tuple[int, Any]]:
    problems: list[tuple[int, str]] = []  # line number and problem, for the lines of the current row
    read: list[str] = []  # the lines of the current row
    size = 0  # characters of the current row

    def lines() -> Iterator[str]:
        nonlocal size
        for number, line, problem in _lines(file):
            size += len(line)
            if size > MAX_LINE:
                raise csv.Error(
                    f"a row of more than {MAX_LINE} characters; is a closing quotation mark missing?"
                )
            if read and closed_wrongly.match(line):
                raise csv.Error(
                    f"a quotation mark in this line is closed only in line {number}, before other text; close it "
                    "where the field ends, and double quotation marks that are part of the text"
                )
            if problem:
                problems.append((number, problem))
            read.append(line)
            yield line
        if read:  # without an error, the csv module would take the rest of the file as the last field
            raise csv.Error(
                "a quotation mark in this line is never closed; if it is part of the text, double it and enclose the "
                "field in quotation marks"
            )

    csv.field_size_limit(MAX_LINE)
    # In a line that begins inside quotation marks, a mark that is followed by text probably opens another field: the
    # previous field was not closed.
    closed_wrongly = re.compile(rf'(?:[^"]|"")*+"(?!"| *(?:[\r\n{re.escape(delimiter)}]|$))')
    dialect: Any = {"delimiter": delimiter, "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
    reader = csv.reader(lines(), **dialect)
    names: list[str] | None = None
    while True:
        problems.clear()
        read.clear()
        size = 0
        try:
            row = next(reader, None)
        except csv.Error as error:  # in a field that is still open
            line = reader.line_num + 1 - _lines_of_last_field(read, dialect)
            raise ValueError(f"{path}:{line}: {error}") from None
        if row is None:
            return
        if columns.header and names is None:
            if problems:
                raise ValueError(f"{path}:{problems[0][0]}: {problems[0][1]}")
            names = _header(row, path)
            yield 1, names
            continue
        if not problems and names is not None and len(row) > len(names):
            problem = (
                f"has {len(row)} fields, the header has {len(names)}: put texts with {delimiter!r} in quotation marks; "
                "for one text per line, use a .txt file"
            )
            problems.append((reader.line_num, problem))
        if problems:
            number, problem = problems[0]
            is_cut = any(each.startswith(TOO_LONG) for _, each in problems)
            readable = {} if is_cut else _readable(row, names or list(map(str, range(len(row)))), columns)
            yield number, BadRow(problem, delimiter.join(row)[:SHOWN], readable)
        elif row:
            columns_of_row = names or list(map(str, range(len(row))))
            missing = dict.fromkeys(columns_of_row[len(row) :])  # if the row is short
            yield reader.line_num, dict(zip(columns_of_row, row, strict=False)) | missing


def _header(row: list[str], path: Path) -> Header:
    if len(row) > MAX_COLUMNS:  # each row takes as much memory as it has columns, even if it is short
        raise ValueError(f"{path}:1: {len(row)} columns; at most {MAX_COLUMNS} are allowed")
    if twice := [name for name, number in Counter(row).items() if name and number > 1]:
        raise ValueError(f"{path}:1: has several columns named {twice[0]!r}")
    return Header(row)


def _lines_of_last_field(lines: list[str], dialect: Any) -> int:
    """The number of line breaks in the last field of a row; the field is still open at the end of these lines."""
    row = next(csv.reader((line.rstrip("\r\n") + "\n" for line in lines), **dialect))
    return row[-1].count("\n")


def _readable(row: list[str], names: list[str], columns: Columns) -> dict[str, str | None]:
    """The columns of a row that has too many fields or is not UTF-8; None where the value cannot be read.

    If there are too many fields, a text probably contains an unquoted delimiter, so only the columns before the first
    text are read.
    """
    count = len(names)
    if len(row) > count:
        texts = (columns.text, columns.text_pair or "text_pair")
        count = next((i for i, name in enumerate(names) if name in texts), 0)
    values = {name: value for name, value in zip(names[:count], row, strict=False) if not _BAD.search(value)}
    return dict.fromkeys(names) | values


def _lines(file: TextIO) -> Iterator[tuple[int, str, str]]:
    """Yield the lines of a file opened with surrogateescape: number, line and problem, "" if there is none.

    A line that is not UTF-8, or longer than MAX_LINE, has a problem; of a line that is too long, only the beginning is
    returned.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            marks, rest = line.count('"'), line
            while rest and not rest.endswith("\n"):
                rest = file.readline(MAX_LINE)
                marks += rest.count('"')
            # Keeps one quotation mark if their number is odd, so a field stays open or closed as after the full line.
            shown = line[:SHOWN].replace('"', "") + '"' * (marks % 2)
            yield number, shown, f"{TOO_LONG} {MAX_LINE} characters"
            continue
        # UTF-16 without a byte order mark has a zero byte next to each ASCII letter, which is valid UTF-8.
        is_utf16 = "\0" in line or (number == 1 and line.startswith(("\udcff\udcfe", "\udcfe\udcff")))
        problem = ""
        if is_utf16 or (not line.isascii() and _SURROGATE.search(line)):
            reason = "has a zero byte" if "\0" in line else "not UTF-8"
            encoding = "UTF-16" if is_utf16 else "WINDOWS-1252"
            problem = (
                f"{reason}; repair it, or convert the file if all of it is so: iconv -f {encoding} -t UTF-8"
            )
        yield number, line, problem


def _json(line: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}", line[:SHOWN])
    if line.count("[") + line.count("{") > MAX_DEPTH and _is_deep(value):
        return BadRow(f"nested more than {MAX_DEPTH} levels deep", line[:SHOWN])
    return value


def _is_deep(value: Any) -> bool:
    """True if lists and objects are nested in more than MAX_DEPTH levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for one in level
            if isinstance(one, list | dict)
            for child in (one if isinstance(one, list) else one.values())
        ]
    return bool(level)


def read_rows(path: Path, columns: Columns) -> list[tuple[TextOrPair, str]]:
    """The (text, label) rows of a file; "" for no label.

    Raises ValueError, naming file, line and column, if a column or a value is missing or invalid.
    """
    rows, errors = [], []
    for where, record in records(path, columns):
        try:
            rows.append(row_of(record, columns, where))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(errors[0] + (f" (the first of {len(errors):,} bad rows)" if errors[1:] else ""))
    return rows


def row_of(record: Any, columns: Columns, where: str) -> tuple[TextOrPair, str]:
    """The text or pair, and the label, of one record; raises ValueError with `where` and the reason."""
    label = "" if columns.label is None else _label(record, columns, where)
    _check_characters(label, str(columns.label), where)
    first = text_of(record, columns.text, where)
    pair = columns.text_pair
    return (first if pair is None else (first, text_of(record, pair, where, "--pair-column"))), label


def text_of(record: Any, column: str, where: str, option: str = "--text-column") -> str:
    """The text in a column of a record, stripped; raises ValueError if it is missing, blank, or not a valid text."""
    value = _value(record, column, where, option)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be text, got {type(value).__name__}")
    _check_characters(value, column, where)
    return value.strip()


def _check_characters(value: str, column: str, where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can escape but UTF-8 cannot encode."""
    if not value.isascii() and (half := _SURROGATE.search(value)):
        raise ValueError(
            f"{where}: {column} has {half[0]!a}, half of a surrogate pair, which is not a character"
        )


def _value(record: Any, column: str, where: str, option: str) -> Any:
    """The value in a column of a record; raises ValueError if it is missing, null or blank."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not an object with named columns")
    if column not in record:
        names = list(record)
        hint = "; is it separated by semicolons or tabs? Give --delimiter" if len(names) == 1 else ""
        raise ValueError(
            f"{where}: no column {column!r}; it has {', '.join(map(repr, names)):.1000}: set {option}{hint}"
        )
    value = record[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: {column} is empty; remove the row, or fill it in")
    return value


def _label(record: Any, columns: Columns, where: str) -> str:
    """The label of a record, or its labels separated by JOINT; raises ValueError if it is missing or invalid."""
    column = str(columns.label)
    if columns.multi_label and isinstance(record, dict) and column in record:
        label = record[column]
        if isinstance(label, list) and all(isinstance(one, str | int) for one in label):
            return JOINT.join(map(str, label))  # "": no label
        if label is None:
            raise ValueError(f"{where}: {column} is missing; leave it empty for a text without a label")
        if isinstance(label, str):
            return label.replace(SEPARATOR, JOINT)
    else:
        label = _value(record, column, where, "--label-column")
    if columns.regression:
        if not is_number(label):
            raise ValueError(f"{where}: {column} must be a finite number, got {label!r:.50}")
    elif isinstance(label, list | dict | float):
        raise ValueError(
            f"{where}: {column} must be a label (text or a whole number), got {label!r:.50}"
            f"{'; only a multi-label model has several labels per text' if isinstance(label, list) else ''}"
        )
    return str(label)


def is_number(value: Any) -> bool:
    """True if a cell is a finite number, in JSON or as text."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def labels_in(cell: str, multi_label: bool) -> list[str]:
    """The labels in a row's cell: exactly one; if multi_label, any number, separated by JOINT, without duplicates."""
    if not multi_label:
        return [cell]
    return list(dict.fromkeys(name.strip() for name in cell.split(JOINT) if name.strip()))


def read_groups(records: Iterable[tuple[str, Any]], column: str, option: str = "--group-column") -> list[str]:
    """The group of each record, from a column; raises ValueError if it is missing, null or blank."""
    return [str(_value(record, column, where, option)).strip() for where, record in records]


def read_dataset(name: str, split: str, columns: Columns) -> list[tuple[TextOrPair, str]]:
    """The (text, label) rows of a Hugging Face data set, "path" or "path:config".

    Label numbers are replaced by label names if the data set has them. Raises ValueError as read_rows does, and if the
    package datasets is missing.
    """
    feature = _open_dataset(name, split).features.get(columns.label)
    from datasets import ClassLabel

    named = getattr(feature, "feature", feature) if columns.multi_label else feature  # a list's items
    rows = [row_of(record, columns, where) for where, record in dataset_records(name, split)]
    if not isinstance(named, ClassLabel):
        return rows

    def name_of(cell: str) -> str:
        return JOINT.join(named.int2str(int(number)) for number in labels_in(cell, columns.multi_label))

    return [(text, name_of(label)) for text, label in rows]


def dataset_records(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set, each with its place, in the form in which `records` yields the rows of a file."""
    return ((f"{name}, row {i}", record) for i, record in enumerate(_open_dataset(name, split)))


def _open_dataset(name: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"--dataset needs the train extra ({error}): {install('train')}") from None

    path, _, config = name.partition(":")
    return load_dataset(path, config or None, split=split)
