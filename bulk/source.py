"""The rows of a file, or of a folder of files, in slices."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from de3.bulk.pages import rows_at_once
from de3.client import Input
from de3.columns import pyarrow_module
from de3.data.tables import MAX_LINE, SHOWN, BadRow, Columns, Header, records, text_of

SLICE_ROWS = 2048
SLICE_CHARS = 2**22  # a slice is complete once it has this many characters, which bounds memory
KINDS = (".csv", ".jsonl", ".parquet", ".tsv", ".txt")
PAIR = "text_pair"  # column of the second text, if it exists and no other is named


@dataclass(frozen=True)
class Refused:
    """A row that cannot be classified: its number in the input (from 0), its place, the reason, and its beginning."""

    row: int
    where: str
    reason: str
    content: str


@dataclass
class Slice:
    """Consecutive rows of the input.

    Attributes:
        number: the number of the first row in the input, from 0, not counting blank lines.
        texts: the text of each row; None: it has none that can be classified.
        places: the place of each row: FILE:LINE or, in parquet files, FILE:ROW with rows counted from 0.
        kept: the input's columns that the output repeats, for each row: a list of dicts, or a pyarrow table.
        names: the names of these columns, if they are known without rows.
        refused: the rows that cannot be classified, by index.
        chars: approximate size of the rows, in characters.
        is_private: nothing of the texts may be kept.
    """

    number: int
    texts: list[Input | None] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    kept: Any = field(default_factory=list)
    names: Sequence[str] | None = None
    refused: dict[int, Refused] = field(default_factory=dict)
    chars: int = 0
    is_private: bool = False

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.texts)

    def add(self, text: Input, where: str) -> None:
        """Add a row, without its kept columns."""
        self.texts.append(text)
        self.places.append(where)
        self.chars += chars_of(text)

    def add_refused(self, where: str, reason: str, content: object) -> None:
        """Add a row that cannot be classified, without its kept columns."""
        self.texts.append(None)
        self.places.append(where)
        self.refuse(self.rows - 1, reason, content)

    def refuse(self, index: int, reason: str, content: object) -> None:
        """Refuse a row. content: the row or its text, of which the beginning is kept, unless `is_private` is set.

        Half of a surrogate pair, which many readers of JSON refuse even if it is escaped, is kept as the text \\ud800.
        """
        content = "" if self.is_private else content
        shown = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
        texts = self.places[index], reason.removeprefix(": ")[:SHOWN], shown[:SHOWN]
        plain = [one.encode(errors="backslashreplace").decode() for one in texts]
        self.refused[index] = Refused(self.number + index, *plain)

    def merge_errors(self, errors: list[str | None]) -> None:
        """Refuse the texts that could not be classified, and complete `errors`: the reason for each row."""
        for index, reason in enumerate(errors):
            if index in self.refused:
                errors[index] = self.refused[index].reason
            elif reason is not None:
                self.refuse(index, reason, self.texts[index])

    def drop_refused(self, values: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Drop the refused rows from `kept` and `places`; returns the answers' columns without them and `error`."""
        stay = [index for index in range(self.rows) if index not in self.refused]
        if self.refused:
            self.kept = _taken(self.kept, stay)
            self.places = [self.places[index] for index in stay]
        names = [name for name in values if name != "error"]
        return {name: [values[name][index] for index in stay] for name in names}


