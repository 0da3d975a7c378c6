"""The pages of .parquet files: how many rows of a row group can be read at a time in bounded memory.

pyarrow decompresses whole pages, and decodes as many rows as it is asked for. A few hundred bytes of a file can
decompress to a page of 2 GiB, or repeat one text of 1 MB in 2,048 rows. The sizes are in the headers of the pages,
which pyarrow does not expose (https://parquet.apache.org/docs/file-format/data-pages).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

from de3.columns import pyarrow_module
from de3.data.tables import MAX_DEPTH

PAGES_BYTES = 2**29  # limit on the largest pages of all columns together
READ_BYTES = 2**26  # limit on the values of one read, even if each is the largest in its dictionary
DICTIONARY, DATA, DATA_V2 = 7, 5, 8  # fields of a page's header; which one applies depends on its type
TYPES = {0: DATA, 2: DICTIONARY, 3: DATA_V2}
DELTA_BYTE_ARRAY = 7  # encoding in which a value has only the characters that differ from the previous value
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT96": 12}  # bytes per value; 8 for other numbers


@dataclass(frozen=True)
class Page:
    """A page of a column: its size in memory, in bytes; its number of values, 0 for a dictionary; and bytes per value.

    The bytes per value are the mean, or those of the largest value that the page may repeat.
    """

    size: int
    values: int
    value_bytes: float


def rows_at_once(file: BinaryIO, metadata: Any, group: int, names: set[str]) -> int:
    """The number of rows of a row group to read at a time, so that their values take READ_BYTES at most.

    metadata: the file's, from pyarrow. names: the columns to read. Raises ValueError if their pages are too large or
    damaged.
    """
    row_group, schema = metadata.row_group(group), metadata.schema
    rows, pages_bytes, row_bytes = max(1, row_group.num_rows), 0.0, 0.0
    for index in range(row_group.num_columns):
        column, about = row_group.column(index), schema.column(index)
        path = column.path_in_schema
        if not names.intersection(accumulate(path.split("."), "{}.{}".format)):
            continue
        if path.count(".") > MAX_DEPTH:
            raise ValueError(f"the column {path:.50} is nested more than {MAX_DEPTH} levels deep: see --keep")
        is_list, values, value_bytes, page_bytes = about.max_repetition_level > 0, 0, 0.0, 0.0
        try:
            for page in _pages(file, column, about.length):
                # The list of a row is read whole, and a run of equal values takes few bytes in the file.
                page_bytes = max(page_bytes, page.size, is_list * page.values * (4 + page.value_bytes))
                value_bytes = max(value_bytes, page.value_bytes)
                values += page.values
        except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError) as error:
            raise ValueError(f"the column {path!r} has a damaged page ({error!r})") from None
        pages_bytes += page_bytes
        row_bytes += value_bytes * max(1.0, values / rows)
        if pages_bytes > PAGES_BYTES:
            raise ValueError(
                f"the pages of the columns up to {path!r} take more than {PAGES_BYTES // 2**20} MiB: write the file "
                "with fewer rows in a page, or leave columns out with --keep"
            )
    return max(1, int(READ_BYTES / max(1.0, row_bytes)))


def _pages(file: BinaryIO, column: Any, length: int) -> Iterator[Page]:
    """Yield the pages of a column in a row group. length: bytes per value, if all have the same size."""
    is_text = column.physical_type == "BYTE_ARRAY"
    starts = (column.data_page_offset, column.dictionary_page_offset or 0)
    at = min(start for start in starts if start > 0)
    end, left = at + column.total_compressed_size, column.num_values
    longest = 0 if is_text else max(length, 0) or WIDTHS.get(column.physical_type, 8)
    while left > 0 and at < end:
        file.seek(at)
        header = _struct(file)
        stored, at = file.tell(), file.tell() + max(0, header[3])
        size = max(header[2], header[3])
        kind = TYPES.get(header[1])
        if kind == DICTIONARY:
            if is_text and header[2] >= 0 and size <= PAGES_BYTES:
                longest = _longest(file.read(at - stored), header[2], column.compression)
            yield Page(size, 0, longest)
        elif kind is not None:
            about = header[kind]
            is_delta = about[2 if kind == DATA else 4] == DELTA_BYTE_ARRAY
            yield Page(size, about[1], size if is_delta else max(longest, size / max(1, about[1])))
            left -= about[1]


def _longest(page: bytes, size: int, compression: str) -> int:
    """Bytes of the longest value in a dictionary page, in which each value follows its length, stored in 4 bytes."""
    if compression != "UNCOMPRESSED":
        try:
            page = pyarrow_module().decompress(page, size, compression.lower(), asbytes=True)
        except (ValueError, OSError):  # such as one of the variants of LZ4
            return size
    at = longest = 0
    while at < len(page):
        length = int.from_bytes(page[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return min(longest, size)


def _struct(file: BinaryIO) -> dict[int, Any]:
    """The fields of a struct in Thrift's compact protocol, by number: structs and integers; other types as None."""
    fields, number = dict[int, Any](), 0
    while head := file.read(1)[0]:
        number = number + (head >> 4) if head >> 4 else _integer(file)
        kind, fields[number] = head & 15, None
        if kind in (4, 5, 6):
            fields[number] = _integer(file)
        elif kind == 8:  # text
            file.seek(_varint(file), 1)
        elif kind == 12:
            fields[number] = _struct(file)
        elif kind not in (1, 2):  # true, false
            raise LookupError(f"type {kind}")
    return fields


def _integer(file: BinaryIO) -> int:
    return (number := _varint(file)) >> 1 ^ -(number & 1)


def _varint(file: BinaryIO) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise OverflowError("a number of more than 10 bytes")
