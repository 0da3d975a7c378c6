"""Token classifiers outside of /classify: `de3.load`, several models on one pass, files, and what a server reports."""

import csv
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as arrow
import pytest
from pyarrow import parquet

import de3
from de3.client import Span
from de3.export.classifier import Stock, convert
from de3.loadtest.client import label_of
from de3.model_store.store import Store
from de3.server import text_metrics
from tests.commands import de3 as command
from tests.commands import refusal
from tests.fixtures import TAGS, made_once, make_rows, save_encoder
from tests.serving import Server, serving, until

TEXTS = [f"  {text}" for text, _ in make_rows(40, 5) if text.strip()]
LONG = "a good film and a dull plot " * 40


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
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

    return made_once(tmp_path_factory, "tagged-for-bulk", make) / "store"


@pytest.fixture(scope="module")
def model(tagged: Path) -> Iterator[de3.Classifier]:
    with de3.load("tags", store=tagged, threads=1) as one:
        yield one


@pytest.fixture(scope="module")
def server(tagged: Path) -> Iterator[Server]:
    with serving(tagged, models=["tags", "moods"], default_model="tags", threads=1, log_texts=True) as one:
        yield one


OPTIONS: list[dict[str, Any]] = [
    {},
    {"aggregation": "max", "min_score": {"X": 0.3}},
    {"labels": ["Y"], "explain": True},
    {"redact": {"X": "<x>"}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_answer_is_the_servers(model: de3.Classifier, server: Server, options: dict[str, Any]) -> None:
    rows = model.classify([*TEXTS[:9], LONG], **options)
    assert [row.raw for row in rows] == server.classify(input=[*TEXTS[:9], LONG], **options).json()["data"]
    assert any(row.spans for row in rows)
    for row, text in zip(rows, [*TEXTS[:9], LONG], strict=True):
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


def test_options_that_a_model_cannot_have(model: de3.Classifier, tagged: Path) -> None:
    with pytest.raises(de3.InputError, match="labels: tags:1 finds no 'B-X'; it finds X, Y"):
        model.classify(TEXTS, labels=["B-X"])
    with pytest.raises(de3.InputError, match="half of a surrogate pair"):
        model.classify(TEXTS, redact={"X": "\ud800"})
    with (
        de3.load("moods", store=tagged, threads=1) as other,
        pytest.raises(de3.InputError, match=r"redact: moods:1 .* finds no spans"),
    ):
        other.classify(TEXTS, redact=True)


def test_a_classifier_and_a_token_classifier_on_one_pass(model: de3.Classifier, tagged: Path) -> None:
    with de3.load("moods", store=tagged, threads=1) as alone:
        moods = alone.classify(TEXTS)
    for names in (["moods", "tags"], ["tags", "moods"]):
        with de3.load(names, store=tagged, threads=1) as both:
            found = dict(zip(names, both.classify(TEXTS, labels=["X"]), strict=True))
            assert found == {"moods": moods, "tags": model.classify(TEXTS, labels=["X"])}
            columns = both.answers(TEXTS[:1])[0]
            assert {"moods_label", "moods_probs", "tags_spans"} <= columns.keys()
            assert {"moods_spans", "tags_label", "tags_redacted"}.isdisjoint(columns)


def write(file: Path) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    if file.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ["secret good film"]}]))
    elif file.suffix == ".txt":
        file.write_text("".join(f"{row['text']}\n" for row in [*rows, {"text": LONG * 8}]))
    else:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["id", "text"], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return list(parquet.read_table(file).to_pylist())
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with file.open(newline="") as opened:
        options: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
        rows = list(csv.DictReader(opened, **options))
    return [row | {"spans": json.loads(row["spans"])} for row in rows]


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_spans_in_files(model: de3.Classifier, tagged: Path, tmp_path: Path, kind: str) -> None:
    file, out = tmp_path / f"in{kind}", tmp_path / f"out{kind}"
    write(file)
    # A high score leaves texts without a span, whose cell is an empty list.
    score = sorted(s.score for row in model.classify(TEXTS) for s in row.spans or [])[-9]
    command(
        f"classify --file {file} --out {out} --model tags --store {tagged} --min-score {score} --threads 1"
    )
    expected = model.answers(TEXTS, min_score=score)
    rows = read(out)[: len(TEXTS)]
    assert [row["spans"] for row in rows] == [row["spans"] for row in expected]
    assert [] in [row["spans"] for row in rows]
    for row in rows:
        assert all(row["text"][span["start"] : span["end"]] == span["text"] for span in row["spans"])