class Source:
    """A file, or the files of a folder in the order of their names."""

    def __init__(
        self,
        path: Path,
        columns: Columns,
        keep: Sequence[str] | None = None,
        is_private: bool = False,
    ) -> None:
        """keep: columns that the output repeats; None: all. is_private: the output must not have the texts.

        Raises ValueError as `files_in` does, and if `keep` has a column of texts although they are private.
        """
        self._columns, self._keep, self._is_private = columns, keep, is_private
        self._hidden = {columns.text, columns.text_pair or PAIR} if is_private else set[str]()
        if hidden := [name for name in keep or () if name in self._hidden]:
            raise ValueError(f"--keep: {hidden[0]} has the texts, which --redact must not repeat")
        self._text_names = [name for name in (columns.text, columns.text_pair) if name is not None]
        self._names: list[str] | None = None  # columns of the first row that could be classified
        self.files = files_in(path, columns)
        self.kind = self.files[0].suffix
        is_lines = self.kind == ".txt" and columns.delimiter is None
        self._kept_names = keep  # see Slice.names
        if keep is None and is_lines:
            self._kept_names = self._kept([columns.text])
        self._has_columns = False  # some row had the text columns

    def rows(self) -> int:
        """The number of rows; an estimate for text files, in which a row may have several lines."""
        if self.kind == ".parquet":
            return sum(_open_parquet(file).metadata.num_rows for file in self.files)
        headers = len(self.files) if self.kind in (".csv", ".tsv") else 0
        return sum(_lines_in(file) for file in self.files) - headers

    def slices(self) -> Iterator[Slice]:
        """Yield all rows, in slices; without rows, an empty slice with the columns.

        Raises ValueError for a file that cannot be read or lacks a column, or if no row of the first slice has a text.
        """
        number = 0
        for file in self.files:
            read = self._read_parquet if self.kind == ".parquet" else self._read_rows
            for one in read(file, number):
                number += one.rows
                yield one
        if not number and self.kind == ".parquet":
            table = _open_parquet(self.files[0]).schema_arrow.empty_table()
            yield Slice(0, kept=table.select(self._kept(table.column_names)))
        elif not number:
            yield self._slice_at(0)

    def _kept(self, names: Sequence[str]) -> list[str]:
        """The columns that the output repeats, if the input has these."""
        return (
            [name for name in names if name not in self._hidden] if self._keep is None else list(self._keep)
        )

    def _slice_at(self, number: int) -> Slice:
        return Slice(number, names=self._kept_names, is_private=self._is_private)

    def _read_rows(self, file: Path, number: int) -> Iterator[Slice]:
        one, is_first = self._slice_at(number), True
        for where, record in records(file, self._columns, keeps_bad=True):
            if isinstance(record, Header):
                if not number:
                    self._text(dict.fromkeys(record, "-"), where)
                    self._check_kept(record, where)
                    self._has_columns = True
                if self._kept_names is None:
                    self._kept_names = one.names = self._kept(record)
                continue
            row = {self._columns.text: record} if isinstance(record, str) else record
            try:
                if isinstance(row, BadRow):
                    raise ValueError(row.reason)
                text = self._text(row, "")
            except ValueError as error:
                one.add_refused(where, str(error), row.content if isinstance(row, BadRow) else row)
                row = self._plain(row.columns if isinstance(row, BadRow) else row)
            else:
                if is_first:
                    self._check_kept(row, where)
                is_first, self._names = False, self._names or list(row)
                one.add(text, where)
            self._has_columns |= all(name in row for name in self._text_names)
            kept = {name: row.get(name) for name in self._kept(list(row))}
            one.kept.append(kept)
            one.chars += sum(map(_size, kept.values()))
            if one.rows >= SLICE_ROWS or one.chars >= SLICE_CHARS:
                yield self._with_columns(one)
                one = self._slice_at(one.number + one.rows)
        if one.rows:
            yield self._with_columns(one)

    def _with_columns(self, one: Slice) -> Slice:
        """Return the slice; raises ValueError if no row so far has the text columns: their names are probably wrong."""
        if not self._has_columns:
            first = one.refused[0]
            raise ValueError(
                f"none of the first {one.rows} rows can be classified: {first.where}: {first.reason}"
            )
        return one

    def _check_kept(self, names: Collection[str], where: str) -> None:
        if unknown := [name for name in self._keep or () if name not in names]:
            raise ValueError(f"{where}: no column {unknown[0]!r}; it has {_list(names)}: set --keep")

    def _plain(self, row: Any) -> dict[str, Any]:
        """The columns of a refused row; a text that is missing or of another type becomes None.

        A row without a text has the columns of the first row that could be classified.
        """
        if not isinstance(row, dict):
            return {}
        names = (self._columns.text, self._columns.text_pair or PAIR)
        columns = {name: row.get(name) for name in (row if names[0] in row else self._names or ())}
        return {
            name: value if name not in names or _is_text(value) else None for name, value in columns.items()
        }

    def _text(self, row: Any, where: str) -> Input:
        """The text or pair of a row; raises ValueError if it is missing or invalid."""
        if self._is_private and isinstance(row, dict):
            for name, option in zip(self._text_names, ("--text-column", "--pair-column"), strict=False):
                if name not in row:  # the names that it has may be a text, too
                    raise ValueError(f"{where}: no column {name!r}: set {option}")
        first, pair = _checked(row, self._columns.text, where), self._columns.text_pair
        if pair is None and row.get(PAIR) is None:
            return first
        return first, _checked(row, pair or PAIR, where, "--pair-column")

    def _read_parquet(self, file: Path, number: int) -> Iterator[Slice]:
        opened = _open_parquet(file)
        names, pair = opened.schema_arrow.names, self._columns.text_pair
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{file}: has several columns named {twice[0]!r}")
        if pair is None and PAIR in names:
            pair = PAIR
        text_names = [self._columns.text, *([pair] if pair else [])]
        kept = self._kept(names)
        for name in (*text_names, *kept):
            if name not in names:
                option = {self._columns.text: "--text-column", pair: "--pair-column"}.get(name, "--keep")
                raise ValueError(f"{file}: no column {name!r}; it has {_list(names)}: set {option}")
        wanted, start = [name for name in names if name in text_names or name in kept], 0
        try:
            for table, large in _tables(file, opened, wanted, self._columns.text):
                texts = [table.column(name).to_pylist() for name in text_names]
                one = self._slice(file, number, start, texts, table.select(kept), large)
                yield one
                start += one.rows
                number += one.rows
        except (OSError, OverflowError, UnicodeDecodeError, pyarrow_module().ArrowException) as error:
            # a damaged file
            raise ValueError(f"{file}: {error}") from None

    def _slice(
        self, file: Path, number: int, start: int, texts: list[list[Any]], kept: Any, large: dict[int, str]
    ) -> Slice:
        """A slice of a parquet file.

        number, start: index of the slice's first row in the input and in the file. texts: the text columns. large: see
            _tables.
        """
        one, indices = Slice(number, is_private=self._is_private), iter(range(len(texts[0])))
        rows: list[int | None] = []  # rows of the table; None: the table lacks the row
        for offset in range(len(texts[0]) + len(large)):
            where = f"{file}:{start + offset}"
            if offset in large:
                one.add_refused(where, f"a row of more than {MAX_LINE} bytes", large[offset])
                rows.append(None)
                continue
            index = next(indices)
            rows.append(index)
            try:
                one.add(self._text_in([column[index] for column in texts]), where)
            except ValueError as error:
                try:
                    (row,) = kept.slice(index, 1).to_pylist() or [{}]
                except (ValueError, OverflowError):  # such as a date after the year 9999
                    row = {}
                one.add_refused(where, str(error), {**row, self._columns.text: texts[0][index]})
        one.kept = _taken(_nullable(kept), rows) if large else kept
        one.chars += kept.nbytes
        return one

    def _text_in(self, values: list[Any]) -> Input:
        names = [self._columns.text, self._columns.text_pair or PAIR]
        if len(values) > 1 and values[1] is None and self._columns.text_pair is None:
            values = values[:1]
        texts = [
            # Skips text_of for most texts, which need no checks.
            value
            if isinstance(value, str) and value.isascii() and not value.isspace() and value
            else _checked({name: value}, name, "")
            for name, value in zip(names, values, strict=False)
        ]
        return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _checked(row: Any, name: str, where: str, option: str = "--text-column") -> str:
    """The text in a column of a row, with the spaces around it, as spans count them; raises as text_of does."""
    text_of(row, name, where, option)
    return str(row[name])


