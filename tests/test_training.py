"""The trainer on a small real run: it learns, resumes exactly, distils, and refuses data that would leak."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from de3.data import split as splits
from de3.data import tables
from de3.data.examples import load_examples, rename, to_examples
from de3.exits.recorded import Recorded
from de3.training import trainer
from de3.training.encoded import encode, training_batches
from de3.training.model import De3Model
from de3.training.predict import predict
from de3.training.settings import TrainSettings
from de3.training.trainer import open_teacher
from tests.commands import de3
from tests.fixtures import FILLER

NAMES = ["negative", "positive"]


def common(data_file: Path, encoder: Path, out: Path, held_back: int = 300) -> str:
    return (
        f"train {data_file} --text-column sentence --label-names negative,positive --encoder {encoder} "
        f"--out {out} --lr 1e-3 --batch-size 64 --held-back {held_back} --no-bf16"
    )


@pytest.fixture(scope="module")
def few(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first 240 rows of the data, for tests that need no accurate model."""
    file = tmp_path_factory.mktemp("few") / "train.tsv"
    file.write_text("".join(data_file.read_text().splitlines(keepends=True)[:241]))
    return file


def test_it_learns_and_the_layers_get_better(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "training.json").read_text())
    accuracy = record["history"][record["best_epoch"] - 1]["tune_accuracy"]
    assert accuracy[-1] > 0.9  # the data has negations that only attention can resolve
    assert accuracy[0] < accuracy[-1]
    model = De3Model.from_pretrained(checkpoint)
    assert model.prototype_seen.all()


