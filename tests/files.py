"""Files of rows, as de3 classify --file reads and writes them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(list(rows)), file, row_group_size=7)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".txt":
        file.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, as a later run that has the file as its input would read them."""
    if file.suffix == ".tsv":
        lines = [line.split("\t") for line in file.read_text().split("\n")[:-1]]
        return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    if file.suffix == ".parquet":
        return list(parquet.read_table(file).to_pylist())
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def names_in(file: Path) -> list[str]:
    """The columns of a .parquet, .csv or .tsv file."""
    if file.suffix == ".parquet":
        return list(parquet.read_schema(file).names)
    return file.read_text().splitlines()[0].split("\t" if file.suffix == ".tsv" else ",")
