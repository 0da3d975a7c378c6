"""Checkpoints of `de3 train`. Every command opens them here.

A checkpoint's training.json records whether the training is finished, and the command that resumes it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging

from de3.model_store.sizes import read_config
from de3.training.config_check import check_config
from de3.training.data import Example, check_input, load_examples
from de3.training.model import De3Config, De3Model, check_loaded

RECORD = "training.json"


class Checkpoint:
    """A finished checkpoint.

    Attributes:
        model: in float32, in evaluation mode.
        tokenizer: its Hugging Face tokenizer.
        names: the labels, in the order of the logits.
    """

    def __init__(self, folder: Path, unfinished: bool = False) -> None:
        """Raises ValueError for a folder that is not a checkpoint, is incomplete, or is not finished.

        unfinished: accept a checkpoint whose training is not finished.
        """
        check(folder)
        if not unfinished:
            _check_finished(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder / 'tokenizer.json'}: missing; save the checkpoint's tokenizer there")
        self.folder = folder
        quiet()
        try:
            check_config(str(folder), str(folder))
            self.model, loaded = De3Model.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: the weights cannot be loaded: {error}") from None
        check_loaded(loaded, str(folder))
        _check_weights(self.model, loaded["unexpected_keys"], folder)
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.names = self.model.config.label_names

    @property
    def self_labelled(self) -> bool:
        """True if the held-out samples are labelled with the model's own answers."""
        return bool((read_record(self.folder) or {}).get("self_labelled"))

    @property
    def is_finetuned(self) -> bool:
        """True if an imported classifier was trained further, so that its full depth may answer differently."""
        return bool((read_record(self.folder) or {}).get("finetuned"))

    @property
    def config(self) -> De3Config:
        """The model's configuration."""
        config: De3Config = self.model.config
        return config

    def held_out(self, part: str, file: Path | None = None) -> list[Example]:
        """The samples of a part, tune or certify, or of another file; raises ValueError."""
        path = file or self.folder / f"{part}.jsonl"
        if file is None and not path.exists():
            raise ValueError(f"{path}: missing; de3 train writes it into the checkpoint")
        config = self.config
        examples = load_examples(
            path, self.names, config.thresholds is not None, config.tolerance is not None
        )
        check_input(examples, self.config.input, str(file or self.folder))
        return examples


def check(folder: Path) -> None:
    """Raise ValueError, naming the next step, unless the folder is a checkpoint of de3 train."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; de3 train writes a checkpoint to --out")
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} is an exported model, not a checkpoint of de3 train")
    kind = model_type(folder)
    if kind is None:
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json; de3 train writes one to --out"
        )
    if kind != De3Config.model_type:
        raise ValueError(
            f"{folder} is a plain {kind} model, without exits, not a checkpoint of de3 train. Give a classifier exits "
            f"by de3 import {folder} --texts FILE --name NAME, an encoder by de3 train DATA --encoder {folder}"
        )


def model_type(folder: Path) -> str | None:
    """The type of a folder's model by its config.json; None if there is none."""
    try:
        config = read_config(folder / "config.json")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    return str(config.get("model_type")) if isinstance(config, dict) else None


def looks_like_path(name: str) -> bool:
    """True if a name can only be a folder, so it is not looked up on the Hugging Face hub, which may take minutes."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or ("/" in name and Path(name).parent.is_dir())
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contents of training.json; None if there is none."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_record(folder: Path, **record: Any) -> None:
    """Replace training.json atomically."""
    new = folder / "training.new"
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(folder / RECORD)


def is_finished(folder: Path) -> bool:
    """True if the training that wrote a checkpoint is finished."""
    record = read_record(folder)
    return record is not None and bool(record.get("finished", True))


def _check_finished(folder: Path) -> None:
    if is_finished(folder):
        return
    command = (read_record(folder) or {}).get("command")
    hint = f"finish it with: {command}" if command else "repeat its de3 train command with --resume"
    raise ValueError(f"{folder} is not finished: its training is still running, or was interrupted; {hint}")


def _check_weights(model: De3Model, unexpected: Iterable[str], folder: Path) -> None:
    """Raise ValueError for weights that are not in the model, or are not finite."""
    if surplus := sorted(unexpected):
        raise ValueError(
            f"{folder}: its file has {len(surplus)} weights that are not in the model of its config.json, such as "
            f"{surplus[0]}: they do not belong together"
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(
                f"{folder}: {name} is not finite: the training diverged; repeat it with a lower --lr"
            )


def check_tokenizer(name: str, tokenizer: Any, config: Any) -> None:
    """Raise ValueError for a slow tokenizer, or one with more tokens than an encoder of this configuration."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: its tokenizer is a slow one; a tokenizer.json (a fast tokenizer) is needed"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the encoder {config.vocab_size}: they do not belong "
            "together"
        )


def quiet() -> None:
    """Silence the progress bars and the warnings of transformers; errors are still raised."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
