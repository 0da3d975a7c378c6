"""The segments, compared with the PyTorch model, for every encoder family, pooling, precision and shape of exits."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from de3.data.examples import Example, load_examples, save_examples
from de3.exits.kinds import CLASSES, Labels, TextKind
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy, Risk
from de3.export import exporter
from de3.export.calibrate import CalibrationPart
from de3.export.errors import ExportError
from de3.export.exporter import ExportSettings
from de3.export.full_depth import export_full_depth
from de3.export.group_report import group_table, groups_of
from de3.export.record import record
from de3.export.weights import StateFile
from de3.model_store.graph import quantize
from de3.model_store.model import Model
from de3.model_store.segments import session_options
from de3.model_store.store import Store
from de3.training.checkpoint import Checkpoint, write_record
from de3.training.encoded import encode
from de3.training.evaluate import Times, default_line
from de3.training.model import De3Model
from de3.training.predict import predict
from tests.commands import de3
from tests.fixtures import exact_int8, made_once, make_rows, save_encoder
from tests.stock import coarse_calibration

LABELS = ["a", "b", "c"]


def untrained(folder: Path, encoder: Path, **settings: object) -> Path:
    """The folder of a checkpoint with random heads and prototypes, and held-out parts.

    settings: arguments of `De3Model.from_encoder`.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(3)
    model = De3Model.from_encoder(str(encoder), LABELS, max_tokens=64, **settings)
    for head in model.classifiers:
        head.weight.data.normal_()
    model.prototypes.normal_()
    model.prototype_seen.fill_(True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    write_record(folder, finished=True)
    examples = [Example(text, i % 3) for i, (text, _) in enumerate(make_rows(120, 5))]
    for part, some in (("tune", examples[:60]), ("certify", examples[60:])):
        save_examples(folder / f"{part}.jsonl", some, LABELS)
    return folder


def exported(family: str) -> Path:
    """A folder with an untrained checkpoint, and a store of plain:1 (fp32) and plain-int8:1 made from it."""

    def make(folder: Path) -> None:
        encoder = save_encoder(folder / "encoder", family)
        checkpoint = untrained(folder / "checkpoint", encoder, exit_layers=[0, 1, 2, 3])
        with coarse_calibration():
            for name, quantize in (("plain", "none"), ("plain-int8", "int8")):
                settings = ExportSettings(name, quantize, max_int8_loss=1.0)
                exporter.export(checkpoint, Store(folder / "store"), settings)

    return made_once(f"exported-{family}", make)


@exact_int8
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_every_exit_is_the_pytorch_models(family: str) -> None:
    folder = exported(family)
    artifact = Store(folder / "store").open("plain-int8")
    parity = artifact.manifest.export["parity"]
    assert parity["longest"] == 64
    assert len(parity["logits"]) == 4 and len(parity["distances"]) == 3
    assert 0 < max(parity["logits"] + parity["distances"]) < 1e-3
    opened = Checkpoint(folder / "checkpoint")
    certify = opened.held_out("certify")
    theirs = predict(opened.model, encode(certify, opened.tokenizer, 64), opened.tokenizer.pad_token_id)
    ours = record(Model(artifact, "onnxruntime"), certify)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=0.3)
    np.testing.assert_allclose(ours.distances[:, :-1], theirs.distances[:, :-1], atol=0.3)


@pytest.mark.usefixtures("few_taus")
@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "cls", "exit_layers": [3]},
        {"exit_layers": [0, 3], "last_prototypes": True, "metric_dim": 5},
    ],
)
def test_parity_of_every_shape_of_model(tmp_path: Path, encoder: Path, settings: dict[str, object]) -> None:
    checkpoint = untrained(tmp_path / "checkpoint", encoder, **settings)
    exporter.export(checkpoint, Store(tmp_path / "store"), ExportSettings("m", "none"))
    manifest = Store(tmp_path / "store").open("m").manifest
    assert len(manifest.export["parity"]["distances"]) == len(manifest.prototype_layers)


def test_models_that_cannot_be_exported_are_refused_with_the_reason(tmp_path: Path, encoder: Path) -> None:
    unseen = untrained(tmp_path / "unseen", encoder)
    model = De3Model.from_pretrained(unseen)
    model.prototype_seen[1, 2] = False
    model.save_pretrained(unseen)
    settings, store = ExportSettings("m", "none"), Store(tmp_path / "store")
    with pytest.raises(ValueError, match="layer 2 has no prototype for c"):
        exporter.export(unseen, store, settings)
    with pytest.raises(ValueError, match="int8 or none"):
        ExportSettings("m", "int4")
    for file in ("tune.jsonl", "certify.jsonl", "tokenizer.json"):
        (unseen / file).rename(tmp_path / file)
        with pytest.raises(ValueError, match=f"{file}: missing"):
            exporter.export(unseen, store, settings)
        (tmp_path / file).rename(unseen / file)


