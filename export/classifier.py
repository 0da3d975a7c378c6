"""A stock classifier, read from its files without PyTorch, as an artifact that runs at full depth."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors
from tokenizers import Tokenizer

from de3.exits.recorded import MIN_TOLERANCE
from de3.model_store.architecture import Architecture, Head
from de3.model_store.families import family_named
from de3.model_store.families.encoder import Config, Encoder, StockHead, Weights, named
from de3.model_store.graph import source_of
from de3.model_store.manifest import SCHEMA_VERSION, Defaults, FileEntry, Manifest
from de3.model_store.segment_graph import build_segment, graph_name
from de3.model_store.sizes import check_sizes, read_config
from de3.model_store.store import Store

Precision = Literal["fp32", "int8"]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_SHARDS = 1000
READ_TYPES = ("F32", "F16", "BF16")
# Buffers, and parts of the encoder that a classifier does not use.
UNUSED = ("position_ids", "token_type_ids", "inv_freq", "pooler.dense.weight", "pooler.dense.bias")
REMEDY = "import it with de3 import instead (pip install 'de3[train]')"


@dataclass(frozen=True)
class Description:
    """What a config.json tells of a classifier.

    Attributes:
        config: with the defaults of what it omits.
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
    architectures = raw.get("architectures") or [
        "ForSequenceClassification"
    ]  # not stated: the weights decide
    if raw.get("model_type") == "de3-bert":
        raise ValueError(f"{name} is a checkpoint of de3 train, with exits: de3 export {name} --name NAME")
    try:
        known = family_named(raw.get("model_type"))
        if not any(str(a).endswith("ForSequenceClassification") for a in architectures):
            raise ValueError(
                f"it is a {architectures[0]!s:.100}, not a …ForSequenceClassification, so it has no classifier to "
                "serve; train one from your labels with de3 train"
            )
        config = known.complete(raw)
        known.check(config)
        head = known.head(config)
        known.of(config, False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "encoder"
        raise ValueError(f"{name}: its config.json has a wrong value: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{name}: its config.json has a wrong value ({type(error).__name__}: {error!s:.100})"
        ) from None
    labels = _labels(name, raw)
    if config.get("problem_type") == "multi_label_classification":
        kind: Literal["classes", "labels", "value"] = "labels"
    else:
        kind = "value" if len(labels) == 1 else "classes"
    if kind == "labels" and len(labels) == 1:
        raise ValueError(f"{name} has one output, and a multi-label model needs 2 labels or more")
    if config.get("problem_type") == "regression" and len(labels) > 1:
        raise ValueError(f"{name} is a regression of {len(labels)} numbers; with one output it can be served")
    return Description(config, known, head, labels, kind)


def _labels(name: str, raw: Config) -> list[str]:
    """The labels in the order of the logits; LABEL_0 … if it names none."""
    given_names = raw.get("id2label") or {}
    count = raw.get("num_labels") or len(given_names) or 2
    names = {int(key): str(value) for key, value in given_names.items()}
    if names and set(names) != set(range(count)):
        raise ValueError(f"{name}: id2label in its config.json must have the keys 0 to {count - 1}")
    labels = [names.get(k, f"LABEL_{k}") for k in range(count)]
    if len(set(labels)) != len(labels):
        raise ValueError(f"{name}: its labels must differ from each other, got {labels[:20]}")
    return labels


def check_folder(name: str, folder: Path) -> Description:
    """The classifier in a folder; raises ValueError, with what to do, if a file is missing or of another kind."""
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} is an adapter (LoRA) without its model: merge it with peft's merge_and_unload(), save that "
                "with save_pretrained(), and serve the saved folder"
            )
        raise ValueError(f"{name} has no config.json, so it is not a Hugging Face model")
    try:
        description = describe(name, read_config(folder / CONFIG))
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error}") from None
    if not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"{name} has no tokenizer.json: save one there with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        others = [path.name for path in folder.glob("*.bin")]
        why = (
            f"its weights are in {others[0]}, which could run code: {REMEDY}"
            if others
            else "it has no weights"
        )
        raise ValueError(f"{name} has no model.safetensors: {why}")
    return description


