"""de3 import: stock classifiers of every family keep their answers and get exits."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from de3.data.examples import to_examples
from de3.data.tables import Columns, TextOrPair, read_rows
from de3.exits.kinds import CLASSES
from de3.export import importing, states
from de3.export.cache import artifact_of
from de3.export.full_depth import export_full_depth
from de3.export.original import original_of
from de3.export.seen import warnings_of
from de3.export.training_set import Target, TrainingSet
from de3.model_store.families import FAMILIES
from de3.model_store.model import Model
from de3.model_store.proof import int8_saturates
from de3.model_store.store import Store
from de3.training.checkpoint import Checkpoint
from tests.commands import WITHOUT_TORCH, de3, invoke, refusal
from tests.fixtures import made_once, make_rows, save_encoder
from tests.serving import serving
from tests.stock import (
    coarse_calibration,
    fine_tuned,
    imported_as,
    transformers_model,
    with_random_exits,
)


@pytest.fixture(scope="session")
def texts() -> Path:
    """A file of the fewest texts that an import takes, one per line."""

    def make(folder: Path) -> None:
        (folder / "texts.txt").write_text("".join(f"{text}\n" for text, _ in make_rows(500, 11)))

    return made_once("texts", make) / "texts.txt"


@pytest.fixture(scope="session")
def classifier(data_file: Path, encoder: Path) -> Path:
    """The folder of a stock classifier, fine-tuned on the labelled data."""
    examples = to_examples(read_rows(data_file, Columns("sentence"))[:1200], ["0", "1"])
    return fine_tuned("classifier", encoder, ["bad", "good"], examples, epochs=4)


@pytest.fixture(scope="session")
def imported(classifier: Path) -> Path:
    return imported_as("mine", classifier)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, {"bert": "bfloat16", "modernbert": "float16"}.get(family, "float32")) for family in FAMILIES],
)
def test_the_last_exit_is_the_stock_classifier(family: str, dtype: str, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "stock", family, labels=3)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
    stock.save_pretrained(folder)
    theirs, tokenizer = transformers_model(folder)
    ours = Model(with_random_exits(folder, Store(tmp_path / "store"), "m", "fp32"))
    by_name = artifact_of(str(folder), "int8", tmp_path / "cache")
    assert (by_name.full_name, by_name.manifest.source) == ("stock:1", "stock")
    int8 = Model(by_name)
    most = 0.1 if int8.runtime == "native" or not int8_saturates() else 1.0
    assert ours.manifest.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    singles = [(" ".join(["good"] * n) or "a",) for n in (0, 1, 2, 5, 17, 40, 100)]
    export_full_depth(ours.path, tmp_path / "whole", int8=False)
    session = InferenceSession(tmp_path / "whole/model.onnx")
    names = {x.name for x in session.get_inputs()}
    for text in (*singles, ("good film", "bad"), ("a " * 50, "very " * 50)):
        inputs = tokenizer(*text, return_tensors="pt", truncation=True, max_length=ours.manifest.max_tokens)
        with torch.no_grad():
            expected = theirs(**inputs).logits.numpy()
        tokens = ours.tokenize(*text)
        assert tokens.ids.tolist() == inputs["input_ids"].tolist()
        for model, error in ((ours, 1e-4), (int8, most)):
            np.testing.assert_allclose(model.full_depth(tokens)[-1].logits, expected[0], atol=error, rtol=0)
        feed = {name: value.numpy() for name, value in inputs.items() if name in names}
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_states_to_which_exits_are_fitted(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are transformers' own, after the norm that an exit sees, and in the order of the texts."""
    monkeypatch.setattr(states, "CHUNK", 3)
    folder = save_encoder(tmp_path / "stock", family, labels=3)
    theirs, tokenizer = transformers_model(folder)
    model = Model(artifact_of(str(folder), "fp32", tmp_path / "cache"), "onnxruntime")
    texts = ["the " * 40, "good", "a dull film", "bad plot and bad actor", "good , not bad"]

    def computed(model: Model, texts: list[str]) -> states.Computed:
        return states.compute(model, texts, tmp_path / "states", "some")

    first = computed(model, texts)
    ours = TrainingSet(Target(first.logits, CLASSES), np.arange(len(texts)), first.states)
    for i, text in enumerate(texts):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            outputs = theirs(**inputs, output_hidden_states=True)
            after = theirs.model.final_norm if family == "modernbert" else torch.nn.Identity()
            hidden = [after(one)[0].numpy() for one in outputs.hidden_states[:-1]]
        np.testing.assert_allclose(ours.target.logits[i], outputs.logits[0], atol=1e-4)
        for layer, tokens in enumerate(hidden):
            np.testing.assert_allclose(ours.pooled("mean", layer)[i], tokens.mean(0), atol=5e-3)
            np.testing.assert_allclose(ours.pooled("cls", layer)[i], tokens[0], atol=5e-3)
    part = ours.part(np.array([4, 1, 0])).part(np.array([1, 2]))
    np.testing.assert_array_equal(part.target.logits, ours.target.logits[[1, 0]])
    np.testing.assert_array_equal(part.pooled("cls", 2), ours.pooled("cls", 2)[[1, 0]])
    # For other texts, or for another head, the states in the folder are not reused.
    np.testing.assert_allclose(computed(model, texts[::-1]).logits, first.logits[::-1], atol=1e-5)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: -v if "classifier" in k else v for k, v in tensors.items()}, folder / "model.safetensors")
    other = Model(artifact_of(str(folder), "fp32", tmp_path / "cache"), "onnxruntime")
    np.testing.assert_allclose(computed(other, texts).logits, -first.logits, atol=1e-5)
    logits, kept = first.logits, first.chunks[1].stat().st_ino
    first.chunks[0].write_bytes(first.chunks[0].read_bytes()[:-1])
    again = computed(model, texts)
    np.testing.assert_array_equal(again.logits, logits)
    assert again.chunks[1].stat().st_ino == kept  # only the damaged part ran


