"""An encoder and a model's exits, run on unpadded samples by ONNX Runtime or by the kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from de3.exits.spans import Layout
from de3.model_store.manifest import Manifest

Array = NDArray[np.float32]
NOWHERE = "/nonexistent/de3"
ARENA_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Tokens:
    """The encoder's input for one text: ids and type_ids are (1, tokens) int64; truncated: a part was cut off.

    layout: None unless a token classifier needs it. end: the number of characters of a truncated text that are in the
    tokens; None for a pair.
    """

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    truncated: bool
    layout: Layout | None = None
    end: int | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[1])


@dataclass(slots=True)
class Step:
    """Results of a layer and its exit.

    Attributes:
        hidden: (1, tokens, hidden).
        logits: (K,); None if the layer has no exit.
        distances: cosine distances to the prototypes, (K,); None without prototypes.
    """

    hidden: Array
    logits: Array | None = None
    distances: Array | None = None


@dataclass(frozen=True)
class Pooling:
    """Pools hidden states as the exits do, so that exits can be fitted to the results.

    Attributes:
        norm: scale and shift of the norm between hidden states and an exit, (hidden,) each; None without one.
        epsilon: added to the variance in that norm.
    """

    norm: tuple[Array, Array] | None
    epsilon: float

    def normalized(self, hidden: Array) -> Array:
        """The hidden states of a sample, (1, tokens, hidden), after the norm, if there is one: (tokens, hidden)."""
        rows: Array = hidden[0]
        if self.norm is None:
            return rows
        centred = rows - rows.mean(-1, keepdims=True)
        rows = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        return np.asarray(rows * self.norm[0] + self.norm[1], np.float32)

    def mean(self, hidden: Array) -> Array:
        """Mean over the tokens of normalized hidden states: (hidden,)."""
        rows = self.normalized(hidden)
        mean: Array = np.add.reduce(rows, 0) / np.float32(len(rows))  # equals rows.mean(0), in half the time
        return mean

    def pooled(self, hidden: Array, pooling: str) -> Array:
        """The state that an exit classifies, (hidden,), with the pooling "mean" or "cls"."""
        return self.mean(hidden) if pooling == "mean" else self.normalized(hidden[:, :1])[0]


class Layers(Protocol):
    """The layers of an encoder, run one unpadded sample at a time; safe to share between threads.

    Attributes:
        num_layers: number of layers, without the embeddings, which are layer 0.
    """

    num_layers: int

    def embed(self, tokens: Tokens) -> Array:
        """The embeddings' hidden states, (1, tokens, hidden)."""

    def run(self, layer: int, hidden: Array) -> Array:
        """The hidden states after a layer, from 1, for those of the layer before."""


class Exits(Protocol):
    """The exits of a model, run on the hidden states of one unpadded sample; safe to share between threads.

    Attributes:
        num_layers: layer of the last exit. The encoder may have more layers.
        layers: the layers with an exit, ascending.
        pooling: pools hidden states as the exits do.
        is_spans: they classify each token.
    """

    num_layers: int
    layers: list[int]
    is_spans: bool
    pooling: Pooling

    def run(self, layer: int, hidden: Array) -> tuple[Array, Array | None]:
        """The logits (K,) of an exit and, with prototypes, the distances (K,), for states (1, tokens, hidden).

        If the exits classify each token, the logits are (tokens, K).
        """

    def state_term(self, layer: int, hidden: Array, weights: Array) -> float:
        """The pooled state of an exit, for states (1, tokens, hidden), times weights (hidden,)."""


class OnnxLayers:
    """An encoder that ONNX Runtime runs."""

    def __init__(self, sessions: Sequence[Any], token_types: bool) -> None:
        """sessions: index = layer; each runs a graph that `read_segment` has checked."""
        self.num_layers = len(sessions) - 1
        self._sessions = sessions
        self._inputs = ["input_ids", "token_type_ids"] if token_types else ["input_ids"]

    def embed(self, tokens: Tokens) -> Array:
        """The embeddings' hidden states, (1, tokens, hidden)."""
        feed = dict(zip(self._inputs, (tokens.ids, tokens.type_ids), strict=False))
        hidden: Array = self._sessions[0].run(["hidden"], feed)[0]
        return hidden

    def run(self, layer: int, hidden: Array) -> Array:
        """The hidden states after a layer, from 1, for those of the layer before."""
        after: Array = self._sessions[layer].run(["next_hidden"], {"hidden": hidden})[0]
        return after


