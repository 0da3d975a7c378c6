"""Converts a stock classifier, without PyTorch, to an artifact that runs at full depth.

The classifier's files may come from the hub, so they are untrusted.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save as save_tensors

from de3.exits.recorded import MIN_TOLERANCE
from de3.exits.spans import MAX_TOKEN_LABELS
from de3.export import build, weights
from de3.export.vocabulary import tokenizer_of
from de3.export.weights import INDEX, SHARDS, WEIGHTS, StateFile
from de3.extras import install
from de3.model_store.architecture import Architecture, Head, PoolingKind, Precision
from de3.model_store.families import family_named
from de3.model_store.families.encoder import Config, Encoder, StockHead, Weights, named
from de3.model_store.part import first_error
from de3.model_store.sizes import check_sizes, read_config
from de3.model_store.store import MAX_FILE_BYTES, Store

CONFIG = "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (("vocab.txt",), ("vocab.json", "merges.txt"))  # alternatives to tokenizer.json
TOKENIZER_FILES = (TOKENIZER, *chain(*VOCABULARIES))
POOLING = "1_Pooling/config.json"  # of a sentence-transformers encoder
FILES = (CONFIG, *TOKENIZER_FILES, TOKENIZER_CONFIG, WEIGHTS, INDEX, SHARDS)


Kind = Literal["classes", "labels", "value", "spans"]
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")


class OldFormError(ValueError):
    """Files that only transformers can read: pickled weights, or a tokenizer in another format."""


@dataclass(frozen=True)
class Description:
    """A classifier as its config.json describes it.

    Attributes:
        config: contents of config.json, with defaults for omitted fields.
        family: family of the encoder.
        head: the modules after the encoder; None for an encoder without a classifier.
        labels: the labels, in the order of the logits.
        kind: the kind of answer: mutually exclusive classes, independently assigned labels, a value (regression), or
            spans (a token classifier).
    """

    config: Config
    family: type[Encoder]
    head: StockHead | None
    labels: list[str]
    kind: Kind


Describe = Callable[[str, Any], Description]  # `describe` with its options, or `describe_encoder`


def describe(
    name: str,
    raw: Any,
    label_names: list[str] | None = None,
    multi_label: bool = False,
    is_encoder: bool = False,
) -> Description:
    """The classifier that a config.json describes.

    raw: the parsed config.json. label_names: new names for the labels. multi_label: treat it as a multi-label model,
    even if config.json does not say so. is_encoder: describe the encoder alone, of any kind of model; the labels are
    then placeholders.

    Raises ValueError, with a message that begins with the name, if it cannot be served.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{name}: its config.json is not a JSON object")
    check_sizes(name, raw)
    if raw.get("model_type") == "de3-bert":
        raise ValueError(f"{name} is a checkpoint from de3 train, with exits: de3 export {name} --name NAME")
    architectures = raw.get("architectures")  # if config.json omits them, the weights decide
    try:
        known = family_named(raw.get("model_type"))
        is_classifier = any(str(a).endswith(CLASSIFIERS) for a in architectures or ())
        if architectures and not is_classifier and not is_encoder:
            raise ValueError(
                f"it is a {architectures[0]!s:.100}, not a …{' or …'.join(CLASSIFIERS)}, so it has no classifier to "
                "serve; to fit one to your labels, use de3 fit"
            )
        is_spans = any(str(a).endswith(CLASSIFIERS[1]) for a in architectures or ())
        config = known.complete(raw)
        known.check(config)
        known.of(config, False)
        if is_encoder:
            return Description(config, known, None, ["0", "1"], "classes")
        labels = _labels(raw, label_names)
        if is_spans:
            if not 2 <= len(labels) <= MAX_TOKEN_LABELS:
                raise ValueError(
                    f"a token classifier must have 2 to {MAX_TOKEN_LABELS} labels, and it has {len(labels)}"
                )
            return Description(config, known, known.token_head(config), labels, "spans")
        head = known.head(config)
        kind = "multi_label_classification" if multi_label else config.get("problem_type")
        return Description(config, known, head, labels, _kind(kind, labels))
    except ValidationError as error:
        wrong = first_error(error, "encoder")
        raise ValueError(f"{name}: its config.json has an invalid value: {wrong}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # from values of unexpected types
        raise ValueError(
            f"{name}: its config.json has an invalid value ({type(error).__name__}: {error})"
        ) from None


def _labels(raw: Config, given: list[str] | None) -> list[str]:
    """The labels in the order of the logits: as given, else as in config.json, else LABEL_0, LABEL_1, …."""
    names = {int(key): str(value) for key, value in (raw.get("id2label") or {}).items()}
    count = len(names) or raw.get("num_labels") or 2
    if names and set(names) != set(range(count)):
        raise ValueError(f"id2label in its config.json must have the keys 0 to {count - 1}")
    labels = [names.get(k, f"LABEL_{k}") for k in range(count)]
    if given is not None and len(given) != count:
        raise ValueError(f"--label-names must name the labels {labels[:20]} in this order, got {given}")
    labels = given or labels
    if len(set(labels)) != len(labels):
        raise ValueError(
            f"its labels must be distinct, got {labels[:20]}: rename them in its config.json, or with "
            "--label-names of de3 import"
        )
    return labels


def _kind(problem: Any, labels: list[str]) -> Kind:
    if problem == "multi_label_classification":
        if len(labels) == 1:
            raise ValueError("it has one output, but a multi-label model needs at least 2 labels")
        return "labels"
    if problem == "regression" and len(labels) > 1:
        raise ValueError(
            f"it is a regression model with {len(labels)} outputs; only one output can be served"
        )
    return "value" if len(labels) == 1 else "classes"


def check_files(name: str, files: Collection[str]) -> None:
    """Raise ValueError if a file is missing, and OldFormError if only transformers can read the files."""
    if CONFIG not in files:
        if "adapter_config.json" in files:
            raise ValueError(
                f"{name} is an adapter (LoRA) without its model: merge it with peft's merge_and_unload(), save the "
                "result with save_pretrained(), and serve the saved folder"
            )
        raise ValueError(f"{name} has no config.json, so it is not a Hugging Face model")
    if WEIGHTS not in files and INDEX not in files:
        others = sorted(file for file in files if file.endswith(".bin"))
        if others:
            raise OldFormError(
                f"{name} has no model.safetensors: its weights are in {others[0]}, which could run code; import it "
                f"with de3 import ({install('train')})"
            )
        raise ValueError(f"{name} has no model.safetensors: it has no weights")
    if TOKENIZER not in files and not any(set(vocabulary) <= set(files) for vocabulary in VOCABULARIES):
        raise OldFormError(
            f"{name} has no tokenizer.json: save one with AutoTokenizer.from_pretrained(…).save_pretrained(…), or "
            f"import it with de3 import ({install('train')})"
        )


@dataclass(frozen=True)
class Stock:
    """A classifier's files, before its weights are read.

    Attributes:
        name: the folder or hub id, as the user gave it.
        tokenizer: contents of tokenizer.json, without padding and truncation.
        options: contents of tokenizer_config.json; empty if there is none.
        max_tokens: maximum number of tokens of a text.
        token_types: true if the tokenizer returns token types.
        special_tokens: see Architecture.
    """

    name: str
    folder: Path
    description: Description
    tokenizer: bytes
    options: dict[str, Any]
    max_tokens: int
    token_types: bool
    special_tokens: bool = False

    @classmethod
    def open(
        cls, name: str, folder: Path, describe: Describe = describe, special_tokens: bool = False
    ) -> "Stock":
        """Read config.json and the tokenizer.

        Raises ValueError, with a message that begins with the name, for a classifier that cannot be served.
        """
        with errors_of(name):
            description = describe(name, read_config(folder / CONFIG))
            return cls(name, folder, description, *_tokenizer(folder, description), special_tokens)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return self._encoder.num_layers

    @cached_property
    def pooling(self) -> PoolingKind:
        """The pooling of the last exit."""
        head = self.description.head
        return head.pooling if head else "mean"  # type: ignore[return-value]  # the family has checked it

    @cached_property
    def head(self) -> Head | None:
        """The settings of the head, which is the last exit; None for an encoder, or if it is a classifier alone."""
        head = self.description.head
        if head is None or not head.dense:
            return None
        return Head(
            pooling=self.pooling,
            activation=head.activation,  # type: ignore[arg-type]
            norm=head.epsilon if head.norm else None,
        )

    @cached_property
    def _encoder(self) -> Encoder:
        return self.description.family.of(self.description.config, self.token_types)

    def architecture(self, precision: Precision) -> Architecture:
        """The architecture of the classifier, with its head as the only exit (an encoder has a placeholder)."""
        return Architecture.model_validate(
            {
                "encoder": self._encoder,
                "labels": self.description.labels,
                "exit_layers": [self.num_layers],
                "prototype_layers": [],
                "metric_dim": self._encoder.hidden_size,
                "max_tokens": min(self.max_tokens, self._encoder.longest),
                "pooling": self.pooling,
                "head": self.head,
                "precision": precision,
                "special_tokens": self.special_tokens,
            }
        )


def convert(stock: Stock, store: Store, model: str, precision: Precision, source: str | None = None) -> Path:
    """Write a classifier into a store as version 1 of a model; returns its folder.

    model: name of the model. source: the source to record in the manifest; by default, the classifier's name.

    Raises ValueError, with a message that begins with the classifier's name, if it cannot be served; in that
    case nothing is published.
    """
    description = stock.description
    with errors_of(stock.name), store.new_version(model) as draft:
        state = weights.opened(stock.folder, description.family.PREFIX, description.head is None)
        architecture = stock.architecture(precision)
        exit_of = {architecture.num_layers: _last_exit(architecture, description.head, state)}
        for file, segment in build.segments(architecture, description.config, state, exit_of):
            draft.write({file: segment})
        state.check_all_read(() if description.head else state.outside())
        draft.write({"prototypes.safetensors": save_tensors({}), "tokenizer.json": stock.tokenizer})
        manifest = build.manifest_of(
            architecture,
            draft,
            model,
            version=1,
            source=(source or stock.name)[-200:],
            thresholds=[0.5] * len(description.labels) if description.kind == "labels" else None,
            tolerance=MIN_TOLERANCE if description.kind == "value" else None,
            **({"aggregation": "simple", "input": "text"} if description.kind == "spans" else {}),
        )
        return draft.publish(manifest)


def _last_exit(architecture: Architecture, head: StockHead | None, state: StateFile) -> Weights:
    """The weights of the last exit: the head's, or a placeholder's zeros."""
    if head is None:
        width, count = architecture.hidden_size, len(architecture.labels)
        return {
            "classifier.weight": np.zeros((width, count), np.float32),
            "classifier.bias": np.zeros(count, np.float32),
        }
    modules = {"classifier": head.classifier} | ({"dense": head.dense} if head.dense else {})
    modules |= {"norm": head.norm} if head.norm else {}
    return named(state.whole, "", modules, not architecture.encoder.HAS_BIASES)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Convert every error except OSError to a ValueError with a message that begins with the name."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{name}: it has no weight {error.args[0]}") from None
    except ValidationError as error:
        raise ValueError(f"{name}: {first_error(error)}") from None
    except OSError:
        raise
    except Exception as error:  # from malformed files
        raise ValueError(message_of(name, error)) from None