@pytest.mark.usefixtures("few_taus")
def test_another_family_is_imported_with_new_label_names(tmp_path: Path, texts: Path) -> None:
    equal = {str(k): "same" for k in range(3)}
    folder = save_encoder(tmp_path / "stock", "modernbert", labels=3, id2label=equal)
    command = f"import {folder} --texts {texts} --name m --store {tmp_path}/store --work {tmp_path}/work"
    assert "its labels must be distinct" in refusal(command)
    de3(f"{command} --label-names a,b,c")
    artifact = Store(tmp_path / "store").open("m")
    assert artifact.manifest.labels == ["a", "b", "c"] and artifact.manifest.encoder.type == "modernbert"
    model, (theirs, tokenizer) = Model(artifact), transformers_model(folder)
    assert model.runtime == "native"
    for text in ("good", "a dull film and it was bad", "the " * 300):
        with torch.no_grad():
            logits = theirs(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).logits[0]
        np.testing.assert_allclose(model.full_depth(model.tokenize(text))[-1].logits, logits, atol=0.2)


def test_what_an_import_promises_and_serves(imported: Path, classifier: Path, tmp_path: Path) -> None:
    with coarse_calibration():
        de3(
            f"import {classifier} --texts {imported}/texts.txt --name mine --store {tmp_path} --work {tmp_path}/w "
            "--quantize none --max-loss 5"
        )
    assert not (tmp_path / "w").exists()
    for store, is_int8 in ((imported / "store", True), (tmp_path, False)):
        manifest = Store(store).open("mine").manifest
        assert manifest.labels == ["bad", "good"] and manifest.input == "text" and manifest.source is None
        calibration = manifest.calibration
        assert calibration is not None and calibration.self_labelled and calibration.default.speedup > 1.5
        full = next(row for row in calibration.table if row.tau == 0)
        assert calibration.cross_fitted == is_int8
        if is_int8:
            # Disagreement is counted against the original's answers, so int8 alone may cause some.
            assert full.disagreement == calibration.original_disagreement and full.disagreement_bound > 0
            assert manifest.export["int8"]["same_exit"] > 0.8
        else:
            assert calibration.original_disagreement is None and full.disagreement_bound == 0
    manifest = Store(imported / "store").open("mine").manifest
    texts: list[TextOrPair] = [*(imported / "texts.txt").read_text().splitlines()]
    with pytest.raises(ValueError, match="100% of the texts"):
        warnings_of(manifest, texts, imported / "texts.txt")
    assert manifest.calibration is not None
    full = next(row for row in manifest.calibration.table if row.tau == 0)
    with serving(imported / "store", models=["mine"]) as server:
        row = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        assert row["self_labelled"] and row["labels"] == ["bad", "good"]
        refused = server.classify(input="a", max_disagreement=full.disagreement_bound / 2)
        assert refused.status_code == 422
        assert "because of int8: import it with --quantize none" in refused.json()["error"]["message"]
        certificate = server.classify(input="a", max_disagreement=0.2).json()["certificate"]
        assert certificate["cross_fitted"] and certificate["samples"] == manifest.calibration.tune_size
        bound = certificate["bound"]
        assert full.disagreement_bound <= bound <= 0.2
    said = " ".join((imported / "log.txt").read_text().split())
    assert "disagreement with the original model" in said and "agreement with the original model" in said


