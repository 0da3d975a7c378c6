"""A loaded artifact: its tokenizer, its encoder and its exits, with every file checked."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load as load_tensors

from de3.model_store import proof
from de3.model_store.architecture import Architecture
from de3.model_store.encoder import Encoder, Encoders
from de3.model_store.fitted import MAX_FITTED, FittedTexts, Marks, mark_of
from de3.model_store.forward import LayerByLayer, NativeForward
from de3.model_store.graph import GraphError, stored
from de3.model_store.graph_check import read_model
from de3.model_store.manifest import EXITS, FITTED, PROTOTYPES, TOKENIZER, encoder_hashes
from de3.model_store.segment_graph import build_exit, build_segment, graph_name, read_exits, read_segment
from de3.model_store.segments import (
    Array,
    Exits,
    NativeExits,
    NativeLayers,
    OnnxExits,
    OnnxLayers,
    Pooling,
    Step,
    Tokens,
    hidden_states,
    session_options,
)
from de3.model_store.store import Artifact, StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.native import NoKernelsError, network
from de3.native.network import Head, Memory, Network

log = logging.getLogger("de3")
Weights = Mapping[str, Array]


class Model:
    """A loaded artifact.

    Attributes:
        path: folder of the artifact.
        tokenizer: its tokenizer.
        encoder: its encoder, which may have more layers than the model uses.
        exits: its exits.
        hashes: a hash of its encoder up to each layer; see manifest.encoder_hashes.
        pooling: pools the hidden states of a text.
        fitted: the texts that its exits were fitted to; see fitted_of.
        runtime: native (the kernels) or onnxruntime.
        instructions: instruction set of the kernels, such as amx, vnni or dotprod; empty unless runtime is native.
        why_not_native: reason why the kernels cannot run an int8 artifact; otherwise empty.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: str = "auto",
        check: Callable[[], None] = lambda: None,
        is_proved: bool = False,
        memory_of: Callable[[str], Memory | None] = lambda _: None,
        encoders: Encoders | None = None,
        special_tokens: bool = False,
    ) -> None:
        """Read, check and load every file; raises StoreError for the first invalid one.

        runtime: onnxruntime, native, or auto: native if the kernels support the model and agree with ONNX Runtime.
        check: called before each slow step; an exception from it aborts loading. is_proved: another process on this
        machine has found that the kernels agree with ONNX Runtime, which is then not used. memory_of: returns shared
        memory for the weights in the kernels of the encoder with this hash; None if this process has its own copy.
        encoders: the encoders of other models; one of them is used if it is the same. special_tokens: true if special
        tokens in texts are to stay tokens, whatever the artifact says; the same for all models that share encoders.

        Also raises StoreError if the kernels cannot run the model, and runtime is native or is_proved is true, and
        OSError if shared memory cannot be sealed.
        """
        self.manifest = manifest = artifact.manifest
        self.full_name, self.path = artifact.full_name, artifact.path
        self._check, self._artifact = check, artifact
        self.hashes = tuple(encoder_hashes(manifest))
        self._encoders = Encoders() if encoders is None else encoders
        same = self._encoders.find(self.hashes)
        self.tokenizer = TextTokenizer.of(artifact, special_tokens) if same is None else same.tokenizer
        check_ids(artifact, self.tokenizer)
        prototypes, weights = unit_prototypes(artifact), exit_weights(artifact, check)
        self.pooling = _pooling(manifest, weights[manifest.num_layers])
        self.fitted = fitted_of(artifact)
        self.runtime, self.instructions, self.why_not_native = "onnxruntime", "", ""
        self.encoder: Encoder
        self.exits: Exits
        is_int8 = manifest.precision == "int8"
        try:
            if runtime == "onnxruntime" or not is_int8:
                raise NoKernelsError("only int8 artifacts have kernels")
            self.encoder, self.exits = self._native(weights, prototypes, is_proved, memory_of)
            self.runtime, self.instructions = "native", network.kernels().supported()
            return
        except NoKernelsError as error:
            reason = str(error)
        if runtime != "onnxruntime":
            self._note(reason, is_int8)
            if runtime == "native" or is_proved:
                raise StoreError(f"{artifact.path}: the kernels cannot run it: {reason}")
        self.encoder = self._onnx_encoder()
        self.exits = self._onnx_exits(weights, prototypes)

    def _note(self, reason: str, is_int8: bool) -> None:
        """Log why the kernels cannot run the model."""
        self.why_not_native = reason if is_int8 else ""
        if is_int8:
            log.warning(
                "%s: runs on ONNX Runtime: %s; texts take up to four times as long as with the kernels",
                *(self.full_name, reason),
            )
        else:
            log.info("%s: runs on ONNX Runtime: %s", self.full_name, reason)

    @property
    def full_runtime(self) -> str:
        """The runtime and its instruction set, such as "native, vnni"."""
        return f"{self.runtime}, {self.instructions}" if self.instructions else self.runtime

    def _native(
        self,
        weights: Mapping[int, Weights],
        prototypes: Mapping[int, Array],
        is_proved: bool,
        memory_of: Callable[[str], Memory | None],
    ) -> tuple[Encoder, Exits]:
        """The encoder and the exits in the kernels.

        Raises NoKernelsError if the kernels do not support them or, unless `is_proved`, disagree with ONNX Runtime.
        """
        artifact, manifest, kernels = self._artifact, self.manifest, network.kernels()
        heads = network.build_exits(exit_network_of(manifest, weights, prototypes))
        exits = NativeExits(kernels, heads, manifest, self.pooling)
        encoder, texts, states = self._encoders.find(self.hashes, True), [], None
        if not is_proved:
            texts = proof.texts_of(self.tokenizer, manifest.max_tokens, manifest.is_spans)
        if encoder is None:
            segments = [read for _, read in read_segments(artifact, self._check)]
            built = network.build(network_of(manifest, segments), memory_of(self.hashes[-1]))
            layers = NativeLayers(kernels, built, manifest)
            segments.clear()  # the kernels have their own copy
            forward = NativeForward(kernels, layers, manifest.hidden_size)
            encoder = Encoder(self.hashes, self.tokenizer, layers, LayerByLayer(layers), forward)
            if not is_proved:
                sessions = (self._session(graph) for graph, _ in read_segments(artifact, self._check))
                states = proof.prove_layers(self.path, sessions, layers, texts, manifest, self._check)
        else:
            self._verify_encoder()
        if not is_proved:
            if states is None:  # another model's proof was that of the encoder
                states = [hidden_states(encoder.layers, t, manifest.num_layers, self._check) for t in texts]
            plain = self._onnx_exits(weights, prototypes)
            proof.prove_exits(self.path, plain, exits, states, self._check)
            proof.prove_group(encoder, exits, texts, manifest.kind, self._check)
        return self._encoders.add(encoder), exits

    def _onnx_encoder(self) -> Encoder:
        encoder = self._encoders.find(self.hashes, False)
        if encoder is not None:
            self._verify_encoder()
            return encoder
        artifact = self._artifact
        sessions = [self._session(graph) for graph, _ in read_segments(artifact, self._check)]
        layers = OnnxLayers(sessions, self.manifest.token_types)
        return self._encoders.add(Encoder(self.hashes, self.tokenizer, layers, LayerByLayer(layers)))

    def _onnx_exits(self, weights: Mapping[int, Weights], prototypes: Mapping[int, Array]) -> OnnxExits:
        sessions = {}
        for layer, read in weights.items():
            sessions[layer] = self._session(exit_graph(self.manifest, layer, read))
        return OnnxExits(sessions, prototypes, self.manifest, self.pooling)

    def _verify_encoder(self) -> None:
        """Check the files of the encoder, which is loaded already, against the manifest's hashes."""
        for name in (*self.manifest.segment_files(), TOKENIZER):
            self._check()
            self._artifact.read(name)

    def _session(self, graph: bytes) -> Any:
        options = session_options(self.manifest.max_tokens)
        self._check()
        try:
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise StoreError(f"{self.path}: not a model that ONNX Runtime can run: {error}") from None

    def can_run(self, other: "Model") -> bool:
        """True if another model can answer on this one's passes."""
        return self.encoder.has(other.hashes) and self.runtime == other.runtime

    def tokenize(self, text: str, text_pair: str | None = None, truncate: bool = True) -> Tokens:
        """Tokens of a text or pair, truncated to the model's maximum at the end of the longer text.

        With a token classifier, they have a layout.

        Raises ValueError if there are no tokens, or if there are too many and `truncate` is false.
        """
        tokens = self.tokenizer.start(text, text_pair, truncate, 1, self.manifest.is_spans).all()
        assert isinstance(tokens, Tokens)  # not Windows, as start() allows one window by default
        return tokens

    def marks(self, tokens: Tokens) -> Marks:
        """What shows whether a text is near to others; runs the embeddings."""
        return mark_of(tokens, self.encoder.layers.embed(tokens), self.pooling)

    def empty_states(self) -> Array:
        """A zero array for the pooled states of a text, (num_states, hidden); see Decision.states."""
        return np.zeros((self.manifest.num_states, self.manifest.hidden_size), np.float32)

    def deepest_exit(self, max_layer: int | None) -> int:
        """The deepest layer with an exit up to `max_layer`; the last layer if `max_layer` is None."""
        if max_layer is None:
            return self.exits.num_layers
        return max(m for m in self.manifest.exit_layers if m <= max_layer)

    def full_depth(self, tokens: Tokens) -> list[Step]:
        """Results of every layer for one sample, without early exit; index = layer."""
        steps = [
            Step(hidden) for hidden in hidden_states(self.encoder.layers, tokens, self.manifest.num_layers)
        ]
        for layer in self.exits.layers:
            steps[layer].logits, steps[layer].distances = self.exits.run(layer, steps[layer].hidden)
        return steps


