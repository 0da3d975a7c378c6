"""Writes a stock classifier with exits as a checkpoint, without PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from de3.export.classifier import CONFIG, TOKENIZER, TOKENIZER_CONFIG, Stock
from de3.export.fit import Exits, Linear
from de3.export.weights import UNUSED, WEIGHTS, save
from de3.training.config import MODEL_TYPE

# Fields of a classifier's config.json that are not copied, as the checkpoint sets its own.
NOT_OF_ENCODER = ("id2label", "label2id", "dtype", "torch_dtype", "architectures")


def write_checkpoint(
    stock: Stock,
    exits: Exits,
    folder: Path,
    input_: str,
    thresholds: list[float] | None = None,
    tolerance: float | None = None,
) -> None:
    """Write a classifier with exits in the format of training.model.De3Model, with its tokenizer.

    input_: the kind of texts that the exits were fitted to, "text" or "pair". thresholds: probabilities above which a
    multi-label model assigns each label; None for other models. tolerance: of a regression model (see
    `exits.recorded.Recorded`); None for other models.
    """
    architecture, labels = stock.architecture("fp32"), stock.description.labels
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["De3Model"],
        "dtype": "float32",
        "encoder": {k: v for k, v in stock.description.config.items() if k not in NOT_OF_ENCODER},
        "exit_layers": list(range(stock.num_layers + 1)),
        "pooling": exits.pooling,
        "metric_dim": architecture.hidden_size,
        "head": {k: v for k, v in stock.head.model_dump().items() if v is not None},
        "thresholds": thresholds,
        "tolerance": tolerance,
        "max_tokens": architecture.max_tokens,
        "input": input_,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: k for k, label in enumerate(labels)},
    }
    weights: dict[str, NDArray[np.generic]] = {}
    with stock.weights() as state:
        for name in state:
            if not name.startswith("pooler.") and not name.endswith(UNUSED):
                weights[f"encoder.{name}"] = state[name]
        last = f"classifiers.{stock.num_layers}"
        for part, ours in (("dense", "head"), ("norm", "head_norm"), ("classifier", last)):
            if part in stock.modules:
                weight = state.whole[f"{stock.modules[part]}.weight"]
                bias = state.whole.get(f"{stock.modules[part]}.bias", np.zeros(len(weight), np.float32))
                weights |= _named(ours, (weight, bias))
    for layer, both in enumerate(exits.classifiers):
        weights |= _named(f"classifiers.{layer}", both)
    for layer, both in enumerate(exits.spaces):
        weights |= _named(f"prototypical.{layer}", both)
    shape = (len(exits.prototypes), len(labels), architecture.hidden_size)
    weights["prototypes"] = np.array(exits.prototypes, np.float32).reshape(shape)
    weights["prototype_seen"] = np.ones(shape[:2], np.bool_)
    save({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / TOKENIZER).write_bytes(stock.tokenizer)
    options = json.dumps(_tokenizer_options(stock), indent=1, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(options + "\n", "utf-8")


def _named(module: str, both: Linear) -> dict[str, NDArray[np.generic]]:
    return {f"{module}.weight": both[0], f"{module}.bias": both[1]}


def _tokenizer_options(stock: Stock) -> dict[str, Any]:
    """Contents of tokenizer_config.json with which transformers loads the tokenizer without knowing the encoder."""
    tokenizer, config = Tokenizer.from_str(stock.tokenizer.decode()), stock.description.config
    number = config.get("pad_token_id")
    pad = tokenizer.id_to_token(number if type(number) is int and number >= 0 else 0)
    types = ["token_type_ids"] if stock.token_types else []
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
    return {
        **defaults,
        **{k: v for k, v in stock.options.items() if v is not None and k != "auto_map"},
        "model_input_names": ["input_ids", *types, "attention_mask"],
        "model_max_length": stock.max_tokens,
    }
