"""An artifact opened for running: its tokenizer and one ONNX Runtime session for each layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from tokenizers import Tokenizer

from model_store.manifest import Manifest
from model_store.store import Artifact, StoreError

Array = NDArray[np.float32]
MAX_CHARS_PER_TOKEN = 100


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text as the encoder takes it: ids and type_ids are (1, tokens) int64."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    truncated: bool

    def __len__(self) -> int:
        return int(self.ids.shape[1])


@dataclass(frozen=True, slots=True)
class Step:
    """What a segment returns.

    Attributes:
        hidden: (1, tokens, hidden); None after the last layer.
        logits: (K,); None where the layer has no exit.
        distances: cosine distances to the prototypes, (K,); None where it has no prototypes.
    """

    hidden: Array | None
    logits: Array | None
    distances: Array | None


class Segment:
    """One layer, run one unpadded sample at a time; safe to share between threads."""

    def __init__(self, layer: int, session: Any, manifest: Manifest, prototypes: Array | None) -> None:
        self.layer = layer
        self.is_exit = layer in manifest.exit_layers
        self._session = session
        self._feed: dict[str, Any] = {} if prototypes is None else {"prototypes": prototypes}
        hidden = "hidden" if layer == 0 else "next_hidden"
        self._outputs = (
            ([hidden] if layer < manifest.num_layers else [])
            + (["logits"] if self.is_exit else [])
            + (["distances"] if prototypes is not None else [])
        )
        hidden_shape, labels = [1, -1, manifest.hidden_size], len(manifest.labels)
        self._shapes = {
            "input_ids": [1, -1],
            "token_type_ids": [1, -1],
            "hidden": hidden_shape,
            "next_hidden": hidden_shape,
            "prototypes": [labels, manifest.metric_dim],
            "logits": [1, labels],
            "distances": [1, labels],
        }
        self._inputs = ["hidden"] if layer else ["input_ids"] + ["token_type_ids"] * manifest.token_types

    def check(self, file: str) -> None:
        """Raise StoreError unless the session takes and gives what the manifest promises."""
        takes = {x.name: x.shape for x in self._session.get_inputs()}
        gives = {x.name: x.shape for x in self._session.get_outputs()}
        for what, found, wanted in (
            ("takes", takes, [*self._inputs, *self._feed]),
            ("gives", gives, self._outputs),
        ):
            if set(found) != set(wanted):
                raise StoreError(f"{file}: {what} {sorted(found)}, the manifest asks for {sorted(wanted)}")
            for name, shape in found.items():
                # A free dimension (tokens) has a name instead of a size.
                if [x if isinstance(x, int) else -1 for x in shape] != self._shapes[name]:
                    raise StoreError(f"{file}: {name} has shape {shape}, expected {self._shapes[name]}")

    def embed(self, tokens: Tokens) -> Step:
        """Run the embeddings (layer 0)."""
        arrays = (tokens.ids, tokens.type_ids)
        return self._run(dict(zip(self._inputs, arrays, strict=False)))

    def run(self, hidden: Array | None) -> Step:
        """Run an encoder layer on the hidden states (1, tokens, hidden) of the layer before."""
        return self._run({"hidden": hidden})

    def _run(self, inputs: dict[str, Any]) -> Step:
        values = iter(self._session.run(self._outputs, inputs | self._feed))
        return Step(
            hidden=next(values) if self._outputs[0].endswith("hidden") else None,
            logits=next(values)[0] if self.is_exit else None,
            distances=next(values)[0] if self._feed else None,
        )


class Model:
    """A loaded artifact. `segments[m]` is layer m; 0 is the embeddings."""

    def __init__(self, artifact: Artifact) -> None:
        """Read, check and load every file; raises StoreError for the first that is not sound."""
        self.manifest = artifact.manifest
        self.full_name = artifact.full_name
        manifest = self.manifest
        self._tokenizer = _tokenizer(artifact)
        self._special_tokens = {
            pair: self._tokenizer.num_special_tokens_to_add(is_pair=pair) for pair in (False, True)
        }
        prototypes = unit_prototypes(artifact)
        options = session_options()
        self.segments: list[Segment] = []
        for layer, file in enumerate(manifest.segment_files()):
            try:
                # From bytes: what runs is what was checked, and a model cannot refer to files beside it.
                session = ort.InferenceSession(
                    artifact.read(file), options, providers=["CPUExecutionProvider"]
                )
            except StoreError:
                raise
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(
                    f"{artifact.path / file}: not a model ONNX Runtime can run: {error}"
                ) from None
            segment = Segment(layer, session, manifest, prototypes.get(layer))
            segment.check(str(artifact.path / file))
            self.segments.append(segment)

    def tokenize(self, text: str, text_pair: str | None = None, truncate: bool = True) -> Tokens:
        """Tokens of a text or pair, at most `max_tokens`, cut at the longer text's end.

        Raises ValueError if the text is longer and `truncate` is false. So that no text can hold a thread for
        long, a text counts as too long from MAX_CHARS_PER_TOKEN characters for each token the model takes.
        """
        limit = self.manifest.max_tokens
        most = MAX_CHARS_PER_TOKEN * limit
        long = len(text) > most or (text_pair is not None and len(text_pair) > most)
        if long and not truncate:
            raise ValueError(f"has more than {most} characters, the most allowed; let truncate be true")
        # The tokenizer's own truncation is a state that all threads share, so the parts are encoded and cut
        # by themselves, and then joined by the tokenizer's template.
        first = self._tokenizer.encode(text[:most], add_special_tokens=False)
        second = None
        if text_pair is not None:
            second = self._tokenizer.encode(text_pair[:most], add_special_tokens=False)
        room = limit - self._special_tokens[second is not None]
        size, size_pair = len(first), 0 if second is None else len(second)
        if size + size_pair > room:
            if not truncate:
                found = size + size_pair + limit - room
                raise ValueError(f"has {found} tokens, the model takes at most {limit}; let truncate be true")
            long = True
            # Longest first, as transformers does: take from the longer until both fit.
            keep = room if second is None else max(room - size_pair, min(size, room - room // 2))
            first.truncate(keep)
            if second is not None:
                second.truncate(room - keep)
        encoding = self._tokenizer.post_process(first, second)
        return Tokens(np.array([encoding.ids], np.int64), np.array([encoding.type_ids], np.int64), long)

    def deepest_exit(self, max_layer: int | None) -> int:
        """The deepest exit that is not deeper than max_layer; None: the last layer."""
        if max_layer is None:
            return self.manifest.num_layers
        return max(m for m in self.manifest.exit_layers if m <= max_layer)

    def full_depth(self, tokens: Tokens) -> list[Step]:
        """Every layer's step for one sample, run without exiting; index = layer."""
        steps = [self.segments[0].embed(tokens)]
        for segment in self.segments[1:]:
            steps.append(segment.run(steps[-1].hidden))
        return steps


