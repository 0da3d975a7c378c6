"""A stock classifier, read from its files without PyTorch, as an artifact that runs at full depth.

The files may come from the hub, so they are hostile until checked.
"""

import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from de3.exits.recorded import MIN_TOLERANCE
from de3.export.vocabulary import tokenizer_of
from de3.model_store.architecture import Architecture, Head
from de3.model_store.families import family_named
from de3.model_store.families.encoder import Config, Encoder, StockHead, Weights, named
from de3.model_store.graph import source_of
from de3.model_store.manifest import SCHEMA_VERSION, Defaults, FileEntry, Manifest
from de3.model_store.segment_graph import build_segment, graph_name
from de3.model_store.sizes import check_sizes, read_config
from de3.model_store.store import MAX_FILE_BYTES, Store

Precision = Literal["fp32", "int8"]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (("vocab.txt",), ("vocab.json", "merges.txt"))  # instead of tokenizer.json
SHARDS = "model-*-of-*.safetensors"
FILES = (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    INDEX,
    SHARDS,
    *(file for v in VOCABULARIES for file in v),
)
MAX_SHARDS, MAX_TENSORS = 1000, 20_000
MAX_HEADER_BYTES = 2**24
MAX_ELEMENTS = 2**29  # of a weight
READ_TYPES = {"F32": 4, "F16": 2, "BF16": 2}
# Buffers, and parts of the encoder that a classifier does not use.
UNUSED = ("position_ids", "token_type_ids", "inv_freq", "pooler.dense.weight", "pooler.dense.bias")


@dataclass(frozen=True)
class Description:
    """What a config.json tells of a classifier.

    Attributes:
        config: with the defaults of what it omits.
        family: of its encoder.
        head: the modules after the encoder.
        labels: in the order of the logits.
        kind: its classes exclude each other, or each label is assigned by itself, or the answer is a value.
    """

    config: Config
    family: type[Encoder]
    head: StockHead
    labels: list[str]
    kind: Literal["classes", "labels", "value"]


