"""An artifact opened for running: its tokenizer and one ONNX Runtime session for each layer."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from tokenizers import Encoding, Tokenizer

from model_store.manifest import Manifest
from model_store.store import Artifact, StoreError

Array = NDArray[np.float32]
MAX_CHARS_PER_TOKEN = 100
# One text at a time on each engine thread: the tokenizer's own thread pool would only get in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text as the encoder takes it: ids and type_ids are (1, tokens) int64."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    truncated: bool

    def __len__(self) -> int:
        return int(self.ids.shape[1])


@dataclass(slots=True)
class Step:
    """What a segment returns.

    Attributes:
        hidden: (1, tokens, hidden).
        logits: (K,); None where the layer has no exit or it was not asked.
        distances: cosine distances to the prototypes, (K,); None where there are none.
    """

    hidden: Array
    logits: Array | None = None
    distances: Array | None = None


class Segment:
    """One layer and its exit, run one unpadded sample at a time; safe to share between threads."""

    def __init__(
        self, layer: int, session: Any, manifest: Manifest, prototypes: Array | None, file: str
    ) -> None:
        """Raises StoreError unless the session takes and gives what the manifest promises."""
        self.layer = layer
        self.is_exit = layer in manifest.exit_layers
        self._session = session
        hidden, labels = [1, -1, manifest.hidden_size], len(manifest.labels)
        takes = {"hidden": hidden} if layer else {"input_ids": [1, -1]}
        if layer == 0 and manifest.token_types:
            takes["token_type_ids"] = [1, -1]
        self._inputs = list(takes)
        gives = {"next_hidden" if layer else "hidden": hidden}
        self._with_exit: dict[str, Any] = {}
        self._without_exit: dict[str, Any] = {}
        if self.is_exit:
            takes["with_exit"], gives["logits"] = [], [1, labels]
            self._with_exit["with_exit"], self._without_exit["with_exit"] = np.array(True), np.array(False)
        if prototypes is not None:
            takes["prototypes"], gives["distances"] = [labels, manifest.metric_dim], [1, labels]
            self._with_exit["prototypes"] = self._without_exit["prototypes"] = prototypes
        self._outputs = list(gives)
        _check(session, takes, gives, file)

    def embed(self, tokens: Tokens, with_exit: bool) -> Step:
        """Run the embeddings (layer 0) and, if asked, their exit."""
        feed = dict(zip(self._inputs, (tokens.ids, tokens.type_ids), strict=False))
        return self._run(feed, with_exit)

    def run(self, hidden: Array, with_exit: bool) -> Step:
        """Run an encoder layer on the hidden states of the layer before and, if asked, its exit."""
        return self._run({"hidden": hidden}, with_exit)

    def _run(self, feed: dict[str, Any], with_exit: bool) -> Step:
        feed.update(self._with_exit if with_exit else self._without_exit)
        values = self._session.run(self._outputs, feed)
        if not (with_exit and self.is_exit):
            return Step(values[0])
        return Step(values[0], values[1][0], values[2][0] if len(values) > 2 else None)


def _check(session: Any, takes: dict[str, list[int]], gives: dict[str, list[int]], file: str) -> None:
    """Raise StoreError unless a session takes and gives exactly these shapes; −1 is a free dimension."""
    for what, found, wanted in (
        ("takes", {x.name: x.shape for x in session.get_inputs()}, takes),
        ("gives", {x.name: x.shape for x in session.get_outputs()}, gives),
    ):
        if set(found) != set(wanted):
            raise StoreError(f"{file}: {what} {sorted(found)}, the manifest asks for {sorted(wanted)}")
        for name, shape in found.items():
            # A free dimension (tokens) has a name instead of a size.
            if [x if isinstance(x, int) else -1 for x in shape] != wanted[name]:
                raise StoreError(f"{file}: {name} has shape {shape}, expected {wanted[name]}")


class Model:
    """A loaded artifact.

    Attributes:
        segments: index = layer; 0 is the embeddings.
    """

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

        def session(file: str) -> Any:
            try:
                # From bytes: what runs is what was checked, and a model cannot refer to files beside it.
                return ort.InferenceSession(artifact.read(file), options, providers=["CPUExecutionProvider"])
            except StoreError:
                raise
            except Exception as error:  # onnxruntime raises its own classes, without a common base
                raise StoreError(
                    f"{artifact.path / file}: not a model ONNX Runtime can run: {error}"
                ) from None

        self.segments = [
            Segment(layer, session(file), manifest, prototypes.get(layer), str(artifact.path / file))
            for layer, file in enumerate(manifest.segment_files())
        ]

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
        pair = None if text_pair is None else text_pair[:most]
        # A batch of one: unlike encode, it leaves other Python threads alone, and it finds no offsets.
        whole = text[:most] if pair is None else (text[:most], pair)
        encoding = self._tokenizer.encode_batch_fast([whole])[0]
        if len(encoding) > limit:
            encoding = self._cut(text[:most], pair, limit, truncate)
            long = True
        return Tokens(np.array([encoding.ids], np.int64), np.array([encoding.type_ids], np.int64), long)

    def _cut(self, text: str, text_pair: str | None, limit: int, truncate: bool) -> Encoding:
        """The encoding of a text or pair that is longer than `limit`, cut to it."""
        # The tokenizer's own truncation is a state that all threads share, so the parts are encoded and cut
        # by themselves, and then joined by the tokenizer's template.
        parts = [text] if text_pair is None else [text, text_pair]
        first, *rest = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        second = rest[0] if rest else None
        size, size_pair = len(first), 0 if second is None else len(second)
        room = limit - self._special_tokens[second is not None]
        if not truncate:
            found = size + size_pair + limit - room
            raise ValueError(f"has {found} tokens, the model takes at most {limit}; let truncate be true")
        # Longest first, as transformers does: take from the longer until both fit.
        keep = room if second is None else max(room - size_pair, min(size, room - room // 2))
        first.truncate(keep)
        if second is not None:
            second.truncate(room - keep)
        return self._tokenizer.post_process(first, second)

    def deepest_exit(self, max_layer: int | None) -> int:
        """The deepest exit that is not deeper than max_layer; None: the last layer."""
        if max_layer is None:
            return self.manifest.num_layers
        return max(m for m in self.manifest.exit_layers if m <= max_layer)

    def full_depth(self, tokens: Tokens) -> list[Step]:
        """Every layer's step for one sample, run without exiting; index = layer."""
        steps = [self.segments[0].embed(tokens, True)]
        for segment in self.segments[1:]:
            steps.append(segment.run(steps[-1].hidden, True))
        return steps


def session_options() -> Any:
    """One thread a call: running several samples at once measured 2 to 3 times faster than thread pools."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The segments are fused as they are written; more would fuse Add and LayerNormalization into
    # SkipLayerNormalization, which measured 5 times slower than the two (docs/performance.md).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
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
