"""de3 fit: a classifier from a table of texts and labels."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from de3.data.examples import Example
from de3.data.split import stratified
from de3.data.tables import pair_of
from de3.exits.calibration import Samples
from de3.exits.recorded import Recorded
from de3.export import from_table, labels
from de3.export.encoder import encoder_of
from de3.export.label_report import report
from de3.library import load
from de3.model_store.model import Model
from de3.model_store.store import Store
from tests.commands import de3, refusal
from tests.fixtures import BAD, FILLER, GOOD, made_once, save_encoder

# What a text is about is the word that it has of one of these.
TOPICS = {"praise": GOOD[:5], "thanks": GOOD[5:], "blame": BAD[:5], "anger": BAD[5:]}


def topics(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts, a twentieth of them without a word of their topic, with one of four labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = str(rng.choice(list(TOPICS)))
        words = list(rng.choice(FILLER, rng.integers(3, 10)))
        if rng.random() > 0.05:
            words.insert(rng.integers(len(words)), str(rng.choice(TOPICS[label])))
        rows.append((" ".join(words), label))
    return rows


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


# Fewer values of τ take a third of the time to calibrate.
FAST_WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None)
from de3.cli import main
from de3.export import calibrate
calibrate.FINE_TAUS = calibrate.FINE_TAUS[::24]
main()
"""


