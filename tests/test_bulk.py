"""`de3 classify --file`: files in and out, refused rows, and runs that are continued."""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError
from io import BytesIO
from itertools import count, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as arrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import json as arrow_json
from pyarrow import parquet

import de3
from de3.bulk import formats, pages, parts, pool, run, source
from de3.bulk.formats import KINDS
from de3.bulk.parts import Parts
from de3.bulk.report import report
from de3.bulk.source import Source
from de3.client import Input, ServerError, batches
from de3.columns import Answers
from de3.data import tables
from de3.data.tables import MAX_DEPTH, SEPARATOR, Columns
from de3.loadtest.servers import process_tree
from de3.model_store.manifest import fingerprint
from de3.model_store.store import Store
from tests.commands import de3 as command
from tests.commands import invoke, refusal
from tests.fixtures import make_rows
from tests.serving import serving, until

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
) -> Any:
    output = Parts(out, out.suffix or ".parquet", {"a": 1}, drops_refused)
    try:
        summary = run.classify(Source(file, READING, keep), pool, output, lambda name: name, part_rows)
        return summary, output.finish(summary.parts, summary.json())
    finally:
        output.close()


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
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


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "SLICE_ROWS", 8)


@pytest.mark.parametrize(
    ("kind_in", "kind_out"),
    [*((".parquet", kind) for kind in KINDS), *((kind, ".jsonl") for kind in (".csv", ".tsv", ".txt"))],
)
def test_every_format(model: de3.Classifier, tmp_path: Path, kind_in: str, kind_out: str) -> None:
    file, out = tmp_path / f"in{kind_in}", tmp_path / f"out{kind_out}"
    write(file, [{"id": f"a{i}", "text": text} for i, text in enumerate(TEXTS)])
    pool = Here(model)
    summary, refused = classify(pool, file, out)
    rows, expected = read(out), model.classify(TEXTS, tau=0.3)
    exact = model.classify(TEXTS, tau=0.3, as_arrow=True)
    assert summary.truncated == summary.json()["truncated"] == 0
    assert pool.most == 5  # two for each process, and one
    assert summary.rows == summary.answered == len(TEXTS) and refused is None
    assert [row["text"] for row in rows] == [text.strip() for text in TEXTS] or kind_in == ".txt"
    if kind_in != ".txt":
        assert [row["id"] for row in rows] == [f"a{i}" for i in range(len(TEXTS))]
    assert [row["label"] for row in rows] == [row.label for row in expected]
    assert [int(row["exit_layer"]) for row in rows] == [row.exit.layer for row in expected]
    probs = [row["probs"] if isinstance(row["probs"], list) else json.loads(row["probs"]) for row in rows]
    assert probs == exact.column("probs").to_pylist()
    assert {str(row["truncated"]).lower() for row in rows} == {"false"}
    assert summary.layers == {"": Counter(row.exit.layer for row in expected)}
    assert [file.name for file in tmp_path.iterdir() if "parts" in file.name] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_text_keeps_its_other_columns(
    model: de3.Classifier, tmp_path: Path, kind: str
) -> None:
    rows: list[Any] = [{"text": "good", "id": "a"}, {"id": "b", "more": 1}, {"text": 5, "id": "c"}]
    write(tmp_path / "in.jsonl", rows)
    classify(Here(model), tmp_path / "in.jsonl", tmp_path / f"out{kind}")
    found = read(tmp_path / f"out{kind}")
    assert [row["id"] for row in found] == ["a", "b", "c"]
    assert [row["text"] or None for row in found] == ["good", None, None]
    assert [bool(row["error"]) for row in found] == [False, True, True]


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
    output = Parts(out, kind, {})
    summary = run.classify(Source(folder, READING), Here(model), output, lambda name: f"de3_{name}", 16)
    output.finish(summary.parts, summary.json())
    output.close()
    files = sorted(file for file in out.iterdir() if file.name[0] != ".")
    assert [file.name for file in files] == ["_run.json", *(f"part-{n:06}{kind}" for n in range(4))]
    assert [len(read(file)) for file in files[1:]] == [16, 20, 20, 4]  # slices of 8, 8, 4, 8, 8, 4, ...
    rows = [row for file in files[1:] for row in read(file)]
    assert kind == ".jsonl" or {tuple(row)[:2] for row in rows} == {("id", "text")}
    assert [row["text"] for row in rows] == TEXTS[:60]
    assert [row.get("id") or "" for row in rows] == [*map(str, range(40)), *[""] * 20]
    assert [row["de3_label"] for row in rows] == [row.label for row in model.classify(TEXTS[:60], tau=0.3)]
    again = Parts(out, kind, {})
    assert again.is_complete
    again.close()


@pytest.mark.parametrize(("kind", "drops"), [*product([".parquet", ".csv"], [False, True])])
def test_a_run_that_is_interrupted_at_any_file_goes_on_with_the_same_bytes(
    model: de3.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, drops: bool
) -> None:
    file, whole, part_rows, many = tmp_path / "in.jsonl", tmp_path / f"whole{kind}", 16, 10**6
    rows: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS[:40])]
    rows[part_rows:] = [dict(reversed(row.items())) for row in rows[part_rows:]]
    for i in range(part_rows, 2 * part_rows):  # a part without answers
        rows[i]["text"] = " " if i % 8 else LONG
    write(file, rows)
    left, publish = many, formats.publish

    def interrupted(draft: Path, into: Path) -> None:
        nonlocal left
        assert draft != into
        for step in (lambda: None, lambda: publish(draft, into)):  # before and after the file appears
            step()
            left -= 1
            if not left:
                raise KeyboardInterrupt

    for module in (formats, parts):
        monkeypatch.setattr(module, "publish", interrupted)
    summary, refused = classify(Here(model), file, whole, part_rows, drops_refused=drops)
    assert (summary.rows, summary.answered, summary.refused) == (40, 24, 16)
    if drops:
        assert [row["row"] for row in read(refused)] == [*range(16, 32)]
        assert [int(row["id"]) for row in read(whole)] == [*range(16), *range(32, 40)]
    else:
        assert [int(row["id"]) for row in read(whole)] == [*range(40)] and refused is None
        assert [i for i, row in enumerate(read(whole)) if row["error"]] == [*range(16, 32)]
    for steps in range(1, many - left + 1):
        out, left = tmp_path / f"out{steps}{kind}", steps
        with pytest.raises(KeyboardInterrupt):
            classify(Here(model), file, out, part_rows, drops_refused=drops)
        left, pool = many, Here(model)
        rows_left = max(0, 40 - part_rows * len(list(Path(f"{out}.parts").glob("part-*"))))
        if out.exists():  # complete, but for the folder of parts
            again = Parts(out, kind, {"a": 1}, drops)
            assert again.is_complete and not Path(f"{out}.parts").exists()
            again.close()
        else:
            summary, refused_again = classify(pool, file, out, part_rows, drops_refused=drops)
            assert summary.rows - summary.earlier == rows_left and summary.refused == 16
            assert pool.texts == rows_left - (14 if rows_left > 8 else 0)
            assert not drops or refused.read_bytes() == refused_again.read_bytes()
        assert out.read_bytes() == whole.read_bytes()
        again = Parts(out, kind, {"a": 1}, drops)
        assert again.is_complete and (again.summary["rows"], again.summary["refused"]) == (40, 16)
        again.close()
        assert not Path(f"{out}.parts").exists()


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
    summary, refused = classify(Here(model), tmp_path / "in.jsonl", out, 8, drops_refused=True)
    assert (summary.answered, summary.refused) == (4, 1)
    assert len(read(out)) == 4 and len(read(refused)) == 1
    assert other.read_text() == "kept"


