"""The trainer on a small real run: it learns, resumes exactly, distils, and refuses data that would leak."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.main import get_command

from de3 import tables
from de3.cli import app
from de3.training import data as datas
from de3.training import progress
from de3.training import split as splits
from de3.training.encoded import encode
from de3.training.model import De3Model
from de3.training.predict import predict
from de3.training.settings import TrainSettings
from de3.training.trainer import open_teacher, train
from tests.commands import de3
from tests.fixtures import FILLER


def common(data_file: Path, encoder: Path, out: Path) -> str:
    return (
        f"train {data_file} --text-column sentence --label-names negative,positive --encoder {encoder} "
        f"--out {out} --lr 1e-3 --batch-size 64 --held-back 300 --no-bf16"
    )


def test_every_setting_is_an_option_with_its_default() -> None:
    options = {p.name: p for p in get_command(app).commands["train"].params}  # type: ignore[attr-defined]
    for setting in fields(TrainSettings):
        option = options[setting.name]
        by_other_options = isinstance(option.show_default, str)  # type: ignore[attr-defined]
        assert option.default == (None if by_other_options else setting.default), setting.name
        assert option.help, setting.name  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def few(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first 900 rows of the data, for tests that need no accurate model."""
    file = tmp_path_factory.mktemp("few") / "train.tsv"
    file.write_text("".join(data_file.read_text().splitlines(keepends=True)[:901]))
    return file


def test_it_learns_and_the_layers_get_better(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "training.json").read_text())
    accuracy = record["history"][record["best_epoch"] - 1]["tune_accuracy"]
    assert accuracy[-1] > 0.9  # the data has negations that only attention can resolve
    assert accuracy[0] < accuracy[-1]
    model = De3Model.from_pretrained(checkpoint)
    assert model.prototype_seen.all()
    assert {"tune.jsonl", "certify.jsonl", "tokenizer.json", "config.json"} <= {
        p.name for p in checkpoint.iterdir()
    }