def _pooling(architecture: Architecture, last: Weights) -> Pooling:
    norm = None
    if "final_norm.weight" in last:
        norm = last["final_norm.weight"].copy(), last["final_norm.bias"].copy()
    return Pooling(norm, architecture.encoder.epsilon)


def exit_network_of(
    architecture: Architecture, weights: Mapping[int, Weights], prototypes: Mapping[int, Array]
) -> network.Exits:
    """The kernels' description of a model's exits; weights: by layer and name."""
    head = architecture.head
    return network.Exits(
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_layers,
        pooling=architecture.pooling,
        epsilon=architecture.encoder.epsilon,
        head=None if head is None else Head(head.activation, head.pooling, head.norm),
        weights=weights,
        prototypes=prototypes,
    )


def network_of(architecture: Architecture, segments: Sequence[Mapping[str, Array]]) -> Network:
    """The kernels' description of an encoder; segments: its weights by name, index = layer."""
    encoder = architecture.encoder
    return Network(
        *(encoder.hidden_size, encoder.num_heads, encoder.inner, encoder.activation),
        epsilon=encoder.epsilon,
        is_gated=encoder.IS_GATED,
        is_pre_norm=encoder.IS_PRE_NORM,
        score_scale=encoder.score_scale,
        windows=[encoder.window_of(layer) for layer in range(1, encoder.num_layers + 1)],
        max_tokens=architecture.max_tokens,
        segments=segments,
    )