def _taken(kept: Any, rows: Sequence[int | None]) -> Any:
    """The kept columns (Slice.kept) of these rows; None: a row of a table in which every column is null."""
    if isinstance(kept, list):
        return [kept[index] for index in rows if index is not None]
    arrow = pyarrow_module()
    if not kept.column_names:
        return arrow.table({"": arrow.nulls(len(rows))}).select([])
    return kept.take(arrow.array(rows, arrow.int64()))


def _nullable(table: Any) -> Any:
    """The table, with columns that may have nulls."""
    schema = pyarrow_module().schema([one.with_nullable(True) for one in table.schema], table.schema.metadata)
    return pyarrow_module().Table.from_arrays(table.columns, schema=schema)


def files_in(path: Path, columns: Columns) -> list[Path]:
    """The file, or the files in a folder, sorted by name.

    Raises ValueError if there are none, or if they are of several kinds or of an unsupported kind.
    """
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if path.suffix not in KINDS and columns.delimiter is None:
            raise ValueError(f"{path}: expected {', '.join(KINDS)}; rename it, or give --delimiter")
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] not in "._")
    kinds = {file.suffix for file in files}
    if not files or len(kinds) > 1 or not kinds <= set(KINDS):
        found = ", ".join(sorted(kinds)) or "no files"
        raise ValueError(f"{path}: must contain files of one kind, {' or '.join(KINDS)}; it has {found}")
    return files


