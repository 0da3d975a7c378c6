"""`de3 classify --file`: files in and out, refused rows, and runs that are continued."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import json as arrow_json
from pyarrow import parquet

import de3
from de3.bulk import formats, pages, parts, pool, run, source
from de3.bulk.formats import KINDS, Format
from de3.bulk.parts import Parts
from de3.bulk.report import report
from de3.bulk.source import Source
from de3.client import Input, ServerError, batches
from de3.columns import Answers
from de3.data.tables import MAX_DEPTH, SEPARATOR, Columns
from de3.loadtest.servers import process_tree
from de3.model_store.store import Store
from tests.commands import de3 as de3_command
from tests.commands import invoke, refusal
from tests.files import names_in, read, write
from tests.fixtures import make_rows
from tests.serving import serving

TEXTS = [text for text, _ in make_rows(100, 23) if text.strip()]
LONG = "good film " * 60  # more than the model takes
READING = Columns(label=None)


@pytest.fixture(scope="module")
def model(store: Path) -> Iterator[de3.Classifier]:
    with de3.load("tiny-int8", store=store, threads=1) as one:
        yield one


class Here:
    """A pool that answers in this process; after `stops_at` slices it raises KeyboardInterrupt.

    Attributes:
        texts: number of texts that it was given.
        most: the most slices that it had at a time.
    """

    size = 2

    def __init__(self, model: de3.Classifier, stops_at: int = 10**9) -> None:
        self._model, self._left, self._waiting = model, stops_at, 0
        self.texts = self.most = 0

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        self._left -= bool(texts)
        if self._left < 0:
            raise KeyboardInterrupt
        self.texts += sum(text is not None for text in texts)
        self._waiting += 1
        self.most = max(self.most, self._waiting)
        answers = self._model.answers_by_column(texts, tau=0.3, long="error")
        future = Future[Answers]()
        future.result = lambda timeout=None: self._taken(answers)  # type: ignore[method-assign]
        return future

    def _taken(self, answers: Answers) -> Answers:
        self._waiting -= 1
        return answers

    def close(self) -> None:
        pass


def classify(
    pool: Here,
    file: Path,
    out: Path,
    part_rows: int = 16,
    keep: list[str] | None = None,
    drops_refused: bool = False,
    kind: str = "",
    prefix: str = "",
    reading: Columns = READING,
) -> Any:
    """Run; returns the summary and the file of dropped rows. kind: of the parts, if `out` is a folder."""
    with closing(Parts(out, kind or out.suffix, {"a": 1}, drops_refused)) as output:
        rows = Source(file, reading, keep)
        summary = run.classify(rows, pool, output, lambda name: prefix + name, part_rows)
        return summary, output.finish(summary.parts, summary.json())


def kept(model: de3.Classifier, file: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of the output."""
    classify(Here(model), file, out, **options)
    return read(out)


