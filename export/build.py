"""The ONNX segments of a model: one for the embeddings and one for each layer, each with its exit if it has one."""

from collections.abc import Iterator, Mapping

from de3.export.weights import StateFile
from de3.model_store.architecture import Architecture
from de3.model_store.families.encoder import Config, Weights, named
from de3.model_store.graph import source_of
from de3.model_store.segment_graph import build_segment, graph_name

Modules = Mapping[str, str]  # module names by part of an exit, such as classifier


def segments(
    architecture: Architecture, config: Config, state: StateFile, exits: Mapping[int, Modules]
) -> Iterator[tuple[str, bytes]]:
    """Yield the segments' file names and contents in execution order, one at a time to save memory.

    config: the encoder's configuration. exits: the modules of each exit, by layer; see segment_graph.build_segment.
    Raises KeyError for a missing weight, and ValueError for a weight of the wrong shape.
    """
    encoder, lack_biases = architecture.encoder, not architecture.encoder.HAS_BIASES
    for layer, file in enumerate(architecture.segment_files()):
        weights: Weights = (
            encoder.layer_weights(config, state, layer) if layer else encoder.embedding_weights(config, state)
        )
        if layer in exits:
            weights |= named(state.whole, "", exits[layer], lack_biases) | final_norm(architecture, state)
        built = build_segment(architecture, layer, source_of(weights))
        yield file, built.model(graph_name(layer)).SerializeToString()


def final_norm(architecture: Architecture, state: StateFile) -> Weights:
    """The weights of the norm between a layer's hidden states and its exit; empty if there is none."""
    encoder = architecture.encoder
    if not encoder.FINAL_NORM:
        return {}
    return named(state, "", {"final_norm": encoder.FINAL_NORM}, not encoder.HAS_BIASES)
