"""Multi-label models: imported, calibrated and served; a text exits when no label's decision is likely to change."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from de3.client import Client
from de3.data.examples import Example, label_array, label_of, load_examples, save_examples
from de3.export.classifier import Stock
from de3.export.importing import answers
from de3.export.record import record
from de3.model_store.model import Model
from de3.model_store.store import Store, StoreError
from de3.training.evaluate import f1
from tests.commands import de3
from tests.fixtures import BAD, FILLER, GOOD, make_rows
from tests.serving import Server, serving
from tests.stock import fine_tuned, imported_as, transformers_model

NAMES = ["praise", "blame", "story"]
STORY = FILLER[5:9]


def labels_of(text: str) -> tuple[int, ...]:
    """The labels of a text, as ascending indices: praise, blame and story, each if the text has one of its words."""
    words = set(text.split())
    return tuple(k for k, known in enumerate((GOOD, BAD, STORY)) if words & set(known))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """The folder of a stock multi-label classifier."""
    examples = [Example(text, labels_of(text)) for text, _ in make_rows(1200, 1)]
    return fine_tuned(tmp_path_factory, "multi", encoder, NAMES, examples, epochs=4)


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Path:
    return imported_as(tmp_path_factory, "topics", classifier)


@pytest.fixture(scope="module")
def server(imported: Path) -> Iterator[Server]:
    with serving(imported / "store", models=["topics"]) as running:
        yield running


def test_an_artifact_records_that_it_is_multi_label(imported: Path, classifier: Path) -> None:
    artifact = Store(imported / "store").open("topics")
    manifest = artifact.manifest
    assert (manifest.labels, manifest.thresholds, manifest.prototype_layers) == (NAMES, [0.5] * 3, [])
    assert manifest.calibration is not None and manifest.calibration.default.speedup > 1.2
    assert {row.signal for row in manifest.calibration.table} == {"risk", "entropy"}
    texts = (imported / "texts.txt").read_text().splitlines()
    theirs = answers(Stock.open("", classifier), texts, manifest.thresholds, None)
    examples = [Example(text, answer) for text, answer in zip(texts, theirs, strict=True)]
    recorded = record(Model(artifact, "onnxruntime"), examples)
    assert recorded.correct[:, -1].mean() > 0.97  # the original's answers, except where int8 changes them
    micro, macro = f1(recorded)
    assert micro[-1] > 0.98 and macro[-1] > 0.95 and micro[0] <= micro[-1]


def test_a_text_has_any_number_of_labels(server: Server, imported: Path, classifier: Path) -> None:
    import torch

    model, tokenizer = transformers_model(classifier)
    texts = ["good and bad", "a good film", "the plot", "a", "bad plot of a good scene"]
    rows = server.described(input=texts, tau=0, explain=True)["data"]
    for text, row in zip(texts, rows, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert row["probs"] == pytest.approx(torch.sigmoid(logits).tolist(), abs=0.03)
        assert row["labels"] == [NAMES[k] for k in label_of((logits > 0).numpy())]  # type: ignore[union-attr]
        assert row["label"] == NAMES[int(logits.argmax())]
        assert row["exit"]["edr"] is None and row["exit"]["distance_ratio"] is None
        assert len(row["layers"]) == 4
    early = server.classify(input=texts).json()["data"]
    assert {row["exit"]["signal"] for row in early} <= {"risk", "entropy"}
    listed = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert listed["thresholds"] == [0.5] * 3 and "edr" not in listed["signals"]


def test_a_label_of_any_window_is_given(server: Server) -> None:
    fill = "the a film " * 40
    parts = [f"good {fill}", f"{fill} bad"]
    long, *each = (
        server.classify(input=text, tau=0, long="windows", explain=True).json()["data"][0]
        for text in (" ".join(parts), *parts)
    )
    assert long["windows"]["run"] == long["windows"]["of"] > 3
    last = [x for x in long["layers"] if x["layer"] == 3]
    assert long["probs"] == [max(column) for column in zip(*(x["probs"] for x in last), strict=True)]
    assert long["labels"] == [name for name, p in zip(NAMES, long["probs"], strict=True) if p > 0.5]
    assert {"praise", "blame"} <= {label for row in (long, *each) for label in row["labels"]}
    # Once every label is assigned, the remaining windows cannot change the answer.
    with Client(server.url) as client:
        (one,) = client.classify(" ".join(parts), tau=0, long="windows", thresholds=1e-9).rows
    assert one.labels == NAMES and one.raw["windows"]["run"] == 1


def test_a_request_may_set_thresholds(server: Server) -> None:
    def labels(**options: Any) -> list[str]:
        answer = server.classify(input="a good film and a bad plot", tau=0, **options)
        assert answer.status_code == 200, answer.text
        row = answer.json()["data"][0]
        limits = options.get("thresholds", 0.5)
        wanted = [limits] * 3 if isinstance(limits, float) else [limits.get(name, 0.5) for name in NAMES]
        assert row["labels"] == [n for n, p, t in zip(NAMES, row["probs"], wanted, strict=True) if p > t]
        return list(row["labels"])

    assert set(labels(thresholds=1e-6)) == set(NAMES) and labels(thresholds=1 - 1e-6) == []
    assert "blame" not in labels(thresholds={"blame": 1 - 1e-6})
    # Unknown labels, values out of range, and combinations with a calibrated target are refused with a clear message.
    for options, says in (
        ({"thresholds": {"anger": 0.5}}, "topics:1 has no label 'anger'; available: praise, blame, story"),
        ({"thresholds": 1.0}, "a number above 0 and below 1"),
        ({"thresholds": {"blame": 0}}, "a number above 0 and below 1"),
        ({"thresholds": 0.4, "max_disagreement": 0.1}, "cannot be combined with max_disagreement"),
        ({"thresholds": 0.4, "target_speedup": 2}, "cannot be combined with target_speedup"),
    ):
        answer = server.classify(input="a", **options)
        assert answer.status_code == 422 and says in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] == "thresholds"


def test_thresholds_void_what_the_server_guarantees(imported: Path) -> None:
    """The calibration does not cover a request's own thresholds."""
    with serving(imported / "store", models=["topics"], max_disagreement=0.5) as server:
        assert "certificate" in server.classify(input="a good film").json()
        refused = server.classify(input="a good film", thresholds=0.01)
        assert refused.status_code == 422
        assert "cannot be combined with this server's max_disagreement" in refused.json()["error"]["message"]
        explained = server.classify(input="a good film", thresholds=0.01, tau=0, explain=True).json()
        assert "certificate" not in explained and "expected" not in explained["tau_choice"]


