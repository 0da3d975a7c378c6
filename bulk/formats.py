"""File formats of the output: writing the rows of a part to a file, and joining the parts into one file."""

import csv
import json
import os
import re
import shutil
from base64 import b64encode
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

import orjson

from de3.bulk.source import Slice
from de3.columns import pyarrow_module, table_of
from de3.data.tables import SEPARATOR

KINDS = (".csv", ".jsonl", ".parquet", ".tsv")
ROW_GROUP = 2**16
BREAKS = re.compile("[\t\r\n]+")


@dataclass(frozen=True)
class Rows:
    """Rows of the output.

    Attributes:
        slices: the rows of the input.
        answers, types: the answers' columns, and their types (see de3.columns).
    """

    slices: Sequence[Slice]
    answers: dict[str, list[Any]]
    types: dict[str, str]

    def names(self) -> list[str] | None:
        """The names of the input's columns, from the first row that could be read; None if they are not known."""
        for one in self.slices:
            if not isinstance(one.kept, list):
                return list(one.kept.column_names)
            for row in filter(None, one.kept):
                return list(row)
        names = self.slices[0].names
        return None if names is None else list(names)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if a row has an input column that is not among these names."""
        known = set(names)
        for one in self.slices:
            rows = one.kept if isinstance(one.kept, list) else [one.kept.column_names]
            for where, row in zip(one.places, rows, strict=False):
                if surplus := [name for name in row if name not in known]:
                    raise ValueError(
                        f"{where}: has the column {surplus[0]!r}, which the first row lacks: "
                        "name the columns with --keep"
                    )

    def dicts(self) -> Iterable[dict[str, Any]]:
        """Yield the rows, each with the columns of the input and of the answers."""
        before = (row for one in self.slices for row in _dicts(one.kept))
        columns = list(self.answers)
        for row, values in zip(before, zip(*self.answers.values(), strict=True), strict=True):
            yield {**row, **dict(zip(columns, values, strict=True))}


def _dicts(piece: Any) -> list[dict[str, Any]]:
    if isinstance(piece, list):
        return piece
    if not piece.column_names:
        return [{} for _ in range(piece.num_rows)]
    try:
        return list(piece.to_pylist())
    except (ValueError, OverflowError) as error:  # such as a date after the year 9999
        raise ValueError(
            f"a column has a value that only .parquet can hold ({error}): leave it out with --keep"
        ) from None


def check_names(one: Slice, types: Mapping[str, str]) -> None:
    """Raise ValueError if an input column that a slice keeps and an answers' column have the same name."""
    for names in (one.names or [], *(one.kept if isinstance(one.kept, list) else [one.kept.column_names])):
        if both := [name for name in names if name in types]:
            raise ValueError(
                f"{both[0]}: is a column of the input and of the answers: rename the answers' columns, as with "
                "--prefix de3_, or leave out the input's with --keep"
            )


class Format:
    """The format of one output. Except in .jsonl, all rows have the input columns of the first row.

    Attributes:
        names: names of the input's columns; None before the first row.
    """

    def __init__(self, kind: str, about: Mapping[str, Any]) -> None:
        """kind: a suffix in KINDS. about: metadata to add to .parquet files.

        Raises ValueError for .parquet if pyarrow is not installed.
        """
        self.kind, self._about = kind, about
        self.names: list[str] | None = None
        self._schema: Any = None  # schema of all parts so far, if they are .parquet files
        if kind == ".parquet":
            pyarrow_module()

    def prepare(self, rows: Rows, parts: Sequence[Path]) -> None:
        """Set `names` from the first rows; raises ValueError if the rows do not fit the parts so far."""
        if self.names is None:
            self.names = rows.names()
        if self.kind != ".jsonl" and self.names is not None:
            rows.check(self.names)
        if self.kind == ".parquet" and self._schema is None and parts:
            read = pyarrow_module().parquet.read_schema
            self._schema = _unified([read(part) for part in parts if _has_rows(part)])

    def write(self, file: Path, rows: Rows) -> None:
        """Write rows to a new file, which appears only once it is complete.

        Raises ValueError for values that the format cannot hold, or whose types differ from those of earlier parts.
        """
        draft = new_draft(file)
        if self.kind == ".parquet":
            self._write_parquet(draft, rows)
        else:
            # Half of a surrogate pair, which JSON may contain but UTF-8 cannot encode, is escaped.
            with draft.open("x", encoding="utf-8", errors="backslashreplace", newline="") as opened:
                if self.kind == ".jsonl":
                    for row in rows.dicts():
                        opened.write(_json(row) + "\n")
                else:
                    names = [*(self.names or []), *rows.types]
                    opened.writelines(_line(names, self.kind))
                    for row in rows.dicts():
                        cells = [_cell(row.get(name), rows.types.get(name)) for name in names]
                        opened.writelines(_line(cells, self.kind))
        publish(draft, file)

    def _write_parquet(self, draft: Path, rows: Rows) -> None:
        arrow = pyarrow_module()
        try:
            table, pieces = table_of(rows.answers, rows.types), []
            for one in rows.slices:
                pieces.append(self._kept(one))
                if pieces[-1].num_rows:
                    self._schema = _unified([*([self._schema] if self._schema else []), pieces[-1].schema])
            before = arrow.concat_tables(pieces, promote_options="default")
            for index, name in enumerate(before.column_names):
                table = table.add_column(index, before.schema.field(name), before.column(name))
            table = table.replace_schema_metadata({"de3": json.dumps(self._about, sort_keys=True)})
            with draft.open("xb") as opened:
                table = table.combine_chunks()
                arrow.parquet.write_table(table, opened, compression="zstd", row_group_size=ROW_GROUP)
        # pyarrow's errors are of these kinds
        except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
            raise ValueError(
                f"a column cannot be written as parquet ({error}): leave it out with --keep"
            ) from None

    def _kept(self, one: Slice) -> Any:
        """The columns `names` of a slice as a table, in this order; raises ValueError for a row that does not fit."""
        arrow, names, table = pyarrow_module(), self.names or [], one.kept
        if isinstance(table, list):
            values = {name: [row.get(name) for row in table] for name in names}
            return arrow.table({name: self._array(name, values[name], one.places) for name in names})
        for name in names:
            if name not in table.column_names:
                table = table.append_column(name, arrow.nulls(table.num_rows))
            elif table.num_rows and (problem := self._misfit(name, table.schema.field(name).type)):
                raise ValueError(f"{one.places[0]}: {problem}")
        return table.select(names)

    def _array(self, name: str, values: list[Any], places: Sequence[str]) -> Any:
        def problem(end: int) -> str:
            try:
                return self._misfit(name, pyarrow_module().array(values[:end]).type)
            except (ValueError, TypeError, OverflowError) as error:
                return f"{name}: {error}"

        if problem(len(values)):
            end = 1 + bisect_left(range(1, len(values)), True, key=lambda end: problem(end) != "")
            raise ValueError(f"{places[end - 1]}: {problem(end)}")
        return pyarrow_module().array(values)

    def _misfit(self, name: str, kind: Any) -> str:
        """Why a column of this type does not fit the rows so far; "" if it does."""
        at, null = self._schema.get_field_index(name) if self._schema else -1, pyarrow_module().null()
        if at < 0 or kind == null or self._schema.field(at).type in (kind, null):
            return ""
        return f"{name} is {kind}, but {self._schema.field(at).type} in earlier rows"

    def join(self, parts: Sequence[Path], file: Path) -> None:
        """Write the rows of all parts to one file, which appears only once it is complete."""
        draft = new_draft(file)
        with_rows = [part for part in parts if _has_rows(part)] or parts[:1]
        if self.kind == ".parquet":
            _join_parquet(with_rows, draft)
        else:
            with draft.open("xb") as opened:
                for number, part in enumerate(with_rows):
                    with part.open("rb") as rows:
                        if number and self.kind != ".jsonl":
                            _skip_record(rows, self.kind)
                        shutil.copyfileobj(rows, opened)
        publish(draft, file)