def dropping(
    model: de3.Classifier, file: Path, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the output, and those that were dropped from it."""
    _, refused = classify(Here(model), file, out, drops_refused=True)
    return read(out), read(refused)


class Limits:
    """The limits on what is read, sent and written at a time, which tests lower."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def lower(self, **limits: int) -> None:
        for name, limit in limits.items():
            (module,) = (one for one in (source, pages, pool, run) if name in vars(one))
            self._patch.setattr(module, name, limit)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    found = Limits(monkeypatch)
    found.lower(SLICE_ROWS=8)
    return found


@pytest.mark.parametrize(
    "kinds", [".parquet .parquet", ".parquet .csv", ".csv .jsonl", ".tsv .tsv", ".txt .jsonl"]
)
def test_every_format(model: de3.Classifier, tmp_path: Path, kinds: str) -> None:
    kind_in, kind_out = kinds.split()
    file, out = tmp_path / f"in{kind_in}", tmp_path / f"out{kind_out}"
    write(file, [{"id": f"a{i}", "text": text} for i, text in enumerate(TEXTS)])
    pool = Here(model)
    summary, refused = classify(pool, file, out)
    rows, expected = read(out), model.classify(TEXTS, tau=0.3)
    exact = model.classify(TEXTS, tau=0.3, as_arrow=True).column("probs").to_pylist()
    assert pool.most == 5  # two for each process, and one
    assert summary.rows == summary.answered == len(TEXTS) and refused is None
    assert [row["text"] for row in rows] == [text.strip() for text in TEXTS] or kind_in == ".txt"
    if kind_in != ".txt":
        assert [row["id"] for row in rows] == [f"a{i}" for i in range(len(TEXTS))]
    assert [row["label"] for row in rows] == [row.label for row in expected]
    assert [int(row["exit_layer"]) for row in rows] == [row.exit.layer for row in expected]
    assert [probs if isinstance(probs := row["probs"], list) else json.loads(probs) for row in rows] == exact
    assert {str(row["truncated"]).lower() for row in rows} == {"false"}
    assert summary.layers == {"": Counter(row.exit.layer for row in expected)}
    answers = kept(model, file, tmp_path / f"answers{kind_out}", keep=[])
    assert answers == [{n: v for n, v in row.items() if n not in ("id", "text")} for row in rows]


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".csv"])
def test_a_folder_whose_files_have_their_columns_in_another_order_or_lack_one(
    model: de3.Classifier, tmp_path: Path, kind: str
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number, columns in enumerate((["id", "text"], ["text", "id"], ["text"])):
        given = [{"id": str(i), "text": TEXTS[i]} for i in range(number * 20, number * 20 + 20)]
        write(folder / f"{number}{kind}", [{name: row[name] for name in columns} for row in given])
    (folder / "_SUCCESS").touch()
    if kind == ".csv":
        (folder / "1-without-rows.csv").write_text("text\n")
    classify(Here(model), folder, out, kind=kind, prefix="de3_")
    files = sorted(file for file in out.iterdir() if file.name[0] != ".")
    assert [file.name for file in files] == ["_run.json", *(f"part-{n:06}{kind}" for n in range(4))]
    assert [len(read(file)) for file in files[1:]] == [16, 20, 20, 4]  # slices of 8, 8, 4, 8, 8, 4, ...
    rows = [row for file in files[1:] for row in read(file)]
    assert kind == ".jsonl" or {tuple(row)[:2] for row in rows} == {("id", "text")}
    assert [row["text"] for row in rows] == TEXTS[:60]
    assert [row.get("id") or "" for row in rows] == [*map(str, range(40)), *[""] * 20]
    assert [row["de3_label"] for row in rows] == [row.label for row in model.classify(TEXTS[:60], tau=0.3)]
    with closing(Parts(out, kind, {"a": 1})) as again:
        assert again.is_complete


@pytest.mark.parametrize(("kind", "drops"), [(".parquet", True), (".csv", False)])
def test_a_run_that_is_interrupted_at_any_file_goes_on_with_the_same_bytes(
    model: de3.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, drops: bool
) -> None:
    file, whole, part_rows = tmp_path / "in.jsonl", tmp_path / f"whole{kind}", 16
    rows: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS[:40])]
    rows[part_rows:] = [dict(reversed(row.items())) for row in rows[part_rows:]]
    for i in range(part_rows, 2 * part_rows):  # a part without answers
        rows[i]["text"] = " " if i % 8 else LONG
    write(file, rows)
    published, stops_at, last, publish = 0, 0, 0, formats.publish

    def interrupted(draft: Path, into: Path) -> None:
        nonlocal published
        published += 1
        if published == stops_at:  # the draft stays
            raise KeyboardInterrupt
        publish(draft, into)
        if stops_at == last + 1 == published + 1:  # after the last file appears
            raise KeyboardInterrupt

    for module in (formats, parts):
        monkeypatch.setattr(module, "publish", interrupted)
    summary, refused = classify(Here(model), file, whole, drops_refused=drops)
    assert (summary.rows, summary.answered, summary.refused) == (40, 24, 16)
    if drops:
        assert [row["row"] for row in read(refused)] == [*range(16, 32)]
        assert [int(row["id"]) for row in read(whole)] == [*range(16), *range(32, 40)]
    else:
        assert [int(row["id"]) for row in read(whole)] == [*range(40)] and refused is None
        assert [i for i, row in enumerate(read(whole)) if row["error"]] == [*range(16, 32)]
    last = published
    for number in range(1, last + 2):
        out, published, stops_at = tmp_path / f"out{number}{kind}", 0, number
        with pytest.raises(KeyboardInterrupt):
            classify(Here(model), file, out, drops_refused=drops)
        stops_at, pool = 0, Here(model)
        rows_left = max(0, 40 - part_rows * len(list(Path(f"{out}.parts").glob("part-*"))))
        if not out.exists():  # else it is complete, but for the folder of parts
            summary, refused_again = classify(pool, file, out, drops_refused=drops)
            assert summary.rows - summary.earlier == rows_left
            assert pool.texts == rows_left - (14 if rows_left > 8 else 0)
            assert not drops or refused.read_bytes() == refused_again.read_bytes()
        for _ in range(2):
            with closing(Parts(out, kind, {"a": 1}, drops)) as again:
                assert again.is_complete and not Path(f"{out}.parts").exists()
                assert (again.summary["rows"], again.summary["refused"]) == (40, 16)
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", [".parquet", ".csv"])
def test_drafts_follow_no_links(model: de3.Classifier, tmp_path: Path, kind: str) -> None:
    out, other = tmp_path / f"out{kind}", tmp_path / "other"
    other.write_text("kept")
    write(tmp_path / "in.jsonl", [{"text": text} for text in (*TEXTS[:4], " ")])
    parts = (f"part-000000{kind}", "_refused-000000.jsonl", "_run.json")
    names = (out.name, f"{out.name}.refused.jsonl", *(f"{out.name}.parts/{part}" for part in parts))
    for name in names:
        draft = formats.new_draft(tmp_path / name)
        draft.parent.mkdir(exist_ok=True)
        draft.symlink_to(other)
    rows, refused = dropping(model, tmp_path / "in.jsonl", out)
    assert (len(rows), len(refused)) == (4, 1) and other.read_text() == "kept"


@pytest.mark.parametrize(
    ("kind", "drops"), [*((kind, False) for kind in KINDS), (".parquet", True), (".csv", True)]
)
def test_values_that_need_care(model: de3.Classifier, tmp_path: Path, kind: str, drops: bool) -> None:
    """Quotation marks, line breaks and tabs in values and names; a part without rows; columns that a row lacks."""
    file, out = tmp_path / "in.jsonl", tmp_path / f"out{kind}"
    values = ['a "fine" one', "two\nlines", "a\rreturn", "a\ttab", "", "café"]
    rows: list[Any] = [{"my\nid": values[i % 6], "text": TEXTS[i], "none": None} for i in range(64)]
    for i in (20, 21):
        del rows[i]["my\nid"]
    for i in range(32, 64):
        rows[i]["text"] = " "
    found = kept(model, write(file, rows), out, drops_refused=drops)
    if drops:
        assert "error" not in found[0]
    else:
        reason = "text is empty; remove the row, or fill it in"
        assert {(row["label"], row["error"]) for row in found[32:]} <= {(None, reason), ("", reason)}
        assert {row["error"] for row in found[:32]} <= {None, ""} and len(found) == 64
        found = found[:32]
    expected = [row.get("my\nid") for row in rows[:32]]
    if kind in (".csv", ".tsv"):
        expected = [value or "" for value in expected]
    if kind == ".tsv":
        expected = [re.sub(r"\s", " ", value) for value in expected]
    assert [row.get("my id" if kind == ".tsv" else "my\nid") for row in found] == expected
    assert [row["label"] for row in found] == [row.label for row in model.classify(TEXTS[:32], tau=0.3)]


