"""The segments, compared with the PyTorch model, for every encoder family, pooling, precision and shape of exits."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file

from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule
from de3.export import exporter
from de3.export.calibrate import Part
from de3.export.errors import ExportError
from de3.export.exporter import ExportSettings
from de3.export.full_depth import export_full_depth
from de3.export.record import record
from de3.export.weights import StateFile
from de3.model_store.families import FAMILIES
from de3.model_store.graph import quantize
from de3.model_store.model import Model
from de3.model_store.segments import session_options
from de3.model_store.store import Store
from de3.training import data as datas
from de3.training.checkpoint import Checkpoint, write_record
from de3.training.data import Example
from de3.training.encoded import encode
from de3.training.model import De3Model
from de3.training.predict import predict
from tests.commands import de3
from tests.fixtures import make_rows, save_encoder

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
    examples = [Example(text, i % 3) for i, (text, _) in enumerate(make_rows(60, 5))]
    for part in ("tune", "certify"):
        datas.save_examples(folder / f"{part}.jsonl", examples, LABELS)
    return folder


@pytest.mark.usefixtures("few_taus")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_parity_of_every_family(tmp_path: Path, family: str, quantize: str) -> None:
    encoder = save_encoder(tmp_path / "encoder", family)
    checkpoint = untrained(tmp_path / "checkpoint", encoder, exit_layers=[0, 1, 2, 3])
    settings = ExportSettings("m", quantize, max_int8_loss=1.0)
    path = exporter.export(checkpoint, Store(tmp_path / "store"), settings)
    artifact = Store(tmp_path / "store").open("m")
    parity = artifact.manifest.export["parity"]
    assert parity["longest"] == 64
    assert len(parity["logits"]) == 4 and len(parity["distances"]) == 3
    assert 0 < max(parity["logits"] + parity["distances"]) < 1e-3
    if quantize == "int8":
        opened = Checkpoint(checkpoint)
        certify = opened.held_out("certify")
        theirs = predict(opened.model, encode(certify, opened.tokenizer, 64), opened.tokenizer.pad_token_id)
        ours = record(Model(artifact, "onnxruntime"), certify)
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=0.3)
        np.testing.assert_allclose(ours.distances[:, :-1], theirs.distances[:, :-1], atol=0.3)
    assert (path / "layer_03.onnx").exists()


@pytest.mark.usefixtures("few_taus")
@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "cls"},
        {"exit_layers": [2, 3]},
        {"exit_layers": [3]},
        {"exit_layers": [0, 3], "last_prototypes": True, "metric_dim": 5},
    ],
)
def test_parity_of_every_shape_of_model(tmp_path: Path, encoder: Path, settings: dict[str, object]) -> None:
    checkpoint = untrained(tmp_path / "checkpoint", encoder, **settings)
    exporter.export(checkpoint, Store(tmp_path / "store"), ExportSettings("m", "none"))
    manifest = Store(tmp_path / "store").open("m").manifest
    assert len(manifest.export["parity"]["distances"]) == len(manifest.prototype_layers)


@pytest.mark.usefixtures("few_taus")
@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_parity_of_other_activations(tmp_path: Path, activation: str) -> None:
    encoder = save_encoder(tmp_path / "encoder", activation=activation)
    checkpoint = untrained(tmp_path / "checkpoint", encoder)
    exporter.export(checkpoint, Store(tmp_path / "store"), ExportSettings("m", "none"))


def test_models_that_cannot_be_exported_are_refused_with_the_reason(tmp_path: Path, encoder: Path) -> None:
    checkpoint = untrained(tmp_path / "checkpoint", save_encoder(tmp_path / "e", activation="silu"))
    with pytest.raises(ValueError, match="activation 'silu' cannot be exported"):
        exporter.export(checkpoint, Store(tmp_path / "store"), ExportSettings("m", "none"))
    unseen = untrained(tmp_path / "unseen", encoder)
    model = De3Model.from_pretrained(unseen)
    model.prototype_seen[1, 2] = False
    model.save_pretrained(unseen)
    with pytest.raises(ValueError, match="layer 2 has no prototype for c"):
        exporter.export(unseen, Store(tmp_path / "store"), ExportSettings("m", "none"))
    with pytest.raises(ValueError, match="int8 or none"):
        ExportSettings("m", "int4")


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


def test_int8_that_costs_too_much_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=r"int8 costs exit \d .* --max-int8-loss"):
        exporter.export(checkpoint, Store(tmp_path), ExportSettings("m", "int8", max_int8_loss=-1.0))
    assert Store(tmp_path).versions() == {}


def test_exits_in_int8_are_compared_with_those_in_fp32(
    store: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Store(store).open("tiny-int8").manifest
    opened = Checkpoint(checkpoint)
    certify = opened.held_out("certify")
    int8 = record(Model(Store(store).open("tiny-int8"), "onnxruntime"), certify)
    encoded = encode(certify, opened.tokenizer, manifest.max_tokens)
    fp32 = predict(opened.model, encoded, opened.tokenizer.pad_token_id)
    rule = ExitRule(manifest.defaults.tau, manifest.default_signal)
    alike = 0
    for i in range(len(certify)):
        left = []
        for r in (int8, fp32):
            scores = rule.signal.scores(r.rows(np.array([i])))[0]
            j = next((j for j, score in enumerate(scores[:-1]) if score < rule.tau), len(scores) - 1)
            left.append((j, int(r.logits[i, j].argmax())))
        alike += left[0] == left[1]
    assert manifest.export["int8"]["same_exit"] == pytest.approx(alike / len(certify))
    assert 0.5 < alike / len(certify) <= 1
    assert exporter.same_exit(int8, int8, rule) == 1
    assert "100.0% of the certifying samples" in (said := capsys.readouterr().err) and "warning" not in said
    other = Recorded(int8.exit_layers, -int8.logits, int8.distances, int8.labels)
    assert exporter.same_exit(int8, other, rule) < 0.2
    assert "warning" in capsys.readouterr().err
    assert "int8" not in Store(store).open("tiny").manifest.export


def test_missing_samples_are_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "c")
    (copy / "tune.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tune.jsonl: missing"):
        exporter.export(copy, Store(tmp_path / "s"), ExportSettings("m", "none"))


def test_samples_that_tune_do_not_certify(tmp_path: Path, checkpoint: Path) -> None:
    tune, certify = checkpoint / "tune.jsonl", checkpoint / "certify.jsonl"
    for given in ((certify, None), (None, tune), (tune, tune)):
        with pytest.raises(ValueError, match=r"of its texts are in .*\.jsonl too; guarantees need samples"):
            exporter.export(checkpoint, Store(tmp_path), ExportSettings("m", "none"), *given)
    assert Store(tmp_path).versions() == {}


def test_quantization_is_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    weight[:, 3] = 0
    q, scale = quantize(weight)
    assert q.dtype == np.int8 and np.abs(q).max() == 127
    assert (np.abs(q * scale - weight) <= scale / 2 + 1e-7).all()


def test_calibration_is_honest(store: Path, checkpoint: Path) -> None:
    """The manifest's numbers come from running the held-out samples through the exported segments."""
    for name in ("tiny", "tiny-int8"):
        artifact = Store(store).open(name)
        manifest = artifact.manifest
        assert manifest.calibration is not None
        parts = []
        for name_of_part in ("tune", "certify"):
            examples = datas.load_examples(checkpoint / f"{name_of_part}.jsonl", manifest.labels)
            parts.append(Part.of(record(Model(artifact, "onnxruntime"), examples), examples))
        found = exporter.calibrate(*parts, manifest.calibration.max_loss)
        assert manifest.calibration == found.calibration
        assert (manifest.risk, manifest.defaults) == (found.risk, found.defaults)
        default = manifest.calibration.default
        assert (default.tau, default.signal, default.lam) == tuple(
            getattr(manifest.defaults, field) for field in ("tau", "signal", "lam")
        )
        assert default in manifest.calibration.table
        assert default.speedup > 1