def test_held_back_samples_are_not_trained_on(checkpoint: Path, data_file: Path) -> None:
    parts = parts_of(data_file)
    assert load_examples(checkpoint / "tune.jsonl", NAMES) == parts.tune
    assert load_examples(checkpoint / "certify.jsonl", NAMES) == parts.certify


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, few: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    de3(common(few, encoder, tmp_path / "whole", 30) + " --epochs 3")
    out, epochs = tmp_path / "broken", iter([1])
    command = common(few, encoder, out, 30) + " --epochs 3"

    class Killed(Exception):
        pass

    def predict_or_die(*args: Any, **kwargs: Any) -> Recorded:
        if next(epochs, None) is None:  # the second epoch is over, but not yet saved
            raise Killed
        return predict(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainer, "predict", predict_or_die)
        de3(command)
    output = de3(f"{command} --resume")
    assert "resuming after epoch 1" in output and not (out / trainer.RESUME).exists()
    assert "nothing to resume" in de3(f"{command} --resume")
    for other in ("--held-back 20", "--pooling cls", "--exits last", "--seed 1", "--epochs 2"):
        with pytest.raises(ValueError, match="other settings or data"):
            de3(f"{command} --resume {other}")
    whole, broken = (De3Model.from_pretrained(tmp_path / x).state_dict() for x in ("whole", "broken"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    assert (out / "certify.jsonl").read_bytes() == (tmp_path / "whole/certify.jsonl").read_bytes()


def test_the_best_epoch_is_kept_and_training_stops_when_none_is_better(
    tmp_path: Path, few: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch is the best by the weighted mean over the exits, though not by the last exit."""
    by_epoch = iter(np.array([[4, 4, 4, 4], [8, 8, 8, 5], [5, 5, 5, 6], [8, 8, 8, 5], [9, 9, 9, 9]]) / 10)
    kept, seeds = list[Any](), list[int]()

    def scores(_: Recorded) -> tuple[str, Any]:
        kept.append(load_file(tmp_path / "model.safetensors")["classifiers.0.weight"] if kept else None)
        return "accuracy", next(by_epoch)

    def drawn(lengths: list[int], size: int, seed: int) -> list[list[int]]:
        seeds.append(seed)
        return training_batches(lengths, size, seed)

    monkeypatch.setattr(trainer, "training_batches", drawn)
    monkeypatch.setattr(trainer, "exit_scores", scores)
    de3(common(few, encoder, tmp_path, 30) + " --epochs 5")
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["best_epoch"], len(record["history"])) == (2, 4)
    assert len(set(seeds[:4])) == 4  # every epoch has its own batches
    final = De3Model.from_pretrained(tmp_path).classifiers[0].weight
    assert torch.equal(final, kept[2]) and not torch.equal(final, kept[1])


def test_rates_warm_up_and_fall_to_0_and_gradients_are_clipped(
    tmp_path: Path, few: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, norms, groups = list[float](), list[float](), list[dict[str, Any]]()

    class Watched(torch.optim.AdamW):
        def step(self, *_: Any) -> Any:
            groups[:] = self.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            rates.append(groups[0]["lr"] / groups[0]["base_lr"])
            norms.append(float(sum((gradient**2).sum() for gradient in gradients)) ** 0.5)
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    model, tokenizer = De3Model.from_encoder(str(encoder), NAMES), AutoTokenizer.from_pretrained(encoder)
    steps = {"lr": 1e-3, "head_lr": 1e-2, "warmup": 0.25, "epochs": 2, "batch_size": 45, "alpha": 1e4}
    settings = TrainSettings(**steps, bf16=False, prototypes="sliding")
    trainer.train(model, tokenizer, parts_of(few, 30), settings, tmp_path)
    assert rates == pytest.approx([1 / 2, 1, *(left / 6 for left in range(6, 0, -1))])
    assert norms == [pytest.approx(1, rel=1e-3)] * 8
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["base_lr"] == (1e-3 if names[p].startswith("encoder.") else 1e-2), names[p]
            assert (group["weight_decay"] > 0) == (p.ndim > 1), names[p]


def parts_of(data_file: Path, held_back: int = 300) -> splits.Split:
    """The split that the command makes."""
    rows = rename(tables.read_rows(data_file, tables.Columns("sentence")), "negative,positive")
    return splits.split(to_examples(rows, NAMES), 0, held_back)


@pytest.mark.slow
def test_distillation_follows_the_teacher(
    tmp_path: Path, data_file: Path, encoder: Path, checkpoint: Path
) -> None:
    """A student that learns only from a teacher with inverted answers learns to invert them, too."""
    teacher = shutil.copytree(checkpoint, tmp_path / "teacher")
    opposite = De3Model.from_pretrained(teacher)
    for p in opposite.classifiers.parameters():
        p.data.neg_()
    opposite.save_pretrained(teacher)
    command = common(data_file, encoder, tmp_path / "student")
    command = command.replace("1e-3 --batch-size 64", "2e-3 --batch-size 32")
    de3(f"{command} --epochs 2 --teacher {teacher} --distill 1 --augment 1")
    (cache,) = teacher.glob("logits-*.safetensors")  # kept for the next student
    student = De3Model.from_pretrained(tmp_path / "student")
    parts, tokenizer = parts_of(data_file), AutoTokenizer.from_pretrained(encoder)
    assert len(load_file(cache)["logits"]) == 2 * len(parts.train)
    encoded = encode(parts.tune, tokenizer, 64)
    said = predict(student, encoded, tokenizer.pad_token_id).logits[:, -1].argmax(-1)
    assert (said != encoded.labels.numpy()).mean() > 0.7


def test_a_teacher_with_other_held_out_samples_or_labels_in_another_order_is_refused(
    checkpoint: Path, data_file: Path
) -> None:
    parts = parts_of(data_file)
    other = splits.Split(parts.train, parts.certify, parts.tune)
    with pytest.raises(ValueError, match="may have been trained on them"):
        open_teacher(checkpoint, other, NAMES)
    with pytest.raises(ValueError, match="must be the same, in the same order"):
        open_teacher(checkpoint, parts, NAMES[::-1])


def test_wrong_arguments_are_named(tmp_path: Path, few: Path, encoder: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ("--exits 0,1", "must end at the last layer, 3"),
        ("--exits some", "--exits"),
        ("--pooling max", "mean, cls"),
        ("--label-names a,b,c", "--label-names"),
        ("--weights width", "depth or uniform"),
        ("--held-back 120", "--held-back"),
        ("--text-column text", "no column 'text'"),
        ("--augment 1", "--augment needs a --teacher"),
        ("--distill 2", "distill"),
        ("--dataset x", "either as a file"),
        ("--group-column label --fragments", "--group-column .* --fragments"),
        ("--group-column user", "train.tsv:2: no column 'user'.*--group-column"),
        ("--threshold 0.5", "add --multi-label"),
    ):
        with pytest.raises(ValueError, match=message):
            de3(common(few, encoder, out, 30) + f" --epochs 1 {arguments}")
    assert not out.exists()


def test_groups_of_a_column_stay_in_one_part(tmp_path: Path, encoder: Path) -> None:
    names = [("good", "bad")[i % 2] for i in range(240)]
    texts = [f"{names[i]} {'film ' * (i // 17)}{FILLER[i % 17]}" for i in range(240)]
    # More tokens than the encoder takes, in every part.
    texts[:40] = [text + " film" * 80 for text in texts[:40]]
    rows = [{"text": text, "label": names[i], "user": f"u{i % 40}"} for i, text in enumerate(texts)]
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = str(file), f"--dataset {tmp_path / 'data'} --pooling cls --exits 1,2,3"
    for source, exits in zip(sources, ([0, 1, 2, 3], [1, 2, 3]), strict=True):
        out = tmp_path / f"out{len(exits)}"
        de3(
            f"train {source} --group-column user --encoder {encoder} --out {out} --epochs 1 --held-back 30 "
            "--no-bf16 --max-length 500 --batch-size 64"
        )
        config = De3Model.from_pretrained(out).config
        assert (config.exit_layers, config.pooling) == (exits, "mean" if len(exits) == 4 else "cls")
        parts = [load_examples(out / f"{part}.jsonl", ["bad", "good"]) for part in ("tune", "certify")]
        users = [{e.group for e in part} for part in parts]
        assert [len(part) for part in parts] == [30, 30]  # 5 users with 6 rows each
        assert [len(group) for group in users] == [5, 5] and not users[0] & users[1]
