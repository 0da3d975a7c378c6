"""`de3.load`: the server's answers without a server."""

import gc
import json
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import de3
from de3.client import Input
from de3.library import WINDOW
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.job import Job
from tests.fixtures import make_rows
from tests.serving import Server, until

TEXTS: list[Input] = [text for text, _ in make_rows(60, 17) if text.strip()]
LONG = "a good film and a dull plot " * 40


@pytest.fixture(scope="module")
def model(store: Path) -> Iterator[de3.Classifier]:
    with de3.load("tiny-int8", store=store, threads=2) as one:
        yield one


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The number of texts of each job that engines get (submit), and of each that they drop."""
    found = {"submit": list[int](), "drop": list[int]()}
    for name, sizes in found.items():
        call = getattr(Engine, name)

        def recorded(engine: Engine, job: Job, sizes: Any = sizes, call: Any = call) -> None:
            sizes.append(len(job.items))
            call(engine, job)

        monkeypatch.setattr(Engine, name, recorded)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.4, "signal": "edr", "lam": 2.0, "max_layer": 1, "raw": True},
        {"target_speedup": 1.5, "explain": True},
        {"max_disagreement": 0.5, "ood": True, "top_k": 2},
        {"tau": 0.2, "long": "windows"},
        {"latency_budget_ms": 60_000.0},
    ],
)
def test_an_answer_is_the_servers(model: de3.Classifier, server: Server, options: dict[str, Any]) -> None:
    texts: list[Input] = [*TEXTS[:9], LONG, ("a good film", "a dull plot"), TEXTS[0]]
    rows = [row.raw for row in model.classify(texts, **options)]
    sent = [{"text": t[0], "text_pair": t[1]} if isinstance(t, tuple) else t for t in texts]
    named = {("lambda" if name == "lam" else name): value for name, value in options.items()}
    answer = server.classify(input=sent, model="tiny-int8", **named).json()
    assert rows == answer["data"]
    if "max_disagreement" in options:
        assert model.certificate(max_disagreement=0.5) == answer["certificate"]


def test_a_table_has_the_same_answers(model: de3.Classifier) -> None:
    texts = [*TEXTS, LONG, TEXTS[0]]
    rows, table = model.classify(texts, tau=0.3), model.classify(texts, tau=0.3, as_arrow=True)
    columns = table.to_pydict()
    assert columns["label"] == [row.label for row in rows]
    assert columns["exit_layer"] == [row.exit.layer for row in rows]
    assert columns["truncated"] == [row.truncated for row in rows]
    exact, scores = columns["probs"], columns["exit_score"]
    assert [[round(p, 6) for p in probs] for probs in exact] == [row.probs for row in rows] != exact
    assert [float(f"{score:.6g}") for score in scores] == [row.exit.score for row in rows] != scores
    windows = model.classify(texts, long="windows", ood=True, as_arrow=True)
    assert windows.column("windows_of").to_pylist()[-2] > 1 and "ood_score" in windows.column_names
    assert model.classify([], long="windows", ood=True, as_arrow=True).schema == windows.schema


@pytest.mark.parametrize(
    ("texts", "options", "field", "says"),
    [
        (["good", " "], {}, "input[1]", "input[1]: must not be only white space"),
        (["good", 7], {}, "input[1]", "must be a text, or an object with text and text_pair; got a number"),
        (["a much longer text", "good", LONG], {"long": "error"}, "input[2]", "the maximum is 64"),
        (["good"], {"model": "tiny"}, "model", "unknown option; known options: tau, signal"),
        (["good"], {"lam": -1}, "lambda", "greater than or equal to 0"),
        (["good"], {"latency_budget_ms": 1e-6}, "latency_budget_ms", "cannot be met"),
    ],
)
def test_an_error_names_the_field(
    model: de3.Classifier, texts: list[Any], options: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(de3.InputError) as raised:
        model.classify(texts, **options)
    assert raised.value.field == field and says in str(raised.value)
    assert model.classify("good")


def test_a_column_is_a_list_of_texts(model: de3.Classifier) -> None:
    import pandas
    import pyarrow as arrow

    table = arrow.table({"id": [1, 2], "text": ["good", "bad"]})
    expected = model.classify(["good", "bad"])
    assert model.classify(table.column("text")) == list(model.stream(table.column("text"))) == expected
    for columns in (table, pandas.DataFrame({"text": ["good"]})):
        with pytest.raises(de3.InputError, match="give one of its columns"):
            model.classify(columns)
    assert model.classify(pandas.Series(["good", "bad"])) == expected
    assert model.classify("good") == expected[:1] and model.classify([]) == []
    (pair,) = model.classify({"text": "good", "text_pair": "bad"}, tau=0)
    assert [pair] == model.classify(("good", "bad"), tau=0)


def test_a_budget_is_for_all_texts_together(model: de3.Classifier, sizes: dict[str, list[int]]) -> None:
    texts: list[Input] = ["good", *(f"good {i}" for i in range(WINDOW))]
    assert len(model.classify(texts, latency_budget_ms=60_000)) == WINDOW + 1
    assert sizes["submit"] == [WINDOW + 1]
    model.classify(texts)
    assert sizes["submit"][1:] == [WINDOW, 1]


def test_answers_have_a_row_for_each_text(model: de3.Classifier) -> None:
    import numpy
    import pandas

    missing: list[Any] = [None, float("nan"), numpy.float32("nan"), pandas.NA, pandas.NaT]
    texts: list[Any] = ["good", "", *missing, LONG, "bad", ("a", None), 7, "good", "\ud800", "a 🎬 film"]
    columns = model.answers_by_column(texts, long="error", tau=0).values
    rows = model.answers(texts, long="error", tau=0)
    assert rows == [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert len(rows) == len(texts)
    table = model.answers(texts, long="error", tau=0, as_arrow=True)
    assert table.to_pydict() == columns
    reasons = dict(enumerate(columns["error"]))
    good = [index for index, reason in reasons.items() if reason is None]
    assert good == [0, 8, 11, 13]
    expected = model.classify([texts[index] for index in good], long="error", tau=0, as_arrow=True)
    assert table.take(good).drop_columns("error") == expected
    for name in expected.column_names:
        assert [columns[name][index] for index in reasons if index not in good] == [None] * 10
    assert {reasons[i] for i in range(1, 7)} == {"must not be empty"}
    assert "the maximum is 64" in reasons[7]
    assert reasons[9] == "text_pair: must be a text; got null" and "surrogate" in reasons[12]
    single = model.answers_by_column("good", tau=0)
    assert single.values["label"] == columns["label"][:1]
    times = single.times[""]
    assert times.full_depth_s == pytest.approx(times.model_s)  # at τ = 0 nothing exits early
    assert model.answers([]) == []
    assert model.answers([None], as_arrow=True).schema == table.schema
    with pytest.raises(de3.InputError, match=r"input\[1\]: must not be empty"):
        model.classify(["good", float("nan")])  # type: ignore[list-item]
    assert list(model.stream("good", tau=0)) == model.classify("good", tau=0)
    for window in (1, 3, WINDOW):
        assert list(model.stream(texts, window=window, keep_errors=True, long="error", tau=0)) == rows
    with pytest.raises(de3.InputError, match="tau"):
        model.stream([None], keep_errors=True, tau=7)


@pytest.mark.parametrize("window", [1, 7])
def test_a_stream_is_answered_in_order_with_bounded_memory(
    model: de3.Classifier, window: int, sizes: dict[str, list[int]]
) -> None:
    taken, texts = 0, TEXTS * 2

    def source() -> Iterator[Input]:
        nonlocal taken
        for text in texts:
            taken += 1
            yield text

    expected = [row.probs for row in model.classify(texts)]
    for index, row in enumerate(model.stream(source(), window=window)):
        assert row.raw["index"] == index and row.probs == expected[index]
        assert taken <= index + 1 + 2 * window
    assert taken == len(texts) and sizes["drop"] == []
    rows = model.stream(iter(TEXTS[:20]), window=5)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert sizes["drop"] == [5]  # the window that would have been next


def test_a_stream_ends_with_an_error_after_the_windows_before_it(model: de3.Classifier) -> None:
    with pytest.raises(de3.InputError, match="window: must be at least 1"):
        model.stream([], window=0)
    found = []
    with pytest.raises(de3.InputError, match=r"input\[3\]"):
        found.extend(model.stream(["a", "b", "c", ""], window=2))
    assert len(found) == 2  # the texts of the first window
    with pytest.raises(de3.InputError, match=r"input\[3\]"):
        list(model.stream(["a", "b", "c", LONG], window=2, long="error"))


def test_threads_share_a_classifier(model: de3.Classifier) -> None:
    expected = model.classify(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(model.classify, [TEXTS] * 4)) == [expected] * 4


def test_several_models_on_one_encoder_answer_as_each_alone(
    several: Path, sizes: dict[str, list[int]]
) -> None:
    texts: list[Any] = [*TEXTS, LONG, ("a good film", "a dull plot"), TEXTS[0]]
    some: list[Any] = [*texts, None, "good"]
    names, own = ["mood-int8", "tiny-int8"], {"tau": 0.5, "signal": "edr", "lam": 2.0}
    with (
        de3.load([names[0], {"model": names[1], **own}], store=several, threads=2) as both,
        de3.load(names[0], store=several, threads=1) as mood,
        de3.load(names[1], store=several, threads=1) as tiny,
    ):
        assert both.names == [mood.name, tiny.name]
        for given in (
            {"tau": 0.9, "long": "windows"},
            {"tau": 0.8, "explain": True, "ood": True, "raw": True},
        ):
            of_tiny: Any = {**given, **own}
            sizes["submit"].clear()
            answers = both.classify(texts, **given)
            assert sizes["submit"] == [len(set(texts))]  # identical texts are computed once
            assert answers == [mood.classify(texts, **given), tiny.classify(texts, **of_tiny)]
            table = both.answers(some, as_arrow=True, **given)
            alone = mood.answers(some, as_arrow=True, **given), tiny.answers(some, as_arrow=True, **of_tiny)
            expected = {
                f"{name}_{column}": one.column(column)
                for name, one in zip(names, alone, strict=True)
                for column in one.column_names[:-1]
            }
            expected["error"] = alone[0].column("error")
            assert dict(zip(table.column_names, table.columns, strict=True)) == expected
            assert both.answers(some, **given) == table.to_pylist()
        about = json.loads(table.schema.metadata[b"de3"])
        assert about == {"models": [{"model": m.name, "labels": m.labels} for m in (mood, tiny)]}
        assert {row.exit.layer for row in answers[0]} > {0, 1}
        with pytest.raises(de3.InputError, match=r"^input\[1\]"):
            both.classify(["good", " "])
    with pytest.raises(RuntimeError, match="closed"):
        both.classify("good")
    mixed = ["tiny", "mood-int8"]  # fp32 and int8: two encoders
    with (
        de3.load(mixed, store=several, threads=2) as both,
        de3.load("tiny", store=several) as tiny,
        de3.load(names[0], store=several) as mood,
    ):
        assert both.classify(texts[:9]) == [tiny.classify(texts[:9]), mood.classify(texts[:9])]
    before = threading.active_count()
    for models, says in (
        (["mood", {"model": "mood:1", "tau": 0.1}], "models: mood is given twice"),
        (["tiny", {"model": "mood", "max_disagreement": 0.1}], "mood:1 was exported without a calibration"),
        (["tiny", "nothing"], "no model 'nothing'"),
    ):
        with pytest.raises(ValueError, match=says):
            de3.load(models, store=several, threads=1)  # type: ignore[arg-type]
    assert threading.active_count() == before


def test_a_failed_engine_and_a_closed_model_are_errors(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.library.CHECK_S", 0.01)
    with de3.load("tiny-int8", store=store, threads=1) as model:
        monkeypatch.setattr(Engine, "_step", lambda *_: False)  # the thread ends after the next text
        model.classify("good")
        with pytest.raises(RuntimeError, match="engine thread 0 has ended"):
            model.classify("good")
    with pytest.raises(RuntimeError, match="closed"):
        model.classify("good")


def test_the_garbage_collector_closes_it(store: Path) -> None:
    before = threading.active_count()
    model = de3.load("tiny-int8", store=store, threads=1)
    model.classify("good")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    until(lambda: threading.active_count() <= before, "the threads to end")


def test_it_changes_nothing_of_the_process_and_is_pickled_by_its_path_and_loaded_once(
    model: de3.Classifier,
) -> None:
    pickled = pickle.dumps(model)
    assert len(pickled) < 100_000
    code = f"""