def _open_parquet(file: Path) -> Any:
    parquet = pyarrow_module().parquet
    try:
        # The default reads whole row groups, before they are decompressed.
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from None


def _tables(file: Path, opened: Any, columns: list[str], text: str) -> Iterator[tuple[Any, dict[int, str]]]:
    """Yield the rows of a parquet file, a table per slice: up to SLICE_ROWS rows, or SLICE_CHARS bytes and one row.

    A table lacks the rows that are larger than MAX_LINE bytes. With it comes the beginning of their column `text`, by
    their index among all rows of the slice.
    """
    pieces, large = list[Any](), dict[int, str]()
    rows = held = 0
    for batch in _batches(file, opened, columns):
        done = 0
        while done < batch.num_rows:
            piece = batch.slice(done, SLICE_ROWS - rows)
            while (size := sum(map(_bytes, piece.columns))) > SLICE_CHARS - held and piece.num_rows > 1:
                piece = piece.slice(0, piece.num_rows // 2)
            if size > MAX_LINE:
                large[rows] = _beginning(piece.column(text))
            else:
                pieces.append(piece)
                held += size
            rows += piece.num_rows
            done += piece.num_rows
            if rows == SLICE_ROWS or held >= SLICE_CHARS:
                yield pyarrow_module().Table.from_batches(pieces, batch.schema).combine_chunks(), large
                pieces, large, rows, held = [], {}, 0, 0
    if rows:
        yield pyarrow_module().Table.from_batches(pieces, batch.schema).combine_chunks(), large


def _batches(file: Path, opened: Any, columns: list[str]) -> Iterator[Any]:
    with file.open("rb") as raw:
        for group in range(opened.num_row_groups):
            try:
                rows = rows_at_once(raw, opened.metadata, group, set(columns))
            except ValueError as error:
                raise ValueError(f"{file}: row group {group}: {error}") from None
            # With threads, a read of a few rows takes five times as long.
            yield from opened.iter_batches(min(SLICE_ROWS, rows), [group], columns, use_threads=False)


def _bytes(array: Any) -> int:
    """Approximate size of the values, each counted as often as it occurs."""
    arrow = pyarrow_module()
    if isinstance(array, arrow.ExtensionArray):
        return _bytes(array.storage)
    if isinstance(array, arrow.StructArray):
        return sum(map(_bytes, array.flatten()))
    if isinstance(array, arrow.MapArray):  # a ListArray that cannot be flattened
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        parts = (array.keys, array.items)
        return 8 * len(array) + sum(_bytes(part.slice(start, end - start)) for part in parts)
    if isinstance(array, arrow.ListArray | arrow.LargeListArray | arrow.FixedSizeListArray):
        return 8 * len(array) + _bytes(array.flatten())
    return int((array.dictionary_decode() if isinstance(array, arrow.DictionaryArray) else array).nbytes)


def _beginning(array: Any) -> str:
    """The first characters of the only text in an array; "" if it is of another type."""
    if isinstance(array, pyarrow_module().ListArray | pyarrow_module().StructArray):
        return ""
    value = array[0].as_py()
    return value[:SHOWN] if isinstance(value, str) else ""


def _list(names: Any) -> str:
    return ", ".join(map(repr, names))[:SHOWN]


def _is_text(value: Any) -> bool:
    """True for a text that UTF-8 can encode."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def chars_of(text: Input) -> int:
    """The number of characters of a text or pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _size(value: Any) -> int:
    """Approximate number of characters of a value, or of a text that takes as much memory."""
    if isinstance(value, list | dict):
        return 8 * len(str(value))  # an empty list in a list takes 64 bytes
    return len(value) if isinstance(value, str) else 8


def _lines_in(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: opened.read(2**20), b""))