def test_a_damaged_checkpoint_tokenizer_is_named(tmp_path: Path, checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "c")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json: missing"):
        exporter.export(copy, Store(tmp_path / "s"), ExportSettings("m", "none"))


def test_evaluate_prints_a_table_and_draws_a_plot(
    tmp_path: Path, checkpoint: Path, store: Path, data_file: Path
) -> None:
    for model in (checkpoint, store / "tiny-int8" / "1"):
        png = tmp_path / "plot.png"
        arguments = ["evaluate", str(model), str(data_file), "--text-column", "sentence"]
        arguments += ["--label-names", "negative,positive", "--png", str(png)]
        output = de3(arguments)
        assert "EDR λ=2" in output and "distance ratio" in output
        assert png.read_bytes().startswith(b"\x89PNG")
        png.unlink()
        assert ("risk" in output) == (model != checkpoint)  # a checkpoint has no fitted risk yet
    assert "The default by length" in output and "≤ 2%" in output
    long = tmp_path / "long.tsv"
    rows = [f"{text} {'and it was so ' * 9}\t{label}\n" for text, label in make_rows(40, 1)]
    long.write_text("sentence\tlabel\n" + "".join(rows))
    arguments = ["evaluate", str(store / "tiny-int8/1"), str(long), "--text-column", "sentence"]
    output = de3([*arguments, "--label-names", "negative,positive", "--png", str(png)])
    assert "the calibration's guarantees may not hold for these texts" in output
    default = Store(store).open("tiny-int8").manifest.defaults
    assert f"Default {default.signal}" in output.replace("EDR", "edr")  # the artifact's default