def test_many_thresholds_are_refused_at_the_first_wrong_one(server: Server) -> None:
    for count, says in ((50_000, "at most 10000 are allowed"), (5_000, "thresholds['label 0']: must be")):
        answer = server.classify(input="a", thresholds={f"label {i}": 7 for i in range(count)})
        assert answer.status_code == 422 and says in answer.json()["error"]["message"]


def test_edr_needs_classes_that_exclude_each_other(server: Server) -> None:
    for options in ({"signal": "edr"}, {"lambda": 1}, {"signal": "edr", "lambda": 2, "tau": 0.1}):
        answer = server.classify(input="a", **options)
        assert answer.status_code == 422, options
        assert "edr needs mutually exclusive classes" in answer.json()["error"]["message"]


def test_answers_are_the_same_layer_by_layer_and_in_the_kernels(imported: Path) -> None:
    texts = [text for text, _ in make_rows(40, 77)]
    answers = []
    for runtime in ("auto", "onnxruntime"):
        with serving(imported / "store", models=["topics"], runtime=runtime) as server:
            rows = server.classify(input=texts, signal="risk", tau=0.1, thresholds=0.4).json()["data"]
            alone = server.classify(input=texts[3], signal="risk", tau=0.1, thresholds=0.4)
            assert alone.json()["data"][0]["probs"] == rows[3]["probs"]
            explained = server.classify(input=texts, signal="risk", tau=0.1, thresholds=0.4, explain=True)
            for row, other in zip(rows, explained.json()["data"], strict=True):
                assert (row["labels"], row["exit"]) == (other["labels"], other["exit"])
            answers.append([(row["labels"], row["exit"]["layer"]) for row in rows])
    same = np.mean([a == b for a, b in zip(*answers, strict=True)])
    assert same > 0.9  # int8 occasionally rounds differently


