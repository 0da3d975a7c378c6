"""de3 train --multi-label: any number of labels for a text, from the data to the server's answer."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from de3.data import tables
from de3.data.examples import Example, label_order, load_examples, save_examples, to_examples
from de3.exits.kinds import Labels
from de3.exits.recorded import Recorded
from de3.model_store.store import Store
from de3.training import checks
from de3.training import loss as losses
from de3.training.checkpoint import Checkpoint
from de3.training.evaluate import exit_scores, weaknesses
from de3.training.measures import f1
from de3.training.model import De3Model
from tests.commands import de3, refusal
from tests.fixtures import BAD, FILLER, GOOD, made_once, make_rows
from tests.serving import serving

pytestmark = pytest.mark.slow  # the fast tests of such models are in test_multi_label.py
NAMES = ["blame", "praise", "story"]
WORDS = (BAD, GOOD, FILLER[5:9])


def names_of(text: str) -> list[str]:
    """The labels of a text: none for praise or blame that is negated."""
    words = set(text.replace("not ", "not-").split())
    return [name for name, known in zip(NAMES, WORDS, strict=True) if words & set(known)]


@pytest.fixture(scope="session")
def data_file() -> Path:
    """A .jsonl file whose rows each list any number of the three labels."""

    def make(folder: Path) -> None:
        rows = ({"text": text, "label": names_of(text)} for text, _ in make_rows(1400, 41))
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return made_once("multi-data", make) / "train.jsonl"


@pytest.fixture(scope="session")
def trained(data_file: Path, encoder: Path) -> Path:
    """A folder with the checkpoint and, in store, topics:1 (int8), made by the commands a user types."""

    def make(folder: Path) -> None:
        output = de3(
            f"train {data_file} --multi-label --threshold 0.4 --encoder {encoder} --out {folder}/checkpoint "
            "--held-back 200 --epochs 4 --lr 2e-3 --batch-size 32 --no-bf16"
        )
        none = sum(not names_of(text) for text, _ in make_rows(1400, 41))
        assert f"{none} of 1400 texts have no label" in output and none > 10
        assert "tune micro f1 by exit" in output and f"de3 export {folder}/checkpoint" in output
        exported = de3(
            f"export {folder}/checkpoint --name topics --store {folder}/store --max-loss 5 --max-int8-loss 5"
        )
        assert "de3 serve --model topics" in exported

    return made_once("multi-trained", make)


def test_it_learns_every_label(trained: Path) -> None:
    folder = trained / "checkpoint"
    record = json.loads((folder / "training.json").read_text())
    best = record["history"][record["best_epoch"] - 1]["tune_micro_f1"]
    assert best[-1] > 0.97 and len(best) == 4
    opened = Checkpoint(folder)
    assert (opened.names, opened.config.thresholds) == (NAMES, [0.4] * 3)
    assert not opened.model.prototypical and opened.model.prototypes.numel() == 0
    certify = opened.held_out("certify")
    assert len(certify) == 200
    assert all([NAMES[k] for k in e.label] == names_of(str(e.text)) for e in certify)  # type: ignore[union-attr]


def test_what_was_trained_is_served(trained: Path) -> None:
    manifest = Store(trained / "store").open("topics").manifest
    assert (manifest.labels, manifest.thresholds, manifest.prototype_layers) == (NAMES, [0.4] * 3, [])
    assert manifest.calibration is not None and manifest.calibration.default.speedup > 1.2
    texts = [text for text, _ in make_rows(60, 42)]
    with serving(trained / "store", models=["topics"]) as server:
        full, early = (server.classify(input=texts, **o).json()["data"] for o in ({"tau": 0}, {}))
    assert np.mean([row["labels"] == names_of(text) for row, text in zip(full, texts, strict=True)]) > 0.9
    assert np.mean([row["labels"] == other["labels"] for row, other in zip(full, early, strict=True)]) > 0.9
    assert np.mean([row["exit"]["layer"] for row in early]) < 2.5


def test_options_that_make_no_sense_are_refused(data_file: Path, encoder: Path, tmp_path: Path) -> None:
    command = f"train {data_file} --encoder {encoder} --out {tmp_path}/out"
    for option in ("--distill 0.5", "--augment 1", "--label-names a,b"):
        assert option.split(maxsplit=1)[0] in refusal(f"{command} --multi-label {option}")
    assert "only a multi-label model has several labels per text" in refusal(command)
    assert not (tmp_path / "out").exists()


def test_labels_are_checked() -> None:
    assert "use --multi-label" in checks.labels(Counter({"a|b": 5, "b|c": 5, "a": 5}))[0]
    assert checks.labels(Counter({"a": 50, "b": 60}), 70) == []
    assert "1 label has fewer than 5 rows" in checks.labels(Counter({"a": 50, "b": 1}), 60)[0]
    with pytest.raises(ValueError, match="needs at least 2 labels; the data has none"):
        checks.labels(Counter(), 9)
    with pytest.raises(ValueError, match="80 labels in 100 rows"):
        checks.labels(Counter({str(i): 3 for i in range(80)}), 100)
    one, many = Example("a", (1,)), Example("b", (0, 2))
    assert "train without --multi-label" in checks.label_counts([one, one])[0]
    assert checks.label_counts([one, many]) == checks.label_counts([one, Example("c", ())]) == []
    with pytest.raises(ValueError, match="no sample of y is left"):
        checks.held_out(checks.Split([one, many], [one], [one]), ["a", "b", "c", "y"])


def test_a_label_may_have_a_bar_in_it_where_labels_are_a_list(tmp_path: Path) -> None:
    columns = tables.Columns(multi_label=True)
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "label": ["x|y", "z", "z"]}\n{"text": "b", "label": "x | y"}\n')
    rows = tables.read_rows(file, columns)
    assert label_order(rows, multi_label=True) == ["x", "x|y", "y", "z"]
    examples = to_examples(rows, ["x", "x|y", "y", "z"], multi_label=True)
    assert [e.label for e in examples] == [(1, 3), (0, 2)]
    save_examples(file, examples, ["x", "x|y", "y", "z"])
    assert load_examples(file, ["x", "x|y", "y", "z"], multi_label=True) == examples


def test_a_dataset_of_numbers_has_the_names_of_its_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    kind = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=["joy", "anger"]))})
    rows = {"text": ["a", "b", "c"], "label": [[1, 0], [], [1]]}
    Dataset.from_dict(rows, kind).to_parquet(str(tmp_path / "train.parquet"))
    read = tables.read_dataset(str(tmp_path), "train", tables.Columns(multi_label=True))
    assert [tables.labels_in(cell, multi_label=True) for _, cell in read] == [["anger", "joy"], [], ["anger"]]


def test_the_loss_is_that_of_plain_pytorch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, 4), torch.rand(5, 4) > 0.6
    weights = losses.layer_weights([0, 1, 2], "depth")
    total = losses.total(logits, torch.zeros(5, 0, 4), labels, weights, alpha=0.1)
    plain = torch.nn.BCEWithLogitsLoss(reduction="sum")
    expected = sum(w * plain(logits[:, j], labels.float()) / 5 for j, w in enumerate(weights))
    assert total == pytest.approx(float(expected), rel=1e-6)


def test_every_exit_starts_at_the_frequencies_of_the_labels(encoder: Path) -> None:
    model = De3Model.from_encoder(str(encoder), NAMES, exit_layers=[0, 3], thresholds=[0.5] * 3)
    labels = torch.zeros(99, 3, dtype=torch.bool)
    labels[:24, 1] = labels[:, 2] = True
    model.start_at(labels)
    for classifier in model.classifiers:
        assert torch.sigmoid(classifier.bias).tolist() == pytest.approx([0.005, 0.245, 0.995])


def recorded(logits: list[list[float]], labels: list[list[bool]]) -> Recorded:
    outputs = np.array(logits, np.float32)[:, None]
    arrays = (outputs, np.full_like(outputs, np.nan), np.array(labels))
    return Recorded([3], *arrays, kind=Labels.of([0.5] * outputs.shape[-1]))


def test_micro_f1_chooses_the_epoch_and_labels_that_are_never_assigned_are_named() -> None:
    some = recorded(
        [[1, -1, -1], [1, -1, -1], [-1, 1, -1]], [[True, False, False], [False, True, False], [False] * 3]
    )
    name, values = exit_scores(some)
    assert (name, values.tolist()) == ("micro_f1", [2 * 1 / (3 + 2)]) and f1(some.answers, some.labels)[
        0
    ] == values
    assert weaknesses(some, NAMES) == []
    silent = recorded([[-1, 1, -1], [-1, 1, -1]], [[True, True, False], [False, True, False]])
    (warning,) = weaknesses(silent, NAMES)
    assert "assigns 1 of 3 labels to none of 2 samples, though they are correct for some: blame;" in warning