import gc, logging, os, pickle, signal, sys
def state():
    return sys.getswitchinterval(), gc.get_freeze_count(), signal.getsignal(signal.SIGTERM), logging.root.handlers[:]
before = state()
import de3
assert {{"load", "Classifier", "__version__"}} <= set(dir(de3)) and de3.__version__[0].isdigit()
assert not {{"numpy", "onnxruntime", "httpx", "fastapi"}} & sys.modules.keys()
with de3.load("sst2", store=de3.DEMO) as model:
    assert model.classify(["a fine film"])[0].label == "positive"
assert not {{"de3.server.http", "starlette", "uvicorn", "prometheus_client", "torch", "pyarrow"}} & sys.modules.keys()
assert state() == before
one, two = pickle.loads({pickled!r}), pickle.loads({pickled!r})
assert one is two
expected = one.classify("good")
pid = os.fork()
if pid == 0:
    try:
        one.classify("good")
    except RuntimeError as error:
        if "load it in this process" in str(error) and pickle.loads({pickled!r}).classify("good") == expected:
            os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
one.close()
one = pickle.loads({pickled!r})
print(one.classify("a good film")[0].probs)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(model.classify("a good film")[0].probs)


def test_by_folder_and_not_unpickled_from_another_artifact(store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(store / "tiny-int8" / "1", tmp_path / "1")
    with de3.load(folder, store=tmp_path, threads=1) as model:
        assert model.name == "tiny-int8:1" and model.labels == model.manifest.labels
        pickled = pickle.dumps(model)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    with pytest.raises(ValueError, match="not the artifact"):
        pickle.loads(pickled)
    with de3.load(store / "tiny-int8", store=tmp_path, threads=1) as model:  # its newest version
        assert model.name == "tiny-int8:1"
    for name, says in (
        ("nothing", "the store .* has no model 'nothing' either"),
        ("tiny:7", "no version '7'"),
    ):
        with pytest.raises(ValueError, match=says):
            de3.load(name, store=store)
