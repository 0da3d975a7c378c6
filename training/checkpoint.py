"""Checkpoints of `de3 train`. Every command opens them here. Only `Checkpoint.model` imports PyTorch.

A checkpoint's training.json records whether the training is finished, and the command that resumes it.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from de3.data.examples import Example, check_input, load_examples
from de3.model_store.sizes import read_config
from de3.training.config import MODEL_TYPE, CheckpointConfig, model_type

if TYPE_CHECKING:
    from de3.training.model import De3Model

RECORD = "training.json"


class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: its path.
        config: its configuration.
        names: the labels, in the order of the logits.
    """

    def __init__(self, folder: Path, unfinished: bool = False) -> None:
        """Raises ValueError unless the folder is a complete and valid checkpoint whose training is finished.

        unfinished: accept a checkpoint whose training is not finished.
        """
        check(folder)
        if not unfinished:
            _check_finished(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder / 'tokenizer.json'}: missing; save the checkpoint's tokenizer there")
        self.folder = folder
        self.config = CheckpointConfig.of(str(folder), read_config(folder / "config.json"))
        self.names = self.config.label_names

    @cached_property
    def model(self) -> "De3Model":
        """The PyTorch model, in float32, in evaluation mode; raises ValueError for unusable weights."""
        from de3.training.pretrained import load

        return load(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, as transformers loads it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, split_special_tokens=True)

    def held_out(self, part: str) -> list[Example]:
        """The samples of a part (tune or certify); raises ValueError if they are unusable."""
        path = self.folder / f"{part}.jsonl"
        if not path.exists():
            raise ValueError(f"{path}: missing; de3 train writes it into the checkpoint")
        config = self.config
        examples = load_examples(path, self.names, config.thresholds is not None)
        check_input(examples, self.config.input, str(self.folder))
        return examples


def check(folder: Path) -> None:
    """Raise ValueError unless the folder is a checkpoint; the message says what it is."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; de3 train writes a checkpoint to --out")
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} is an exported model, not a checkpoint from de3 train")
    kind = model_type(folder)
    if kind is None:
        raise ValueError(
            f"{folder} is not a checkpoint: it has no config.json with a model_type; de3 train writes one to --out"
        )
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{folder} is a plain {kind} model, without exits, not a checkpoint from de3 train. Add exits to a "
            f"classifier with de3 import {folder} --texts FILE --name NAME, or to an encoder with de3 train DATA "
            f"--encoder {folder}"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contents of training.json; None if it is missing or invalid."""
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
