"""Answers as columns, for tables and files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from de3.model_store.manifest import Manifest
from de3.server.engine.job import Job
from de3.server.engine.outcome import Outcome
from de3.server.errors import RequestError
from de3.server.http.classify import Classification

if TYPE_CHECKING:
    import pyarrow

# All columns, and their types, as names of pyarrow types.
TYPES = {
    "label": "string",
    "labels": "list<string>",
    "value": "double",
    "probs": "list<double>",
    "exit_layer": "int32",
    "exit_reason": "string",
    "exit_tau": "double",
    "exit_score": "double",
    "truncated": "bool",
    "windows_run": "int32",
    "windows_of": "int32",
    "ood_score": "double",
    "out_of_distribution": "bool",
}


@dataclass
class Answers:
    """The answers to texts, by column.

    Attributes:
        values: the columns, without rows for texts that have no answer.
        types: the type of each column, as in TYPES.
        errors: the reason why a text has no answer, by the text's index.
        model_s: time in the model, seconds; 0 if it is unknown.
        full_depth_s: predicted time in the model at full depth, seconds.
    """

    values: dict[str, list[Any]]
    types: dict[str, str]
    errors: dict[int, str]
    model_s: float = 0.0
    full_depth_s: float = 0.0


class AnswerColumns:
    """The answers of finished jobs, by column.

    Attributes:
        values: the columns; a text without an answer has None in each.
        errors: the reason why a text has no answer, by the text's index.
        model_s, full_depth_s: as in Answers.
    """

    def __init__(self, manifest: Manifest, request: Classification) -> None:
        """request: the options of the jobs; `explain`, `flag` and `top_k` add no columns."""
        self._name, self._labels, self._request = (
            f"{manifest.name}:{manifest.version}",
            manifest.labels,
            request,
        )
        self.types = types_of(manifest, request)
        self.values: dict[str, list[Any]] = {name: [] for name in self.types}
        self.errors: dict[int, str] = {}
        self.model_s = self.full_depth_s = 0.0

    def add(self, job: Job) -> None:
        """Append the answers of a finished job, and release it."""
        nothing = dict.fromkeys(self.types)
        for item in job.items:
            if item.outcome is None:
                reason = str(item.error)
                if isinstance(item.error, RequestError) and item.error.field:
                    reason = reason.removeprefix(f"{item.error.field}: ")
                self.errors[len(self.values["label"])] = reason
            row = nothing if item.outcome is None else self._answer(item.outcome, job)
            for name, value in row.items():
                self.values[name].append(value)
        job.release()

    def _answer(self, outcome: Outcome, job: Job) -> dict[str, Any]:
        for part in outcome.windows or (outcome,):
            self.model_s += part.model_s
            self.full_depth_s += part.model_s * job.served.timing.speedup(part.tokens, part.layer)
        reading, labels = outcome.reading, self._labels
        row: dict[str, Any] = {"label": labels[reading.label]}
        if reading.labels is not None:
            row["labels"] = [labels[k] for k in reading.labels]
        if reading.value is not None:
            row["value"] = reading.value
        else:
            row["probs"] = reading.logits if self._request.raw else reading.probs
        row["exit_layer"] = outcome.layer
        row["exit_reason"] = outcome.reason
        row["exit_tau"] = outcome.rule.tau
        row["exit_score"] = reading.score
        row["truncated"] = outcome.truncated
        if self._request.windows > 1:
            row["windows_run"] = len(outcome.windows) or 1
            row["windows_of"] = outcome.num_windows
        if self._request.ood:
            row["ood_score"] = job.served.monitor.score(outcome.passed)
            row["out_of_distribution"] = outcome.is_far
        return row

    def ordered(self, order: Sequence[int]) -> dict[str, list[Any]]:
        """The columns with the rows in this order, given as row indices, which may be repeated."""
        return {name: [values[i] for i in order] for name, values in self.values.items()}

    def table(self, order: Sequence[int]) -> "pyarrow.Table":
        """The columns as a table with the rows in this order (see `ordered`), and metadata about the model.

        Raises ValueError without pyarrow.
        """
        about = {"model": self._name, "labels": self._labels}
        return table_of(self.ordered(order), self.types).replace_schema_metadata({"de3": json.dumps(about)})


def types_of(manifest: Manifest, request: Classification) -> dict[str, str]:
    """The type of each column of the answers to a request."""
    names = {"label", "exit_layer", "exit_reason", "exit_tau", "exit_score", "truncated"}
    names.add("probs" if manifest.tolerance is None else "value")
    if manifest.thresholds is not None:
        names.add("labels")
    if request.windows > 1:
        names |= {"windows_run", "windows_of"}
    if request.ood:
        names |= {"ood_score", "out_of_distribution"}
    return {name: kind for name, kind in TYPES.items() if name in names}


def table_of(values: dict[str, Any], types: dict[str, str]) -> "pyarrow.Table":
    """A table of columns, which may be lists or arrays; raises ValueError without pyarrow.

    types: as in TYPES; pyarrow infers the type of any other column.
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
    """The module pyarrow; raises ValueError, with the command that installs it, if it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError("this needs pyarrow: pip install 'de3[bulk]'") from None
    return pyarrow