@pytest.mark.parametrize(("kind", "drops"), [(".parquet", False), (".csv", True), (".jsonl", True)])
def test_an_input_without_rows_or_texts_gives_an_output_with_all_columns(
    model: de3.Classifier, tmp_path: Path, kind: str, drops: bool
) -> None:
    columns = list(model.answers_by_column([]).values)
    no_texts = arrow.table({"id": arrow.array([1, 2] * 9), "text": arrow.nulls(18, arrow.string())})
    parquet.write_table(no_texts.slice(0, 0), tmp_path / "rows.parquet")
    parquet.write_table(no_texts, tmp_path / "texts.parquet")
    row = {"csv": "1,\n", "txt": "\n", "jsonl": '{"id": 1, "text": null}\n'}
    contents = {f"texts.{suffix}": one * 18 for suffix, one in row.items()}
    contents |= dict.fromkeys(("rows.csv", "rows.txt", "rows.jsonl", "nothing.csv"), "")
    for name, content in contents.items():
        header = "id,text\n" if name in ("rows.csv", "texts.csv") else ""
        (tmp_path / name).write_text(header + content)
    for name in ("rows.parquet", "texts.parquet", *contents):
        out, has_rows = tmp_path / f"of-{name}{kind}", name.startswith("texts")
        summary, refused = classify(Here(model), tmp_path / name, out, drops_refused=drops)
        rows = read(out)
        assert summary.rows == summary.refused == 18 * has_rows
        if drops:
            assert rows == [] and (refused is not None) == has_rows
        else:
            assert len(rows) == 18 * has_rows and not any(row["label"] for row in rows)
            assert all(row["error"].startswith("text is empty") for row in rows)
        kept = ["text"] if name.endswith(".txt") else ["id", "text"]
        if name in ("nothing.csv", "rows.jsonl") or (drops and name == "texts.jsonl"):
            kept = []  # unknown
        assert kind == ".jsonl" or names_in(out) == [*kept, *(columns[:-1] if drops else columns)]
        if kind == ".parquet" == tmp_path.joinpath(name).suffix:
            assert parquet.read_schema(out).field("id").type == arrow.int64()


@pytest.mark.parametrize("rows", [0, 1])
def test_a_wrong_column_is_an_error_also_without_rows(
    model: de3.Classifier, tmp_path: Path, rows: int
) -> None:
    table, lines, objects = (tmp_path / f"in{kind}" for kind in (".parquet", ".csv", ".jsonl"))
    write(objects, [{"sentence": "good", "label": "a"}] * rows)
    parquet.write_table(arrow.table({"sentence": ["good"] * rows, "label": ["a"] * rows}), table)
    lines.write_text("sentence,label\n" + "good,a\n" * rows)
    right, pool = Columns("sentence", label=None), Here(model)
    places = {table: "in.parquet: ", lines: "in.csv:1: "} | ({objects: "in.jsonl:1: "} if rows else {})
    for reading, keep, says in (
        (READING, None, "no column 'text'; it has 'sentence'.*--text-column"),
        (Columns("sentence", "other", label=None), None, "no column 'other'; .*--pair-column"),
        (right, ["more"], "no column 'more'; .*--keep"),
        (right, None, "label: is a column of the input and of the answers.* --prefix de3_"),
    ):
        for file, where in places.items():
            with pytest.raises(ValueError, match=says if says.startswith("label") else where + says):
                classify(pool, file, tmp_path / "out.csv", keep=keep, reading=reading)
    assert pool.texts == 0
    classify(pool, table, tmp_path / "out.csv", keep=["sentence"], reading=right)


def test_large_values_end_slices_and_parts(limits: Limits, tmp_path: Path, model: de3.Classifier) -> None:
    limits.lower(SLICE_CHARS=500, PART_CHARS=1000)
    for kind in (".jsonl", ".parquet"):
        file = write(tmp_path / f"in{kind}", [{"text": text, "more": "x" * 200} for text in TEXTS])
        slices = list(Source(file, READING).slices())
        assert max(one.rows for one in slices) <= 4 and sum(one.rows for one in slices) == 100
        summary, _ = classify(Here(model), file, tmp_path / f"out{kind}", 10**6)
        assert 10 < summary.parts <= len(slices) / 2 + 1  # two slices have enough characters
    file = write(tmp_path / "in.jsonl", [{"text": "good", "x": [[]] * 1000}, {"b" * 5000: 1}])
    one, other = Source(file, READING).slices()
    assert one.rows == 1 and one.chars > 30_000  # the memory that they take
    assert len(other.refused[0].reason) <= 1000
    pairs = arrow.array([[("a", 1)], None, [("b" * 600, 2)], [("c", 3)]], arrow.map_("string", "int64"))
    parquet.write_table(arrow.table({"text": ["good"] * 4, "more": pairs}), file := tmp_path / "in.parquet")
    assert [one.rows for one in Source(file, READING).slices()] == [3, 1]
    found = [row["more"] for row in kept(model, file, tmp_path / "pairs.jsonl")]
    assert found[::3] == [[["a", 1]], [["c", 3]]]