class OnnxExits:
    """Exits that ONNX Runtime runs."""

    def __init__(
        self,
        sessions: Mapping[int, Any],
        prototypes: Mapping[int, Array],
        manifest: Manifest,
        pooling: Pooling,
    ) -> None:
        """sessions: by layer; each runs a graph of `build_exit`. prototypes: (K, D), unit rows, by layer."""
        self.num_layers, self.layers, self.pooling = manifest.num_layers, manifest.exit_layers, pooling
        self.is_spans, self._pooling_of = manifest.is_spans, manifest.pooling
        self._sessions = sessions
        self._feeds = {layer: {"prototypes": rows} for layer, rows in prototypes.items()}

    def run(self, layer: int, hidden: Array) -> tuple[Array, Array | None]:
        """See Exits.run."""
        values = self._sessions[layer].run(None, {"hidden": hidden, **self._feeds.get(layer, {})})
        if self.is_spans:
            return values[0], None
        return values[0][0], values[1][0] if len(values) > 1 else None

    def state_term(self, layer: int, hidden: Array, weights: Array) -> float:
        """See Exits.state_term."""
        return float(self.pooling.pooled(hidden, self._pooling_of) @ weights)


class NativeLayers:
    """An encoder that the kernels run.

    Attributes:
        model: the kernels' model.
    """

    def __init__(self, kernels: Any, model: Any, manifest: Manifest) -> None:
        self.num_layers, self.model = manifest.num_layers, model
        self._run, self._hidden = kernels.run, manifest.hidden_size

    def embed(self, tokens: Tokens) -> Array:
        """The embeddings' hidden states, (1, tokens, hidden)."""
        hidden = np.empty((1, len(tokens), self._hidden), np.float32)
        self._run(self.model, 0, tokens.ids, tokens.type_ids, hidden)
        return hidden

    def run(self, layer: int, hidden: Array) -> Array:
        """The hidden states after a layer, from 1, for those of the layer before."""
        after = np.empty_like(hidden)
        self._run(self.model, layer, hidden, None, after)
        return after


class NativeExits:
    """Exits that the kernels run.

    Attributes:
        exits: the kernels' exits.
        num_labels: number of labels.
    """

    def __init__(self, kernels: Any, exits: Any, manifest: Manifest, pooling: Pooling) -> None:
        self.num_layers, self.layers, self.pooling = manifest.num_layers, manifest.exit_layers, pooling
        self.exits, self.num_labels, self.is_spans = exits, len(manifest.labels), manifest.is_spans
        self._run, self._with_distances = kernels.run_exit, frozenset(manifest.prototype_layers)

    def run(self, layer: int, hidden: Array) -> tuple[Array, Array | None]:
        """See Exits.run."""
        shape = (hidden.shape[1], self.num_labels) if self.is_spans else (self.num_labels,)
        logits = np.empty(shape, np.float32)
        distances = np.empty(self.num_labels, np.float32) if layer in self._with_distances else None
        self._run(self.exits, layer, hidden, logits, distances)
        return logits, distances

    def state_term(self, layer: int, hidden: Array, weights: Array) -> float:
        """See Exits.state_term."""
        logits, distances = np.empty((2, self.num_labels), np.float32)
        return float(
            self._run(
                self.exits,
                layer,
                hidden,
                logits,
                distances if layer in self._with_distances else None,
                weights,
            )
        )


def hidden_states(
    layers: Layers, tokens: Tokens, num_layers: int, check: Callable[[], None] = lambda: None
) -> list[Array]:
    """The hidden states of a sample after every layer up to `num_layers`; index = layer. check: called before each."""
    check()
    states = [layers.embed(tokens)]
    for layer in range(1, num_layers + 1):
        check()
        states.append(layers.run(layer, states[-1]))
    return states


def session_options(max_tokens: int = ARENA_TOKENS) -> Any:
    """Options of ONNX Runtime, with one thread per call.

    Running several samples at once, each on one thread, was measured to be 2 to 3 times faster than thread pools.
    max_tokens: length of the longest text.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; onnxruntime would also write them to standard error
    # No tensor is read from another file: the graphs are checked, and this folder does not exist.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
    # One arena for all sessions. An arena keeps the memory of its longest text: after texts of 512 tokens on two
    # threads, 12 layers of BERT's size kept 1.1 GB with an arena each, and keep 0.15 GB with a shared one. Models for
    # longer texts run without an arena, although this was 10 to 15% slower for texts of 400 to 1000 tokens.
    options.enable_cpu_mem_arena = max_tokens <= ARENA_TOKENS
    if options.enable_cpu_mem_arena:
        _make_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights are not allocated in the arena: it would keep their memory after the model is unloaded.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # The segments are built fused; a higher level would fuse Add and LayerNormalization into SkipLayerNormalization,
    # which was measured to be 5 times slower than the two operators (lab/docs/performance.md).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


@cache
def _make_arena() -> None:
    """Make the arena that all sessions of this process share; only the first call has an effect."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)