def test_other_protocols_give_each_label_its_own_probability(server: Server) -> None:
    text = "good and bad"
    row = server.classify(input=text, tau=0).json()["data"][0]
    probs = row["probs"]
    both = server.classify(inputs=text, parameters={"tau": 0}).json()
    assert {row["label"]: row["score"] for row in both} == pytest.approx(dict(zip(NAMES, probs, strict=True)))
    softmax = server.classify(inputs=text, parameters={"tau": 0, "function_to_apply": "softmax"}).json()
    assert sum(row["score"] for row in softmax) == pytest.approx(1)
    tei = httpx.post(f"{server.url}/predict", json={"inputs": text}).json()
    early = server.classify(input=text).json()["data"][0]["probs"]
    assert {row["label"]: row["score"] for row in tei} == pytest.approx(dict(zip(NAMES, early, strict=True)))
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    body = {"inputs": [tensor], "parameters": {"tau": 0}}
    infer = httpx.post(f"{server.url}/v2/models/topics/infer", json=body).json()
    labels = next(output["data"] for output in infer["outputs"] if output["name"] == "label")
    assert labels == [", ".join(row["labels"])]


def test_moderation_with_openais_client(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    texts = ["good and bad", "a the"]
    found = client.moderations.create(input=texts, model="topics")
    rows = server.classify(input=texts).json()["data"]
    assert found.id.startswith("modr-") and found.model == "topics:1"
    for result, row in zip(found.results, rows, strict=True):
        assert result.flagged == bool(row["labels"])
        raw = result.model_dump()
        assert [name for name in NAMES if raw["categories"][name]] == row["labels"]
        assert [raw["category_scores"][name] for name in NAMES] == row["probs"]
        applied = raw["category_applied_input_types"]
        for name in NAMES:
            assert applied[name] == (["text"] if name in row["labels"] else [])
    one = client.moderations.create(input="good", extra_body={"tau": 0, "thresholds": 1e-6}).results[0]
    assert one.flagged and one.model_dump()["exit_layer"] == 3
    both = client.moderations.create(input=[{"type": "text", "text": text} for text in ("good", "bad")])
    (good,), (bad,) = (client.moderations.create(input=text).results for text in ("good", "bad"))
    (parts,) = both.model_dump()[
        "results"
    ]  # parts are one input: each label has its highest score in any of them
    for name in NAMES:
        alone = [one.model_dump() for one in (good, bad)]
        assert parts["categories"][name] == any(one["categories"][name] for one in alone)
        assert parts["category_scores"][name] == max(one["category_scores"][name] for one in alone)
    assert parts["categories"]["praise"] and parts["categories"]["blame"]
    image: Any = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    wrong: tuple[Any, ...] = ([image], [{"type": "text", "text": "good"}, image], [{"type": "text"}])
    for body in ({"input": []}, {"input": ["a", ""]}, {"input": 7}, {}, *({"input": one} for one in wrong)):
        answer = httpx.post(f"{server.url}/v1/moderations", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "input"), answer.text
    unknown = {"input": [{"type": "text", "text": "good", "txet": "bad"}]}
    message = httpx.post(f"{server.url}/v1/moderations", json=unknown).json()["error"]["message"]
    assert message == "input[0].txet: unknown field; known fields: type, text"


def test_detectors_find_each_label_that_reaches_its_threshold(server: Server) -> None:
    text = "good and bad"
    row = server.classify(input=text, tau=0).json()["data"][0]
    probs = dict(zip(NAMES, row["probs"], strict=True))

    def found(**parameters: Any) -> dict[str, float]:
        body = {"contents": [text], "detector_params": {"tau": 0, **parameters}}
        (detections,) = httpx.post(f"{server.url}/api/v1/text/contents", json=body).json()
        assert all((one["start"], one["end"], one["text"]) == (0, len(text), text) for one in detections)
        return {one["detection"]: one["score"] for one in detections}

    assert found() == {name: probs[name] for name in row["labels"]}  # no label is safe by default
    for limit in (p - 1e-6 for p in probs.values()):  # the probabilities are rounded
        assert found(threshold=limit) == {name: prob for name, prob in probs.items() if prob >= limit}
    assert found(threshold=0, safe_labels=["praise"]).keys() == {"blame", "story"}
    assert found(threshold=0, safe_labels=["praise", "story"]).keys() == {"blame"}
    long = " ".join([*["good the a"] * 60, *["bad"] * 30, *["good the a"] * 60])
    body: dict[str, Any] = {"contents": [long], "detector_params": {"safe_labels": ["praise", "story"]}}
    ((one,),) = httpx.post(f"{server.url}/api/v1/text/contents", json=body).json()
    assert (one["detection"], one["start"] < long.index("bad") < one["end"]) == ("blame", True)
    assert one["start"] > 0 and one["end"] < len(long)  # the window in which blame is most probable
    for name in NAMES:  # LiteLLM's guardrail blocks one label, at the model's own threshold
        params = {"label": name, "tau": 0}
        body = {"texts": [text], "additional_provider_specific_params": params}
        answer = httpx.post(f"{server.url}/beta/litellm_basic_guardrail_api", json=body).json()
        assert answer["action"] == ("BLOCKED" if name in row["labels"] else "NONE")


@pytest.mark.slow
@pytest.mark.usefixtures("few_taus")
def test_unlabelled_texts_calibrate_against_full_depth(imported: Path, tmp_path: Path) -> None:
    store, texts = shutil.copytree(imported / "store", tmp_path / "store"), tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text, _ in make_rows(900, 6)))
    de3(f"calibrate topics --texts {texts} --store {store} --max-loss 5")
    calibration = Store(store).open("topics:2").manifest.calibration
    assert calibration is not None and calibration.exit_accuracy[-1] == 1


