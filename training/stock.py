"""Stock Hugging Face classifiers: read strictly, and turned into a model whose last exit is their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from de3.exits.recorded import MIN_TOLERANCE
from de3.exits.rule import Thresholds
from de3.model_store.families import family
from de3.training import checkpoint
from de3.training.config_check import check_config
from de3.training.data import Encoded, Example, Label, encode, evaluation_batches, label_of
from de3.training.model import De3Config, De3Model, check_loaded
from de3.training.progress import track

MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Stock:
    """A stock classifier.

    Attributes:
        model: the model of transformers, in float32, in evaluation mode.
        tokenizer: its Hugging Face tokenizer.
        names: its labels, in the order of its logits.
        thresholds: of a multi-label model: the probability above which each label is assigned; None: its classes
            exclude each other.
        tolerance: of a regression model: values that differ by more count as different; None: it has classes, or the
            tolerance is not known.
    """

    model: Any
    tokenizer: Any
    names: list[str]
    thresholds: list[float] | None
    tolerance: float | None = None

    @property
    def family(self) -> str:
        """The model type of transformers."""
        return str(self.model.config.model_type)

    @property
    def is_regression(self) -> bool:
        """True if its answer is a number."""
        return len(self.names) == 1

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a text."""
        config = self.model.config.to_dict()
        return int(min(self.tokenizer.model_max_length, family(config).max_tokens(config)))


def open_stock(
    name: str,
    label_names: str | None = None,
    threshold: float | None = None,
    multi_label: bool = False,
    tolerance: float | None = None,
) -> Stock:
    """A classifier from a folder or the hub; no code of its repository is run, and nothing but weights is unpickled.

    label_names: new names of its labels, comma-separated, in the order of its logits. threshold: of every label of a
    multi-label model, a probability; None: 0.5. multi_label: treat it as one even if its config.json does not say so.
    tolerance: of a regression model, which has one output.

    Raises ValueError, naming a remedy, for a classifier that cannot be imported.
    """
    checkpoint.quiet()
    folder = Path(name).expanduser()
    if folder.is_dir():
        kind = checkpoint.model_type(folder)
        if (folder / "manifest.json").exists():
            raise ValueError(f"{name} is an exported model already: de3 serve --store {folder.parent.parent}")
        if kind == De3Config.model_type:
            raise ValueError(
                f"{name} is a checkpoint of de3 train, with exits: de3 export {name} --name NAME"
            )
        if kind is None:
            raise ValueError(f"{name} has no config.json, so it is not a Hugging Face model")
    elif checkpoint.looks_like_path(name):
        raise ValueError(f"{name}: no such folder")
    source = str(folder) if folder.is_dir() else name
    try:
        check_config(name, source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check(name, config, multi_label)
        tokenizer = _tokenizer(name, source)
        model, loaded = _model(name, source)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name}: cannot be read: {str(error).partition(chr(10))[0]}") from None
    check_loaded(loaded, name)
    checkpoint.check_tokenizer(name, tokenizer, config)
    for key, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite")
    names = _names(config, label_names)
    if tolerance is not None and len(names) > 1:
        raise ValueError(f"--tolerance: {name} has {len(names)} labels; it is for models of one number")
    thresholds = _thresholds(name, config, threshold, multi_label)
    return Stock(model.eval(), tokenizer, names, thresholds, tolerance)


def _model(name: str, source: str) -> tuple[Any, Any]:
    """The model of transformers, and the report on its loading; raises ValueError for damaged or malicious weights."""
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except UnpicklingError:  # its message suggests to load the file without this protection
        raise ValueError(
            f"{name}: its pytorch_model.bin is damaged, or holds more than weights, which could run code; save the "
            "model as model.safetensors"
        ) from None
    except (EOFError, LookupError) as error:  # of the unpickler
        raise ValueError(
            f"{name}: its weights are damaged ({type(error).__name__}: {error!s:.200})"
        ) from None
    return model, loaded