def describe(name: str, raw: Any) -> Description:
    """The classifier of a config.json; raises ValueError, which begins with the name, if it cannot be served."""
    if not isinstance(raw, dict):
        raise ValueError(f"{name}: its config.json is not a JSON object")
    check_sizes(name, raw)
    if raw.get("model_type") == "de3-bert":
        raise ValueError(f"{name} is a checkpoint of de3 train, with exits: de3 export {name} --name NAME")
    architectures = raw.get("architectures")  # if they are not stated, the weights decide
    try:
        known = family_named(raw.get("model_type"))
        if architectures and not any(str(a).endswith("ForSequenceClassification") for a in architectures):
            raise ValueError(
                f"it is a {architectures[0]!s:.100}, not a …ForSequenceClassification, so it has no classifier to "
                "serve; train one from your labels with de3 train"
            )
        config = known.complete(raw)
        known.check(config)
        head, _ = known.head(config), known.of(config, False)
        labels = _labels(raw)
        return Description(config, known, head, labels, _kind(config, labels))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "encoder"
        raise ValueError(f"{name}: its config.json has a wrong value: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # a value of a type that no configuration has
        raise ValueError(
            f"{name}: its config.json has a wrong value ({type(error).__name__}: {error})"
        ) from None


def _labels(raw: Config) -> list[str]:
    """The labels in the order of the logits; LABEL_0 … if it names none."""
    names = {int(key): str(value) for key, value in (raw.get("id2label") or {}).items()}
    count = len(names) or raw.get("num_labels") or 2
    if names and set(names) != set(range(count)):
        raise ValueError(f"id2label in its config.json must have the keys 0 to {count - 1}")
    labels = [names.get(k, f"LABEL_{k}") for k in range(count)]
    if len(set(labels)) != len(labels):
        raise ValueError(f"its labels must differ from each other, got {labels[:20]}")
    return labels


def _kind(config: Config, labels: list[str]) -> Literal["classes", "labels", "value"]:
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        if len(labels) == 1:
            raise ValueError("it has one output, and a multi-label model needs 2 labels or more")
        return "labels"
    if problem == "regression" and len(labels) > 1:
        raise ValueError(f"it is a regression of {len(labels)} numbers; with one output it can be served")
    return "value" if len(labels) == 1 else "classes"


def check_files(name: str, files: Collection[str]) -> None:
    """Raise ValueError, with what to do, unless a classifier's files are among these."""
    if CONFIG not in files:
        if "adapter_config.json" in files:
            raise ValueError(
                f"{name} is an adapter (LoRA) without its model: merge it with peft's merge_and_unload(), save that "
                "with save_pretrained(), and serve the saved folder"
            )
        raise ValueError(f"{name} has no config.json, so it is not a Hugging Face model")
    if WEIGHTS not in files and INDEX not in files:
        others = sorted(file for file in files if file.endswith(".bin"))
        why = "it has no weights"
        if others:
            why = (
                f"its weights are in {others[0]}, which could run code; import it with de3 import "
                "(pip install 'de3[train]')"
            )
        raise ValueError(f"{name} has no model.safetensors: {why}")
    if TOKENIZER not in files and not any(set(vocabulary) <= set(files) for vocabulary in VOCABULARIES):
        raise ValueError(
            f"{name} has no tokenizer.json: save one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )


def convert(
    name: str, folder: Path, store: Store, model: str, precision: Precision, source: str | None = None
) -> Path:
    """Write a classifier as version 1 of a model into a store; returns its folder.

    model: its name there. source: as its manifest states it; None: the name. Raises ValueError, which begins with
    `name`, for one that cannot be served; no version is left behind then.
    """
    try:
        raw = read_config(folder / CONFIG)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error}") from None
    description = describe(name, raw)
    try:
        with store.new_version(model) as draft, _opened(folder, description.family.PREFIX) as state:
            tokenizer, max_tokens, token_types = _tokenizer(folder, description)
            architecture = _architecture(description, precision, max_tokens, token_types)
            for file, segment in _segments(description, architecture, state):
                draft.write({file: segment})
            state.check_all_read()
            draft.write({"prototypes.safetensors": save_tensors({}), "tokenizer.json": tokenizer})
            manifest = Manifest(
                **dict(architecture),
                schema_version=SCHEMA_VERSION,
                name=model,
                version=1,
                created=int(time.time()),
                source=(source or name)[-200:],
                thresholds=[0.5] * len(description.labels) if description.kind == "labels" else None,
                tolerance=MIN_TOLERANCE if description.kind == "value" else None,
                defaults=Defaults(tau=0, signal="entropy"),
                calibration=None,
                export={},
                files={file: FileEntry.model_validate(entry) for file, entry in draft.entries().items()},
            )
            return draft.publish(manifest)
    except KeyError as error:
        raise ValueError(f"{name}: it has no weight {error.args[0]}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except OSError:
        raise
    except Exception as error:  # whatever arrays of an unexpected form raise
        raise ValueError(f"{name}: {error or type(error).__name__}") from None


def _architecture(
    description: Description, precision: Precision, max_tokens: int, token_types: bool
) -> Architecture:
    encoder, head = description.family.of(description.config, token_types), description.head
    return Architecture.model_validate(
        {
            "encoder": encoder,
            "labels": description.labels,
            "exit_layers": [encoder.num_layers],
            "prototype_layers": [],
            "metric_dim": encoder.hidden_size,
            "max_tokens": min(max_tokens, encoder.longest),
            "pooling": head.pooling,
            "head": Head(
                pooling=head.pooling,  # type: ignore[arg-type]  # a family has checked it
                activation=head.activation,  # type: ignore[arg-type]
                norm=head.epsilon if head.norm else None,
            ),
            "precision": precision,
        }
    )


def _segments(
    description: Description, architecture: Architecture, state: "_State"
) -> Iterator[tuple[str, bytes]]:
    """The segments' file names and files, one at a time, as they take memory."""
    encoder, head, config = architecture.encoder, description.head, description.config
    modules = {"dense": head.dense, "classifier": head.classifier} | (
        {"norm": head.norm} if head.norm else {}
    )
    for layer, file in enumerate(architecture.segment_files()):
        weights: Weights = (
            encoder.layer_weights(config, state, layer) if layer else encoder.embedding_weights(config, state)
        )
        if layer == architecture.num_layers:
            weights |= named(state.whole, "", modules, not encoder.HAS_BIASES)
            if encoder.FINAL_NORM:
                weights |= named(state, "", {"final_norm": encoder.FINAL_NORM}, not encoder.HAS_BIASES)
        built = build_segment(architecture, layer, source_of(weights))
        yield file, built.model(graph_name(layer)).SerializeToString()


def _tokenizer(folder: Path, description: Description) -> tuple[bytes, int, bool]:
    """The tokenizer.json, the longest text by its configuration, and whether it has token types."""
    path = folder / TOKENIZER_CONFIG
    options = read_config(path) if path.is_file() else {}
    if not isinstance(options, dict):
        raise ValueError("its tokenizer_config.json is not a JSON object")
    files = {file: folder / file for file in (TOKENIZER, *(f for v in VOCABULARIES for f in v))}
    data = {file: _read(path) for file, path in files.items() if path.is_file()}
    inputs = options.get("model_input_names")
    longest = options.get("model_max_length", options.get("max_len"))
    types = "token_type_ids" in inputs if isinstance(inputs, list) else description.family.RETURNS_TYPES
    most = description.family.max_tokens(description.config)
    if isinstance(longest, int | float) and 3 <= longest < most:
        most = int(longest)
    return tokenizer_of(data, options, description.family), most, types


def _read(path: Path) -> bytes:
    limit = MAX_FILE_BYTES[TOKENIZER]
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"its {path.name} is larger than {limit} bytes")
    return data


class _State(Mapping[str, NDArray[np.float32]]):
    """The encoder's weights in float32 by their names in transformers' model, read when they are asked for.

    Attributes:
        whole: those of the whole classifier.
    """

    def __init__(self, tensors: dict[str, "_Tensor"], prefix: str, read: set[str]) -> None:
        """read: names of the tensors that were read, which is updated."""
        self._tensors, self._prefix, self._read = tensors, prefix, read
        self.whole = _State(tensors, "", read) if prefix else self

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        full = self._prefix + name
        array = self._tensors[full].read(full)
        self._read.add(full)
        return array

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check_all_read(self) -> None:
        """Raise ValueError if there are weights that the classifier does not use: its config.json is another's."""
        unread = [name for name in self._tensors if name not in self._read and not name.endswith(UNUSED)]
        if unread:
            raise ValueError(
                f"its weights include {min(unread)!r:.100}, which a classifier of this type does not use: config.json "
                "and weights do not belong together"
            )


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file that the library has checked.

    Attributes:
        at: where its bytes begin in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    at: int

    def read(self, name: str) -> NDArray[np.float32]:
        """The values in float32; raises ValueError for a type that is not read, or values that are not finite."""
        if self.dtype not in READ_TYPES:
            raise ValueError(
                f"its weights are {self.dtype:.20}; de3 reads {', '.join(READ_TYPES)}: save it in one of these"
            )
        if not 1 <= len(self.shape) <= 2 or min(self.shape) < 1 or prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"its weight {name} has the shape {list(self.shape)[:10]}")
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.dtype]
        values = np.fromfile(self.path, kind, prod(self.shape), offset=self.at)
        if self.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        array = values.astype(np.float32, copy=False).reshape(self.shape)
        if not np.isfinite(array).all():
            raise ValueError(f"its weight {name} is not finite")
        return array


