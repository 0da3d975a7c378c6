"""The rows of a file, or of a folder of files, in slices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from de3.client import Input
from de3.columns import pyarrow_module
from de3.tables import SHOWN, BadRow, Columns, records, text_of

SLICE_ROWS = 2048
SLICE_CHARS = 2**22  # a slice with more characters ends, so that memory is bounded
KINDS = (".csv", ".jsonl", ".parquet", ".tsv", ".txt")
PAIR = "text_pair"  # column of a second text, if there is one


@dataclass(frozen=True)
class Refused:
    """A row that cannot be classified: its number in the input (from 0), its place, and the reason."""

    row: int
    where: str
    reason: str
    content: str


@dataclass
class Slice:
    """Consecutive rows of the input.

    Attributes:
        texts: of the rows that can be classified.
        numbers: the number of each one's row in the input, from 0.
        places: where each one stands, as FILE:LINE.
        kept: its other columns: a dict for each row, or a pyarrow table.
        refused: the other rows.
        rows: number of all rows.
    """

    texts: list[Input] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    kept: Any = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    rows: int = 0

    def remove(self, errors: dict[int, str]) -> None:
        """Remove texts that could not be classified; errors: the reasons, by index."""
        for index, reason in errors.items():
            content = str(self.texts[index])[:SHOWN]
            self.refused.append(Refused(self.numbers[index], self.places[index], reason, content))
        self.refused.sort(key=lambda refused: refused.row)
        stay = [index for index in range(len(self.texts)) if index not in errors]
        if isinstance(self.kept, list):
            self.kept = [self.kept[index] for index in stay]
        else:
            self.kept = _taken(self.kept, stay)
        for name in ("texts", "numbers", "places"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in stay])


class Source:
    """A file, or the files of a folder in the order of their names."""

    def __init__(self, path: Path, columns: Columns, keep: Sequence[str] | None = None) -> None:
        """keep: columns that the output repeats; None: all. Raises ValueError if there is nothing to read."""
        self._columns, self._keep = columns, keep
        self.files = files_in(path, columns)
        self.kind = self.files[0].suffix

    def rows(self) -> int:
        """The number of rows; of text files about that, as a row may have several lines."""
        if self.kind == ".parquet":
            parquet = _parquet()
            return sum(parquet.ParquetFile(file).metadata.num_rows for file in self.files)
        return sum(_lines_in(file) for file in self.files)

    def slices(self) -> Iterator[Slice]:
        """Yield all rows; raises ValueError for a file that cannot be read."""
        number = 0
        for file in self.files:
            read = self._read_parquet if self.kind == ".parquet" else self._read_rows
            for one in read(file, number):
                number += one.rows
                yield one

    def _read_rows(self, file: Path, number: int) -> Iterator[Slice]:
        one, chars = Slice(), 0
        for where, record in records(file, self._columns, keeps_bad=True):
            row = {self._columns.text: record} if isinstance(record, str) else record
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.reason)
                text = self._text(row)
            except ValueError as error:
                content = row.content if isinstance(row, BadRow) else str(row)[:SHOWN]
                one.refused.append(Refused(number + one.rows, where, str(error), content))
            else:
                one.texts.append(text)
                one.numbers.append(number + one.rows)
                one.places.append(where)
                one.kept.append(row if self._keep is None else {name: row.get(name) for name in self._keep})
                chars += _chars(text)
            one.rows += 1
            if one.rows >= SLICE_ROWS or chars >= SLICE_CHARS:
                number += one.rows
                yield one
                one, chars = Slice(), 0
        if one.rows:
            yield one

    def _text(self, row: Any) -> Input:
        """The text or pair of a row; raises ValueError."""
        first, pair = text_of(row, self._columns.text, ""), self._columns.text_pair
        if pair is None and row.get(PAIR) is None:
            return first
        return first, text_of(row, pair or PAIR, "", "--pair-column")

    def _read_parquet(self, file: Path, number: int) -> Iterator[Slice]:
        parquet = _parquet()
        opened = parquet.ParquetFile(file)
        names, pair = opened.schema_arrow.names, self._columns.text_pair
        if pair is None and PAIR in names:
            pair = PAIR
        text_names = [self._columns.text, *([pair] if pair else [])]
        kept = names if self._keep is None else list(self._keep)
        for name in (*text_names, *kept):
            if name not in names:
                option = {self._columns.text: "--text-column", pair: "--pair-column"}.get(name, "--keep")
                known = ", ".join(map(repr, names))
                raise ValueError(f"{file}: no column {name!r}; it has {known}: set {option}")
        wanted = [name for name in names if name in text_names or name in kept]
        for batch in opened.iter_batches(SLICE_ROWS, columns=wanted):
            table = pyarrow_module().Table.from_batches([batch])
            values = [table.column(name).to_pylist() for name in text_names]
            start = 0
            for end in _ends(values):
                texts = [column[start:end] for column in values]
                yield self._slice(file, number + start, texts, table.slice(start, end - start).select(kept))
                start = end
            number += start

    def _slice(self, file: Path, number: int, texts: list[list[Any]], kept: Any) -> Slice:
        rows = len(texts[0])
        one, stay = Slice(rows=rows), []
        for index in range(rows):
            row = number + index
            try:
                one.texts.append(self._checked([column[index] for column in texts]))
            except ValueError as error:
                content = str(texts[0][index])[:SHOWN]
                one.refused.append(Refused(row, f"{file}:{row}", str(error), content))
            else:
                stay.append(index)
                one.numbers.append(row)
                one.places.append(f"{file}:{row}")
        one.kept = kept if len(stay) == rows else _taken(kept, stay)
        return one

    def _checked(self, values: list[Any]) -> Input:
        names = [self._columns.text, self._columns.text_pair or PAIR]
        if len(values) > 1 and values[1] is None and self._columns.text_pair is None:
            values = values[:1]
        texts = [
            # Most texts have nothing to check.
            value.strip()
            if isinstance(value, str) and value.isascii() and not value.isspace() and value
            else text_of({name: value}, name, "")
            for name, value in zip(names, values, strict=False)
        ]
        return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _taken(table: Any, rows: list[int]) -> Any:
    """Some rows of a table; of one without columns, as many."""
    return table.take(rows) if table.column_names else table.slice(0, len(rows))


def files_in(path: Path, columns: Columns) -> list[Path]:
    """A file, or the files in a folder, all of one kind; raises ValueError."""
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        if path.suffix not in KINDS and columns.delimiter is None:
            raise ValueError(f"{path}: expected {', '.join(KINDS)}; rename it, or give --delimiter")
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] not in "._")
    kinds = {file.suffix for file in files}
    if not files or len(kinds) > 1 or not kinds <= set(KINDS):
        found = ", ".join(sorted(kinds)) or "no files"
        raise ValueError(f"{path}: must contain files of one kind, {' or '.join(KINDS)}; it has {found}")
    return files


def _parquet() -> Any:
    pyarrow_module()
    from pyarrow import parquet

    return parquet


def _ends(columns: list[list[Any]]) -> Iterator[int]:
    """Where to end slices of these rows, so that none has many more characters than SLICE_CHARS."""
    chars, rows = 0, len(columns[0])
    for index in range(rows):
        chars += sum(len(value) for column in columns if isinstance(value := column[index], str))
        if chars >= SLICE_CHARS or index == rows - 1:
            yield index + 1
            chars = 0


def _chars(text: Input) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _lines_in(file: Path) -> int:
    lines = 0
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            lines += chunk.count(b"\n")
    return lines