def read_segments(
    artifact: Artifact, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[bytes, dict[str, Array]]]:
    """Yield the graph and the weights of each segment, without its exit, one at a time to save memory.

    check: called before each. Raises StoreError for a file that is damaged or that export would not have written.
    """
    manifest = artifact.manifest
    for layer, name in enumerate(manifest.segment_files()):
        check()
        data = artifact.read(name)
        weights = check_segment(artifact, layer, data)
        if manifest.has_old_exits:
            weights = {name: array for name, array in weights.items() if not _is_of_exit(name, layer)}
            data = (
                build_segment(manifest, layer, stored(weights)).model(graph_name(layer)).SerializeToString()
            )
        # These are the checked bytes: the file could have changed since the check.
        yield data, weights


def exit_graph(architecture: Architecture, layer: int, weights: Weights) -> bytes:
    """The graph of a layer's exit, from its weights in an artifact."""
    model = build_exit(architecture, layer, stored(weights)).model(f"exit_{layer}")
    data: bytes = model.SerializeToString()
    return data


def check_segment(artifact: Artifact, layer: int, data: bytes) -> dict[str, Array]:
    """The weights in a segment's file by name; raises StoreError unless export would build the same graph."""
    try:
        return read_segment(read_model(data), artifact.manifest, layer, artifact.manifest.has_old_exits)
    except GraphError as error:
        raise StoreError(f"{artifact.path / artifact.manifest.segment_files()[layer]}: {error}") from None