def new_draft(file: Path) -> Path:
    """Path of a file's draft, next to the file. Open it with mode x, which follows no links put there by others."""
    draft = file.with_name(f".{file.name}")
    draft.unlink(missing_ok=True)  # left by an interrupted run
    return draft


def publish(draft: Path, file: Path) -> None:
    """Rename a complete draft to its final name, after syncing it, so that the file survives a crash of the machine."""
    with draft.open("rb") as opened:
        os.fsync(opened.fileno())
    draft.replace(file)


def _line(cells: Sequence[Any], kind: str) -> Iterable[str]:
    """A line of a .csv or .tsv file, in pieces. In .tsv nothing is quoted, so tabs and line breaks become spaces."""
    if kind == ".tsv":
        return "\t".join(BREAKS.sub(" ", str(cell)) for cell in cells), "\n"
    line = StringIO()
    # In Python 3.11, a carriage return alone does not cause a field to be quoted.
    has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)
    writer = csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL)
    writer.writerow(cells)
    return (line.getvalue(),)


def _cell(value: Any, column: str | None) -> Any:
    """A value in .csv and .tsv. column: the type of an answers' column (see de3.columns); None for any other."""
    if value is None:
        return ""
    if column != "list<span>" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return SEPARATOR.join(value)
    if isinstance(value, list | dict | bool | bytes):
        return _json(value)
    return value


def _json(value: Any) -> str:
    """A value in JSON: NaN is null, bytes are in base64."""
    try:
        return orjson.dumps(value, default=_plain).decode()
    except TypeError:  # half of a surrogate pair, or a number that is too large
        return json.dumps(_finite(value), ensure_ascii=False, default=_plain)


def _finite(value: Any) -> Any:
    """The value with null in place of every NaN and infinity, which JSON cannot represent."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return value


def _plain(value: Any) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _skip_record(rows: Any, kind: str) -> None:
    """Skip the header of a .csv or .tsv file; in .csv, quoted names may contain line breaks."""
    marks = 0
    while line := rows.readline():
        marks += line.count(b'"')
        if kind == ".tsv" or marks % 2 == 0:
            return


def _has_rows(part: Path) -> bool:
    """True if a part has rows. A part whose rows were all refused has none, and lacks the input's columns."""
    if part.suffix == ".parquet":
        return bool(pyarrow_module().parquet.read_metadata(part).num_rows)
    with part.open("rb") as rows:
        if part.suffix != ".jsonl":
            _skip_record(rows, part.suffix)
        return bool(rows.read(1))


def _unified(schemas: Sequence[Any]) -> Any:
    """The common schema, in which a column without values fits any type; None without schemas.

    Raises ValueError or TypeError if the types of a column differ.
    """
    if not schemas:
        return None
    return pyarrow_module().unify_schemas(list(schemas), promote_options="default")


def _join_parquet(parts: Sequence[Path], draft: Path) -> None:
    parquet = pyarrow_module().parquet
    schema = _unified([parquet.read_schema(part) for part in parts])
    with draft.open("xb") as opened, parquet.ParquetWriter(opened, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(parquet.read_table(part).cast(schema), row_group_size=ROW_GROUP)