@pytest.mark.usefixtures("few_taus")
def test_an_interrupted_import_continues(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels that are the indices of the model's."""
    monkeypatch.setattr(states, "CHUNK", 100)
    saved, save = list[Path](), states.save

    def interrupted(tensors: Any, file: Path) -> None:
        saved.append(file)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(tensors, file)

    monkeypatch.setattr(states, "save", interrupted)
    rows, work = tmp_path / "rows.tsv", tmp_path / "work"
    rows.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in make_rows(500, 11)))
    kept = work / "base/mine"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    command = f"import {classifier} --texts {rows} --label-column label --name m --store {tmp_path}/store"
    assert invoke(f"{command} --work {work}").exit_code == 130
    output = de3(f"{command} --work {work}")
    assert "fitting: 2 of 5 chunks are reused from an earlier run" in output
    assert "used as indices of the model's labels: 0 is bad, 1 is good" in " ".join(output.split())
    assert len(saved) == 3 + 3 + 5  # 3 in the first run; then 3 for fitting, 5 for certifying
    assert kept.read_text() == "mine" and not (work / ".import").exists()


@pytest.mark.slow
def test_an_import_needs_no_pytorch(classifier: Path, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Without PyTorch, import and evaluate run; where PyTorch is needed, they say so."""

    def run(command: str) -> str:
        words = [sys.executable, "-c", WITHOUT_TORCH, *command.split()]
        environment = os.environ | {"COLUMNS": "200"}
        result = subprocess.run(
            words, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path, env=environment
        )
        assert (result.returncode == 0) == (result.stderr.find("error:") < 0), result.stderr
        return result.stdout + result.stderr

    command = f"import {classifier} --texts {texts} --name m --quantize none"
    assert "published models/m/1" in run(command)
    assert "the default by length" in run(f"evaluate models/m/1 {texts} --original {classifier}").lower()
    assert "needs the train extra" in run(f"export {checkpoint} --name x")
    copy = Path(shutil.copytree(classifier, tmp_path / "old"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    installs = f"{sys.executable} -m pip install -e '.[train]'"
    assert installs in run(f"import {copy} --texts {texts} --name m --work other")


def test_what_would_fail_at_the_end_fails_at_the_beginning_with_advice(
    tmp_path: Path, texts: Path, encoder: Path, classifier: Path, checkpoint: Path
) -> None:
    exported = with_random_exits(classifier, Store(tmp_path / "exported"), "m", "fp32").path
    few, rows, wide = tmp_path / "few.txt", tmp_path / "rows.tsv", tmp_path / "rows.csv"
    few.write_text("a good film\n" * 499)
    rows.write_text("text\tlabel\n" + "".join(f"{text}\tnice\n" for text, _ in make_rows(600, 3)))
    wide.write_text("text\n" + "I liked it, mostly\n" * 600)
    (tmp_path / "file").touch()
    for model, more, message in (
        (encoder, texts, "is a BertModel, not a …ForSequenceClassification"),
        (checkpoint, texts, "is a checkpoint from de3 train, with exits: de3 export"),
        (exported, texts, "is an exported model already: de3 serve"),
        (classifier, f"{texts} --label-names a,b,c", "--label-names must name the labels ['bad', 'good']"),
        (classifier, few, "499 texts are too few"),
        (classifier, f"{rows} --label-column label", "such as ['nice'], but the model has ['bad', 'good']"),
        (classifier, f"{rows} --label-column other", "no column 'other'"),
        (classifier, f"{texts} --name BAD/NAME", "--name must have"),
        (classifier, f"{texts} --work {tmp_path}/file", "is a file; give a folder"),
        (classifier, f"{texts} --threshold 0.3", "is not a multi-label model"),
        (classifier, wide, "rows.csv:2: has 2 fields, the header has 1"),
    ):
        folders = f"--name m --store {tmp_path}/s --work {tmp_path}/w"
        assert message in refusal(f"import {model} {folders} --texts {more}")
    assert not (tmp_path / "s").exists() and not (tmp_path / "w").exists()  # nothing was computed
    for flag, message in (
        ("nosuch", "flag: 'nosuch' is not a label of m: bad, good"),
        ("bad@80%", "flag: 'bad@80%': give NAME=LABEL,LABEL@PROBABILITY"),
        ("m=bad", "flag: 'm=bad': there is one model, so give the flag without 'm'"),
    ):
        assert message in refusal(f"import {classifier} {folders} --texts {texts} --flag {flag}")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_labels": 10**9}, "config.json says num_labels 1000000000; .* whole number from 1 to 10000"),
        ({"num_hidden_layers": 100}, "num_hidden_layers 100; .* whole number from 1 to 99"),
        ({"id2label": {str(i): str(i) for i in range(10_001)}}, "at most 10000 labels"),
        ({"id2label": ["a", "b"]}, "id2label in its config.json must be an object"),
        ({"id2label": {"a": "b"}}, "must have whole numbers as keys"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_of_impossible_size_is_refused_before_a_model_is_built(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "bert", **fields}))
    with pytest.raises(ValueError, match=says), original_of(str(tmp_path)):
        pass
    config.write_text(json.dumps({"model_type": "de3-bert", "encoder": fields}))
    with pytest.raises(ValueError, match=says):
        Checkpoint(tmp_path, unfinished=True)
    config.write_bytes(b" " * 2**24 + b"{}")
    with pytest.raises(ValueError, match="more than 16777216 bytes"), original_of(str(tmp_path)):
        pass


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this code must not run",)


def test_a_file_with_more_than_weights_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_encoder(tmp_path, labels=2)
    (folder / "model.safetensors").unlink()
    for content, says in (
        (pickle.dumps(Evil()), "holds more than weights"),
        (b"", "damaged"),
        (b"junk" * 100, "damaged"),
    ):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=says) as caught, original_of(str(folder)):
            pass
        assert "\n" not in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "albert"}))
    with pytest.raises(ValueError, match="type 'albert' cannot be exported"), original_of(str(folder)):
        pass
    assert "must not run" not in capfd.readouterr().out


def test_a_checkpoint_with_damaged_weights_is_refused_in_a_line(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    whole = (copy / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], b""):
        (copy / "model.safetensors").write_bytes(damaged)
        assert "the prototypes cannot be read" in refusal(f"export {copy} --name x --store {tmp_path}/s")


def test_the_pooling_with_the_higher_speedup_is_chosen(imported: Path) -> None:
    said = (imported / "log.txt").read_text()
    merits = {
        kind: float(said.split(f"exits on the {words}")[1].split("speed-up about ")[1].split("×")[0])
        for kind, words in (("mean", "mean of the tokens"), ("cls", "first token"))
    }
    best = max(merits, key=lambda kind: merits[kind])
    assert Store(imported / "store").open("mine").manifest.pooling == best


@pytest.mark.parametrize(("option", "exact"), [("", 200), ("--fragments", 3000), ("--quantize none", 3000)])
def test_neither_exits_nor_risk_are_fitted_to_texts_that_certify(
    option: str, exact: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = save_encoder(tmp_path / "stock", layers=1, labels=2), tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text, _ in make_rows(600, 5)))
    computed: dict[str, tuple[set[str], Any]] = {}
    run = importing.states.compute

    def watched(model: Any, texts: Any, folder: Any, what: str, *more: Any) -> Any:
        found = run(model, texts, folder, what, *more)
        computed[what] = set(texts), found
        return found

    def fitted(layers: int, texts: TrainingSet, *_: Any) -> Any:
        assert texts.states == computed["fitting"][1].states and len(texts.groups) == len(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(importing.states, "compute", watched)
    monkeypatch.setattr(importing.fit, "fit", fitted)
    monkeypatch.setattr(importing, "MIN_EXACT", exact)
    command = (
        f"import {folder} --texts {file} --name m --store {tmp_path}/store --work {tmp_path}/work {option}"
    )
    assert invoke(command).exit_code == 130
    fitting, certifying = (computed[what][0] for what in ("fitting", "certifying"))
    assert len(computed) == 2 and min(map(len, (fitting, certifying))) > 100
    assert not fitting & certifying