@pytest.mark.parametrize(("kind", "drops"), [*product(KINDS, [False, True])])
def test_values_that_need_care(model: de3.Classifier, tmp_path: Path, kind: str, drops: bool) -> None:
    """Quotation marks, line breaks and tabs in values and names; a part without rows; columns that a row lacks."""
    file, out = tmp_path / "in.jsonl", tmp_path / f"out{kind}"
    values = ['a "fine" one', "two\nlines", "a\rreturn", "a\ttab", "", "café"]
    rows: list[Any] = [{"my\nid": values[i % 6], "text": TEXTS[i], "none": None} for i in range(64)]
    for i in (20, 21):
        del rows[i]["my\nid"]
    for i in range(32, 64):
        rows[i]["text"] = " "
    write(file, rows)
    classify(Here(model), file, out, drops_refused=drops)
    found = read(out)
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
        expected = [value.replace("\n", " ").replace("\r", " ").replace("\t", " ") for value in expected]
    assert [row.get("my id" if kind == ".tsv" else "my\nid") for row in found] == expected
    assert [row["label"] for row in found] == [row.label for row in model.classify(TEXTS[:32], tau=0.3)]


def names_in(file: Path) -> list[str]:
    """The columns of a .parquet, .csv or .tsv file."""
    if file.suffix == ".parquet":
        return list(parquet.read_schema(file).names)
    return file.read_text().splitlines()[0].split("\t" if file.suffix == ".tsv" else ",")


@pytest.mark.parametrize(("kind", "drops"), [*product(KINDS, [False, True])])
def test_an_input_without_rows_or_texts_gives_an_output_with_all_columns(
    model: de3.Classifier, tmp_path: Path, kind: str, drops: bool
) -> None:
    columns = list(model.answers_by_column([]).values)
    no_texts = arrow.table({"id": arrow.array([1, 2] * 9), "text": arrow.nulls(18, arrow.string())})
    parquet.write_table(no_texts.slice(0, 0), tmp_path / "rows.parquet")
    parquet.write_table(no_texts, tmp_path / "texts.parquet")
    contents = {
        "rows.csv": "id,text\n",
        "texts.csv": "id,text\n" + "1,\n2,\n" * 9,
        "rows.txt": "",
        "texts.txt": "\n" * 18,
        "rows.jsonl": "",
        "texts.jsonl": '{"id": 1, "text": null}\n' * 18,
        "nothing.csv": "",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
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
    table = arrow.table({"sentence": ["good"] * rows, "label": ["a"] * rows})
    parquet.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "in.csv").write_text("sentence,label\n" + "good,a\n" * rows)
    for name, where in (("in.parquet", "in.parquet"), ("in.csv", "in.csv:1")):
        with pytest.raises(ValueError, match=f"{where}: no column 'text'; it has 'sentence'.*--text-column"):
            list(Source(tmp_path / name, READING).slices())
        with pytest.raises(ValueError, match=f"{where}: no column 'other'; .*--pair-column"):
            list(Source(tmp_path / name, Columns("sentence", "other", label=None)).slices())
        with pytest.raises(ValueError, match=f"{where}: no column 'more'; .*--keep"):
            list(Source(tmp_path / name, Columns("sentence", label=None), ["more"]).slices())
        output = Parts(tmp_path / f"{name}.csv", ".csv", {})
        with pytest.raises(ValueError, match="label: is a column of the input and of the answers"):
            run.classify(
                Source(tmp_path / name, Columns("sentence", label=None)), Here(model), output, lambda n: n
            )
        output.close()
    write(tmp_path / "in.jsonl", [{"text": "good"}] * rows)
    if rows:
        with pytest.raises(ValueError, match=r"none of the first 1 rows .*no column 'other'.*--pair-column"):
            list(Source(tmp_path / "in.jsonl", Columns("text", "other", label=None)).slices())


def test_files_of_a_folder_without_rows(model: de3.Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (("a", "text\ngood\n"), ("b", "text\n"), ("c", "text\nbad\n")):
        (folder / f"{name}.csv").write_text(text)
    classify(Here(model), folder, tmp_path / "out.csv")
    assert [row["text"] for row in read(tmp_path / "out.csv")] == ["good", "bad"]


def test_large_columns_end_slices_and_parts(
    model: de3.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SLICE_CHARS", 500)
    monkeypatch.setattr(run, "PART_CHARS", 1000)
    for kind in (".jsonl", ".parquet"):
        write(tmp_path / f"in{kind}", [{"text": text, "more": "x" * 200} for text in TEXTS])
        slices = list(Source(tmp_path / f"in{kind}", READING).slices())
        assert max(one.rows for one in slices) <= 4 and sum(one.rows for one in slices) == 100
        summary, _ = classify(Here(model), tmp_path / f"in{kind}", tmp_path / f"out{kind}", 10**6)
        assert 10 < summary.parts <= len(slices) / 2 + 1  # two slices have enough characters


LARGE = "good film " * 10_000


def repeated(text: str, rows: int, kind: str) -> Any:
    """A column of equal texts that a file can have as a single text and a few bytes."""
    if kind == "delta":
        return arrow.array([text] * rows)
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), arrow.array([text]))
    if kind == "struct":
        return arrow.StructArray.from_arrays([column], ["inner"])
    if kind == "list":
        return arrow.ListArray.from_arrays(list(range(rows + 1)), column)
    return column