@pytest.mark.parametrize(
    ("kind", "to", "refused"),
    [
        *((".csv", to, "keep") for to in (".csv", ".parquet")),
        *((kind, ".jsonl", "drop") for kind in (".parquet", ".jsonl", ".txt")),
    ],
)
def test_a_redacted_file_has_nothing_of_the_texts(
    model: de3.Classifier, tagged: Path, tmp_path: Path, kind: str, to: str, refused: str
) -> None:
    file, folder = tmp_path / f"in{kind}", tmp_path / "redacted"
    write(file)
    folder.mkdir()
    options = f"--model tags --store {tagged} --redact --refused {refused} --threads 1"
    command(f"classify --file {file} --out {folder / 'out'}{to} {options}")
    rows = read(folder / f"out{to}")
    redacted = [row.text for row in model.classify(TEXTS, redact=True)]
    assert [row["redacted"] for row in rows[: len(TEXTS)]] == redacted != TEXTS
    assert all("text" not in row for row in rows)
    assert kind == ".txt" or [row["id"] for row in rows[: len(TEXTS)]] == [str(i) for i in range(len(TEXTS))]
    assert not any(span.get("text") for row in rows for span in row["spans"] or [])
    written = "".join(
        str(read(one)) if one.suffix == ".parquet" else one.read_text() for one in folder.iterdir()
    )
    if kind in (".jsonl", ".txt"):
        assert "out.jsonl.refused.jsonl" in [one.name for one in folder.iterdir()]
        assert "secret" not in written and LONG not in written
    changed = [one.strip() for one, text in zip(TEXTS, redacted, strict=True) if text != one]
    assert len(changed) > 20
    assert [text for text in changed if len(text) > 30 and text in written] == []


def test_a_redacted_file_cannot_keep_the_texts(tagged: Path, tmp_path: Path) -> None:
    write(file := tmp_path / "in.csv")
    options = f"--file {file} --out {tmp_path}/out.csv --model tags --store {tagged} --redact --keep id,text"
    assert refusal(f"classify {options}").startswith("--keep: text has the texts")


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_names_of_columns_that_may_be_texts_are_not_written(tagged: Path, tmp_path: Path, kind: str) -> None:
    rows = ["I am Bob", "I am Eve"] if kind == ".csv" else ['{"text": "good"}', '{"I am Bob": 1}']
    (file := tmp_path / f"in{kind}").write_text("\n".join([*rows, ""]))
    folder = tmp_path / "out"
    folder.mkdir()
    options = f"--file {file} --out {folder}/out.jsonl --model tags --store {tagged} --redact --threads 1"
    if kind == ".csv":
        assert refusal(f"classify {options}").endswith("no column 'text': set --text-column")
        return
    command(f"classify {options}")
    assert read(folder / "out.jsonl")[1]["error"] == "no column 'text': set --text-column"
    assert "Bob" not in "".join(one.read_text() for one in folder.iterdir())


def test_a_server_answers_the_same_file(server: Server, tagged: Path, tmp_path: Path) -> None:
    write(file := tmp_path / "in.jsonl")
    for number, where in enumerate((f"--url {server.url}", f"--store {tagged} --threads 1")):
        command(f"classify --file {file} --out {tmp_path}/{number}.jsonl --model tags --redact {where}")
    remote, local = (read(tmp_path / f"{number}.jsonl") for number in range(2))
    assert [row["redacted"] for row in remote] == [row["redacted"] for row in local]
    assert [row.keys() for row in remote] == [row.keys() for row in local]


def test_lines_on_the_terminal(model: de3.Classifier, tagged: Path) -> None:
    text = next(
        text for text in TEXTS if {s.label for s in model.classify(text)[0].spans or []} == {"X", "Y"}
    )
    (row,) = model.classify(text)
    parts = ", ".join(f"{one.label} {one.text!r} {one.score:.3f}" for one in row.spans or [])
    run = ["classify", text, "--model", "tags", "--store", str(tagged), "--threads", "1"]
    assert command(run) == f"{parts}  layer 3  {text}\n"
    assert command([*run, "--min-score", "1"]) == f"no spans  layer 3  {text}\n"
    (redacted,) = model.classify(text, redact=True, labels=["X"])
    output = command([*run, "--redact", "--labels", "X"])
    assert output.endswith(f"  layer 3  {redacted.text}\n") and "'" not in output


def test_spans_are_counted_by_label(server: Server, tagged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {label: server.metric("de3_spans_total", model="tags:1", label=label) for label in "XY"}
    data = server.classify(input=TEXTS).json()["data"]
    found = Counter(span["label"] for row in data for span in row["spans"])
    for label in "XY":
        assert (
            server.metric("de3_spans_total", model="tags:1", label=label) == before[label] + found[label] > 0
        )
    assert "de3_spans_total{label" not in "".join(
        line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if "moods" in line
    )
    monkeypatch.setattr(text_metrics, "MAX_SPAN_LABELS", 1)
    with serving(tagged, models=["tags"], threads=1) as other:
        lines = httpx.get(f"{other.url}/metrics").text.splitlines()
        started = [line for line in lines if line.startswith("de3_spans_total")]
        assert len(started) == 2 and all(line.endswith(" 0.0") for line in started)
        other.classify(input=TEXTS)
        counts = [other.metric("de3_spans_total", label=label) for label in ("X", "other")]
        assert counts == [found["X"], found["Y"]]


def test_models_say_what_they_find(server: Server, tagged: Path) -> None:
    rows = {row["name"]: row for row in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert (rows["tags"]["span_labels"], rows["tags"]["aggregation"]) == (["X", "Y"], "simple")
    assert (rows["moods"]["span_labels"], rows["moods"]["aggregation"]) == (None, None)
    assert "spans: X, Y" in command(f"models list --store {tagged}")


def test_the_request_log_never_has_a_redacted_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for redact in (False, True):
        caplog.clear()
        assert server.classify(input="a good film", redact=redact).status_code == 200
        until(lambda: "tags:1" in caplog.text, "the line")
        assert ("a good film" in caplog.text) != redact


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
