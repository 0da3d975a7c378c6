"""Users' mistakes on the way to a served model: each is refused, or warned about, early."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from de3.bulk.pool import RemotePool
from de3.client import Client
from de3.data.examples import Example
from de3.exits.calibration import FINE_TAUS
from de3.exits.recorded import Recorded
from de3.export.errors import ExportError
from de3.export.exporter import int8_loss
from de3.training import checks, trainer
from de3.training.checkpoint import Checkpoint
from de3.training.evaluate import weaknesses
from tests.commands import de3, invoke, refusal
from tests.fixtures import make_rows, save_encoder
from tests.serving import serving


def training(table: Path, encoder: Path, out: Path) -> str:
    return (
        f"train {table} --text-column sentence --encoder {encoder} --out {out} --lr 1e-3 --batch-size 64 "
        "--epochs 1 --held-back 100 --no-bf16"
    )


def test_a_plain_classifier_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    stock = save_encoder(tmp_path / "stock", labels=2)
    for command in ("export {} --full-depth {}/out", "export {} --name x --store {}/s", "evaluate {}"):
        message = refusal(command.format(stock, tmp_path))
        assert "is a plain bert model, without exits" in message and f"de3 import {stock} --texts" in message
        assert not (tmp_path / "out").exists() and not (tmp_path / "s").exists()


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if name not in key}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_are_missing_or_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copy / "model.safetensors"
    before, tensors = file.read_bytes(), load_file(file)
    for name, tensor, message in (
        ("classifiers.9.bias", torch.zeros(2), "not in the model of its config.json, such as {}"),
        ("classifiers.1.bias", torch.zeros(3), "another shape: {}"),
        ("classifiers.1.bias", torch.full((2,), torch.nan), "{} is not finite: the training diverged"),
    ):
        save_file(tensors | {name: tensor}, file, {"format": "pt"})
        assert message.format(name) in refusal(f"evaluate {copy}")
    file.write_bytes(before[:1000])
    assert "the weights cannot be loaded" in refusal(f"evaluate {copy}")
    file.write_bytes(before)
    drop(copy, "classifiers.2")
    message = refusal(f"export {copy} --name x --store {tmp_path}/s")
    assert message == f"{copy}: it has no weight classifiers.2.weight"
    with pytest.raises(ValueError, match=r"lacks 2 of the model's weights.*classifiers.2.bias"):
        _ = Checkpoint(copy).model


def test_an_unfinished_training_is_not_used(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is interrupted by Ctrl-C, after its best epoch was saved."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    interrupted, few_rows = tmp_path / "interrupted", tmp_path / "train.tsv"
    rows = "".join(f"{text}\t{label}\n" for text, label in make_rows(400, 1))
    few_rows.write_text("sentence\tlabel\n" + rows)  # no test here needs a good model
    with monkeypatch.context() as patch:
        patch.setattr(trainer.prototypes, "finish", interrupt)
        result = invoke(training(few_rows, encoder, interrupted))
    assert result.exit_code == 130 and "interrupted; continue" in result.output
    assert (interrupted / "model.safetensors").exists()
    commands = [
        f"evaluate {interrupted}",
        f"export {interrupted} --name x --store {tmp_path}/s",
        f"export {interrupted} --full-depth {tmp_path}/full",
        training(few_rows, encoder, tmp_path / "student") + f" --teacher {interrupted}",
    ]
    for command in commands:
        message = refusal(command)
        assert "is not finished" in message and "--resume" in message
    assert "a training run that --resume continues" in refusal(training(few_rows, encoder, interrupted))

    de3(training(few_rows, encoder, interrupted) + " --resume")
    assert Checkpoint(interrupted).names == ["0", "1"]
    assert not (interrupted / "resume.safetensors").exists()
    diverges = training(few_rows, encoder, tmp_path / "out").replace("--lr 1e-3", "--lr 1e30")
    assert "diverged in epoch 1: repeat it with a lower --lr" in refusal(diverges)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Callable[[str], Path]:
    """A function from a name to a path: data.jsonl has pairs, checkpoint is trained on them, store has its artifact."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"a": text, "b": text, "label": label} for text, label in make_rows(400, 3)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = training(folder / "data.jsonl", encoder, folder / "checkpoint").replace("sentence", "a")
    de3(train + " --pair-column b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("de3.export.calibrate.FINE_TAUS", FINE_TAUS[::24])
        de3(f"export {folder}/checkpoint --name pairs --store {folder}/store --max-int8-loss 50")
    return lambda name: folder / name


def test_a_model_of_pairs_takes_pairs(pairs: Callable[[str], Path], checkpoint: Path) -> None:
    data, artifact = pairs("data.jsonl"), pairs("store") / "pairs/1"
    assert json.loads((artifact / "manifest.json").read_text())["input"] == "pair"
    for model in (pairs("checkpoint"), artifact):
        message = refusal(f"evaluate {model} {data} --text-column a")
        assert "trained on pairs of texts, but these are single texts: give --pair-column" in message
    both = f"{data} --text-column a --pair-column b --label-names negative,positive"
    assert "drop --pair-column" in refusal(f"evaluate {checkpoint} {both}")
    single = pairs("single.jsonl")
    single.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in make_rows(60, 3)))
    store = pairs("store")
    message = refusal(f"calibrate pairs --store {store} --tune {single} --certify {single}")
    assert "these are single texts" in message


