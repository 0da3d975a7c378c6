"""Stock classifiers: fine-tuned once for all workers, and imported by the command a user types."""

from pathlib import Path

import pytest

from de3.training.data import Example
from de3.training.settings import TrainSettings
from tests.commands import de3
from tests.fine_tune import fine_tune
from tests.fixtures import made_once, make_rows


def fine_tuned(
    factory: pytest.TempPathFactory,
    name: str,
    encoder: Path,
    names: list[str],
    examples: list[Example],
    epochs: int,
) -> Path:
    """A stock model without exits, fine-tuned once for all workers."""

    def make(folder: Path) -> None:
        settings = TrainSettings(batch_size=32, lr=2e-3, epochs=epochs, bf16=False)
        for part in fine_tune(str(encoder), names, examples, settings):
            part.save_pretrained(folder)

    return made_once(factory, name, make)


def imported_as(factory: pytest.TempPathFactory, name: str, stock: Path, options: str = "") -> Path:
    """A folder with store/NAME/1 (int8) and its checkpoint in work: a stock model, imported with unlabelled texts."""

    def make(folder: Path) -> None:
        texts = folder / "texts.txt"
        texts.write_text("".join(f"{text}\n" for text, _ in make_rows(1500, 12)))
        de3(
            f"import {stock} --texts {texts} --name {name} --store {folder}/store --work {folder}/work "
            f"--max-loss 5 {options}"
        )

    return made_once(factory, f"imported-{name}", make)