@pytest.fixture(scope="session")
def fitted(encoder: Path) -> Path:
    """A folder with the table, and the classifier that the command made without PyTorch: store/topics/1, log.txt."""

    def make(folder: Path) -> None:
        table = write_table(folder / "topics.csv", topics(2600, 1))
        command = f"fit {table} --encoder {encoder} --name topics --store {folder}/store"
        done = subprocess.run(
            [sys.executable, "-c", FAST_WITHOUT_TORCH, *command.split()],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        assert done.returncode == 0, done.stderr
        (folder / "log.txt").write_text(done.stderr)

    return made_once("fitted", make)


def test_a_table_becomes_a_classifier(fitted: Path) -> None:
    log = (fitted / "log.txt").read_text()
    manifest = Store(fitted / "store").open("topics").manifest
    assert (manifest.labels, manifest.source, manifest.input) == (sorted(TOPICS), None, "text")
    calibration = manifest.calibration
    assert calibration is not None and not calibration.self_labelled
    assert calibration.certify_size == 520 and calibration.default.accuracy > 0.9
    assert "2080 texts to fit, 520 to certify" in log
    assert "520 texts that were not used for fitting: at full depth, accuracy 9" in log
    assert "Labels that full depth confuses most often" in log
    assert "Next: de3 serve --model topics --store" in log
    new = topics(400, 2)
    answers = load("topics", store=fitted / "store").answers([text for text, _ in new], tau=0)
    right = np.mean([row["label"] == label for row, (_, label) in zip(answers, new, strict=True)])
    low, high = calibration.default.accuracy_interval
    assert low - 0.03 < right < high + 0.03


def test_full_depth_is_a_logistic_regression_on_the_fitting_texts(fitted: Path) -> None:
    """As scikit-learn fits it."""
    model = Model(Store(fitted / "store").open("topics"), "auto")
    examples = [Example(text, sorted(TOPICS).index(label)) for text, label in topics(2600, 1)]
    is_certifying = stratified(examples, from_table.SEED) < from_table.CERTIFYING

    def pooled(of: bool, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
        """The last states, the logits and the labels of the first examples that certify, or do not."""
        some = [e for e, chosen in zip(examples, is_certifying, strict=True) if chosen == of][:count]
        steps = [model.full_depth(model.tokenize(*pair_of(e.text)))[-1] for e in some]
        logits = np.stack([step.logits for step in steps if step.logits is not None])
        return np.stack([step.hidden[0].mean(0) for step in steps]), logits, [int(e.label) for e in some]

    x, _, labels = pooled(False, 2600)
    mean, spread = x.mean(0), x.std(0) + 1e-4
    ridge = float((fitted / "log.txt").read_text().partition("\nridge ")[2].partition(";")[0])
    theirs = LogisticRegression(C=1 / (2 * ridge * len(x)), max_iter=5000, tol=1e-8)
    theirs.fit((x - mean) / spread, labels)
    new, logits, _ = pooled(True, 200)
    expected = theirs.predict_log_proba((new - mean) / spread)
    ours = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert (ours.argmax(-1) == expected.argmax(-1)).mean() > 0.99
    assert np.abs(np.exp(ours) - np.exp(expected)).mean() < 0.01


def test_a_second_table_is_the_next_version(fitted: Path, tmp_path: Path, encoder: Path) -> None:
    """With few texts: no certificate, a default τ from cross-validation, and the encoder of a stored model."""
    table = write_table(tmp_path / "few.csv", topics(32, 5))
    path = tmp_path / "store"
    first = f"fit {table} --encoder {fitted}/store/topics --name few --store {path}"
    output = de3(first)
    assert "32 independent texts are too few for a certificate, so by default no text exits early" in output
    assert "32 texts, by cross-validation" in output
    manifest = Store(path).open("few").manifest
    assert manifest.calibration is None
    assert manifest.risk is not None
    assert "published" in de3(first.replace("few.csv", "few.csv --quantize int8"))
    second = Store(path).open("few")
    assert second.manifest.version == 2
    assert second.manifest.files == manifest.model_copy().files
    answers = load("few", store=path).answers(["a good film", "a stale film"], tau=0.5)
    assert {row["label"] for row in answers} <= set(TOPICS)
    assert "it is int8: give --quantize int8" in refusal(f"{first} --quantize none")


def test_evaluate_compares_with_a_baseline(fitted: Path, tmp_path: Path) -> None:
    rows = topics(60, 6)
    table = write_table(tmp_path / "test.csv", rows)
    three = write_table(tmp_path / "three.csv", [(t, label.replace("anger", "blame")) for t, label in rows])
    de3(f"fit {three} --encoder {fitted}/store/topics --store {tmp_path}/store --name three")
    pairs = Path(shutil.copytree(tmp_path / "store/three", tmp_path / "store/pairs")) / "1/manifest.json"
    pairs.write_text(json.dumps(json.loads(pairs.read_text()) | {"name": "pairs", "input": "pair"}))
    command = f"evaluate {fitted}/store/topics {table} --png {tmp_path}/plot.png --store {tmp_path}/store --baseline"
    other = write_table(tmp_path / "other.csv", [("a film", "unknown"), ("the plot", "unknown")])
    assert "no row has a label" in refusal(f"{command.replace(str(table), str(other))} three")
    assert "--baseline pairs:1: the model was trained on pairs of texts" in refusal(f"{command} pairs")
    output = de3(f"{command} three")
    assert "rows are left out, as only one model, or none, has their label: 'anger'" in output
    assert "at the defaults, the baseline's accuracy is" in output


def test_several_labels_in_a_cell_make_a_multi_label_model(tmp_path: Path, encoder: Path) -> None:
    rows = [("the film", "")]
    for (one, first), (two, second) in zip(topics(150, 1), topics(150, 2), strict=True):
        rows += [(f"{one} {two}", "|".join(dict.fromkeys([first, second]))), (one, first)]
    table = write_table(tmp_path / "multi.csv", rows)
    output = de3(f"fit {table} --encoder {encoder} --name multi --store {tmp_path}/store --threshold 0.4")
    assert "all labels right" in output
    assert Store(tmp_path / "store").open("multi").manifest.thresholds == [0.4] * 4
    answers = load("multi", store=tmp_path / "store").answers([text for text, _ in rows], tau=0)
    right = [set(a["labels"]) == set(label.split("|")) for a, (_, label) in zip(answers, rows, strict=True)]
    assert np.mean(right) > 0.8


GOOD_ROWS = topics(40, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD_ROWS, ("a film", "")], "table.csv:42: label is empty"),
        (
            [(text.replace("a", "ä x"), label) for text, label in GOOD_ROWS],
            "tokens are unknown to the encoder",
        ),
        ([("\u200b", "praise"), ("\u200b", "anger")] * 2, "the tokenizer produces no tokens for the texts"),
        ([("a film", "praise"), ("A FILM", "anger")] * 2, "too few independent texts"),
    ],
)
def test_an_unusable_table_is_refused(
    rows: list[tuple[str, str]], message: str, tmp_path: Path, encoder: Path
) -> None:
    table = write_table(tmp_path / "table.csv", rows)
    assert message in refusal(f"fit {table} --encoder {encoder} --name bad --store {tmp_path}")