@contextmanager
def _opened(folder: Path, prefix: str) -> Iterator[_State]:
    """The weights in a folder, whose files stay open until the end."""
    tensors: dict[str, _Tensor] = {}
    with ExitStack() as files:
        for path in _weight_files(folder):
            try:
                with path.open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    if size > MAX_HEADER_BYTES:
                        raise ValueError(
                            f"its header has {size} bytes, at most {MAX_HEADER_BYTES} are allowed"
                        )
                    header = json.loads(file.read(size))
                files.enter_context(safe_open(path, "numpy"))  # checks the header against the file
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"its {path.name} cannot be read: {error}") from None
            for key, entry in header.items():
                if key != "__metadata__":
                    # TensorFlow's names of a norm's weights, in old checkpoints.
                    name = key.replace("LayerNorm.gamma", "LayerNorm.weight")
                    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
                    begin = 8 + size + entry["data_offsets"][0]
                    tensors[name] = _Tensor(path, entry["dtype"], tuple(entry["shape"]), begin)
            if len(tensors) > MAX_TENSORS:
                raise ValueError(f"it has more than {MAX_TENSORS} weights")
        yield _State(tensors, prefix, set())


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, several if its weights are in shards."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_config(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"its {INDEX} has no weight_map")
    shards = sorted(set(names.values()))
    if (
        not all(Path(shard).match(SHARDS) and "/" not in shard for shard in shards)
        or len(shards) > MAX_SHARDS
    ):
        raise ValueError(f"its {INDEX} names files that are not weights beside it")
    return [folder / shard for shard in shards]
