"""Answers as columns, for tables and files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from de3.extras import install
from de3.model_store.manifest import Manifest
from de3.runtime.answer import row_of
from de3.runtime.engine.job import Job
from de3.runtime.errors import RequestError

if TYPE_CHECKING:
    import pyarrow


class Column(NamedTuple):
    """A column: its type, as the name of a pyarrow type, and its value in a row of `data` in a response."""

    type: str
    value: Callable[[Mapping[str, Any]], Any]


COLUMNS = {
    "label": Column("string", lambda row: row["label"]),
    "labels": Column("list<string>", lambda row: row["labels"]),
    "value": Column("double", lambda row: row["value"]),
    "spans": Column("list<span>", lambda row: row["spans"]),
    "redacted": Column("string", lambda row: row["text"]),
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
}
# The columns that only some kinds of models have.
Kind = Literal["classes", "labels", "value", "spans", "redacted"]
ANSWERS: dict[Kind, set[str]] = {
    "classes": {"label", "probs"},
    "labels": {"label", "labels", "probs"},
    "value": {"label", "value"},
    "spans": {"spans"},
    "redacted": {"spans", "redacted"},
}
SPAN = ("start", "end", "label", "score", "text")


@dataclass
class Times:
    """Time in a model, and predicted time at full depth, seconds; 0 if they are unknown."""

    model_s: float = 0.0
    full_depth_s: float = 0.0

    def add(self, model_s: float, full_depth_s: float) -> None:
        """Add the times of a text, or of several."""
        self.model_s += model_s
        self.full_depth_s += full_depth_s


@dataclass
class Answers:
    """The answers to texts, by column.

    Attributes:
        values: the columns, with a row for each text. If a text cannot be classified, `error` has the reason, and the
            other columns are None.
        types: the type of each column; see Column.
        times: the time in each model, by the prefix of its columns.
    """

    values: dict[str, list[Any]]
    types: dict[str, str]
    times: dict[str, Times]

    @classmethod
    def of(cls, kinds: Mapping[str, Kind], windows: bool, ood: bool = False, errors: bool = True) -> Self:
        """Columns without answers yet.

        kinds: for each model, by the prefix of its columns: what its answers are. windows, ood: the requests have
        several windows, or set `ood`; `explain`, `flag` and `top_k` add no columns. errors: add the column `error`,
        which has no prefix.
        """
        absent = set() if windows else {"windows_run", "windows_of"}
        absent |= set() if ood else {"ood_score", "out_of_distribution"}
        absent |= set[str]().union(*ANSWERS.values())
        types = {
            prefix + name: column.type
            for prefix, kind in kinds.items()
            for name, column in COLUMNS.items()
            if name not in absent - ANSWERS[kind]
        }
        types |= {"error": "string"} if errors else {}
        return cls({name: [] for name in types}, types, {prefix: Times() for prefix in kinds})

    def add(self, answers: Sequence[Sequence[Mapping[str, Any]] | str]) -> None:
        """Append the answers to texts: for each, a row of `data` in a response for each model, or why it has none."""
        for index, prefix in enumerate(self.times):
            for name, column in COLUMNS.items():
                if (values := self.values.get(prefix + name)) is not None:
                    values += [None if isinstance(one, str) else column.value(one[index]) for one in answers]
        if "error" in self.values:
            self.values["error"] += [one if isinstance(one, str) else None for one in answers]

    def add_job(self, job: Job) -> None:
        """Append the answers of a finished job, and release them."""
        answers = list[Sequence[Mapping[str, Any]] | str]()
        for by_part in zip(*map(job.rows, job.parts), strict=True):
            if failed := [head for _, head in by_part if head.outcome is None]:
                error = failed[0].error
                where = error.field if isinstance(error, RequestError) else None
                answers.append(str(error).removeprefix(f"{where}: "))
                continue
            answers.append([row_of(item, head, exact=True) for item, head in by_part])
            for (_, head), times in zip(by_part, self.times.values(), strict=True):
                assert head.outcome is not None
                for window in head.outcome.windows or (head.outcome,):
                    speedup = head.part.served.timing.speedup(window.tokens, window.layer)
                    times.add(window.model_s, window.model_s * speedup)
        self.add(answers)
        job.release()

    def reorder(self, order: Sequence[int]) -> None:
        """Put the rows in this order, given as row indices, which may be repeated."""
        self.values = {name: [values[i] for i in order] for name, values in self.values.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows, each a dict by column."""
        return [dict(zip(self.values, row, strict=True)) for row in zip(*self.values.values(), strict=True)]

    def table(self, manifests: Sequence[Manifest]) -> "pyarrow.Table":
        """The columns as a table, with metadata about the models; raises ValueError without pyarrow."""
        about = json.dumps(describe(manifests))
        return table_of(self.values, self.types).replace_schema_metadata({"de3": about})


def kind_of(manifest: Manifest, redacts: bool) -> Kind:
    """Kind of a model's answers. redacts: the requests set `redact`."""
    if manifest.is_spans:
        return "redacted" if redacts else "spans"
    if manifest.tolerance is not None:
        return "value"
    return "classes" if manifest.thresholds is None else "labels"


def prefixes(names: Sequence[str]) -> list[str]:
    """The prefixes of the columns of several models; raises ValueError if two have the same name."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"models: {twice} is given twice; the columns of each model begin with its name")
    return [f"{name}_" for name in names]


def describe(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Metadata about a model, or about several: their names and labels."""
    each = [{"model": one.full_name, "labels": one.labels} for one in manifests]
    return each[0] if len(each) == 1 else {"models": each}


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
        "list<span>": arrow.list_(
            arrow.struct(
                zip(
                    SPAN,
                    (arrow.int32(), arrow.int32(), arrow.string(), arrow.float64(), arrow.string()),
                    strict=True,
                )
            )
        ),
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
        raise ValueError(f"this needs pyarrow: {install('bulk')}") from None
    return pyarrow
