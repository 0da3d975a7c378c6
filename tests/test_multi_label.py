"""Multi-label models: imported, calibrated and served; a text exits when no label's decision is likely to change."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.data.examples import Example, label_array, label_of, load_examples
from de3.model_store.manifest import Missed
from de3.model_store.store import Store, StoreError
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.server.settings import Settings
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
def classifier(encoder: Path) -> Path:
    """The folder of a stock multi-label classifier."""
    examples = [Example(text, labels_of(text)) for text, _ in make_rows(800, 1)]
    return fine_tuned("multi", encoder, NAMES, examples, epochs=3)


@pytest.fixture(scope="session")
def imported(classifier: Path) -> Path:
    return imported_as("topics", classifier)


@pytest.fixture(scope="module")
def server(imported: Path) -> Iterator[Server]:
    with serving(imported / "store", models=["topics"]) as running:
        yield running


def test_an_artifact_records_that_it_is_multi_label(imported: Path) -> None:
    artifact = Store(imported / "store").open("topics")
    manifest = artifact.manifest
    assert (manifest.labels, manifest.thresholds, manifest.prototype_layers) == (NAMES, [0.5] * 3, [])
    assert manifest.calibration is not None and manifest.calibration.default.speedup > 1.2
    assert {row.signal for row in manifest.calibration.table} == {"risk", "entropy"}


def test_a_text_has_any_number_of_labels(server: Server, classifier: Path) -> None:
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
        ({"thresholds": {f"label {i}": 7 for i in range(20_000)}}, "at most 10000 are allowed"),
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
    missed = {"labels": ["blame"], "threshold": None, "is_below": False, "flagged": 200}
    manifest = Store(imported / "store").open("topics").manifest
    manifest = manifest.model_copy(
        update={"missed": Missed.model_validate(missed | {"taus": [0, 0.5], "bounds": [0, 0.01]})}
    )
    rules = Rules(manifest, Settings(max_missed=0.02))
    for thresholds, tau in ((None, 0.5), (0.01, 0.0)):  # all layers, as with a guarantee
        choice = rules.choose(ExitOptions(thresholds=thresholds))
        assert choice.rule.tau == tau and (choice.certificate is None) == (tau == 0)


def test_edr_needs_classes_that_exclude_each_other(server: Server) -> None:
    for options in ({"signal": "edr"}, {"lambda": 1}, {"signal": "edr", "lambda": 2, "tau": 0.1}):
        answer = server.classify(input="a", **options)
        assert answer.status_code == 422, options
        assert "edr needs mutually exclusive classes" in answer.json()["error"]["message"]


def test_answers_are_the_same_layer_by_layer_and_in_the_kernels(server: Server) -> None:
    body: dict[str, Any] = {"input": [text for text, _ in make_rows(40, 77)], "signal": "risk", "tau": 0.1}
    rows, explained = (
        server.classify(**body, thresholds=0.4, explain=explain).json()["data"] for explain in (False, True)
    )
    for row, other in zip(rows, explained, strict=True):
        assert (row["labels"], row["exit"]) == (other["labels"], other["exit"])


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
    found = client.moderations.create(input=texts, model="topics", extra_body={"tau": 0})
    rows = server.classify(input=texts, tau=0).json()["data"]
    assert found.id.startswith("modr-") and found.model == "topics:1"
    for result, row in zip(found.results, rows, strict=True):
        raw = result.model_dump()
        assert raw["flagged"] == bool(row["labels"])
        assert [name for name in NAMES if raw["categories"][name]] == row["labels"]
        assert [raw["category_scores"][name] for name in NAMES] == row["probs"]
        assert [name for name in NAMES if raw["category_applied_input_types"][name]] == row["labels"]
    one = client.moderations.create(input="good", extra_body={"tau": 0, "thresholds": 1e-6}).results[0]
    assert one.flagged and one.model_dump()["exit_layer"] == 3
    # Parts are one input: each label has its highest score in any of them.
    (parts,) = client.moderations.create(input=[{"type": "text", "text": x} for x in ("good", "bad")]).results
    alone = [client.moderations.create(input=x).results[0].model_dump() for x in ("good", "bad")]
    for name in NAMES:
        assert parts.model_dump()["categories"][name] == any(x["categories"][name] for x in alone)
        assert parts.model_dump()["category_scores"][name] == max(x["category_scores"][name] for x in alone)
    image: Any = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    for wrong in ([image], [{"type": "text", "text": "good"}, image], [{"type": "text"}]):
        answer = httpx.post(f"{server.url}/v1/moderations", json={"input": wrong})
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


@pytest.mark.usefixtures("few_taus")
def test_labels_of_the_data_are_reported(classifier: Path, tmp_path: Path) -> None:
    file, texts = tmp_path / "texts.csv", tmp_path / "texts.txt"
    rows = [(text, labels_of(text)) for text, _ in make_rows(600, 5)]
    file.write_text("text,label\n" + "".join(f"{t},{'|'.join(NAMES[k] for k in ks)}\n" for t, ks in rows))
    texts.write_text("".join(f"{text}\n" for text, _ in make_rows(100, 6)))
    options = f"--label-column label --name low --threshold 0.2 --quantize none --work {tmp_path}/w"
    de3(f"import {classifier} --texts {file} {options} --store {tmp_path}/s")
    calibration = Store(tmp_path / "s").open("low").manifest.calibration
    assert calibration is not None and not calibration.self_labelled
    evaluate = f"evaluate {tmp_path}/s/low/1 --original {classifier} --png {tmp_path}/plot.png"
    output = de3(f"{evaluate} {file}")
    assert "all labels right" in output and "macro F1" in output
    assert "100.00" in de3(f"{evaluate} {texts}")  # with the import's thresholds: the original's answers


def test_labels_as_arrays_and_back(tmp_path: Path) -> None:
    """test_multi_label_training.py reads lists, and labels with bars."""
    labels, path = [(0, 2), (), (1,)], tmp_path / "x.jsonl"
    assert [label_of(row) for row in label_array(labels, 3)] == labels
    path.write_text('{"text": "a", "label": ["praise"]}\n')
    with pytest.raises(ValueError, match=r"must be a label \(text or a whole number\)"):
        load_examples(path, NAMES)
    for label, message in (('["praise", "anger"]', "'anger'"), ("null", "label is missing")):
        path.write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(ValueError, match=message):
            load_examples(path, NAMES, multi_label=True)


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