def session_options() -> Any:
    """One thread a call: running several samples at once measured 2 to 3 times faster than thread pools."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def unit_prototypes(artifact: Artifact) -> dict[int, Array]:
    """Prototypes (K, metric_dim) by layer, each row scaled to length 1. Raises StoreError."""
    manifest = artifact.manifest
    file = artifact.path / "prototypes.safetensors"
    try:
        tensors = load_tensors(artifact.read("prototypes.safetensors"))
    except SafetensorError as error:
        raise StoreError(f"{file}: not a safetensors file: {error}") from None
    shape = (len(manifest.labels), manifest.metric_dim)
    found: dict[int, Array] = {}
    for layer in manifest.prototype_layers:
        rows = tensors.get(f"layer_{layer:02}")
        if rows is None:
            raise StoreError(f"{file}: has no tensor layer_{layer:02}")
        if rows.shape != shape or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise StoreError(f"{file}: layer_{layer:02} must be finite float32 of shape {shape}")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if (lengths == 0).any():
            label = manifest.labels[int(np.argmin(lengths))]
            raise StoreError(f"{file}: layer_{layer:02} has no prototype for label {label!r}")
        found[layer] = np.ascontiguousarray(rows / lengths)
    return found


def _tokenizer(artifact: Artifact) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(artifact.read("tokenizer.json").decode())
    except StoreError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise StoreError(f"{artifact.path / 'tokenizer.json'}: not a tokenizer: {error}") from None
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise StoreError(f"{artifact.path / 'tokenizer.json'}: must not pad or truncate; export strips both")
    return tokenizer