LARGE = "good film " * 10_000


def repeated(text: str, rows: int, kind: str) -> Any:
    """A column of equal texts that a file can have as a single text and a few bytes."""
    if kind == "delta":
        return arrow.array([text] * rows)
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), arrow.array([text]))
    if kind == "struct":
        return arrow.StructArray.from_arrays([column], ["inner"])
    if kind == "list":
        column = arrow.concat_arrays([column] * 8)
        return arrow.ListArray.from_arrays(list(range(0, 8 * rows + 1, 8)), column)
    return column


@pytest.mark.parametrize(
    ("kind", "compression", "stores_types"),
    [
        *((kind, "zstd", False) for kind in ("struct", "list", "delta")),
        ("dictionary", "none", True),
        ("dictionary", "lz4", False),
    ],
)
def test_memory_does_not_grow_with_texts_that_a_file_has_only_once(
    tmp_path: Path, limits: Limits, kind: str, compression: str, stores_types: bool
) -> None:
    limits.lower(SLICE_ROWS=2048, SLICE_CHARS=2**20, READ_BYTES=2**21)
    file, rows = tmp_path / "in.parquet", 300
    texts = arrow.array([f"good {i}" for i in range(rows)])
    columns = {"text": texts, "more": repeated(LARGE, rows, kind)}
    if kind in ("dictionary", "delta"):
        columns = {"text": columns["more"], "more": texts}
    delta = {next(iter(columns)): "DELTA_BYTE_ARRAY"} if kind == "delta" else None
    parquet.write_table(
        arrow.table(columns),
        file,
        compression=compression,
        use_dictionary=not delta,
        column_encoding=delta,
        store_schema=stores_types,
    )
    before, seen = arrow.total_allocated_bytes(), 0
    for one in Source(file, READING).slices():
        assert one.rows <= 12 and not one.refused
        assert arrow.total_allocated_bytes() - before < 2**23  # of 30 MB
        assert one.number == seen
        seen += one.rows
    assert seen == rows


@pytest.mark.parametrize("values", ["texts", "dictionary", "nulls"])
def test_pages_that_are_too_large_are_refused_unless_their_column_is_left_out(
    tmp_path: Path, limits: Limits, values: str
) -> None:
    limits.lower(PAGES_BYTES=2**16)
    file, rows = tmp_path / "in.parquet", 20
    more = {
        "texts": arrow.array([LARGE, *["x"] * (rows - 1)]),
        "dictionary": repeated(LARGE, rows, "dictionary"),
        "nulls": arrow.nulls(1000 * rows, arrow.int8()),
    }[values]
    if len(more) > rows:
        more = arrow.ListArray.from_arrays([1000 * i for i in range(rows + 1)], more)
    table = arrow.table({"text": [f"good {i}" for i in range(rows)], "more": more})
    parquet.write_table(table, file, use_dictionary=values == "dictionary")
    assert file.stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"in.parquet: row group 0: the pages of .*'more.*leave columns out"):
        list(Source(file, READING).slices())
    assert sum(one.rows for one in Source(file, READING, ["text"]).slices()) == rows