def test_odd_rows_of_a_table_are_named(tmp_path: Path, encoder: Path) -> None:
    odd = [
        ("a film", "seen once"),
        ("A  FILM", "praise"),
        ("the plot", "anger"),
        ("the plot", "\x1b[1mblame"),
    ]
    table = write_table(tmp_path / "table.csv", [*GOOD_ROWS, *odd])
    output = de3(f"fit {table} --encoder {encoder} --name good --store {tmp_path}/store")
    assert "'seen once' (1)" in output
    said = r"'a film': praise or seen once; 'the plot': \u001b[1mblame or anger"
    assert f"2 texts occur with different labels: {said}" in output


@pytest.mark.parametrize(
    ("kind", "family"), [("encoder", "bert"), ("classifier", "modernbert"), ("masked", "mpnet")]
)
def test_the_encoder_of_any_model_is_used(kind: str, family: str, tmp_path: Path) -> None:
    """Its states are transformers' own, whatever head it has; weights of another encoder are refused."""
    folder = save_encoder(tmp_path / "encoder", family, labels=3 * (kind == "classifier"))
    if kind == "masked":
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with encoder_of(str(folder), Store(tmp_path / "store"), "fp32") as (artifact, poolings):
        model = Model(artifact, "onnxruntime")
    assert poolings == ("mean", "cls")
    for text in ("a good film", "not " * 40):
        with torch.no_grad():
            expected = theirs(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64))
        ours = model.pooling.normalized(model.full_depth(model.tokenize(text))[-1].hidden)
        np.testing.assert_allclose(ours, expected.last_hidden_state[0].numpy(), atol=1e-4)
    weights = load_file(folder / "model.safetensors")
    layer = next(name for name in weights if "layers.0." in name or "layer.0." in name)
    weights[layer.replace(".0.", ".7.")] = weights[layer].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    opened = encoder_of(str(folder), Store(tmp_path / "store"), "fp32")
    with pytest.raises(ValueError, match="which a model of this type does not use"), opened:
        pass


def test_unusable_weights_are_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"] *= 1e7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    table = write_table(tmp_path / "few.csv", topics(40, 5))
    message = refusal(f"fit {table} --encoder {folder} --name large --store {tmp_path}/store")
    assert "no exits can be fitted to layer 2: its output has values above 65504" in message
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(f"fit {table} --encoder {folder} --name large --store {tmp_path}/store")
    assert "save them again with save_pretrained(…) of AutoModel and AutoTokenizer" in message


def test_a_sentence_encoder_says_how_it_pools(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "sentences"))
    (folder / "1_Pooling").mkdir()
    for config, expected in (
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": "lasttoken"}, ("mean", "cls")),
    ):
        (folder / "1_Pooling/config.json").write_text(json.dumps(config))
        with encoder_of(str(folder), Store(tmp_path / "store"), "int8") as (_, poolings):
            assert poolings == expected