@pytest.mark.usefixtures("few_taus")
def test_labels_of_the_data_are_reported(classifier: Path, imported: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    rows = [(text, labels_of(text)) for text, _ in make_rows(900, 5)]
    file.write_text("text,label\n" + "".join(f"{t},{'|'.join(NAMES[k] for k in ks)}\n" for t, ks in rows))
    de3(
        f"import {classifier} --texts {file} --label-column label --name m --store {tmp_path}/s --work {tmp_path}/w"
    )
    calibration = Store(tmp_path / "s").open("m").manifest.calibration
    assert calibration is not None and not calibration.self_labelled
    output = de3(
        f"evaluate {imported}/store/topics/1 {file} --png {tmp_path}/plot.png --original {classifier}"
    )
    assert "all labels right" in output and "macro F1" in output
    command = (
        f"import {classifier} --texts {file} --label-column label --name low --threshold 0.2 --quantize none"
    )
    de3(f"{command} --store {tmp_path}/s --work {tmp_path}/low")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in make_rows(300, 6)))
    output = de3(f"evaluate {tmp_path}/s/low/1 {texts} --original {classifier} --png {tmp_path}/plot.png")
    assert "100.00" in output  # with the import's thresholds, full depth gives the original's answers


def test_labels_as_arrays_and_back(tmp_path: Path) -> None:
    labels = [(0, 2), (), (1,)]
    assert [label_of(row) for row in label_array(labels, 3)] == labels
    examples = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    save_examples(tmp_path / "x.jsonl", examples, NAMES)
    assert load_examples(tmp_path / "x.jsonl", NAMES, multi_label=True) == examples
    for label, message in (
        ('["praise", "anger"]', "'anger'"),
        ("0", "a label \\(text or a whole number\\)|'0'"),
        ("null", "label is missing"),
        ('"anger"', "'anger'"),
    ):
        (tmp_path / "y.jsonl").write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(ValueError, match=message):
            load_examples(tmp_path / "y.jsonl", NAMES, multi_label=True)
    rows = [{"text": "a", "label": "praise | story"}, {"text": "b", "label": ""}]
    (tmp_path / "z.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_examples(tmp_path / "z.jsonl", NAMES, multi_label=True)
    assert [example.label for example in read] == [(0, 2), ()]
    (tmp_path / "z.jsonl").write_text('{"text": "a", "label": ["praise"]}\n')
    with pytest.raises(ValueError, match=r"must be a label \(text or a whole number\)"):
        load_examples(tmp_path / "z.jsonl", NAMES)


def test_an_unsound_manifest_is_refused(imported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(imported / "store", tmp_path / "store")) / "topics/1/manifest.json"
    sound = json.loads(path.read_text())
    for change, message in (
        ({"thresholds": [0.5, 0.5]}, "one entry for each label"),
        ({"thresholds": [0.5, 0.5, 1.0]}, "less than 1"),
        ({"thresholds": [0.5, 0.5, 0]}, "greater than 0"),
        ({"thresholds": None}, "prototype_layers must be the exit layers"),
        ({"prototype_layers": [0, 1, 2]}, "prototype_layers must be empty"),
    ):
        path.write_text(json.dumps(sound | change))
        with pytest.raises(StoreError, match=message):
            Store(tmp_path / "store").open("topics")
