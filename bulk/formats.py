"""Writes tables of rows: one part of the output to a file, and parts one after the other to a larger file."""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from de3.columns import pyarrow_module, table_of
from de3.tables import SEPARATOR

KINDS = (".csv", ".jsonl", ".parquet", ".tsv")
ROW_GROUP = 2**16


def write(
    file: Path, kept: list[Any], answers: dict[str, list[Any]], types: dict[str, str], first: Path
) -> None:
    """Write rows to a new file, or none at all: it appears once it is complete.

    Args:
        kept: the input's columns of all rows, in pieces: lists of a dict for each row, or pyarrow tables.
        answers, types: the other columns, and their types (see de3.columns).
        first: the first part of the output, whose columns this one must have.

    Raises ValueError for values that the format cannot hold.
    """
    draft = file.with_name(f".{file.name}")
    if file.suffix == ".parquet":
        try:
            _write_parquet(draft, kept, answers, types, first)
        except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are of these kinds
            raise ValueError(
                f"a column cannot be written as parquet ({error}): leave it out with --keep"
            ) from None
    else:
        rows = _rows(kept, answers)
        # Half of a surrogate pair, which JSON may have, is escaped again.
        with draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as opened:
            if file.suffix == ".jsonl":
                opened.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            else:
                _write_delimited(opened, file.suffix, rows, _names(kept, types))
    publish(draft, file)


def publish(draft: Path, file: Path) -> None:
    """Give a complete draft its name, so that it survives a crash of the machine."""
    with draft.open("rb") as opened:
        os.fsync(opened.fileno())
    draft.replace(file)


def _names(kept: list[Any], types: dict[str, str]) -> list[str]:
    """All columns, those of the first row first; raises ValueError if a later row has others."""
    first: list[str] = []
    for piece in kept:
        for row in piece if isinstance(piece, list) else [dict.fromkeys(piece.column_names)]:
            if not first:
                first = [*row]
            elif surplus := [name for name in row if name not in first]:
                raise ValueError(
                    f"a row has the column {surplus[0]!r}, which the first row lacks: name the columns with --keep"
                )
    return [*first, *types]


def _rows(kept: list[Any], answers: dict[str, list[Any]]) -> Iterable[dict[str, Any]]:
    columns = list(answers)
    before = (row for piece in kept for row in _dicts(piece))
    for row, values in zip(before, zip(*answers.values(), strict=True), strict=True):
        yield {**row, **dict(zip(columns, values, strict=True))}


def _dicts(piece: Any) -> list[dict[str, Any]]:
    if isinstance(piece, list):
        return piece
    return list(piece.to_pylist()) if piece.column_names else [{} for _ in range(piece.num_rows)]


def _write_delimited(opened: Any, kind: str, rows: Iterable[dict[str, Any]], names: Sequence[str]) -> None:
    delimiter = "\t" if kind == ".tsv" else ","
    writer = csv.writer(opened, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])


def _cell(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return SEPARATOR.join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _write_parquet(
    draft: Path, kept: list[Any], answers: dict[str, list[Any]], types: dict[str, str], first: Path
) -> None:
    from pyarrow import parquet

    arrow = pyarrow_module()
    tables = [piece for piece in kept if not isinstance(piece, list)]
    rows = [row for piece in kept if isinstance(piece, list) for row in piece]
    if rows:
        names = _names([rows], {})
        columns = {name: arrow.array([row.get(name) for row in rows]) for name in names}
        before = arrow.table(columns) if columns else None
    else:
        before = arrow.concat_tables(tables) if tables else None
    table = table_of(answers, types)
    if before is not None:
        for index, name in enumerate(before.column_names):
            table = table.add_column(index, before.schema.field(name), before.column(name))
    if first.exists():
        arrow.unify_schemas([parquet.read_schema(first), table.schema], promote_options="permissive")
    parquet.write_table(table.combine_chunks(), draft, compression="zstd", row_group_size=ROW_GROUP)


def join(parts: Sequence[Path], file: Path) -> None:
    """Write the rows of all parts to one file, which appears once it is complete."""
    draft = file.with_name(f".{file.name}")
    if file.suffix == ".parquet":
        _join_parquet(parts, draft)
    else:
        with draft.open("wb") as opened:
            for number, part in enumerate(parts):
                with part.open("rb") as rows:
                    if number and file.suffix != ".jsonl":
                        rows.readline()  # the names
                    shutil.copyfileobj(rows, opened)
    publish(draft, file)


def _join_parquet(parts: Sequence[Path], draft: Path) -> None:
    from pyarrow import parquet

    arrow = pyarrow_module()
    # A column of .csv or .jsonl files may have values in some parts only.
    schema = arrow.unify_schemas([parquet.read_schema(part) for part in parts], promote_options="permissive")
    with parquet.ParquetWriter(draft, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(parquet.read_table(part).cast(schema), row_group_size=ROW_GROUP)
