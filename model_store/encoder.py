"""The encoder of a loaded model, which models with the same encoder share."""

from dataclasses import dataclass
from weakref import WeakSet

from de3.model_store.forward import LayerByLayer, NativeForward
from de3.model_store.segments import Layers
from de3.model_store.tokenizer import TextTokenizer


@dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded encoder.

    Attributes:
        hashes: a hash of it up to each layer; see manifest.encoder_hashes.
        tokenizer: its tokenizer.
        layers: its layers.
        layer_by_layer: runs samples one after the other, on either runtime.
        forward: runs several samples together, in the kernels; None in ONNX Runtime.
    """

    hashes: tuple[str, ...]
    tokenizer: TextTokenizer
    layers: Layers
    layer_by_layer: LayerByLayer
    forward: NativeForward | None = None

    def has(self, hashes: tuple[str, ...]) -> bool:
        """True if a model whose encoder has these hashes can run on this one."""
        return self.hashes[len(hashes) - 1 : len(hashes)] == hashes[-1:]


class Encoders:
    """The encoders of the models that are in use; one with fewer layers can be the start of another."""

    def __init__(self) -> None:
        self._loaded: WeakSet[Encoder] = WeakSet()

    def find(self, hashes: tuple[str, ...], is_native: bool | None = None) -> Encoder | None:
        """An encoder on which a model whose encoder has these hashes can run.

        is_native: in the kernels, or in ONNX Runtime; None: in either.
        """
        for encoder in list(self._loaded):
            if encoder.has(hashes) and is_native in (None, encoder.forward is not None):
                return encoder
        return None

    def add(self, encoder: Encoder) -> Encoder:
        """Keep an encoder for as long as a model uses it; returns it."""
        self._loaded.add(encoder)
        return encoder