def test_a_server_refuses_inputs_that_the_model_does_not_take(pairs: Callable[[str], Path]) -> None:
    single = Path(shutil.copytree(pairs("store") / "pairs", pairs("store") / "single")) / "1/manifest.json"
    single.write_text(json.dumps(json.loads(single.read_text()) | {"name": "single", "input": "text"}))
    pair = {"text": "good", "text_pair": "bad"}
    with serving(pairs("store"), default_model="pairs", runtime="onnxruntime") as server:
        for model, right, wrong, names in (
            ("pairs", pair, "good", ["text", "text_pair"]),
            ("single", "good", pair, ["text"]),
        ):
            assert server.classify(input=[right, right], model=model).status_code == 200
            refused = server.classify(input=[right, wrong], model=model)
            assert refused.status_code == 422 and refused.json()["error"]["param"] == "input[1]"
            tensors = httpx.get(f"{server.url}/v2/models/{model}").json()["inputs"]
            assert [one["name"] for one in tensors] == names
        inputs = httpx.post(server.url + "/predict", json={"inputs": "good"})
        assert inputs.status_code == 422 and "inputs: pairs:1 takes pairs of texts" in inputs.text
        listed = httpx.get(server.url + "/v1/models").json()["data"]
        assert [row["input"] for row in listed] == ["pair", "text"]
        for model in ("pairs", "single"):  # the columns of the answers, before a text of the file is sent
            with Client(server.url) as client, closing(RemotePool(client, [model], {}, 1)) as pool:
                assert "label" in pool.submit([]).result().types


def test_a_useless_or_destructive_training_is_refused(
    checkpoint: Path, data_file: Path, encoder: Path, tmp_path: Path
) -> None:
    AutoConfig.for_model("albert").save_pretrained(tmp_path / "other")
    (tmp_path / "file").touch()
    mine, without_tokenizer, cut, out = (tmp_path / name for name in ("mine", "without", "cut", "out"))
    for folder in (mine, without_tokenizer, cut):
        shutil.copytree(encoder, folder)
    for file in without_tokenizer.glob("tokenizer*"):
        file.unlink()
    drop(cut, "layer.1.output.dense")

    def state() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for folder in (mine, checkpoint) for file in folder.iterdir()}

    kept = state()
    for source, to, more, message in (
        (tmp_path / "other", out, "", "'albert' cannot be exported; supported: bert, roberta"),
        (checkpoint, out, "", "is a checkpoint from de3 train; give the encoder that it was trained from"),
        (without_tokenizer, out, "", "tokenizer.json"),
        (cut, out, "", "lacks 2 of the model's weights"),
        (encoder, out, f"--teacher {tmp_path}/none", "none: no such folder; de3 train writes a checkpoint"),
        (encoder, tmp_path / "file", "", "is a file; give a folder"),
        (encoder, checkpoint, "", "has a finished checkpoint"),
        (mine, mine, "--resume", "contains the model of another training run"),
    ):
        assert message in refusal(f"{training(data_file, source, to)} {more}")
    assert kept == state() and not out.exists()


def recorded(labels: list[int], answers: list[int]) -> Recorded:
    logits = np.zeros((len(labels), 1, 2), np.float32)
    logits[np.arange(len(labels)), 0, answers] = 1
    return Recorded([1], logits, np.full_like(logits, np.nan), np.array(labels))


def test_weak_results_are_called_weak(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "evaluation.png").mkdir()  # a read-only folder would not stop root
    assert "name another file with --png" in de3(f"evaluate {copy}")
    few = weaknesses(recorded([0, 1] * 15, [0, 1] * 9 + [1, 0] * 6), ["no", "yes"])
    assert "only 30 samples" in few[0] and "has learned little" in few[1]
    majority = weaknesses(recorded([0, 0, 0, 1] * 500, [0] * 2000), ["no", "yes"])
    assert majority == [
        "full depth is right for 75.0%, and 'no' alone would be right for 75.0%: the model has learned little"
    ]
    assert weaknesses(recorded([0, 1] * 500, [0, 1] * 450 + [1, 0] * 50), ["no", "yes"]) == []


def test_implausible_data_is_refused_or_warned_about(encoder: Path) -> None:
    for counts, says in (
        ({"3.8": 4, "2.25": 9, "1": 7}, "scores, not classes"),
        ({"x" * 1001: 5, "y": 5}, "a label has 1001 characters: is --label-column the right one"),
        ({"a": 5}, "every row has the label 'a'"),
        ({"a": 2, "b": 2, "c": 1}, "3 labels in 5 rows"),
    ):
        with pytest.raises(ValueError, match=says):
            checks.labels(Counter(counts))
    assert checks.labels(Counter({"a": 5, "b": 1}))[0].startswith("1 label has fewer than 5 rows")
    assert checks.labels(Counter({"1": 50, "2": 50})) == []
    two = checks.labels(Counter({"pos": 50, "Pos ": 40, "neg": 50}))
    assert two == ["'Pos ' (40), 'pos' (50) are different labels that differ only in capitals or spaces"]
    tokenizer = AutoTokenizer.from_pretrained(encoder).backend_tokenizer
    known = [Example(text, 0) for text, _ in make_rows(50, 1)]
    assert checks.unknown_tokens(tokenizer, known) == []
    few = [*known, *[Example("Ωψ", 0)] * 20]
    assert "unknown to the encoder's tokenizer" in checks.unknown_tokens(tokenizer, few)[0]


def test_int8_is_judged_by_an_interval() -> None:
    right = [0, 1] * 183
    five_off = [1 - label if i % 73 == 0 else label for i, label in enumerate(right)]
    exact, off = recorded(right, right), recorded(right, five_off)
    assert int8_loss(off, exact, 0.01)["int8_accuracy"][0] < 0.99  # but 6 of 366 may be chance
    labels = right * 20
    with pytest.raises(ExportError, match=r"int8 costs exit 1 at least 1.* points"):
        int8_loss(recorded(labels, five_off * 20), recorded(labels, labels), 0.01)