def test_prototypes_are_an_input_that_can_be_replaced(store: Path, tmp_path: Path) -> None:
    """Swapping two prototypes in the file swaps the distances, so the prototypes are read from the file."""
    copy = shutil.copytree(store, tmp_path / "s") / "tiny" / "1"
    before = Model(Store(tmp_path / "s").open("tiny"))
    tensors = load_file(copy / "prototypes.safetensors")
    save_file({k: np.ascontiguousarray(v[::-1]) for k, v in tensors.items()}, copy / "prototypes.safetensors")
    from tests.test_store import rehash

    rehash(copy, "prototypes.safetensors")
    after = Model(Store(tmp_path / "s").open("tiny"))
    tokens = before.tokenize("a good film")
    a, b = before.full_depth(tokens)[1], after.full_depth(tokens)[1]
    assert np.array_equal(a.distances, b.distances[::-1])
    assert np.array_equal(a.logits, b.logits)


@pytest.mark.parametrize("name", ["tiny", "tiny-int8"])
def test_full_depth_is_the_segments_in_one_graph(store: Path, tmp_path: Path, name: str) -> None:
    artifact = Store(store).open(name)
    model = Model(artifact, "onnxruntime")
    export_full_depth(artifact.path, tmp_path / "same", int8=name == "tiny-int8")
    export_full_depth(artifact.path, tmp_path / "fp32", int8=False)
    same, fp32 = (
        ort.InferenceSession((tmp_path / kind / "model.onnx").read_bytes(), session_options())
        for kind in ("same", "fp32")
    )
    for text in ("good", "a dull plot and a bad film", "good " * 80):
        tokens = model.tokenize(text)
        feed = {"input_ids": tokens.ids, "token_type_ids": tokens.type_ids}
        wanted = model.full_depth(tokens)[-1].logits
        np.testing.assert_allclose(same.run(None, feed)[0][0], wanted, atol=0.1 if name == "tiny-int8" else 0)
        np.testing.assert_allclose(fp32.run(None, feed)[0][0], wanted, atol=0.1)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config == {"labels": model.manifest.labels, "max_tokens": model.manifest.max_tokens}
    with pytest.raises(ValueError, match="exists already"):
        export_full_depth(artifact.path, tmp_path / "same", int8=False)


def test_full_depth_of_a_checkpoint(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    export_full_depth(checkpoint, tmp_path / "a", int8=False)
    export_full_depth(Store(store).open("tiny").path, tmp_path / "b", int8=False)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