def test_a_group_counts_for_the_label_of_the_fewest_groups() -> None:
    """By rows, group 0 would count for label 1, as would the others, and might then have no row for fitting."""
    rows = [(0, 0)] * 5 + [(1, group) for group in range(4)]
    for seed in range(10):
        examples = [Example(f"text {i}", label, str(group)) for i, (label, group) in enumerate(rows)]
        assert stratified(examples, seed)[0] == 0.5


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=4, max_size=200),
    st.integers(0, 5),
)
def test_any_interval_of_positions_has_its_share_of_each_label(
    rows: list[tuple[str, int]], seed: int
) -> None:
    examples = [Example(f"text {i}", "abc".index(label), f"group {g}") for i, (label, g) in enumerate(rows)]
    positions = stratified(examples, seed)
    of_group: dict[str | None, set[float]] = {}
    for example, position in zip(examples, positions, strict=True):
        of_group.setdefault(example.group, set()).add(position)
    assert all(len(found) == 1 for found in of_group.values())
    assert ((positions > 0) & (positions < 1)).all()
    single = [Example(f"text {i}", "abc".index(label)) for i, (label, _) in enumerate(rows)]
    positions, counts = stratified(single, seed), Counter(label for label, _ in rows)
    for k, label in enumerate("abc"):
        own = np.array([p for p, e in zip(positions, single, strict=True) if e.label == k])
        for share in (0.2, 0.5):
            assert abs((own < share).sum() - share * counts[label]) <= 0.5


def test_a_rare_label_that_early_exits_miss_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    n = 200
    truth = (np.arange(n) < 20).astype(np.int64)
    logits = np.zeros((n, 2, 2), np.float32)
    logits[np.arange(n), 1, truth] = 4
    logits[:, 0, 0] = 2  # the early exit always answers the frequent label
    samples = Samples.independent(Recorded([0, 1], logits, np.full_like(logits, np.nan), truth))
    for tau in (0.5, 0.0):
        report(
            samples, np.full((n, 2), 0.1), tau, ["[red]usual", "rare"], [f"text {i}" for i in range(n)], "x"
        )
    early, full = capsys.readouterr().err.split("falls")
    assert early.endswith("the recall of 1 of 2 labels ") and "'rare' (100 → 0% of 20)" in full
    assert "[red]usual" in full


def test_only_independent_texts_certify() -> None:
    """A fifth of the texts is enough, but not if they are of a few groups."""
    parts = from_table._parts
    few = [Example(f"text {i}", i % 2, f"group {i // 10}") for i in range(3000)]
    assert not parts(few)[2]
    alone = [replace(e, group=None) for e in few]
    rare = [Example(f"rare {i}", 2) for i in range(2)]
    assert set(rare) <= set(parts([*alone, *rare], 100)[0])
    fitting, _, certifying = parts(alone, 1000)
    assert (len(fitting), len(certifying)) == (1000, 600)


def test_layers_that_gain_nothing_are_left_out(tmp_path: Path) -> None:
    depth, rng = labels._depth, np.random.default_rng(0)
    correct = np.stack([rng.random(2000) < p for p in (0.95, 0.7, 0.9, 0.9, 0.9)], 1)
    correct[:, 3:] = correct[:, 2:3]
    # The embeddings' exit is more accurate than that of any layer.
    assert (depth(correct), depth(correct[:, 1:]), depth(np.zeros((4, 3), np.bool_))) == (2, 1, 1)
    correct[:40, 4] = True
    assert depth(correct[:, 1:]) == 3
    save_encoder(tmp_path / "encoder", "modernbert")  # its second layer has local attention
    table = write_table(tmp_path / "few.csv", topics(40, 5))
    de3(f"fit {table} --encoder {tmp_path}/encoder --name cut --store {tmp_path}/store")
    assert Store(tmp_path / "store").open("cut").manifest.num_layers == 1
    assert load("cut", store=tmp_path / "store").answers(["a good film"], tau=0)[0]["exit_layer"] == 1
