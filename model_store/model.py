"""A loaded artifact: its tokenizer and its segments, ready to run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load as load_tensors

from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.model_store.architecture import Architecture
from de3.model_store.forward import ForwardPass, LayerByLayer, NativeForward, Pooling
from de3.model_store.graph import GraphError
from de3.model_store.graph_check import read_model
from de3.model_store.segment_graph import read_segment
from de3.model_store.segments import (
    Array,
    NativeSegment,
    OnnxSegment,
    Segment,
    Step,
    Tokens,
    full_depth,
    session_options,
)
from de3.model_store.store import Artifact, StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.native import NoKernelsError
from de3.native.network import Head, Memory, Network, build

log = logging.getLogger("de3")
MAX_NATIVE_DIFFERENCE = 0.1  # relative to the range of a layer's logits or distances
MAX_STATES_DIFFERENCE = 0.2  # mean over a token's values, relative to the layer's standard deviation
MIN_SPREAD = 0.2  # lower limit of the range of logits or distances, as they may be nearly equal for all texts
# ONNX Runtime's memory grows with the square of a text's length: 3 GB for 8,192 tokens.
MAX_PROOF_TOKENS = 1024
PROOF = (
    ("a", None),
    ("It was not what we had hoped for , but 3 of the 12 rooms were fine .", None),
    ("the quick brown fox jumps over the lazy dog", "a second text, of another kind"),
    ("one two three four five six seven eight nine ten " * 6, None),
)


class Model:
    """A loaded artifact.

    Attributes:
        path: folder of the artifact.
        tokenizer: its tokenizer.
        segments: one per layer, index = layer; 0 is the embeddings.
        pooling: pools the hidden states of a text.
        runtime: native (the kernels) or onnxruntime.
        instructions: instruction set of the kernels, such as amx, vnni or dotprod; empty unless runtime is native.
        why_not_native: reason why the kernels cannot run an int8 artifact; otherwise empty.
        forward: runs several samples together, in the kernels; None unless runtime is native.
        layer_by_layer: runs samples one after the other, on either runtime.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: str = "auto",
        check: Callable[[], None] = lambda: None,
        is_proved: bool = False,
        memory: Memory | None = None,
    ) -> None:
        """Read, check and load every file; raises StoreError for the first invalid one.

        runtime: onnxruntime, native, or auto: native if the kernels support the model and agree with ONNX Runtime.
        check: called before each slow step; an exception from it aborts loading. is_proved: another process on this
        machine has found that the kernels agree with ONNX Runtime, which is then not used. memory: shared memory for
        the kernels' weights; None if this process has its own copy.

        Also raises StoreError if the kernels cannot run the model, and runtime is native or is_proved is true, and
        OSError if `memory` cannot be sealed.
        """
        self.manifest = manifest = artifact.manifest
        self.full_name, self.path = artifact.full_name, artifact.path
        self._check = check
        self.tokenizer = TextTokenizer.of(artifact)
        check_ids(artifact, self.tokenizer)
        prototypes = unit_prototypes(artifact)
        options = session_options(manifest.max_tokens)
        self.runtime, self.instructions, self.why_not_native = "onnxruntime", "", ""
        self.forward: NativeForward | None = None
        is_int8 = manifest.precision == "int8"
        no_kernels = "" if is_int8 else "only int8 artifacts have kernels"
        weights, segments = [], []
        norm: tuple[Array, Array] | None = None
        for layer, name in enumerate(manifest.segment_files()):
            check()
            file, data = artifact.path / name, artifact.read(name)
            read = check_segment(artifact, layer, data)
            if "final_norm.weight" in read:
                norm = read["final_norm.weight"].copy(), read["final_norm.bias"].copy()
            if runtime != "onnxruntime" and not no_kernels:
                weights.append(read)
            if is_proved:
                continue
            try:
                # From the checked bytes, as the file could have changed since the check.
                session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's exceptions have no common base class
                raise StoreError(f"{file}: not a model that ONNX Runtime can run: {error}") from None
            segments.append(OnnxSegment(layer, session, manifest, prototypes.get(layer)))
        self.segments: Sequence[Segment] = segments
        self.pooling = Pooling(norm, manifest.encoder.epsilon)
        self.layer_by_layer = LayerByLayer(segments, self.pooling)
        if runtime == "onnxruntime":
            return
        try:
            if no_kernels:
                raise NoKernelsError(no_kernels)
            built = build(network_of(manifest, weights), memory)
            weights.clear()  # the kernels have their own copy
            self.segments, self.forward = self._native(artifact, built, prototypes, is_proved)
            self.layer_by_layer = LayerByLayer(self.segments, self.pooling)
            self.runtime = "native"
        except NoKernelsError as error:
            self.why_not_native = str(error) if is_int8 else ""
            if is_int8:
                log.warning(
                    "%s: runs on ONNX Runtime: %s; texts take up to four times as long as with the kernels",
                    *(self.full_name, error),
                )
            else:
                log.info("%s: runs on ONNX Runtime: %s", self.full_name, error)
            if runtime == "native" or is_proved:
                raise StoreError(f"{artifact.path}: the kernels cannot run it: {error}") from None

    @property
    def full_runtime(self) -> str:
        """The runtime and its instruction set, such as "native, vnni"."""
        return f"{self.runtime}, {self.instructions}" if self.instructions else self.runtime

    def _native(
        self, artifact: Artifact, model: Any, prototypes: dict[int, Array], is_proved: bool
    ) -> tuple[Sequence[Segment], NativeForward]:
        """The kernels' segments and forward pass.

        Unless `is_proved`, raises NoKernelsError if they disagree with ONNX Runtime; see `_prove`.
        """
        manifest = self.manifest
        from de3.native import kernels  # build() has checked that it can be imported

        native = [
            NativeSegment(layer, kernels, model, manifest, prototypes.get(layer))
            for layer in range(manifest.num_layers + 1)
        ]
        forward = NativeForward(kernels, model, manifest, prototypes)
        if not is_proved:
            self._prove(artifact, native, forward)
        self.instructions = kernels.supported()
        return native, forward

    def _prove(self, artifact: Artifact, native: Sequence[Segment], forward: NativeForward) -> None:
        """Compare the kernels with ONNX Runtime on PROOF and on a long text.

        Each layer's input is ONNX Runtime's output of the layer before, as rounding errors add up over the layers.
        Raises NoKernelsError if results differ by more than rounding can explain: both runtimes quantize activations,
        so a rounding error can become a step of 1/255 of the range. Texts must give the same bits in a group as alone.
        Raises StoreError if ONNX Runtime cannot run the model.
        """
        longest = " ".join(f"{text} {pair or ''}" for text, pair in PROOF) + " "
        most = min(self.manifest.max_tokens, MAX_PROOF_TOKENS)
        texts = [self.tokenize(text, pair) for text, pair in (*PROOF, (longest * (1 + most // 60), None))]
        texts[-1] = Tokens(texts[-1].ids[:, :most], texts[-1].type_ids[:, :most], True)
        pairs: dict[tuple[int, str], list[tuple[Array, Array]]] = {}
        for tokens in texts:
            try:
                theirs = full_depth(self.segments, tokens, self._check)
            except StoreError:
                raise
            except Exception as error:  # onnxruntime's exceptions have no common base class
                raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None
            for layer, (a, segment) in enumerate(zip(theirs, native, strict=True)):
                self._check()
                try:
                    b = segment.run(theirs[layer - 1].hidden, True) if layer else segment.embed(tokens, True)
                except ValueError as error:
                    raise NoKernelsError(str(error)) from None
                if not np.abs(a.hidden - b.hidden).mean(-1).max() <= MAX_STATES_DIFFERENCE * a.hidden.std():
                    raise NoKernelsError(
                        f"layer {layer}: the kernels' hidden states differ from ONNX Runtime's"
                    )
                for name in ("logits", "distances"):
                    x, y = getattr(a, name), getattr(b, name)
                    if (x is None) != (y is None):
                        raise NoKernelsError(
                            f"layer {layer}: the kernels' set of outputs differs from ONNX Runtime's"
                        )
                    if x is not None:
                        pairs.setdefault((layer, name), []).append((x, y))
        for (layer, name), values in pairs.items():
            theirs_, ours_ = (np.stack(side) for side in zip(*values, strict=True))
            spread = max(float(np.ptp(theirs_)), MIN_SPREAD)
            if not np.abs(theirs_ - ours_).max() <= MAX_NATIVE_DIFFERENCE * spread:
                raise NoKernelsError(f"layer {layer}: the kernels' {name} differ from ONNX Runtime's")
        self._prove_group(texts, native, forward)

    def _prove_group(
        self, tokens: Sequence[Tokens], native: Sequence[Segment], forward: NativeForward
    ) -> None:
        """Raise NoKernelsError unless texts give the same bits in a group, run in two calls, as alone."""
        rule = ExitRule(0.0, Entropy())
        passes = [ForwardPass(t, rule, self.manifest.num_layers, ask_all=True) for t in tokens]
        try:
            for _ in range(2):
                self._check()
                forward(passes, layers=self.manifest.num_layers // 2 + 1)
            alone = [full_depth(native, one.tokens, self._check) for one in passes]
        except ValueError as error:
            raise NoKernelsError(str(error)) from None
        for one, steps in zip(passes, alone, strict=True):
            for layer, step in enumerate(steps):
                same = step.logits is None or one.logits[layer].tobytes() == step.logits.tobytes()
                if not same or one.reason != "last_layer":
                    raise NoKernelsError(
                        f"layer {layer}: the kernels give different values for texts in a group"
                    )

    def tokenize(self, text: str, text_pair: str | None = None, truncate: bool = True) -> Tokens:
        """Tokens of a text or pair, truncated to the model's maximum at the end of the longer text.

        Raises ValueError if there are no tokens, or if there are too many and `truncate` is false.
        """
        tokens = self.tokenizer.start(text, text_pair, truncate).all()
        assert isinstance(tokens, Tokens)  # not Windows, as start() allows one window by default
        return tokens

    def empty_states(self) -> Array:
        """A zero array for the pooled states of a text, (num_layers, hidden); see ForwardPass.states."""
        return np.zeros((self.manifest.num_layers, self.manifest.hidden_size), np.float32)

    def deepest_exit(self, max_layer: int | None) -> int:
        """The deepest layer with an exit up to `max_layer`; the last layer if `max_layer` is None."""
        if max_layer is None:
            return self.manifest.num_layers
        return max(m for m in self.manifest.exit_layers if m <= max_layer)

    def full_depth(self, tokens: Tokens) -> list[Step]:
        """Results of every layer for one sample, without early exit; index = layer."""
        return full_depth(self.segments, tokens)


def network_of(architecture: Architecture, segments: Sequence[Mapping[str, Array]]) -> Network:
    """The kernels' description of an encoder; segments: its weights by name, index = layer."""
    encoder, head = architecture.encoder, architecture.head
    return Network(
        *(encoder.hidden_size, encoder.num_heads, encoder.inner, encoder.activation),
        mean=architecture.pooling == "mean",
        epsilon=encoder.epsilon,
        is_gated=encoder.IS_GATED,
        is_pre_norm=encoder.IS_PRE_NORM,
        score_scale=encoder.score_scale,
        windows=[encoder.window_of(layer) for layer in range(1, encoder.num_layers + 1)],
        max_tokens=architecture.max_tokens,
        head=None if head is None else Head(head.activation, head.pooling == "mean", head.norm),
        segments=segments,
    )


def check_segment(artifact: Artifact, layer: int, data: bytes) -> dict[str, Array]:
    """The weights in a segment's file by name; raises StoreError unless export would build the same graph."""
    try:
        return read_segment(read_model(data), artifact.manifest, layer)
    except GraphError as error:
        raise StoreError(f"{artifact.path / artifact.manifest.segment_files()[layer]}: {error}") from None


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
    manifest = artifact.manifest
    file = artifact.path / "prototypes.safetensors"
    try:
        tensors = load_tensors(artifact.read("prototypes.safetensors"))
    except StoreError:
        raise
    except Exception as error:  # SafetensorError, or KeyError for a type unknown to NumPy
        raise StoreError(f"{file}: not a safetensors file: {type(error).__name__}: {error}") from None
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