def convert(
    name: str, folder: Path, store: Store, model: str, precision: Precision, source: str | None = None
) -> Path:
    """Write a classifier as version 1 of a model into a store; returns its folder.

    model: its name there. source: as its manifest states it; None: the name. Raises ValueError, which begins with
    `name`, for one that cannot be served; nothing is left behind then.
    """
    description = check_folder(name, folder)
    try:
        with store.new_version(model) as draft, _opened(folder, description.family.PREFIX) as state:
            tokenizer, max_tokens, token_types = _tokenizer(folder, description)
            architecture = _architecture(description, precision, max_tokens, token_types)
            for file, weights in _segments(description, architecture, state):
                draft.write({file: weights})
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
    except (ValueError, OSError, SafetensorError, KeyError) as error:
        reason = f"it has no weight {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {' '.join(reason.split())[:400]}") from None


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
    encoder, head, last = architecture.encoder, description.head, architecture.num_layers
    modules = {"dense": head.dense, "classifier": head.classifier} | (
        {"norm": head.norm} if head.norm else {}
    )
    for layer, file in enumerate(architecture.segment_files()):
        weights: Weights = (
            encoder.layer_weights(description.config, state, layer)
            if layer
            else encoder.embedding_weights(state)
        )
        if layer == last:
            weights |= named(state.whole, "", modules)
            weights |= named(state, "", {"final_norm": encoder.FINAL_NORM}) if encoder.FINAL_NORM else {}
        yield (
            file,
            build_segment(architecture, layer, source_of(weights))
            .model(graph_name(layer))
            .SerializeToString(),
        )


def _tokenizer(folder: Path, description: Description) -> tuple[bytes, int, bool]:
    """The tokenizer without padding and truncation, the longest text by its configuration, and whether it has token
    types."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(f"its tokenizer.json cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    path = folder / TOKENIZER_CONFIG
    options = read_config(path) if path.is_file() else {}
    if not isinstance(options, dict):
        raise ValueError("its tokenizer_config.json is not a JSON object")
    inputs, longest = options.get("model_input_names"), options.get("model_max_length")
    types = "token_type_ids" in inputs if isinstance(inputs, list) else description.family.RETURNS_TYPES
    most = description.family.max_tokens(description.config)
    if isinstance(longest, int | float) and 3 <= longest < most:
        most = int(longest)
    return str(tokenizer.to_str()).encode(), most, types


class _State(Mapping[str, NDArray[np.float32]]):
    """The encoder's weights in float32 by their names in transformers' model, read when they are asked for.

    Attributes:
        whole: those of the whole classifier.
    """

    def __init__(self, files: dict[str, Any], prefix: str, read: set[str] | None = None) -> None:
        """files: the open file of each weight."""
        self._files, self._prefix = files, prefix
        self._read: set[str] = set() if read is None else read
        self.whole = self if not prefix else _State(files, "", self._read)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        full = self._prefix + name
        array = _float32(*self._files[full])
        self._read.add(full)
        if not np.isfinite(array).all():
            raise ValueError(f"its weight {full} is not finite")
        return array

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._files

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._files if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check_all_read(self) -> None:
        """Raise ValueError if there are weights that the classifier does not use: its config.json is another's."""
        unread = [name for name in self._files if name not in self._read and not name.endswith(UNUSED)]
        if unread:
            raise ValueError(
                f"its model.safetensors has weights that a classifier of this type does not use, such as "
                f"{min(unread)!r:.100}: config.json and weights do not belong together"
            )


@contextmanager
def _opened(folder: Path, prefix: str) -> Iterator[_State]:
    """The weights in a folder, whose files are closed at the end."""
    weights: dict[str, Any] = {}
    with ExitStack() as files:
        for path in _weight_files(folder):
            try:
                file: Any = files.enter_context(safe_open(path, "numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"its {path.name} cannot be read: {error}") from None
            for key in file.keys():  # noqa: SIM118  # not a mapping
                # TensorFlow's names of a norm's weights, in old checkpoints.
                name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                    "LayerNorm.beta", "LayerNorm.bias"
                )
                weights[name] = file, path, key
        yield _State(weights, prefix)


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
        any("/" in shard or not shard.endswith(".safetensors") for shard in shards)
        or len(shards) > MAX_SHARDS
    ):
        raise ValueError(f"its {INDEX} names files that are not weights beside it")
    return [folder / shard for shard in shards]


def _float32(file: Any, path: Path, key: str) -> NDArray[np.float32]:
    """A tensor of an open safetensors file in float32."""
    kind = file.get_slice(key).get_dtype()
    if kind == "BF16":
        return _bfloat16(path, key)
    if kind not in READ_TYPES:
        raise ValueError(
            f"its weights are {kind}; de3 reads {', '.join(READ_TYPES)}: save it in one of these"
        )
    return np.asarray(file.get_tensor(key), np.float32)


def _bfloat16(path: Path, key: str) -> NDArray[np.float32]:
    """A tensor of bfloat16, a type that NumPy does not have, of a file that safetensors has checked."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[key]
    begin, end = entry["data_offsets"]
    halves = np.fromfile(path, "<u2", (end - begin) // 2, offset=8 + size + begin)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