def test_a_row_that_is_too_large_is_refused(model: de3.Classifier, tmp_path: Path, limits: Limits) -> None:
    limits.lower(MAX_LINE=2**16, SLICE_CHARS=2**16)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS[:20])]
    for i in (0, 3, 19):
        rows[i]["text"] = LARGE
    types = arrow.schema([arrow.field("id", arrow.int64(), nullable=False), ("text", arrow.string())])
    parquet.write_table(arrow.Table.from_pylist(rows, types), tmp_path / "in.parquet", row_group_size=7)
    small = [1, 2, *range(4, 19)]
    file, reason = tmp_path / "in.parquet", "a row of more than 65536 bytes"
    found = kept(model, file, tmp_path / "kept.parquet")
    assert [row["id"] for row in found] == [i if i in small else None for i in range(20)]
    assert {row["error"] for i, row in enumerate(found) if i not in small} == {reason}
    found = kept(model, file, tmp_path / "none.csv", keep=[])
    assert [i for i, row in enumerate(found) if not row["error"]] == small
    found, refused = dropping(model, file, tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == small
    assert refused == [
        {"row": row, "where": f"{file}:{row}", "reason": reason, "content": LARGE[:1000]}
        for row in (0, 3, 19)
    ]


def test_damaged_pages_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", [{"text": text} for text in TEXTS[:20]])
    content, errors = file.read_bytes(), 0
    for at in range(4, 60):  # the header of the first page, and the page
        for byte in (0, 0xFF):
            file.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                list(Source(file, READING).slices())
            except ValueError as error:
                errors += 1
                assert str(file) in str(error)
    assert errors > 25


def test_values_that_are_nested_too_deeply(model: de3.Classifier, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lists = ["[" * n + "]" * n for n in (1, MAX_DEPTH - 1, MAX_DEPTH + 1, 10**5)]
    file.write_text("".join(f'{{"text": "good", "x": {one}}}\n' for one in lists))
    for kind in (".jsonl", ".parquet"):
        rows, refused = dropping(model, file, tmp_path / f"out{kind}")
        assert len(rows) == 2 and [one["reason"][:8] for one in refused] == ["nested m", "not JSON"], kind
    column = arrow.array([1])
    for _ in range(MAX_DEPTH + 1):
        column = arrow.StructArray.from_arrays([column], ["x"])
    parquet.write_table(arrow.table({"text": ["good"], "x": column}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in.parquet: row group 0: the column x.x.* levels deep"):
        list(Source(tmp_path / "in.parquet", READING).slices())


def test_rows_that_cannot_be_classified(model: de3.Classifier, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = {
        b'{"text": "good", "id": "a"}': "",
        b"not json": "not JSON",
        b'"bad"': "",
        b"[1]": "not an object",
        b'{"text": null, "id": "c"}': "is empty",
        b'{"id": "d", "text": 5}': "must be text",
        b'{"text": "\\ud800"}': "surrogate",
        b'{"id": "e", "more": 1}': "no column",
        b'"caf\xe9"': "UTF-8",
        b'"fine"': "",
    }
    file.write_bytes(b"\n".join(rows) + b"\n")
    for kind in KINDS:
        found = kept(model, file, tmp_path / f"kept{kind}")
        for row, (line, reason) in zip(found, rows.items(), strict=True):
            assert reason in (row["error"] or "") and bool(row["label"]) == (not reason), (kind, line)
        assert [row.get("text") or "" for row in found] == ["good", "", "bad", *[""] * 6, "fine"]
        assert [row.get("id") or "" for row in found] == ["a", "", "", "", "c", "d", "", "e", "", ""]
    found, refused = dropping(model, file, out)
    assert [row["text"] for row in found] == ["good", "bad", "fine"]
    # pyarrow refuses half of a surrogate pair.
    assert arrow_json.read_json(f"{out}.refused.jsonl").to_pylist() == refused
    assert [refused[i]["content"] for i in (4, 6)] == [r'{"text": "\ud800"}', '"caf\\udce9"\n']
    expected = [(row, f"{file}:{row + 1}", reason) for row, reason in enumerate(rows.values()) if reason]
    for one, (number, where, reason) in zip(refused, expected, strict=True):
        assert (one["row"], one["where"]) == (number, where) and reason in one["reason"]


def test_values_of_other_types_are_written_as_text(model: de3.Classifier, tmp_path: Path) -> None:
    file, table = tmp_path / "in.jsonl", tmp_path / "in.parquet"

    def one(file: Path, kind: str) -> dict[str, Any]:
        (row,) = kept(model, file, tmp_path / f"{file.suffix[1:]}{kind}")
        return row

    numbers = '"n": [1e999, {"big": 36893488147419103232}]'
    file.write_text(f'{{"text": "good", {numbers}, "yes": true, "names": ["a", "b"]}}\n')
    row = one(file, ".csv")
    assert one(file, ".jsonl")["n"] == json.loads(row["n"]) == [None, {"big": 2**65}]
    assert (row["yes"], row["names"]) == ("true", f"a{SEPARATOR}b")
    file.write_text('{"text": "good", "more": {}}\n')
    with pytest.raises(ValueError, match=r"cannot be written as parquet .*'more'.*--keep"):
        one(file, ".parquet")
    write(table, [{"text": "good", "data": b"\xff\x00"}])
    assert {one(table, kind)["data"].strip('"') for kind in (".jsonl", ".csv")} == {"/wA="}
    dates = arrow.array([2**31 - 1], arrow.int32()).cast(arrow.date32())  # after the year 9999
    parquet.write_table(arrow.table({"text": ["good"], "on": dates}), table)
    classify(Here(model), table, tmp_path / "dates.parquet")
    with pytest.raises(ValueError, match=r"only \.parquet can hold .*--keep"):
        one(table, ".tsv")


def test_columns_that_change_their_type_are_refused_early(model: de3.Classifier, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    half = write(tmp_path / "half.jsonl", [*rows[:41], {**rows[41], "half": "\ud800"}, *rows[42:]])
    text = write(tmp_path / "text.jsonl", [*rows[:40], {**rows[40], "n": "forty"}])
    for file, out, says in (
        (text, "out.parquet", r"as parquet \(.*text\.jsonl:41: n is string, but int64 .* --keep"),
        (half, "out.csv", r"half\.jsonl:42: has the column 'half', which the first row lacks"),
    ):
        with pytest.raises(ValueError, match=says):
            classify(Here(model), file, tmp_path / out, 1000)
    for out, keep in (("out.jsonl", None), ("numbers.parquet", ["n"])):
        found = kept(model, half, tmp_path / out, keep=keep)
        assert [row["n"] for row in found] == [*range(100)] and (keep or found[41]["half"] == "\ud800")
    later = [row if row["n"] < 48 else {**row, "n": row["n"] + 0.5} for row in rows]
    file = write(tmp_path / "later.jsonl", later)
    for _ in range(2):  # also after the run is continued, when the previous part is only a file
        with pytest.raises(ValueError, match=r"as parquet \(.*later\.jsonl:49: n is double, but int64"):
            classify(Here(model), file, tmp_path / "more.parquet", keep=["n"])
        assert len(list((tmp_path / "more.parquet.parts").glob("part-*"))) == 3


def test_rows_of_tables_that_cannot_be_classified(model: de3.Classifier, tmp_path: Path) -> None:
    table, shifted, folder = tmp_path / "in.csv", tmp_path / "shifted.csv", tmp_path / "folder"
    table.write_bytes(b'id,text\n1,good\n2,a,b\n3,"two\nlines"\n4,caf\xe9\n5,\n6,"a ""fine"" one"\n')
    found = kept(model, table, tmp_path / "kept.csv")
    assert [row["id"] for row in found] == list("123456") and not any(row["text"] for row in found[1:5:2])
    found, refused = dropping(model, table, tmp_path / "a.csv")
    assert [row["id"] for row in found] == ["1", "3", "6"]
    assert [one["where"].rpartition(":")[2] for one in refused] == ["3", "6", "7"]
    shifted.write_bytes(b"a,text,id\n1,a,b,2\n3,good,4\n")  # 2 may be in any column after the text
    found = kept(model, shifted, tmp_path / "shifted.jsonl")
    assert [(row["a"], row["id"]) for row in found] == [("1", None), ("3", "4")]
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.parquet", [{"id": i, "text": None if i == 9 else "fine"} for i in range(10)])
    assert [row["id"] for row in kept(model, folder, tmp_path / "kept.parquet")] == [*range(10)] * 2
    found, refused = dropping(model, folder, tmp_path / "b.parquet")
    assert [row["id"] for row in found] == [*range(9)] * 2
    for one, row, name in zip(refused, (9, 19), ("a", "b"), strict=True):
        assert (one["row"], one["where"]) == (row, f"{folder}/{name}.parquet:9")
        assert json.loads(one["content"]) == {"id": 9, "text": None}


def test_single_texts_and_pairs_in_one_file(model: de3.Classifier, tmp_path: Path) -> None:
    rows = [{"n": 0, "text": "good", "text_pair": None}, {"n": 1, "text": "bad", "text_pair": "good"}]
    file = write(tmp_path / "in.parquet", rows)
    found = kept(model, file, tmp_path / "out.parquet", keep=["n"])
    expected = model.classify(["good", ("bad", "good")], tau=0.3, as_arrow=True)
    assert [row["probs"] for row in found] == expected.column("probs").to_pylist()
    assert [row["n"] for row in found] == [0, 1] and "text" not in found[0]
    (only_pairs,) = Source(file, Columns(label=None, text_pair="text_pair")).slices()
    assert only_pairs.texts == [None, ("bad", "good")] and len(only_pairs.refused) == 1
    file = write(tmp_path / "in.jsonl", [{"n": 0, "text": "good"}, {"text": "bad"}])
    assert [row["n"] for row in kept(model, file, tmp_path / "out.jsonl", keep=["n"])] == [0, None]


def test_an_output_is_only_continued_by_the_same_run(model: de3.Classifier, tmp_path: Path) -> None:
    out, file = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])

    def refuses(says: str, out: Path = out, drops_refused: bool = False, **noted: int) -> None:
        with pytest.raises(ValueError, match=says):
            Parts(out, ".jsonl", noted, drops_refused)

    with pytest.raises(KeyboardInterrupt):
        classify(Here(model, 9), file, out)
    refuses(r"other settings \(a\): use the same command, or remove", a=2)
    refuses(r"other settings \(b\)", a=1, b=2)
    with closing(Parts(out, ".jsonl", {"a": 1})):
        refuses("another run is writing to it", a=1)
    classify(Here(model), file, out)
    refuses(r"out\.jsonl: already exists", a=2)
    with out.open("a") as opened:
        opened.write("another row\n")
    refuses(r"out\.jsonl: already exists", a=1)
    out.unlink()
    (tmp_path / "out.jsonl.refused.jsonl").write_text("may be this run's input")
    refuses(r"refused\.jsonl: already exists", drops_refused=True, a=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    refuses("contains other files", tmp_path / "full")


def test_a_run_without_a_part_leaves_nothing(model: de3.Classifier, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"sentence": "good"}])
    with pytest.raises(ValueError, match="none of the first 1 rows"):
        classify(Here(model), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "mine").mkdir()
    Parts(tmp_path / "mine", ".jsonl", {}).close()
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model tiny --file {0} --out {0}/out", "files of one kind"),
        ("--file {0}/in.jsonl", "--out is missing"),
        ("--model tiny --file {0}/in.jsonl --out {0}/out.xlsx", "expected .csv, .jsonl"),
        ("--file - --out - --refused drop", "--refused: "),
        ("good --url http://127.0.0.1:9", "de3 serve"),
    ],
)
def test_errors_of_the_command(store: Path, tmp_path: Path, arguments: str, says: str) -> None:
    write(tmp_path / "in.jsonl", [{"text": "good"}])
    (tmp_path / "in.csv").touch()
    where = f"--store {store}" if "--model" in arguments else ""
    assert says in refusal(f"classify {where} {arguments.format(tmp_path)}")


BOTH = ["mood-int8", "tiny-int8"]


class Refusing:
    """A client whose server refuses texts with "bad", and requests with more than `most` texts."""

    def __init__(self, most: int, names_first: bool, answers: Sequence[str] = ()) -> None:
        """answers: the models that answer, in this order; default: the one that is asked for."""
        self._most, self._names_first, self._answers = most, names_first, iter(answers)
        self.asked = list[list[Input]]()

    def classify(self, texts: list[Input], **options: Any) -> Any:
        self.asked.append(texts)
        bad = (i for i, text in enumerate(texts) if "bad" in text)
        named = {i: f"input[{i}]" if len(texts) > 1 else "input" for i in bad}
        if len(texts) > self._most:
            raise ServerError(413 if self._names_first else 422, "too many", "input", None)
        if named:
            index = min(named) if self._names_first else max(named)
            raise ServerError(422, str(texts[index]), named[index] + (".text" if index % 2 else ""), None)
        exits = [{"layer": i, "reason": "threshold", "tau": 0.1, "score": 0.0} for i in range(len(texts))]
        rows = [{"label": t, "probs": [1.0], "exit": one} for t, one in zip(texts, exits, strict=True)]
        return SimpleNamespace(
            model=next(self._answers, options["model"]), rows=[SimpleNamespace(raw=row) for row in rows]
        )


@given(
    st.lists(st.none() | st.text("ab ", max_size=9).map(lambda text: text.replace("ab", "bad")), max_size=24),
    st.integers(1, 9),
    st.booleans(),
)
def test_a_server_that_refuses_texts_and_large_requests_answers_the_others_in_order(
    given: list[str | None], most: int, names_first: bool
) -> None:
    texts: list[Input] = [text for text in given if text is not None]

    def fits(batch: Sequence[Input]) -> bool:
        return len(batch) == 1 or (len(batch) <= 4 and sum(map(len, batch)) <= 20)

    client = Refusing(most, names_first)
    one = pool.RemotePool(client, ["m"], {"long": "windows"}, 1)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        Limits(patch).lower(MAX_BATCH=4, MAX_BATCH_CHARS=20)
        answers = one.submit(given).result()
    one.close()
    errors = ["missing" if text is None else text if "bad" in text else None for text in given]
    assert answers.values.pop("error") == errors
    labels = [None if error else text for text, error in zip(given, errors, strict=True)]
    assert answers.values["label"] == labels
    assert answers.values["windows_of"] == [None if error else 1 for error in errors]
    assert all(fits(asked) for asked in client.asked)
    found = [texts[part] for part in batches([len(str(text)) for text in texts], 4, 20)]
    assert [text for batch in found for text in batch] == texts and all(map(fits, found))
    assert not any(fits([*batch, following[0]]) for batch, following in pairwise(found))


def test_a_server_whose_answers_cannot_be_combined_is_an_error() -> None:
    client = Refusing(9, True, ["m:1", "m:2"])
    with closing(pool.RemotePool(client, ["m"], {}, 1)) as one:  # type: ignore[arg-type]
        one.submit(["good"]).result()
        with pytest.raises(ValueError, match="m:1, m:2"):
            one.submit(["good"]).result()
        for status, field in ((422, "tau"), (401, None), (0, None)):
            error = ServerError(status, "no", field, None)
            client.classify = Mock(side_effect=error)  # type: ignore[method-assign]
            with pytest.raises(ValueError, match="no"):
                one.submit(["good", "fine"]).result()


def test_the_command_in_processes(store: Path, tmp_path: Path) -> None:
    """A run that Ctrl+C stops, of which the same command then writes the rest."""
    out, texts = tmp_path / "out.parquet", [*TEXTS, LONG]
    file = write(tmp_path / "in.csv", [{"id": i, "text": text} for i, text in enumerate([*texts, ""])])
    command = f"classify --store {store} --model tiny-int8 --max-disagreement 0.5 --threads 2 --prefix de3_ "
    command += f"--refused drop --part-rows 32 --file {file} --out {out}"
    write_part, parts = Format.write, count()

    def interrupted(*written: Any) -> None:
        if next(parts) in (0, 2):  # of all runs
            raise KeyboardInterrupt
        write_part(*written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Format, "write", interrupted)
        for said in ("no rows are kept yet: the same command starts again", "32 rows kept; the same command"):
            stopped = invoke(command)
            assert stopped.exit_code == 130 and f"stopped; {said}" in stopped.stderr
    output = de3_command(command)
    with de3.load("tiny-int8", store=store, threads=1) as model:
        expected = model.classify(texts, max_disagreement=0.5, as_arrow=True)
    assert [row["de3_probs"] for row in read(out)] == expected.column("probs").to_pylist()
    for line in (
        "102 rows (32 of them by an earlier run)",
        "exits by layer in this run: ",
        "at most 50% of the answers differ from full depth (with 95% confidence)",
        f"1 row cannot be classified: {out}.refused.jsonl",
        "1 text in this run truncated to the model's limit (--long windows reads more)",
    ):
        assert line in output
    for more, code in (("", 0), ("--max-refused 0.0098", 3), ("--max-refused 0.0099", 0)):  # 1 of 102 rows
        again = invoke(f"{command} {more}")
        assert again.exit_code == code and "out.parquet is complete: nothing to do" in again.stderr
    summary = json.loads((tmp_path / "_out.parquet.run.json").read_text())["summary"]
    assert [summary[name] for name in ("rows", "refused", "earlier", "truncated")] == [102, 1, 32, 1]
    about = json.loads(parquet.read_schema(out).metadata[b"de3"])
    assert about["model"] == "tiny-int8:1" and len(about["labels"]) == 2


def test_the_report_certifies_only_what_the_calibration_covers(store: Path) -> None:
    artifact, summary = Store(store).open("tiny"), run.Summary(rows=9, answered=9, seconds=10)

    def certifies(**options: Any) -> bool:
        return any("with 95% confidence" in line for line in report(summary, [artifact], options))

    assert certifies(max_disagreement=0.5)
    assert not certifies(tau=0.1) and not certifies(max_disagreement=0.5, long="windows")
    assert not certifies(max_disagreement=1e-9)  # every text runs to full depth


def test_processes_map_the_weights_of_one_encoder(several: Path) -> None:
    with closing(pool.LocalPool([Store(several).open(name) for name in BOTH], {}, 2)) as found:
        found.submit(["good"]).result()
        workers = set(process_tree(os.getpid())) - {os.getpid()}
        mapped = [Path(f"/proc/{pid}/maps").read_text().count("memfd:de3-weights") for pid in workers]
    assert set(mapped) - {0} == {1}


BOTH = ["mood-int8", "tiny-int8"]


def test_several_models_classify_a_file_on_one_pass(several: Path, tmp_path: Path) -> None:
    texts, out = [*TEXTS[:40], LONG, ""], tmp_path / "out"
    file = write(tmp_path / "in.parquet", [{"id": i, "text": text} for i, text in enumerate(texts)])
    with de3.load(BOTH, store=several, threads=1) as both:
        expected = both.answers(texts, tau=0.9, long="error")
    options = f"classify --file {file} --long error --tau 0.9 --model {','.join(BOTH)}"
    local = f"{options} --store {several} --threads 2 --out {out}"
    output = de3_command(local)
    rows = read(out / "part-000000.parquet")
    assert [list(row) for row in rows] == [["id", "text", *expected[0]]] * 42
    for row, one in zip(rows, expected, strict=True):
        assert row.items() >= {**one, "error": row["error"]}.items()
        assert bool(row["error"]) == bool(one["error"])
    assert [bool(row["error"]) for row in rows] == [False] * 40 + [True] * 2
    for name in BOTH:
        layers = Counter(row[f"{name}_exit_layer"] for row in expected[:40])
        shares = ", ".join(f"{n}: {100 * count / 40:.1f}%" for n, count in sorted(layers.items()))
        assert f"{name}: exits by layer: {shares}" in output and f"{name}: certified: nothing" in output
    about = json.loads(parquet.read_schema(out / "part-000000.parquet").metadata[b"de3"])
    assert [one["model"] for one in about["models"]] == ["mood-int8:1", "tiny-int8:1"]
    assert "other settings (models, artifact)" in refusal(local.replace("mood-int8,tiny", "tiny-int8,mood"))

    mixed = ["tiny", *BOTH]  # two encoders
    with closing(pool.LocalPool([Store(several).open(name) for name in mixed], {"tau": 0.9}, 2)) as found:
        answer = found.submit(texts[:9]).result()
    with de3.load(mixed, store=several, threads=1) as three:
        assert answer.values == three.answers(texts[:9], as_arrow=True, tau=0.9).to_pydict()
    text = ["classify", "a good film", "--model", ",".join(BOTH)]
    with serving(several, models=BOTH) as server:
        output = de3_command(f"{options} --url {server.url} --out {tmp_path}/url.jsonl --refused drop")
        assert "tiny-int8: exits by layer: " in output
        found = de3_command([*text, "--url", server.url])
    assert de3_command([*text, "--store", str(several)]) == found
    assert found.startswith("mood-int8: ") and "\ntiny-int8: " in found
    for row, one in zip(read(tmp_path / "url.jsonl"), expected[:40], strict=True):
        for name in BOTH:
            for column in ("label", "exit_layer", "exit_reason"):
                assert row[f"{name}_{column}"] == one[f"{name}_{column}"]
            assert row[f"{name}_probs"] == [round(p, 6) for p in one[f"{name}_probs"]]


def test_standard_input_and_output(
    store: Path, tmp_path: Path, model: de3.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.progress.LOG_EVERY_S", 0.0)
    run, texts = (
        f"classify --store {store} --model tiny-int8 --tau 0 --threads 2",
        ["good", "", 'a "dull" plot'],
    )
    found = invoke(f"{run} - --max-refused 0.2", input=(given := "\n".join([*texts, ""])))
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 3 and rows[1]["error"].startswith("text is empty")
    assert "  classifying: 3 of 3 rows, " in found.stderr
    assert [row["text"] for row in rows] == texts
    assert [row["probs"] for row in rows] == model.answers_by_column(texts, tau=0).values["probs"]
    objects = "\n" + "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    found = invoke(f"{run} -", input=objects)
    again = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 0 and again == [{**row, "id": i} for i, row in enumerate(rows)]
    found = invoke(f"{run} -", input='{"sentence": "good"}')
    assert "classified: standard input:1: no column 'text'" in str(found.exception)
    assert invoke(f"{run} --file - --out {tmp_path}/out.csv --keep none", input=given).stdout == ""
    assert [row["label"] for row in read(tmp_path / "out.csv")] == [row["label"] or "" for row in rows]
    assert "1 of 2 texts were truncated to the model's limit" in de3_command([*run.split(), LONG, "good"])


def test_a_server_answers_files(store: Path, tmp_path: Path, model: de3.Classifier) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[Any] = [{"text": text, "id": i} for i, text in enumerate(TEXTS[:40])]
    rows[7] = {"text": TEXTS[7], "text_pair": "a dull plot", "id": 7}
    rows[9] = {"text": LONG, "id": 9}
    write(file, rows)
    with serving(store, models=["tiny-int8"], max_texts=3) as server:  # fewer than the command sends at once
        de3_command(f"classify --file {file} --out {out} --url {server.url} --tau 0.1 --long error")
        (tmp_path / "blank.txt").write_text("\n")  # the server is not asked for this row
        de3_command(f"classify --file {tmp_path}/blank.txt --out {tmp_path}/blank.csv --url {server.url}")
        assert names_in(tmp_path / "blank.csv") == ["text", *model.answers_by_column([]).values]
        assert len(read(tmp_path / "blank.csv")) == 1
        assert "the server answered 422: tau: " in refusal(f"classify good --tau 7 --url {server.url}")
        output = de3_command(["classify", "a good film", "a dull plot", "--tau", "0", "--url", server.url])
    labels = [row.label for row in model.classify(["a good film", "a dull plot"], tau=0)]
    assert [line.split("  ")[0] for line in output.splitlines()] == labels and "layer 3" in output
    found = read(out)
    assert [row["id"] for row in found] == list(range(40))
    inputs = [(row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in rows]
    for row, one in zip(found, model.answers(inputs, tau=0.1, long="error"), strict=True):
        probs = one["probs"] and [round(p, 6) for p in one["probs"]]
        assert (row["probs"], row["exit_layer"], row["error"]) == (probs, one["exit_layer"], one["error"])
    assert found[9]["error"].startswith("has 122 tokens") and found[9]["label"] is None
