"""Converts a checkpoint's files to an artifact's, without PyTorch."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors
from tokenizers import Tokenizer

from de3.export import build, weights
from de3.export.classifier import TOKENIZER_CONFIG, errors_of
from de3.model_store.architecture import Architecture, Precision
from de3.model_store.families.encoder import named
from de3.model_store.manifest import PROTOTYPES, TOKENIZER
from de3.model_store.sizes import read_config
from de3.training.checkpoint import Checkpoint

TENSOR, SEEN = "prototypes", "prototype_seen"


class Trained:
    """The weights, prototypes and tokenizer of a checkpoint.

    Attributes:
        prototypes: prototypes by layer, (K, metric_dim).
        tokenizer: tokenizer.json without padding and truncation.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError if the prototypes cannot be read or a class has none."""
        self.checkpoint = checkpoint
        self.prototypes = _prototypes(checkpoint)
        tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = str(tokenizer.to_str()).encode()

    def architecture(self, precision: Precision) -> Architecture:
        """The artifact's architecture; raises ValueError for an encoder that cannot be exported."""
        config, family = self.checkpoint.config, self.checkpoint.config.family
        path = self.checkpoint.folder / TOKENIZER_CONFIG
        inputs = (read_config(path) if path.is_file() else {}).get("model_input_names")
        types = "token_type_ids" in inputs if isinstance(inputs, list) else family.RETURNS_TYPES
        return Architecture.model_validate(
            {
                "encoder": family.of(config.encoder, types),
                "labels": config.label_names,
                "exit_layers": config.exit_layers,
                "prototype_layers": config.prototype_layers,
                "metric_dim": config.metric_dim or config.hidden_size,
                "max_tokens": config.max_tokens,
                "pooling": config.pooling,
                "precision": precision,
            }
        )

    def files(self, architecture: Architecture) -> Iterator[tuple[str, bytes]]:
        """Yield the artifact's files, as name and contents; raises ValueError for unusable weights."""
        exits: dict[int, dict[str, str]] = {
            layer: {"classifier": f"classifiers.{i}"} for i, layer in enumerate(architecture.exit_layers)
        }
        for i, layer in enumerate(architecture.prototype_layers):
            exits[layer]["space"] = f"prototypical.{i}"
        folder = self.checkpoint.folder
        with errors_of(str(folder)):
            state = weights.opened(folder, "encoder.")
            lack_biases = not architecture.encoder.HAS_BIASES
            weights_of = {layer: named(state.whole, "", parts, lack_biases) for layer, parts in exits.items()}
            yield from build.segments(architecture, self.checkpoint.config.encoder, state, weights_of)
            state.check_all_read((TENSOR, SEEN))
        tensors = {f"layer_{layer:02}": array for layer, array in self.prototypes.items()}
        yield PROTOTYPES, save_tensors(tensors)
        yield TOKENIZER, self.tokenizer


def _prototypes(checkpoint: Checkpoint) -> dict[int, NDArray[np.float32]]:
    layers, names = checkpoint.config.prototype_layers, checkpoint.names
    if not layers:
        return {}
    path = checkpoint.folder / weights.WEIGHTS
    try:
        with safe_open(path, "numpy") as file:
            prototypes, seen = file.get_tensor(TENSOR), file.get_tensor(SEEN)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: the prototypes cannot be read: {error}") from None
    for layer, row in zip(layers, seen, strict=True):
        if missing := [name for name, one in zip(names, row, strict=True) if not one]:
            raise ValueError(
                f"layer {layer} has no prototype for {', '.join(missing[:5])}: the training data has no sample of it"
            )
    return {m: np.ascontiguousarray(p, np.float32) for m, p in zip(layers, prototypes, strict=True)}
