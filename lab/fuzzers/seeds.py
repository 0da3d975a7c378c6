"""Small valid artifacts, which the fuzzers edit."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from de3.model_store.store import Artifact, Store

DEMO = Path(__file__).parents[2] / "models"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "##s", "##ly", ".", ","]


_FOLDERS: list[TemporaryDirectory[str]] = []


def new_folder() -> Path:
    """An empty folder, which is removed when the process ends."""
    _FOLDERS.append(TemporaryDirectory(prefix="de3-fuzz-"))
    return Path(_FOLDERS[-1].name)


@cache
def demo() -> Artifact:
    """The demo model, whose manifest has a calibration."""
    return Store(DEMO).open("sst2")


@cache
def tiny(precision: Literal["int8", "fp32"]) -> Artifact:
    """A BERT classifier with two narrow layers and random weights."""
    from transformers import BertTokenizerFast

    from lab.studies.untrained import NAME, untrained

    out = new_folder()
    vocabulary = out / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(str(vocabulary), model_max_length=64).save_pretrained(out / "tokenizer")
    untrained(out, 2, 8, 2, 16, str(out / "tokenizer"), precision=precision)
    return Store(out / "store").open(NAME)