def exit_weights(artifact: Artifact, check: Callable[[], None] = lambda: None) -> dict[int, dict[str, Array]]:
    """The weights of a model's exits by layer and name (segment_graph.build_exit); raises StoreError for invalid ones.

    check: called before each slow step.
    """
    manifest = artifact.manifest
    if not manifest.has_old_exits:
        try:
            return read_exits(_tensors(artifact, EXITS), manifest)
        except GraphError as error:
            raise StoreError(f"{artifact.path / EXITS}: {error}") from None
    weights = {}
    for layer in manifest.exit_layers:
        check()
        read = check_segment(artifact, layer, artifact.read(manifest.segment_files()[layer]))
        weights[layer] = {name: array.copy() for name, array in read.items() if _is_of_exit(name, layer)}
    return weights


def _is_of_exit(name: str, layer: int) -> bool:
    """True if a weight of a segment of schema 6 belongs to its exit; the embeddings have a norm of their own."""
    part = name.partition(".")[0]
    return part in ("classifier", "space", "final_norm", "dense") or (part == "norm" and layer > 0)


def check_ids(artifact: Artifact, tokenizer: TextTokenizer) -> None:
    """Raise StoreError if the tokenizer has ids beyond the embedding tables: every text with such an id would fail."""
    encoder = artifact.manifest.encoder
    try:
        tokenizer.check_ids(
            encoder.vocabulary, encoder.token_types or None, pairs=artifact.manifest.input != "text"
        )
    except ValueError as error:
        raise StoreError(f"{artifact.path / 'tokenizer.json'}: {error}") from None


def unit_prototypes(artifact: Artifact) -> dict[int, Array]:
    """Prototypes (K, metric_dim) by layer, each row normalized; raises StoreError for unusable ones."""
    manifest, file, tensors = artifact.manifest, artifact.path / PROTOTYPES, _tensors(artifact, PROTOTYPES)
    shape = (len(manifest.labels), manifest.metric_dim)
    unit: dict[int, Array] = {}
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
        unit[layer] = np.ascontiguousarray(rows / lengths)
    return unit


def fitted_of(artifact: Artifact) -> FittedTexts | None:
    """The texts of live traffic that exits were fitted to; None for other models and those of earlier releases.

    Raises StoreError for a damaged file.
    """
    if FITTED not in artifact.manifest.required_files():
        return None
    try:
        tensors = _tensors(artifact, FITTED)
        hidden, pieces = artifact.manifest.hidden_size, tensors["pieces"]
        means = tensors.get("means", np.zeros((0, hidden), np.float16))
        if len(pieces) > MAX_FITTED:  # each audit compares all of them
            raise ValueError(f"pieces has {len(pieces)} texts; at most {MAX_FITTED} are allowed")
        if means.shape[1:] != (hidden,):
            raise ValueError(f"means must have {hidden} values for each text, got {means.shape[1:]}")
        return FittedTexts(pieces, means, tensors.get("clients", np.zeros(0, np.uint64)))
    except (ValueError, KeyError) as error:
        raise StoreError(f"{artifact.path / FITTED}: {error}") from None


def _tensors(artifact: Artifact, name: str) -> dict[str, Any]:
    """The tensors in a safetensors file; raises StoreError for any other file."""
    data = artifact.read(name)
    try:
        tensors: dict[str, Any] = load_tensors(data)
    except Exception as error:  # SafetensorError, or KeyError for a type unknown to NumPy
        why = f"{type(error).__name__}: {error}"
        raise StoreError(f"{artifact.path / name}: not a safetensors file: {why}") from None
    return tensors
