"""Answers as columns, for tables and files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from de3.model_store.manifest import Manifest
from de3.server.answer import row_of
from de3.server.engine.job import Job
from de3.server.errors import RequestError

if TYPE_CHECKING:
    import pyarrow


class Column(NamedTuple):
    """A column: its type, as the name of a pyarrow type, and its value in an answer (a row of `data` in a response)."""

    type: str
    value: Callable[[Mapping[str, Any]], Any]


COLUMNS = {
    "label": Column("string", lambda row: row["label"]),
    "labels": Column("list<string>", lambda row: row["labels"]),
    "value": Column("double", lambda row: row["value"]),
    "probs": Column("list<double>", lambda row: row["probs"]),
    "exit_layer": Column("int32", lambda row: row["exit"]["layer"]),
    "exit_reason": Column("string", lambda row: row["exit"]["reason"]),
    "exit_tau": Column("double", lambda row: row["exit"]["tau"]),
    "exit_score": Column("double", lambda row: row["exit"]["score"]),
    "truncated": Column("bool", lambda row: row.get("truncated", False)),
    "windows_run": Column("int32", lambda row: row["windows"]["run"] if "windows" in row else 1),
    "windows_of": Column("int32", lambda row: row["windows"]["of"] if "windows" in row else 1),
    "ood_score": Column("double", lambda row: row["ood_score"]),
    "out_of_distribution": Column("bool", lambda row: row.get("out_of_distribution", False)),
    "error": Column("string", lambda row: row.get("error")),
}


@dataclass
class Answers:
    """The answers to texts, by column.

    Attributes:
        values: the columns, with a row for each text. If a text cannot be classified, `error` has the reason, and the
            other columns are None.
        model_s: time in the model, seconds; 0 if it is unknown.
        full_depth_s: predicted time in the model at full depth, seconds.
    """

    values: dict[str, list[Any]]
    model_s: float = 0.0
    full_depth_s: float = 0.0

    @classmethod
    def of(
        cls, has_value: bool, has_labels: bool, windows: bool, ood: bool = False, errors: bool = True
    ) -> Self:
        """Columns without answers yet. has_value: for a regression model; has_labels: for a multi-label model.

        windows, ood: the requests have several windows, or set `ood`; `explain`, `flag` and `top_k` add no columns.
        errors: add the column `error`.
        """
        absent = {"probs" if has_value else "value"}
        absent |= set() if has_labels else {"labels"}
        absent |= set() if windows else {"windows_run", "windows_of"}
        absent |= set() if ood else {"ood_score", "out_of_distribution"}
        absent |= set() if errors else {"error"}
        return cls({name: [] for name in COLUMNS if name not in absent})

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append answers, given as rows of `data` in a response; {"error": reason}: a text without an answer."""
        for name, values in self.values.items():
            value = COLUMNS[name].value
            values += [None if "error" in row and name != "error" else value(row) for row in rows]

    def add_job(self, job: Job) -> None:
        """Append the answers of a finished job, and release it."""
        rows = list[Mapping[str, Any]]()
        for item in job.items:
            if item.outcome is None:
                where = item.error.field if isinstance(item.error, RequestError) else None
                rows.append({"error": str(item.error).removeprefix(f"{where}: ")})
                continue
            rows.append(row_of(item, exact=True))
            for part in item.outcome.windows or (item.outcome,):
                self.model_s += part.model_s
                self.full_depth_s += part.model_s * job.served.timing.speedup(part.tokens, part.layer)
        self.add(rows)
        job.release()

    def reorder(self, order: Sequence[int]) -> None:
        """Put the rows in this order, given as row indices, which may be repeated."""
        self.values = {name: [values[i] for i in order] for name, values in self.values.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows, each a dict by column."""
        return [dict(zip(self.values, row, strict=True)) for row in zip(*self.values.values(), strict=True)]

    def table(self, manifest: Manifest) -> "pyarrow.Table":
        """The columns as a table, with metadata about the model; raises ValueError without pyarrow."""
        about = {"model": manifest.full_name, "labels": manifest.labels}
        types = {name: COLUMNS[name].type for name in self.values}
        return table_of(self.values, types).replace_schema_metadata({"de3": json.dumps(about)})


def table_of(values: dict[str, Any], types: dict[str, str]) -> "pyarrow.Table":
    """A table of columns, which may be lists or arrays; raises ValueError without pyarrow.

    types: see COLUMNS; pyarrow infers the type of any other column.
    """
    arrow = pyarrow_module()
    known = {
        "string": arrow.string(),
        "double": arrow.float64(),
        "int32": arrow.int32(),
        "bool": arrow.bool_(),
        "list<string>": arrow.list_(arrow.string()),
        "list<double>": arrow.list_(arrow.float64()),
    }
    columns = {
        name: arrow.array(column, known[types[name]]) if name in types else column
        for name, column in values.items()
    }
    return arrow.table(columns)


def pyarrow_module() -> Any:
    """The module pyarrow, with pyarrow.parquet; if missing, raises ValueError with the command that installs it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("this needs pyarrow: pip install 'de3[bulk]'") from None
    return pyarrow
