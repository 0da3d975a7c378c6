"""Comparison of the segments with the PyTorch model that they were made from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from de3.data.examples import Example
from de3.data.tables import pair_of
from de3.export.errors import ExportError
from de3.model_store.model import Model
from de3.progress import console, empty_table
from de3.training.checkpoint import Checkpoint
from de3.training.encoded import encode

MAX_FP32_DIFFERENCE = 1e-3
SPREAD = 48  # samples, of all lengths


def parity_samples(examples: Sequence[Example], model: Model) -> list[Example]:
    """Examples of many lengths up to max_tokens: a spread of the given ones, and longer ones joined from them."""
    by_length = sorted(examples, key=lambda e: len(repr(e.text)))
    count = min(SPREAD, len(by_length))
    chosen = [by_length[i] for i in np.linspace(0, len(by_length) - 1, count).astype(int)]
    long = " ".join(e.text if isinstance(e.text, str) else e.text[0] for e in by_length[::-1][:400])
    limit = model.manifest.max_tokens
    return chosen + [Example(long[: 3 * n], 0) for n in (64, 128, 256, 512) if n < limit] + [Example(long, 0)]


@torch.no_grad()
def parity(checkpoint: Checkpoint, exported: Model, examples: Sequence[Example]) -> dict[str, Any]:
    """Run the fp32 segments and the PyTorch model on the same samples; print and return the largest differences.

    Raises ExportError if outputs differ by more than 1e-3, or tokens differ.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    exits, spaces = model.config.exit_layers, model.config.prototype_layers
    largest = {"logits": [0.0] * len(exits), "distances": [0.0] * len(spaces)}
    samples = parity_samples(examples, exported)
    lengths = []
    for example in samples:
        encoded = encode(
            [example], tokenizer, exported.manifest.max_tokens, num_labels=model.config.num_labels
        )
        inputs, _ = encoded.batch([0], tokenizer.pad_token_id)
        expected = model(**inputs)
        text, pair = pair_of(example.text)
        tokens = exported.tokenize(text, pair)
        if tokens.ids[0].tolist() != encoded.ids[0]:
            raise ExportError(f"the exported tokenizer differs from the checkpoint's on {text[:80]!r}")
        lengths.append(len(tokens))
        steps = exported.full_depth(tokens)
        for output, layers in (("logits", exits), ("distances", spaces)):
            for j, (layer, values) in enumerate(
                zip(layers, getattr(expected, output)[0].numpy(), strict=True)
            ):
                difference = float(np.abs(getattr(steps[layer], output) - values).max())
                largest[output][j] = float(np.maximum(largest[output][j], difference))  # NaN stays NaN
    span = f"{min(lengths)} to {max(lengths)} tokens"
    title = f"Largest difference from PyTorch, {len(samples)} samples of {span}"
    table = empty_table(("layer", "logits", "distances"), title)
    for j, layer in enumerate(exits):
        distances = f"{largest['distances'][j]:.1e}" if layer in spaces else "–"
        table.add_row(str(layer), f"{largest['logits'][j]:.1e}", distances)
    console.print(table)
    worst = float(np.max(largest["logits"] + largest["distances"]))
    if not worst <= MAX_FP32_DIFFERENCE:  # true for NaN, too
        raise ExportError(
            f"the segments differ from the PyTorch model by {worst:.1e}, above {MAX_FP32_DIFFERENCE:g}"
        )
    return {"samples": len(samples), "longest": max(lengths), **largest}