def test_an_export_that_differs_from_pytorch_publishes_nothing(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = untrained(tmp_path / "checkpoint", encoder)
    read = StateFile.__getitem__

    def wrong(state: StateFile, name: str) -> object:
        array = read(state, name)
        if name == "encoder.layer.1.output.dense.bias":
            array[0] += 0.1
        return array

    monkeypatch.setattr(StateFile, "__getitem__", wrong)
    with pytest.raises(ExportError, match=r"differ from the PyTorch model by .*, above 0.001"):
        exporter.export(checkpoint, Store(tmp_path / "store"), ExportSettings("m", "none"))
    assert Store(tmp_path / "store").versions() == {}


@pytest.mark.usefixtures("few_taus")
def test_int8_that_costs_too_much_is_refused(tmp_path: Path) -> None:
    checkpoint = exported("bert") / "checkpoint"
    with pytest.raises(ExportError, match=r"int8 costs exit \d .* --max-int8-loss"):
        exporter.export(checkpoint, Store(tmp_path), ExportSettings("m", "int8", max_int8_loss=-1.0))
    assert Store(tmp_path).versions() == {}


def test_exits_in_int8_are_compared_with_those_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported("bert")
    artifact, opened = Store(folder / "store").open("plain-int8"), Checkpoint(folder / "checkpoint")
    manifest, certify = artifact.manifest, opened.held_out("certify")
    int8 = record(Model(artifact), certify)
    fp32 = record(Model(Store(folder / "store").open("plain")), certify, for_fit=True)
    rule = ExitRule(manifest.defaults.tau, manifest.default_signal)
    share = exporter.same_exit(int8, fp32, rule)
    assert manifest.export["int8"]["same_exit"] == pytest.approx(share) and 0.5 < share <= 1
    capsys.readouterr()
    assert exporter.same_exit(int8, int8, rule) == 1
    assert "100.0% of the certifying samples" in (said := capsys.readouterr().err) and "warning" not in said
    other = replace(int8, logits=-int8.logits)
    assert exporter.same_exit(int8, other, rule) < 0.2  # the same exits
    assert "warning" in capsys.readouterr().err
    early, late = recorded([9.0, -1.0], [9.0, -1.0]), recorded([0.1, 0.0], [9.0, -1.0])
    assert exporter.same_exit(early, late, ExitRule(0.5, Entropy())) == 0  # the same answers
    assert "int8" not in Store(folder / "store").open("plain").manifest.export


def recorded(*logits: list[float], **kind: Any) -> Recorded:
    """The logits of one sample at two exits."""
    values = np.array([logits], np.float32)
    return Recorded([0, 1], values, np.full_like(values, np.nan), np.zeros(1), **kind)


def test_quantization_is_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    weight[:, 3] = 0
    q, scale = quantize(weight)
    assert q.dtype == np.int8 and np.abs(q).max() == 127
    assert (np.abs(q * scale - weight) <= scale / 2 + 1e-7).all()


@pytest.mark.usefixtures("few_taus")
def test_calibration_is_honest() -> None:
    """The manifest's numbers come from running the held-out samples through the exported segments."""
    folder = exported("bert")
    artifact = Store(folder / "store").open("plain-int8")
    manifest = artifact.manifest
    assert manifest.calibration is not None
    parts = []
    for name in ("tune", "certify"):
        examples = load_examples(folder / f"checkpoint/{name}.jsonl", LABELS)
        parts.append(CalibrationPart.of(record(Model(artifact), examples, for_fit=True), examples))
    found = exporter.calibrate(*parts, manifest.calibration.max_loss)
    assert manifest.calibration == found.calibration
    assert (manifest.risk, manifest.defaults) == (found.fields()["risk"], found.defaults)
    default = manifest.calibration.default
    assert (default.tau, default.signal, default.lam) == tuple(
        getattr(manifest.defaults, field) for field in ("tau", "signal", "lam")
    )
    assert default in manifest.calibration.table


def test_evaluate_prints_a_table_and_draws_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported("bert")
    store, checkpoint = folder / "store", folder / "checkpoint"
    png, file, named = tmp_path / "plot.png", tmp_path / "texts.tsv", f"plain-int8:1 --store {store}"
    for model, more in ((checkpoint, ""), (store / "plain-int8/1", ""), (named, " and it was so" * 9)):
        made = enumerate(make_rows(40, 1))
        rows = [f"{text}{more}\t{LABELS[int(label)]}\tuser{i % 2}\n" for i, (text, label) in made]
        file.write_text("sentence\tlabel\tsender\n" + "".join(rows))
        by = " --by sender" * (model != checkpoint)
        arguments = f"evaluate {model} {file} --text-column sentence --png {png}{by}"
        output = de3(arguments)
        assert "EDR λ=2" in output and "distance ratio" in output
        assert png.read_bytes().startswith(b"\x89PNG")
        png.unlink()
        for part in ("risk", "The default by length", "sender", "Top probability: differs"):
            assert (part in output) == (model != checkpoint)  # a checkpoint has no fitted risk yet
        assert ("the calibration's guarantees may not hold for these texts" in output) == bool(more)
    default = Store(store).open("plain-int8").manifest.defaults
    assert f"Default {default.signal}" in output.replace("EDR", "edr")  # the artifact's default
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "plot: skipped (" in (skipped := de3(arguments)) and "-m pip install matplotlib" in skipped


def test_evaluate_names_the_groups_that_differ_most_but_not_those_of_a_few_texts() -> None:
    texts = [("It is n't bad .", "Good .")[i >= 30] for i in range(100)]
    logits = np.zeros((100, 2, 2), np.float32)
    logits[:, 0, 1], logits[:, 1, 1] = 1, np.where((np.arange(100) < 12) | (np.arange(100) == 99), -1, 1)
    found = Recorded([0, 1], logits, np.full_like(logits, np.nan), np.arange(100) % 2, np.arange(100))
    groups = groups_of(found, texts, ["a", "b"]) | {"user": [*["u"] * 99, "v"]}
    table = group_table(found, 1.0, Entropy(), groups)
    by, worst, counts, differ, _, others = ([*column.cells] for column in table.columns)
    assert by == ["negation", "length", "label", "user"]
    assert (worst[:2], counts[:2], differ[0], others[0]) == (
        ["with", "0 to 33 tokens"],
        ["30", "34"],
        "40.00%",
        "1.43%",
    )
    assert (worst[3], counts[3], others[3]) == ("u", "99", "100.00%")  # 1 of 1


@pytest.mark.parametrize("kind", [CLASSES, Labels.of([0.5, 0.5])])
def test_evaluate_says_how_exits_change_the_top_probability(kind: TextKind) -> None:
    top = np.array([[0.95, 0.85], [0.97, 0.99]])  # two texts at two exits
    logit = np.log(top / (1 - top))
    other = np.full_like(logit, -9) if isinstance(kind, Labels) else np.zeros_like(logit)
    logits = np.stack([other, logit], -1).astype(np.float32)
    labels = np.array([[False, True]] * 2) if isinstance(kind, Labels) else np.ones(2)
    found = Recorded([0, 1], logits, np.full_like(logits, np.nan), labels, np.array([5, 9]), kind=kind)
    times = Times(np.ones(2), np.ones((2, 2)))
    *_, line = default_line(found, 1.0, Risk(((0.0,) * 5, None)), times).split("\n")
    assert "by 0.0600 on average; for 50.00% of texts, only one of the two is at least 0.9" in line


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("bert", "plain-int8", marks=exact_int8),
        ("deberta-v2", "plain"),
        pytest.param("modernbert", "plain-int8", marks=exact_int8),
    ],
)
def test_full_depth_is_the_segments_in_one_graph(tmp_path: Path, family: str, name: str) -> None:
    folder, int8 = exported(family), name == "plain-int8"
    artifact = Store(folder / "store").open(name)
    model, sessions = Model(artifact, "onnxruntime"), []
    for source, in_int8 in ((artifact.path, int8), (folder / "checkpoint", int8), (artifact.path, False)):
        out = tmp_path / str(len(sessions))
        export_full_depth(source, out, in_int8)
        sessions.append(ort.InferenceSession((out / "model.onnx").read_bytes(), session_options()))
    names = {x.name for x in sessions[0].get_inputs()}
    for text in ("good", "a dull plot and a bad film", "good " * 80):
        tokens = model.tokenize(text)
        feed = {"input_ids": tokens.ids, "token_type_ids": tokens.type_ids}
        feed = {key: value for key, value in feed.items() if key in names}
        same, again, fp32 = (session.run(None, feed)[0][0] for session in sessions)
        wanted = model.full_depth(tokens)[-1].logits
        np.testing.assert_array_equal(same, again)
        np.testing.assert_allclose(same, wanted, atol=0.3 if int8 else 0)
        np.testing.assert_allclose(fp32, wanted, atol=0.3)
    config = json.loads((tmp_path / "0/config.json").read_text())
    assert config == {"labels": model.manifest.labels, "max_tokens": model.manifest.max_tokens}
    with pytest.raises(ValueError, match="already exists"):
        export_full_depth(artifact.path, tmp_path / "0", int8=False)