@pytest.mark.parametrize(
    ("kind", "compression", "stores_types"),
    [
        *((kind, "zstd", False) for kind in ("dictionary", "struct", "list", "delta")),
        *((kind, "none", True) for kind in ("dictionary", "list")),
        ("dictionary", "lz4", False),
    ],
)
def test_memory_does_not_grow_with_texts_that_a_file_has_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str, stores_types: bool
) -> None:
    monkeypatch.setattr(source, "SLICE_ROWS", 2048)
    monkeypatch.setattr(source, "SLICE_CHARS", 2**20)
    monkeypatch.setattr(pages, "READ_BYTES", 2**21)
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


def test_a_page_is_of_the_kind_that_its_type_says(tmp_path: Path) -> None:
    """Otherwise a second description in its header, which pyarrow ignores, could hide how large its texts are."""
    file, rows = tmp_path / "in.parquet", 300
    parquet.write_table(
        arrow.table({"text": [LARGE] * rows}),
        file,
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        data_page_version="2.0",
        compression="none",
        write_statistics=False,
    )
    start = parquet.read_metadata(file).row_group(0).column(0).data_page_offset
    opened = BytesIO(file.read_bytes())
    opened.seek(start)
    (true,) = list(pages._pages(opened, parquet.read_metadata(file).row_group(0).column(0), rows))[:1]
    data = opened.getvalue()
    # Field 5, a page of plain values, before field 8: the header says how far apart the numbers of fields are.
    place = data.index(b"\x5c", start)
    plain = b"\x2c" + b"\x15\xd8\x04" + b"\x15\x00" * 3 + b"\x00"
    opened = BytesIO(data[:place] + plain + b"\x3c" + data[place + 1 :])
    opened.seek(start)
    assert pages._struct(opened)[5][1] == rows
    opened.seek(start)
    (page,) = list(pages._pages(opened, parquet.read_metadata(file).row_group(0).column(0), rows))[:1]
    assert page.value_bytes == true.value_bytes >= len(LARGE)


@pytest.mark.parametrize("values", ["texts", "dictionary", "large page", "nulls"])
def test_pages_that_are_too_large_are_refused_unless_their_column_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    monkeypatch.setattr(pages, "PAGES_BYTES", 2**16)
    file, rows = tmp_path / "in.parquet", 20
    more = {
        "texts": arrow.array([LARGE, *["x"] * (rows - 1)]),
        "dictionary": repeated(LARGE, rows, "dictionary"),
        "large page": arrow.array([float(i) for i in range(1000 * rows)], arrow.float64()),
        "nulls": arrow.nulls(1000 * rows, arrow.int8()),
    }[values]
    if len(more) > rows:
        more = arrow.ListArray.from_arrays([1000 * i for i in range(rows + 1)], more)
    table = arrow.table({"text": [f"good {i}" for i in range(rows)], "more": more})
    parquet.write_table(table, file, use_dictionary=values == "dictionary")
    assert file.stat().st_size < 2**16 or values == "large page"
    with pytest.raises(ValueError, match=r"in.parquet: row group 0: the pages of .*'more.*leave columns out"):
        list(Source(file, READING).slices())
    assert sum(one.rows for one in Source(file, READING, ["text"]).slices()) == rows


def test_a_row_that_is_too_large_is_refused(
    model: de3.Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAX_LINE", "SLICE_CHARS"):
        monkeypatch.setattr(source, name, 2**16)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS[:20])]
    for i in (0, 3, 19):
        rows[i]["text"] = LARGE
    types = arrow.schema([arrow.field("id", arrow.int64(), nullable=False), ("text", arrow.string())])
    parquet.write_table(arrow.Table.from_pylist(rows, types), tmp_path / "in.parquet", row_group_size=7)
    small = [1, 2, *range(4, 19)]
    classify(Here(model), tmp_path / "in.parquet", tmp_path / "kept.parquet")
    kept = read(tmp_path / "kept.parquet")
    assert [row["id"] for row in kept] == [i if i in small else None for i in range(20)]
    assert {row["error"] for i, row in enumerate(kept) if i not in small} == {
        "a row of more than 65536 bytes"
    }
    classify(Here(model), tmp_path / "in.parquet", tmp_path / "none.csv", keep=[])
    assert [i for i, row in enumerate(read(tmp_path / "none.csv")) if not row["error"]] == small
    summary, refused = classify(
        Here(model), tmp_path / "in.parquet", tmp_path / "out.jsonl", drops_refused=True
    )
    assert (summary.rows, summary.refused) == (20, 3)
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == small
    for one, row in zip(read(refused), (0, 3, 19), strict=True):
        assert (one["row"], one["where"]) == (row, f"{tmp_path}/in.parquet:{row}")
        assert one["reason"] == "a row of more than 65536 bytes" and one["content"] == LARGE[:1000]


def test_no_row_of_several_lines_exceeds_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 2**16)
    row = ",".join(['"' + ("x" * 999 + "\n") * 30 + '"'] * 3)
    (tmp_path / "in.csv").write_text(f"text,a,b\ngood,1,2\n{row}\n")
    with pytest.raises(ValueError, match=r"in.csv:\d+: a row of more than 65536 characters"):
        list(Source(tmp_path / "in.csv", READING).slices())


def test_damaged_pages_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    write(file, [{"text": text} for text in TEXTS[:20]])
    content, errors = file.read_bytes(), 0
    for at in range(4, 60):  # the header of the first page, and the page
        for byte in (0, 0x15, 0x7F, 0xFF):
            file.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                list(Source(file, READING).slices())
            except ValueError as error:
                errors += 1
                assert str(file) in str(error)
    assert errors > 50