def message_of(name: str, error: BaseException) -> str:
    """The message of an error, or its type if it has none, beginning with the name."""
    message = str(error) or type(error).__name__
    return message if message.startswith(name) else f"{name}: {message}"


def _tokenizer(folder: Path, description: Description) -> tuple[bytes, dict[str, Any], int, bool]:
    """The tokenizer, options, max_tokens and token_types of a Stock; raises ValueError for an unusable tokenizer."""
    path = folder / TOKENIZER_CONFIG
    options = read_config(path) if path.is_file() else {}
    if not isinstance(options, dict):
        raise ValueError("its tokenizer_config.json is not a JSON object")
    if options.get("truncation_side", "right") != "right":
        raise ValueError("its tokenizer truncates at the beginning; only truncation at the end can be served")
    files = {file: folder / file for file in TOKENIZER_FILES}
    data = {file: _read(path) for file, path in files.items() if path.is_file()}
    inputs = options.get("model_input_names")
    longest = options.get("model_max_length", options.get("max_len"))
    types = "token_type_ids" in inputs if isinstance(inputs, list) else description.family.RETURNS_TYPES
    most = description.family.max_tokens(description.config)
    if isinstance(longest, int | float) and 3 <= longest < most:
        most = int(longest)
    return tokenizer_of(data, options, description.family), options, most, types


def _read(path: Path) -> bytes:
    limit = MAX_FILE_BYTES[TOKENIZER]
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"its {path.name} is larger than {limit} bytes")
    return data