def test_held_back_samples_are_not_trained_on(checkpoint: Path, data_file: Path) -> None:
    rows = datas.rename(tables.read_rows(data_file, tables.Columns("sentence")), "negative,positive")
    names = ["negative", "positive"]
    parts = splits.split(datas.to_examples(rows, names), seed=0, held_back=300)
    assert datas.load_examples(checkpoint / "tune.jsonl", names) == parts.tune
    assert datas.load_examples(checkpoint / "certify.jsonl", names) == parts.certify


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, few: Path, encoder: Path) -> None:
    de3(common(few, encoder, tmp_path / "whole") + " --epochs 3 --patience 1")
    model_parts = _parts(few, encoder)
    settings = TrainSettings(lr=1e-3, batch_size=64, epochs=3, bf16=False, patience=1)
    out = tmp_path / "broken"

    class Killed(Exception):
        pass

    model, tokenizer, parts = model_parts
    original, epochs = model.save_pretrained, []

    def save_then_die(*args: object, **kwargs: object) -> None:
        if len(epochs) == 1:  # the second epoch is over, but not yet saved
            raise Killed
        epochs.append(1)
        original(*args, **kwargs)

    model.save_pretrained = save_then_die
    with pytest.raises(Killed):
        train(model, tokenizer, parts, settings, out)
    output = de3(common(few, encoder, out) + " --epochs 3 --patience 1 --resume")
    assert "resuming after epoch 1" in output
    whole, broken = (De3Model.from_pretrained(tmp_path / x).state_dict() for x in ("whole", "broken"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name


def _parts(data_file: Path, encoder: Path) -> tuple[De3Model, object, splits.Split]:
    """The model, tokenizer and split that the command makes from its arguments."""
    from transformers import AutoTokenizer

    rows = datas.rename(tables.read_rows(data_file, tables.Columns("sentence")), "negative,positive")
    names = ["negative", "positive"]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = De3Model.from_encoder(str(encoder), names, exit_layers=[0, 1, 2, 3], max_tokens=64, input="text")
    return model, tokenizer, splits.split(datas.to_examples(rows, names), 0, 300)


def test_resuming_with_other_settings_is_refused(tmp_path: Path, few: Path, encoder: Path) -> None:
    de3(common(few, encoder, tmp_path) + " --epochs 1")
    with pytest.raises(ValueError, match="other settings or data"):
        de3(common(few, encoder, tmp_path) + " --epochs 2 --resume")
    kept_back = (tmp_path / "certify.jsonl").read_bytes()
    for other in ("--held-back 200", "--gamma 0.5", "--exits last", "--seed 1"):
        with pytest.raises(ValueError, match="other settings or data"):
            de3(common(few, encoder, tmp_path) + f" --epochs 1 --resume {other}")
    assert (tmp_path / "certify.jsonl").read_bytes() == kept_back


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
    de3(
        common(data_file, encoder, tmp_path / "student").replace(
            "1e-3 --batch-size 64", "2e-3 --batch-size 32"
        )
        + f" --epochs 4 --teacher {teacher} --distill 1 --temperature 1"
    )
    assert list(teacher.glob("logits-*.safetensors"))  # kept for the next student
    student = De3Model.from_pretrained(tmp_path / "student")
    _, tokenizer, parts = _parts(data_file, encoder)
    encoded = encode(parts.tune, tokenizer, 64)
    said = predict(student, encoded, tokenizer.pad_token_id).logits[:, -1].argmax(-1)
    assert (said != encoded.labels.numpy()).mean() > 0.7


def test_a_teacher_that_saw_the_held_back_samples_is_refused(
    checkpoint: Path, data_file: Path, encoder: Path
) -> None:
    _, _, parts = _parts(data_file, encoder)
    other = splits.Split(parts.train, parts.certify, parts.tune)
    with pytest.raises(ValueError, match="may have been trained on them"):
        open_teacher(checkpoint, other, ["negative", "positive"])


def test_a_teacher_with_its_labels_in_another_order_is_refused(
    tmp_path: Path, checkpoint: Path, data_file: Path, encoder: Path
) -> None:
    _, _, parts = _parts(data_file, encoder)
    turned = splits.Split(
        *([datas.Example(e.text, 1 - e.label) for e in p] for p in (parts.train, parts.tune, parts.certify))
    )
    with pytest.raises(ValueError, match="must be the same, in order"):
        open_teacher(checkpoint, turned, ["positive", "negative"])


def test_texts_are_cut_to_what_the_encoder_takes(tmp_path: Path, encoder: Path) -> None:
    file = tmp_path / "long.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{'good film ' * (i + 20)}\t{i % 2}\n" for i in range(40)))
    de3(
        f"train {file} --encoder {encoder} --out {tmp_path / 'out'} --epochs 1 --held-back 5 --no-bf16 "
        "--max-length 500"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--exits 0,1", "must end at the last layer, 3"),
        ("--exits some", "--exits must be all, last or layers"),
        ("--pooling max", "mean, cls"),
        ("--label-names a,b,c", "--label-names must name each once"),
        ("--weights width", "depth or uniform"),
        ("--held-back 5000", "--held-back"),
        ("--text-column text", "no column 'text'"),
        ("--augment 1", "--augment needs a --teacher"),
        ("--distill 2", r"distill must be in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    tmp_path: Path, data_file: Path, encoder: Path, arguments: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        de3(common(data_file, encoder, tmp_path) + " --epochs 1 " + arguments)


def test_data_must_come_from_one_place(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either as a file"):
        de3(f"train --encoder {encoder} --out {tmp_path}")


def test_groups_of_a_column_stay_in_one_part(tmp_path: Path, encoder: Path) -> None:
    names = [("good", "bad")[i % 2] for i in range(240)]
    texts = [f"{names[i]} {'film ' * (i // 17)}{FILLER[i % 17]}" for i in range(240)]
    rows = [{"text": text, "label": names[i], "user": f"u{i % 40}"} for i, text in enumerate(texts)]
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, source in enumerate((str(file), f"--dataset {tmp_path / 'data'}")):
        out = tmp_path / f"out{number}"
        de3(
            f"train {source} --group-column user --encoder {encoder} --out {out} --epochs 1 --held-back 30 "
            "--no-bf16"
        )
        parts = [datas.load_examples(out / f"{part}.jsonl", ["bad", "good"]) for part in ("tune", "certify")]
        users = [{e.group for e in part} for part in parts]
        assert [len(part) for part in parts] == [30, 30]  # 5 users with 6 rows each
        assert [len(group) for group in users] == [5, 5] and not users[0] & users[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--group-column label --fragments", "--group-column cannot be combined with --fragments"),
        (
            "--group-column user",
            r"train.tsv:2: no column 'user'; it has 'sentence', 'label': set --group-column",
        ),
    ],
)
def test_an_invalid_group_column_is_refused(
    tmp_path: Path, data_file: Path, encoder: Path, arguments: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        de3(common(data_file, encoder, tmp_path) + " --epochs 1 " + arguments)


@pytest.mark.slow
def test_many_classes_pairs_and_a_dataset_folder(tmp_path: Path, encoder: Path) -> None:
    """Uses pairs of three classes in .jsonl, read by `datasets`, with cls pooling and no exit on the embeddings."""
    words = ["good", "bad", "film"]
    rows = [
        json.dumps(
            {
                "text": words[i % 3],
                "text_pair": f"the {words[(i // 3) % 3]} {'movie ' * (i % 4)}",
                "label": str(i % 3),
            }
        )
        for i in range(240)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    de3(
        f"train --dataset {tmp_path / 'data'} --pair-column text_pair --encoder {encoder} "
        f"--out {tmp_path / 'out'} --epochs 4 --lr 2e-3 --batch-size 16 --held-back 30 --no-bf16 "
        "--pooling cls --no-embedding-exit"
    )
    model = De3Model.from_pretrained(tmp_path / "out")
    assert (model.config.exit_layers, model.config.num_labels, model.config.pooling) == ([1, 2, 3], 3, "cls")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["history"][-1]["tune_accuracy"][-1] > 0.9
    output = de3(f"export {tmp_path / 'out'} --name pairs --store {tmp_path / 'store'} --quantize none")
    assert "published" in output


@pytest.mark.slow
def test_altered_copies_are_labelled_by_the_teacher(tmp_path: Path, few: Path, encoder: Path) -> None:
    teacher = tmp_path / "teacher"
    de3(common(few, encoder, teacher) + " --epochs 1")
    de3(common(few, encoder, tmp_path / "out") + f" --epochs 1 --teacher {teacher} --augment 2")
    from safetensors.torch import load_file

    _, _, parts = _parts(few, encoder)
    (cache,) = teacher.glob("logits-*.safetensors")
    assert len(load_file(cache)["logits"]) == 3 * len(parts.train)


def test_long_work_logs_its_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert list(progress.track(iter(range(4)), "Counting", 4)) == [0, 1, 2, 3]
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Counting …", "Counting: 25%, about 2 min left", "Counting: 75%, about 20 s left"]
    assert list(progress.track(iter(range(3)), "Counting")) == [0, 1, 2]  # the total is unknown
    assert capsys.readouterr().err.strip() == "Counting …"