def _tokenizer(name: str, source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many kinds, for missing or damaged files
        raise ValueError(
            f"{name}: its tokenizer cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}); "
            "save its tokenizer.json there"
        ) from None


def _check(name: str, config: Any, multi_label: bool) -> None:
    """Raise ValueError for a model that cannot be imported, before its weights are read."""
    try:
        family(config.to_dict()).head(config.to_dict())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    architectures = config.architectures or ["ForSequenceClassification"]  # not stated: the weights decide
    if not any(a.endswith("ForSequenceClassification") for a in architectures):
        raise ValueError(
            f"{name} is a {architectures[0]}, not a …ForSequenceClassification: it has no classifier to keep; "
            f"train one from your labels with de3 train DATA --encoder {name}"
        )
    if config.problem_type == "regression" and config.num_labels != 1:
        raise ValueError(
            f"{name} is a regression of {config.num_labels} numbers; with one output it can be imported"
        )
    if config.num_labels == 1 and (multi_label or config.problem_type == "multi_label_classification"):
        raise ValueError(f"{name} has one output, and a multi-label model needs 2 labels or more")


def _thresholds(name: str, config: Any, threshold: float | None, multi_label: bool) -> list[float] | None:
    """The thresholds of a multi-label model; None for another."""
    if multi_label or config.problem_type == "multi_label_classification":
        return [0.5 if threshold is None else threshold] * config.num_labels
    if threshold is not None:
        raise ValueError(
            f'--threshold: by its config.json ("problem_type") {name} is not a multi-label model; if it is one, add '
            "--multi-label"
        )
    return None


def _names(config: Any, label_names: str | None) -> list[str]:
    if set(config.id2label) != set(range(config.num_labels)):
        raise ValueError(f"its config.json must have id2label with the keys 0 to {config.num_labels - 1}")
    names = [str(config.id2label[k]) for k in range(config.num_labels)]
    if label_names is not None:
        given = [name.strip() for name in label_names.split(",")]
        if len(given) != len(names):
            raise ValueError(f"--label-names must name the labels {names[:20]} in this order, got {given}")
        names = given
    if len(set(names)) != len(names):
        raise ValueError(f"the labels must differ from each other, got {names[:20]}: give --label-names")
    return names


@torch.no_grad()
def answers(stock: Stock, encoded: Encoded) -> list[Label]:
    """The classifier's answers to texts, in their order, computed in float32."""
    logits = torch.zeros(len(encoded), len(stock.names))
    for rows in track(evaluation_batches([len(ids) for ids in encoded.ids], 64), "Running the original"):
        inputs, _ = encoded.batch(rows, stock.tokenizer.pad_token_id)
        taken = {k: v for k, v in inputs.items() if k in stock.tokenizer.model_input_names}
        logits[rows] = stock.model(**taken).logits
    if stock.is_regression:
        return [float(value) for value in logits[:, 0]]
    if stock.thresholds is None:
        return [int(label) for label in logits.argmax(-1)]
    given = logits.numpy() > np.array(Thresholds.of(stock.thresholds).logits)
    return [label_of(row) for row in given]


def check_tolerance(stock: Stock, some: Sequence[Example]) -> None:
    """Raise ValueError, describing the values of some texts, for a regression model without a tolerance."""
    if stock.is_regression and stock.tolerance is None:
        values = np.array(answers(stock, encode(some, stock.tokenizer, stock.max_tokens)))
        low, high = np.quantile(values, (0.05, 0.95))
        spread = float(values.std())
        raise ValueError(
            "--tolerance: needed, as the answer is a number: the largest difference from full depth that counts as the "
            f"same, in the model's units. It answers 9 in 10 of {len(values)} of these texts with {low:.3g} to "
            f"{high:.3g}; the standard deviation is {spread:.3g}: for example --tolerance "
            f"{max(MIN_TOLERANCE, spread / 4):.1g}"
        )


def parity(stock: Stock, model: De3Model, encoded: Encoded, count: int = 64) -> float:
    """The largest difference of full depth's logits from those of transformers' model, on texts of many lengths.

    Raises ValueError above 1e-4 (times a tolerance above 1): this version of transformers then computes a
    head that this module does not know.
    """
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded.ids[i]))
    rows = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(count, len(by_length))).astype(int)]
    largest = 0.0
    with torch.no_grad():
        for row in rows:
            inputs, _ = encoded.batch([row], stock.tokenizer.pad_token_id)
            theirs = stock.model(
                **{k: v for k, v in inputs.items() if k in stock.tokenizer.model_input_names}
            )
            largest = max(largest, float((model(**inputs).logits[:, -1] - theirs.logits).abs().max()))
    allowed = MAX_DIFFERENCE * max(1.0, stock.tolerance or 0.0)  # a value may be of any size
    if not largest <= allowed:
        raise ValueError(f"full depth differs from transformers' model by {largest:.1e}, above {allowed:g}")
    return largest


def with_exits(stock: Stock, pooling: str, input_: str) -> De3Model:
    """A model with the stock classifier's encoder and head; its other exits are untrained.

    pooling: of the other exits. input_: kind of the texts that it is imported with, "text" or "pair".
    """
    encoder = stock.model.base_model.config.to_dict()
    head = family(encoder).head(encoder)
    config = De3Config(
        encoder=encoder,
        exit_layers=list(range(stock.model.config.num_hidden_layers + 1)),
        pooling=pooling,
        thresholds=stock.thresholds,
        tolerance=stock.tolerance,
        head={
            "pooling": head.pooling,
            "activation": head.activation,
            **({} if head.norm is None else {"norm": head.epsilon}),
        },
        max_tokens=stock.max_tokens,
        input=input_,
        id2label=dict(enumerate(stock.names)),
        label2id={label: i for i, label in enumerate(stock.names)},
    )
    model = De3Model(config)
    weights = stock.model.base_model.state_dict()
    model.encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("pooler.")})
    parts = ((model.head, head.dense), (model.head_norm, head.norm), (model.classifiers[-1], head.classifier))
    for ours, theirs in parts:
        if ours is not None and theirs is not None:
            module: nn.Module = attrgetter(theirs)(stock.model)
            given = module.state_dict()
            ours.load_state_dict({"bias": torch.zeros(len(given["weight"])), **given})  # some have none
    model.eval()
    return model
