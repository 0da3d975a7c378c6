"""Token classifiers outside of /classify: `de3.load`, several models on one pass, files, and what a server reports."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as arrow
import pytest

import de3
from de3.client import Span
from de3.export.classifier import Stock, convert
from de3.loadtest.client import label_of
from de3.model_store.store import Store
from de3.server import text_metrics
from tests.commands import de3 as command
from tests.commands import refusal
from tests.files import read, write
from tests.fixtures import TAGS, made_once, make_rows, save_encoder
from tests.serving import Server, serving, until

TEXTS = [f"  {text}" for text, _ in make_rows(40, 5) if text.strip()]
LONG = "a good film and a dull plot " * 40


@pytest.fixture(scope="module")
def tagged() -> Path:
    """A store with a token classifier, tags:1, and a classifier on the same encoder, moods:1, without exits."""

    def make(folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

        tags, moods = save_encoder(folder / "tags", tags=TAGS), save_encoder(folder / "moods", labels=3)
        both = AutoModelForTokenClassification.from_pretrained(tags)
        other = AutoModelForSequenceClassification.from_pretrained(moods)
        other.base_model.load_state_dict(both.base_model.state_dict(), strict=False)
        other.save_pretrained(moods)
        for name in ("tags", "moods"):
            convert(Stock.open(name, folder / name), Store(folder / "store"), name, "int8")

    return made_once("tagged-for-bulk", make) / "store"


@pytest.fixture(scope="module")
def model(tagged: Path) -> Iterator[de3.Classifier]:
    with de3.load("tags", store=tagged, threads=1) as one:
        yield one


@pytest.fixture(scope="module")
def server(tagged: Path) -> Iterator[Server]:
    with serving(tagged, models=["tags", "moods"], default_model="tags", threads=1, log_texts=True) as one:
        yield one


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregation": "max", "min_score": {"X": 0.3}},
        {"labels": ["Y"], "explain": True},
        {"redact": {"X": "<x>"}},
    ],
)
def test_an_answer_is_the_servers(model: de3.Classifier, server: Server, options: dict[str, Any]) -> None:
    texts = [*TEXTS[:9], LONG]
    rows = model.classify(texts, **options)
    assert [row.raw for row in rows] == server.classify(input=texts, **options).json()["data"]
    assert any(row.spans for row in rows)
    for row, text in zip(rows, texts, strict=True):
        assert row.label == "" and row.probs == [] and row.spans is not None
        slices = [None if "redact" in options else text[span.start : span.end] for span in row.spans]
        assert [span.text for span in row.spans] == slices
        assert (row.text is None) == ("redact" not in options)
        assert label_of({"data": [row.raw]}).count(" ") == 2 * len(row.spans) - bool(row.spans)


def test_a_table_has_a_column_of_structs(model: de3.Classifier) -> None:
    table, rows = model.classify(TEXTS, as_arrow=True), model.classify(TEXTS)
    assert "label" not in table.column_names and "probs" not in table.column_names
    fields = {"start": arrow.int32(), "end": arrow.int32(), "label": arrow.string(), "score": arrow.float64()}
    assert table.schema.field("spans").type == arrow.list_(arrow.struct({**fields, "text": arrow.string()}))
    exact = [[Span(**one) for one in spans] for spans in table.column("spans").to_pylist()]
    rounded = [[Span(s.start, s.end, s.label, round(s.score, 6), s.text) for s in spans] for spans in exact]
    assert rounded == [row.spans for row in rows] != exact
    (good, bad) = model.answers([TEXTS[0], None], redact=True)
    assert good["redacted"] == model.classify(TEXTS[0], redact=True)[0].text
    assert bad["redacted"] is bad["spans"] is None and bad["error"] == "must not be empty"


ROWS: list[dict[str, Any]] = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
# Rows that are refused, by the file's kind.
REFUSED = {".jsonl": [{"text": ["secret good film"]}], ".txt": [{"text": LONG * 8}]}


def spans_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads(row["spans"]) if isinstance(row["spans"], str) else row["spans"] or []


def run(tagged: Path, file: Path, out: Path, *options: str) -> list[str]:
    """The arguments of a command that finds the spans in a file."""
    files = f"--file {file} --out {out} --model tags --store {tagged} --threads 2"
    return ["classify", *files.split(), *options]


@pytest.mark.parametrize("kind", [".parquet", ".tsv"])
def test_spans_in_files(model: de3.Classifier, tagged: Path, tmp_path: Path, kind: str) -> None:
    file, out = write(tmp_path / f"in{kind}", ROWS), tmp_path / f"out{kind}"
    # A high score leaves texts without a span, whose cell is an empty list.
    score = sorted(s.score for row in model.classify(TEXTS) for s in row.spans or [])[-9]
    command(run(tagged, file, out, "--min-score", str(score)))
    rows = read(out)
    found = [spans_in(row) for row in rows]
    assert found == [row["spans"] for row in model.answers(TEXTS, min_score=score)] and [] in found
    for row, spans in zip(rows, found, strict=True):
        assert all(row["text"][span["start"] : span["end"]] == span["text"] for span in spans)


@pytest.mark.parametrize(
    ("kind", "to", "refused"),
    [(".parquet", ".csv", "keep"), (".jsonl", ".jsonl", "drop"), (".txt", ".parquet", "drop")],
)
def test_a_redacted_file_has_nothing_of_the_texts(
    model: de3.Classifier, server: Server, tagged: Path, tmp_path: Path, kind: str, to: str, refused: str
) -> None:
    file, folder = write(tmp_path / f"in{kind}", [*ROWS, *REFUSED.get(kind, [])]), tmp_path / "redacted"
    folder.mkdir()
    options = ["--redact", "--refused", refused]
    command(run(tagged, file, folder / f"out{to}", *options))
    rows = read(folder / f"out{to}")
    redacted = [row.text for row in model.classify(TEXTS, redact=True)]
    assert [row["redacted"] for row in rows] == redacted != TEXTS
    assert all("text" not in row for row in rows)
    assert kind == ".txt" or [row["id"] for row in rows] == [row["id"] for row in ROWS]
    assert not any(span.get("text") for row in rows for span in spans_in(row))
    files = list(folder.iterdir())
    written = "".join(str(read(one)) if one.suffix == ".parquet" else one.read_text() for one in files)
    if kind in REFUSED:
        assert f"out{to}.refused.jsonl" in [one.name for one in files]
        assert "secret" not in written and LONG not in written
    changed = [one.strip() for one, text in zip(TEXTS, redacted, strict=True) if text != one]
    assert len(changed) > 20
    assert [text for text in changed if len(text) > 30 and text in written] == []
    remote = ["classify", *f"--file {file} --out {tmp_path}/remote{to} --model tags".split()]
    command([*remote, *options, "--url", server.url])  # a server gives the same
    found = read(tmp_path / f"remote{to}")
    assert [(row["redacted"], row.keys()) for row in found] == [(row["redacted"], row.keys()) for row in rows]


def test_names_of_columns_that_may_be_texts_are_not_written(tagged: Path, tmp_path: Path) -> None:
    (names := tmp_path / "in.csv").write_text("I am Bob\nI am Eve\n")
    says = "no column 'text': set --text-column"
    assert refusal(run(tagged, names, tmp_path / "names.jsonl", "--redact")).endswith(says)
    file = write(tmp_path / "in.jsonl", [{"text": "good"}, {"I am Bob": 1}])
    folder = tmp_path / "out"
    folder.mkdir()
    command(run(tagged, file, folder / "out.jsonl", "--redact"))
    assert read(folder / "out.jsonl")[1]["error"] == says
    assert "Bob" not in "".join(one.read_text() for one in folder.iterdir())
    options = run(tagged, file, tmp_path / "out.csv", "--redact", "--keep", "id,text")
    assert refusal(options).startswith("--keep: text has the texts")


def test_lines_on_the_terminal(model: de3.Classifier, tagged: Path) -> None:
    row = next(row for row in model.classify(TEXTS) if {s.label for s in row.spans or []} == {"X", "Y"})
    text = TEXTS[row.raw["index"]]
    parts = ", ".join(f"{one.label} {one.text!r} {one.score:.3f}" for one in row.spans or [])
    run = ["classify", text, "--model", "tags", "--store", str(tagged), "--threads", "1"]
    assert command(run) == f"{parts}  layer 3  {text}\n"
    assert command([*run, "--min-score", "1"]) == f"no spans  layer 3  {text}\n"
    (redacted,) = model.classify(text, redact=True, labels=["X"])
    output = command([*run, "--redact", "--labels", "X"])
    assert output.endswith(f"  layer 3  {redacted.text}\n") and "'" not in output


def test_a_server_counts_spans_lists_labels_and_logs_no_redacted_text(
    server: Server, tagged: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def counts(where: Server, labels: Sequence[str]) -> list[float]:
        return [where.metric("de3_spans_total", model="tags:1", label=label) for label in labels]

    before = counts(server, "XY")
    data = server.classify(input=TEXTS).json()["data"]
    found = Counter(span["label"] for row in data for span in row["spans"])
    new = [after - earlier for after, earlier in zip(counts(server, "XY"), before, strict=True)]
    assert new == [found["X"], found["Y"]] and all(new)
    assert server.metric("de3_spans_total", model="moods:1") == 0
    rows = {row["name"]: row for row in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert (rows["tags"]["span_labels"], rows["tags"]["aggregation"]) == (["X", "Y"], "simple")
    assert (rows["moods"]["span_labels"], rows["moods"]["aggregation"]) == (None, None)
    assert "spans: X, Y" in command(f"models list --store {tagged}")
    caplog.set_level(logging.INFO)
    for redact in (False, True):
        caplog.clear()
        assert server.classify(input="a good film", redact=redact).status_code == 200
        until(lambda: "tags:1" in caplog.text, "the line")
        assert ("a good film" in caplog.text) != redact
    monkeypatch.setattr(text_metrics, "MAX_SPAN_LABELS", 1)
    with serving(tagged, models=["tags"], threads=1) as other:
        lines = httpx.get(f"{other.url}/metrics").text.splitlines()
        started = [line for line in lines if line.startswith("de3_spans_total")]
        assert len(started) == 2 and all(line.endswith(" 0.0") for line in started)
        other.classify(input=TEXTS)
        assert counts(other, ["X", "other"]) == new


def test_a_shadow_makes_spans_as_the_request_asks(tagged: Path, tmp_path: Path) -> None:
    for version in (1, 2):
        shutil.copytree(tagged / "tags/1", tmp_path / f"tags/{version}")
    manifest = tmp_path / "tags/2/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    key = "an-admin-key-of-some-length"
    with serving(tmp_path, models=["tags:1"], threads=1, admin_keys=f"root {key}") as running:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"role": "shadow", "version": 2}
        httpx.post(f"{running.url}/v1/models/tags/load", json=body, headers=headers, timeout=60)
        assert running.classify(input=TEXTS[:20], labels=["X"], aggregation="none").status_code == 422
        answer = running.classify(input=TEXTS[:20], labels=["X"], aggregation="max").json()
        assert any(row["spans"] for row in answer["data"])
        until(lambda: running.metric("de3_shadow_texts_total") == 20, "the shadow")
        assert running.metric("de3_shadow_disagreements_total") == 0
