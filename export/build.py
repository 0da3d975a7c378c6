"""The ONNX segments of a DE3-BERT: one for the embeddings and one per layer, each with its exit."""

from typing import Any

import onnx

from de3.model_store.architecture import Architecture
from de3.model_store.families import family
from de3.model_store.families.encoder import State, Weights, named
from de3.model_store.graph import source_of
from de3.model_store.segment_graph import build_segment, graph_name
from de3.training.model import De3Model


def architecture_of(model: De3Model, int8: bool, token_types: bool) -> Architecture:
    """The architecture of a model; token_types: its tokenizer returns token types.

    Raises ValueError for an encoder that cannot be exported.
    """
    config, encoder = model.config, model.encoder.config.to_dict()
    return Architecture.model_validate(
        {
            "encoder": family(encoder).of(encoder, token_types),
            "labels": config.label_names,
            "exit_layers": config.exit_layers,
            "prototype_layers": config.prototype_layers,
            "metric_dim": config.metric_dim,
            "max_tokens": config.max_tokens,
            "pooling": config.pooling,
            "head": config.head,
            "precision": "int8" if int8 else "fp32",
        }
    )


def build(model: De3Model, architecture: Architecture) -> dict[str, onnx.ModelProto]:
    """The segments of a model: by file name, in execution order."""
    state, encoder, config = _arrays(model.encoder), architecture.encoder, model.encoder.config.to_dict()
    exits = _exit_weights(model, architecture, state)
    segments = {}
    for layer, file in enumerate(architecture.segment_files()):
        weights = (
            encoder.layer_weights(config, state, layer) if layer else encoder.embedding_weights(config, state)
        )
        built = build_segment(architecture, layer, source_of(weights | exits.get(layer, {})))
        segments[file] = built.model(graph_name(layer))
        onnx.checker.check_model(segments[file])
    return segments


def _exit_weights(model: De3Model, architecture: Architecture, encoder: State) -> dict[int, Weights]:
    """The weights of the exits by layer."""
    final_norm = architecture.encoder.FINAL_NORM
    shared = named(encoder, "", {"final_norm": final_norm}, True) if final_norm else {}
    modules: dict[int, dict[str, str]] = {
        layer: {"classifier": f"classifiers.{i}"} for i, layer in enumerate(architecture.exit_layers)
    }
    for i, layer in enumerate(architecture.prototype_layers):
        modules[layer]["space"] = f"prototypical.{i}"
    if architecture.head is not None:
        modules[architecture.num_layers]["dense"] = "head"
        if architecture.head.norm is not None:
            modules[architecture.num_layers]["norm"] = "head_norm"
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    state = {name: _array(tensor) for name, tensor in heads.items()}
    return {layer: shared | named(state, "", names, True) for layer, names in modules.items()}


def _arrays(module: Any) -> State:
    return {name: _array(tensor) for name, tensor in module.state_dict().items()}


def _array(tensor: Any) -> Any:
    """A tensor in float32."""
    return tensor.detach().float().cpu().numpy()