def test_values_that_are_nested_too_deeply(model: de3.Classifier, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lists = ["[" * n + "]" * n for n in (1, MAX_DEPTH - 1, MAX_DEPTH + 1, 10**5)]
    file.write_text("".join(f'{{"text": "good", "x": {one}}}\n' for one in lists))
    for kind in KINDS:
        summary, refused = classify(Here(model), file, tmp_path / f"out{kind}", drops_refused=True)
        assert (summary.answered, summary.refused) == (2, 2), kind
    assert [one["reason"][:11] for one in read(refused)] == ["nested more", "not JSON: m"]
    column = arrow.array([1])
    for _ in range(MAX_DEPTH + 1):
        column = arrow.StructArray.from_arrays([column], ["x"])
    parquet.write_table(arrow.table({"text": ["good"], "x": column}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in.parquet: row group 0: the column x.x.* levels deep"):
        list(Source(tmp_path / "in.parquet", READING).slices())


def test_nested_values_and_names_count_with_the_memory_that_they_take(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    write(file, [{"text": "good", "x": [[]] * 1000}, {"b" * 5000: 1}])
    (one,) = Source(file, READING).slices()
    assert one.chars > 30_000 and len(one.refused[1].reason) <= 1000


def test_rows_that_cannot_be_classified(model: de3.Classifier, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = {
        b'{"text": "good"}': "",
        b"not json": "not JSON",
        b'"bad"': "",
        b"[1]": "not an object",
        b'{"text": null}': "is empty",
        b'{"text": "\\ud800"}': "surrogate",
        b'{"b": 1}': "no column",
        b'"caf\xe9"': "UTF-8",
        b'"fine"': "",
    }
    file.write_bytes(b"\n".join(rows) + b"\n")
    for kind in KINDS:
        classify(Here(model), file, tmp_path / f"kept{kind}")
        kept = read(tmp_path / f"kept{kind}")
        for row, (line, reason) in zip(kept, rows.items(), strict=True):
            assert reason in (row["error"] or "") and bool(row["label"]) == (not reason), (kind, line)
        assert [row.get("text") or "" for row in kept] == ["good", "", "bad", "", "", "", "", "", "fine"]
    summary, refused = classify(Here(model), file, out, drops_refused=True)
    assert [row["text"] for row in read(out)] == ["good", "bad", "fine"]
    expected = [(row, f"{file}:{row + 1}", reason) for row, reason in enumerate(rows.values()) if reason]
    assert arrow_json.read_json(refused).to_pylist() == read(
        refused
    )  # which refuses half of a surrogate pair
    assert [read(refused)[i]["content"] for i in (3, 5)] == [r'{"text": "\ud800"}', '"caf\\udce9"\n']
    for one, (row, where, reason) in zip(read(refused), expected, strict=True):
        assert (one["row"], one["where"]) == (row, where) and reason in one["reason"]
    assert (summary.rows, summary.answered, summary.refused) == (9, 3, 6)


def test_values_of_other_types_are_written_as_text(model: de3.Classifier, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    numbers = '"n": [1e999, {"big": 36893488147419103232}]'
    file.write_text(f'{{"text": "good", {numbers}, "yes": true, "names": ["a", "b"]}}\n')
    classify(Here(model), file, tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["n"] == [None, {"big": 2**65}]
    classify(Here(model), file, tmp_path / "out.csv")
    (row,) = read(tmp_path / "out.csv")
    assert json.loads(row["n"]) == [None, {"big": 2**65}]
    assert (row["yes"], row["names"]) == ("true", f"a{SEPARATOR}b")
    file.write_text('{"text": "good", "more": {}}\n')
    with pytest.raises(ValueError, match=r"cannot be written as parquet .*'more'.*--keep"):
        classify(Here(model), file, tmp_path / "out.parquet")
    write(tmp_path / "in.parquet", [{"text": "good", "data": b"\xff\x00"}])
    for kind in (".jsonl", ".csv"):
        classify(Here(model), tmp_path / "in.parquet", tmp_path / f"bytes{kind}")
        assert read(tmp_path / f"bytes{kind}")[0]["data"].strip('"') == "/wA="
    pairs = arrow.array([[("a", 1)], None, [("b" * 10**7, 2)], [("c", 3)]], arrow.map_("string", "int64"))
    parquet.write_table(arrow.table({"text": ["good"] * 4, "more": pairs}), tmp_path / "in.parquet")
    sizes = [one.rows for one in Source(tmp_path / "in.parquet", READING).slices()]
    classify(Here(model), tmp_path / "in.parquet", tmp_path / "pairs.jsonl")
    assert [row["more"] for row in read(tmp_path / "pairs.jsonl")][::3] == [[["a", 1]], [["c", 3]]]
    assert sizes == [3, 1]  # slices end once they are large
    dates = arrow.array([2**31 - 1, 0], arrow.int32()).cast(arrow.date32())  # Python's end with the year 9999
    parquet.write_table(arrow.table({"text": [None, "good"], "on": dates}), tmp_path / "in.parquet")
    _, refused = classify(Here(model), tmp_path / "in.parquet", tmp_path / "dates.jsonl", drops_refused=True)
    assert read(tmp_path / "dates.jsonl")[0]["on"] == "1970-01-01"
    assert read(refused)[0]["content"] == '{"text": null}'
    with pytest.raises(ValueError, match=r"in\.parquet: days=2147483647"):
        list(Source(tmp_path / "in.parquet", Columns("on", label=None)).slices())
    parquet.write_table(arrow.table({"text": ["good", "bad"], "on": dates}), tmp_path / "in.parquet")
    classify(Here(model), tmp_path / "in.parquet", tmp_path / "dates.parquet")
    with pytest.raises(ValueError, match=r"only \.parquet can hold .*--keep"):
        classify(Here(model), tmp_path / "in.parquet", tmp_path / "no.csv")


def test_rows_of_tables_that_cannot_be_classified(model: de3.Classifier, tmp_path: Path) -> None:
    table = tmp_path / "in.csv"
    table.write_bytes(b'id,text\n1,good\n2,a,b\n3,"two\nlines"\n4,caf\xe9\n5,\n6,"a ""fine"" one"\n')
    classify(Here(model), table, tmp_path / "kept.csv")
    kept = [(row["id"], row["text"]) for row in read(tmp_path / "kept.csv")]
    assert [key for key, _ in kept] == list("123456") and [text for _, text in kept[1:5:2]] == ["", ""]
    (tmp_path / "shifted.csv").write_bytes(
        b"a,text,id\n1,a,b,2\n3,good,4\n"
    )  # 2 may be in any column after the text
    classify(Here(model), tmp_path / "shifted.csv", tmp_path / "shifted.jsonl")
    assert [(row["a"], row["id"]) for row in read(tmp_path / "shifted.jsonl")] == [("1", None), ("3", "4")]
    _, refused = classify(Here(model), table, tmp_path / "a.csv", drops_refused=True)
    assert [row["id"] for row in read(tmp_path / "a.csv")] == ["1", "3", "6"]
    assert [one["where"].rpartition(":")[2] for one in read(refused)] == ["3", "6", "7"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.parquet", [{"id": i, "text": None if i == 9 else "fine"} for i in range(10)])
    classify(Here(model), folder, tmp_path / "kept.parquet")
    assert [row["id"] for row in read(tmp_path / "kept.parquet")] == [*range(10), *range(10)]
    _, refused = classify(Here(model), folder, tmp_path / "b.parquet", drops_refused=True)
    assert [row["id"] for row in read(tmp_path / "b.parquet")] == [*range(9), *range(9)]
    for one, row, name in zip(read(refused), (9, 19), ("a", "b"), strict=True):
        assert (one["row"], one["where"]) == (row, f"{folder}/{name}.parquet:9")
        assert json.loads(one["content"]) == {"id": 9, "text": None}


def test_single_texts_and_pairs_in_one_file(model: de3.Classifier, tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    rows = [{"n": 0, "text": "good", "text_pair": None}, {"n": 1, "text": "bad", "text_pair": "good"}]
    write(file, rows)
    classify(Here(model), file, tmp_path / "out.parquet", keep=["n"])
    (only_pairs,) = Source(file, Columns(label=None, text_pair="text_pair")).slices()
    assert only_pairs.texts == [None, ("bad", "good")] and len(only_pairs.refused) == 1
    with pytest.raises(ValueError, match=r"no column 'm'.*--keep"):
        classify(Here(model), file, tmp_path / "other.parquet", keep=["m"])
    write(tmp_path / "in.jsonl", [{"n": 0, "text": "good"}, {"text": "bad"}])
    classify(Here(model), tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep=["n"])
    assert [row["n"] for row in read(tmp_path / "out.jsonl")] == [0, None]
    expected = model.classify(["good", ("bad", "good")], tau=0.3, as_arrow=True)
    found = read(tmp_path / "out.parquet")
    assert [row["probs"] for row in found] == expected.column("probs").to_pylist()
    assert [row["n"] for row in found] == [0, 1] and "text" not in found[0]


def test_an_output_is_only_continued_by_the_same_run(model: de3.Classifier, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(KeyboardInterrupt):
        classify(Here(model, 9), tmp_path / "in.jsonl", out)
    with pytest.raises(
        ValueError, match=r"was started with other settings \(a\): use the same command, or remove"
    ):
        Parts(out, ".jsonl", {"a": 2})
    with pytest.raises(ValueError, match=r"started with other settings \(b\)"):
        Parts(out, ".jsonl", {"a": 1, "b": 2})
    first = Parts(out, ".jsonl", {"a": 1})
    with pytest.raises(ValueError, match="another run is writing to it"):
        Parts(out, ".jsonl", {"a": 1})
    first.close()
    classify(Here(model), tmp_path / "in.jsonl", out)
    Parts(out, ".jsonl", {"a": 1}).close()
    with pytest.raises(ValueError, match=r"out\.jsonl: already exists"):
        Parts(out, ".jsonl", {"a": 2})
    with out.open("a") as opened:
        opened.write("another row\n")
    with pytest.raises(ValueError, match=r"out\.jsonl: already exists"):
        Parts(out, ".jsonl", {"a": 1})
    out.unlink()
    (tmp_path / "out.jsonl.refused.jsonl").write_text("may be this run's input")
    with pytest.raises(ValueError, match=r"refused\.jsonl: already exists"):
        Parts(out, ".jsonl", {"a": 1}, drops_refused=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="contains other files"):
        Parts(tmp_path / "full", ".jsonl", {})


def test_a_run_without_a_part_leaves_nothing(model: de3.Classifier, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"sentence": "good"}])
    with pytest.raises(ValueError, match=r"none of the first 1 rows .*no column 'text'; it has 'sentence'"):
        classify(Here(model), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "mine").mkdir()
    Parts(tmp_path / "mine", ".jsonl", {}).close()
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_no_column_of_the_input(model: de3.Classifier, tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"in{kind}", [{"text": text} for text in [*TEXTS[:20], " ", "good"]])
    expected = [row.label for row in model.classify([*TEXTS[:20], "good"], tau=0.3)]
    expected.insert(20, "")
    for kind_out in (".parquet", ".csv", ".jsonl"):
        classify(Here(model), tmp_path / f"in{kind}", tmp_path / f"out{kind_out}", keep=[])
        rows = read(tmp_path / f"out{kind_out}")
        assert next(iter(rows[0])) == "label" and "text" not in rows[0]
        assert [row["label"] or "" for row in rows] == expected


def test_columns_that_change_their_type_are_refused_early(model: de3.Classifier, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    rows[40]["n"] = "forty"
    write(file, rows)
    with pytest.raises(ValueError, match=r"as parquet \(.*in\.jsonl:41: n is string, but int64 .* --keep"):
        classify(Here(model), file, tmp_path / "out.parquet", part_rows=1000)
    rows[40]["n"], rows[43]["n"] = 40, "forty-three"
    write(file, rows)
    with pytest.raises(ValueError, match=r"as parquet \(.*in\.jsonl:44: n: Could not convert 'forty-three'"):
        classify(Here(model), file, tmp_path / "out.parquet", part_rows=1000)
    rows[43]["n"] = 43
    rows[40]["n"], rows[41]["half"] = 40, "\ud800"
    write(file, rows)
    summary, _ = classify(Here(model), file, tmp_path / "out.jsonl")
    assert summary.answered == 100 and read(tmp_path / "out.jsonl")[41]["half"] == "\ud800"
    with pytest.raises(ValueError, match=r"in\.jsonl:42: has the column 'half', which the first row lacks"):
        classify(Here(model), file, tmp_path / "out.csv")
    classify(Here(model), file, tmp_path / "numbers.parquet", keep=["n"])
    assert [row["n"] for row in read(tmp_path / "numbers.parquet")][39:42] == [39, 40, 41]
    for row in rows[48:]:  # the earlier parts have whole numbers in this column
        row["n"] += 0.5
    write(file, rows)
    for _ in range(2):  # also after the run is continued, when the previous part is only a file
        with pytest.raises(ValueError, match=r"as parquet \(.*in\.jsonl:49: n is double, but int64"):
            classify(Here(model), file, tmp_path / "more.parquet", keep=["n"])
        assert len(list((tmp_path / "more.parquet.parts").glob("part-*"))) == 3
    (tmp_path / "in").mkdir()
    for name, value in (("a", 1), ("b", "one")):
        write(tmp_path / "in" / f"{name}.parquet", [{"id": value, "text": "good"}])
    with pytest.raises(ValueError, match=r"as parquet \(.*b\.parquet:0: id is string, but int64"):
        classify(Here(model), tmp_path / "in", tmp_path / "both.parquet")


def test_columns_of_input_and_answers_may_not_share_a_name(model: de3.Classifier, tmp_path: Path) -> None:
    for kind in (".parquet", ".jsonl"):
        file, out = tmp_path / f"in{kind}", tmp_path / f"out{kind}"
        write(file, [{"text": text, "label": 1} for text in TEXTS])
        pool = Here(model)
        with pytest.raises(
            ValueError, match=r"label: is a column of the input and of the answers.* --prefix de3_"
        ):
            classify(pool, file, out, part_rows=1000)
        assert pool.texts == 0
        classify(Here(model), file, out, keep=["text"])


def test_parquet_without_pyarrow(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in.parquet", [{"text": "good"}])
    options = f"--file {tmp_path}/in.parquet --store {store} --model tiny"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    def version(package: str) -> str:
        if package == "pyarrow":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("de3.commands.classify.version", version)
    for out in ("out.jsonl", "out.parquet"):
        assert f"this needs pyarrow: {sys.executable} -m pip install -e '.[bulk]'" in refusal(
            f"classify {options} --out {tmp_path}/{out}"
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model tiny --file {0} --out {0}/out", "files of one kind"),
        ("--model tiny --file {0}/in.jsonl --out {0}/out.csv --format csv", "--format: "),
        ("--file {0}/in.jsonl", "--out is missing"),
        ("--model tiny --file {0}/in.jsonl --out {0}/out.xlsx", "expected .csv, .jsonl"),
        ("good --model nothing", "'nothing'"),
        ("good --model tiny --tau 7", "tau: "),
        ("", "give texts"),
        ("--file - --out - --refused drop", "--refused: "),
        ("--file {0}/in.jsonl --out - --model tiny --format xlsx", "--format must be"),
        ("--file {0}/in.csv --out - --model tiny", "in.csv:1: no column 'text'; it has 'sentence'"),
        ("good --url localhost:8000", "http://localhost:8000"),
        ("good --url http://127.0.0.1:9", "de3 serve"),
        ("--model tiny,tiny --file {0}/in.jsonl --out {0}/out.csv", "models: tiny is given twice"),
        ("--model tiny,tiny-int8 --file {0}/in.jsonl --out {0}/out.csv", "cannot share a pass"),
        (
            "--model tiny-int8,{1}/sst2 --file {0}/in.jsonl --out {0}/out.csv",
            "has another encoder than sst2",
        ),
        ("good --model tiny,tiny-int8", "cannot share a pass"),
    ],
)
def test_errors_of_the_command(store: Path, tmp_path: Path, arguments: str, says: str) -> None:
    write(tmp_path / "in.jsonl", [{"text": "good"}])
    (tmp_path / "in.csv").write_text("sentence\n")
    where = f"--store {store}" if "--model" in arguments else ""
    assert says in refusal(f"classify {where} {arguments.format(tmp_path, de3.DEMO)}")


def test_the_command_in_processes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "in.csv", tmp_path / "out.parquet"
    write(file, [{"id": i, "text": text} for i, text in enumerate(TEXTS)] + [{"id": "x", "text": ""}])
    output = command(
        f"classify --store {store} --model tiny-int8 --file {file} --out {out} --max-disagreement 0.5 --threads 2"
    )
    with de3.load("tiny-int8", store=store, threads=1) as model:
        expected = model.classify(TEXTS, max_disagreement=0.5, as_arrow=True)
    assert [row["probs"] for row in read(out)] == [*expected.column("probs").to_pylist(), None]
    assert "101 rows" in output and "exits by layer: 0: " in output and "speed-up in model time: " in output
    assert "at most 50% of the answers differ from full depth (with 95% confidence)" in output
    assert "1 row cannot be classified: error has the reasons" in output
    dropped = tmp_path / "out.tsv"
    part, lines, writes = file.with_name("some.csv"), file.read_text().splitlines(), count()
    part.write_text("\n".join([*lines[:18], lines[-1]]))
    some = f"classify --store {store} --model tiny-int8 --file {part} --out {tmp_path}/some --part-rows 8"

    def interrupted(*written: Any) -> None:
        if next(writes) in (0, 2):
            raise KeyboardInterrupt
        return write_part(*written)

    write_part = formats.Format.write
    monkeypatch.setattr(formats.Format, "write", interrupted)
    for kept in (
        "no rows are kept yet: the same command starts again",
        "8 rows kept; the same command continues",
    ):
        stopped = invoke(some)
        assert stopped.exit_code == 130 and f"stopped; {kept}" in stopped.stderr
    output = command(some)
    assert "18 rows (8 of them by an earlier run)" in output and "exits by layer in this run: " in output
    assert "resumed after the first 8 rows, which an earlier run has written" in output
    assert "1 row cannot be classified: error has the reasons" in output
    for more, code in (("", 0), ("--max-refused 0.05", 3), ("--max-refused 0.06", 0), ("--max-refused 0", 3)):
        again = invoke(f"{some} {more}")  # 1 of 18 rows is refused
        assert again.exit_code == code and "some is complete: nothing to do" in again.stderr
        assert ("5.56% of the rows cannot be classified, more than --max-refused 0" in again.stderr) == bool(
            code
        )
    summary = json.loads((tmp_path / "some" / "_run.json").read_text())["summary"]
    assert (summary["rows"], summary["refused"], summary["earlier"]) == (18, 1, 8)
    write(tmp_path / "long.csv", [{"text": text} for text in (LONG, "good", "")])
    output = command(
        f"classify --store {store} --model tiny --file {tmp_path}/long.csv --out {tmp_path}/long"
    )
    assert "1 text truncated to the model's limit (--long windows reads more)" in output
    assert json.loads((tmp_path / "long" / "_run.json").read_text())["summary"]["truncated"] == 1
    output = command(
        f"classify --store {store} --model tiny-int8 --file {file} --out {dropped} --refused drop --prefix de3_"
    )
    assert f"1 row cannot be classified: {dropped}.refused.jsonl\n  1: " in output
    output = command(
        f"classify --store {store} --model tiny-int8 --file {file} --out {dropped} --refused drop --prefix de3_"
    )
    assert f"{dropped} is complete: nothing to do" in output
    assert [row["id"] for row in read(dropped)] == [str(i) for i in range(len(TEXTS))]
    assert "de3_label" in read(dropped)[0] and "de3_error" not in read(dropped)[0]
    about = json.loads(parquet.read_schema(out).metadata[b"de3"])
    assert about["model"] == "tiny-int8:1" and len(about["labels"]) == 2


def encoders_and_mappings() -> tuple[int, int]:
    """The number of encoders in a process of the pool, and of its mappings of shared weights."""
    ((loaded, _),) = pool._open_in_this_process
    mapped = Path("/proc/self/maps").read_text().count("memfd:de3-weights")
    return len({served.model.encoder for served in loaded._all}), mapped


def test_processes_map_the_weights_of_one_encoder(several: Path) -> None:
    artifacts = [Store(several).open(name) for name in ("mood-int8", "tiny-int8")]
    found = pool.LocalPool(artifacts, {}, 2)
    try:
        assert found._processes.submit(encoders_and_mappings).result() == (1, 1)
    finally:
        found.close()


@pytest.mark.parametrize("kind", [".parquet", ".csv"])
def test_several_models_classify_a_file_on_one_pass(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file, out, again = (tmp_path / f"{name}{kind}" for name in ("in", "out", "again"))
    texts = [*TEXTS, LONG, ""]
    write(file, [{"id": i, "text": text} for i, text in enumerate(texts)])
    names = ["mood-int8", "tiny-int8"]
    options = f"--file {file} --long error --tau 0.9 --model {','.join(names)}"
    with de3.load(names, store=several, threads=1) as both:
        expected = both.answers(texts, tau=0.9, long="error")
    output = command(f"classify {options} --store {several} --threads 2 --out {out}")
    for name in names:
        layers = Counter(row[f"{name}_exit_layer"] for row in expected if not row["error"])
        shares = ", ".join(f"{n}: {100 * count / 100:.1f}%" for n, count in sorted(layers.items()))
        assert f"{name}: exits by layer: {shares}" in output
        assert f"{name}: speed-up in model time: " in output and f"{name}: certified: nothing" in output
    rows = read(out)
    assert names_in(out) == ["id", "text", *expected[0]]
    assert [bool(row["error"]) for row in rows] == [False] * 100 + [True] * 2
    for row, one in zip(rows, expected, strict=True):
        for name in expected[0]:
            if name != "error":
                value = one[name] if kind == ".parquet" else formats._cell(one[name], None)
                assert row[name] == (value if kind == ".parquet" else str(value)), name
    record = json.loads((tmp_path / f"_{out.name}.run.json").read_text())
    prints = [fingerprint(Store(several).open(name).manifest) for name in names]
    assert record["run"]["artifact"] == ",".join(prints)
    assert list(record["summary"]["exits"]) == names
    if kind == ".parquet":
        about = json.loads(parquet.read_schema(out).metadata[b"de3"])
        assert [one["model"] for one in about["models"]] == ["mood-int8:1", "tiny-int8:1"]

    writes, write_part = count(), formats.Format.write

    def interrupted(*written: Any) -> None:
        if next(writes) == 1:
            raise KeyboardInterrupt
        return write_part(*written)

    monkeypatch.setattr(formats.Format, "write", interrupted)
    some = f"classify {options} --store {several} --threads 2 --out {again} --part-rows 16"
    assert invoke(some).exit_code == 130
    assert "other settings (models, artifact)" in refusal(some.replace("mood-int8,tiny", "tiny-int8,mood"))
    assert "in this run: " in command(some)
    assert read(again) == rows

    with serving(several, models=names) as server:
        output = command(f"classify {options} --url {server.url} --out {tmp_path}/url.jsonl --refused drop")
        assert "tiny-int8: exits by layer: " in output
        twice = f"--file {file} --model mood-int8,mood-int8:1 --url {server.url} --out {tmp_path}/twice.csv"
        assert "models: mood-int8 is given twice" in refusal(f"classify {twice}")
        found = command(["classify", "a good film", "--url", server.url, "--model", ",".join(names)])
    for row, one in zip(read(tmp_path / "url.jsonl"), expected[:100], strict=True):
        for name in names:
            for column in ("label", "exit_layer", "exit_reason"):
                assert row[f"{name}_{column}"] == one[f"{name}_{column}"]
            assert row[f"{name}_probs"] == [round(p, 6) for p in one[f"{name}_probs"]]
    texts = ["classify", "a good film", "--store", str(several), "--model", ",".join(names)]
    assert command(texts) == found and found.startswith("mood-int8: ") and "\ntiny-int8: " in found


class Refusing:
    """A client whose server refuses texts with "bad", and requests with more than `most` texts."""

    def __init__(self, most: int, names_first: bool) -> None:
        self._most, self._names_first = most, names_first
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
        return SimpleNamespace(model=options["model"], rows=[SimpleNamespace(raw=row) for row in rows])


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
        patch.setattr(pool, "MAX_BATCH", 4)
        patch.setattr(pool, "MAX_BATCH_CHARS", 20)
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
    client = Refusing(9, names_first=True)
    one = pool.RemotePool(client, ["m:1"], {}, 1)  # type: ignore[arg-type]
    one.submit(["good"]).result()
    one._models = ["m:2"]
    with pytest.raises(ValueError, match="m:1, m:2"):
        one.submit(["good"]).result()
    for status, field in ((422, "tau"), (422, None), (401, None), (0, None)):
        error = ServerError(status, "no", field, None)
        client.classify = lambda *_, error=error, **__: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="no"):
            one.submit(["good", "fine"]).result()
    one.close()


def test_the_report_certifies_only_what_the_calibration_covers(store: Path) -> None:
    artifact, summary = (
        Store(store).open("tiny"),
        run.Summary(rows=9, earlier=3, answered=5, reasons=Counter(["empty"]), seconds=10),
    )

    def certifies(**options: Any) -> bool:
        return any("with 95% confidence" in line for line in report(summary, [artifact], options))

    assert certifies(max_disagreement=0.5)
    assert not certifies() and not certifies(tau=0.1) and not certifies(max_disagreement=0.5, long="windows")
    assert not certifies(max_disagreement=1e-9)  # every text runs to full depth
    summary.truncated = 960
    assert "960 texts in this run truncated to the model's limit (--long windows reads more)" in report(
        summary, [], {}
    )
    assert "960 texts in this run truncated to the model's windows" in report(
        summary, [], {"long": "windows"}
    )
    assert report(summary, [], {})[0] == "9 rows (3 of them by an earlier run) in 10.0 s: 0.5 rows/s"
    assert report(run.Summary(rows=1, earlier=1, seconds=2), [], {}) == [
        "1 row (1 of them by an earlier run) in 2.0 s"
    ]


def test_texts_without_a_server(store: Path) -> None:
    options = ["--store", str(store), "--model", "tiny", "--tau", "0"]
    output = command(["classify", "a good film", *options])
    assert "layer 3  a good film" in output and "truncated" not in output
    assert "1 of 2 texts were truncated to the model's limit" in command(["classify", LONG, "good", *options])


@pytest.mark.slow
def test_the_processes_end_with_their_parent(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    write(file, [{"text": f"{TEXTS[i % 100]} {i}"} for i in range(200_000)])
    options = f"--store {store} --file {file} --out {tmp_path}/out --model tiny-int8 --threads 2"
    command = [sys.executable, "-m", "de3.cli", "classify", *options.split(), "--part-rows", "2048"]
    running = subprocess.Popen(command)
    until((tmp_path / "out" / "part-000000.parquet").exists, "a part")
    pids = process_tree(running.pid)
    running.kill()
    running.wait()
    assert len(pids) >= 4  # the command, the fork server and two worker processes
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "the processes to end")


def test_standard_input_and_output(
    store: Path, tmp_path: Path, model: de3.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.progress.LOG_EVERY_S", 0.0)
    texts = ["a good film", "", "café", 'a "dull" plot']
    given = "\n".join([*texts, ""])
    found = invoke(f"classify - --store {store} --model tiny-int8 --tau 0", input=given)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts and rows[1]["error"].startswith("text is empty")
    gate = invoke(f"classify - --store {store} --model tiny-int8 --tau 0 --max-refused 0.2", input=given)
    assert gate.exit_code == 3 and gate.stdout == found.stdout
    expected = model.answers_by_column(texts, tau=0)
    assert [row["probs"] for row in rows] == expected.values["probs"]
    assert "  classifying: 4 of 4 rows, " in found.stderr and "about 0 s left" in found.stderr
    objects = "\n" + "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    found = invoke(f"classify - --store {store} --model tiny-int8 --tau 0", input=objects)
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        {"text": row["text"], "id": i} | row for i, row in enumerate(rows)
    ]
    found = invoke(f"classify - --store {store} --model tiny-int8 --format csv", input="")
    assert found.exit_code == 0 and found.stdout.startswith("text,label,") and found.stdout.count("\n") == 1
    found = invoke(f"classify - --store {store} --model tiny-int8", input='{"sentence": "good"}')
    assert "classified: standard input:1: no column 'text'" in str(found.exception)
    options = f"--store {store} --model tiny-int8 --tau 0 --keep none"
    found = invoke(f"classify --file - --out {tmp_path}/out.csv {options}", input=given)
    (tmp_path / "in.txt").write_text(given)
    table = invoke(f"classify --file {tmp_path}/in.txt --out - --format csv {options}")
    assert found.stdout == "" and table.stdout == (tmp_path / "out.csv").read_text()
    assert [row["label"] for row in read(tmp_path / "out.csv")] == [row["label"] or "" for row in rows]


def test_a_server_answers_files(store: Path, tmp_path: Path, model: de3.Classifier) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[Any] = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    rows[7] = {"text": TEXTS[7], "text_pair": "a dull plot", "id": 7}
    rows[9] = {"text": LONG, "id": 9}
    write(file, rows)
    with serving(store, models=["tiny-int8"], max_texts=3) as server:  # fewer than the command sends at once
        command(f"classify --file {file} --out {out} --url {server.url} --tau 0.1 --long error")
        for name, content in (("none", ""), ("blank", "\n")):  # the server is not asked for these rows
            (tmp_path / f"{name}.txt").write_text(content)
            command(f"classify --file {tmp_path}/{name}.txt --out {tmp_path}/{name}.csv --url {server.url}")
            expected_names = ["text", *model.answers_by_column([]).values]
            assert names_in(tmp_path / f"{name}.csv") == expected_names
            assert len(read(tmp_path / f"{name}.csv")) == len(content)
    found, sent = read(out), [row for row in rows if row["id"] != 9]
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    refused = found.pop(9)
    assert refused["label"] is None and refused["error"].startswith("has 122 tokens")
    inputs = [(row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in sent]
    expected = model.classify(inputs, tau=0.1)
    for row, one in zip(found, expected, strict=True):
        assert (row["probs"], row["exit_layer"], row["error"]) == (one.probs, one.exit.layer, None)
