"""Accuracy against speed-up by the clock: texts run through the engine one after another, at a grid of τ.

Each text runs like a request with one text: queue, tokenizer, layers and exit rule, in the calling thread. HTTP and the
switches between the threads of the event loop and of the engine are not included.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from de3.commands.timing import Engine, measure_times, text_of
from de3.data.examples import Example
from de3.exits import calibration
from de3.runtime.engine.served import Served
from de3.runtime.options import ExitOptions

TAUS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.2, 0.3, 0.4)
# Texts before the next τ takes its turn: enough to keep a low τ's layers in the caches, as when serving.
BLOCK = 64
SHOWN = 10  # highest speed-up in the plot


def wall(served: Served, examples: Sequence[Example], taus: Sequence[float], rounds: int) -> dict[str, Any]:
    """Accuracy and speed-ups for each τ, the first of which must be 0.

    `on_clock` is the speed-up in time against τ = 0 in the same round, median over the rounds. `predicted` is the
    speed-up in time that `de3 evaluate` prints, and `off` its relative error.
    """
    manifest = served.model.manifest
    right = np.array([example.label for example in examples])
    texts = [text_of(example) for example in examples]
    times = measure_times(served, examples)
    index_of = {layer: j for j, layer in enumerate(manifest.exit_layers)}
    tokens = np.array([len(served.model.tokenize(text.text, text.text_pair)) for text in texts])
    choices = [served.rules.choose(ExitOptions(tau=tau)) for tau in taus]
    seconds = np.zeros((rounds, len(taus), len(texts)))
    labels, layers = np.zeros((2, len(taus), len(texts)), np.int64)
    engine = Engine(served)
    for number in range(-1, rounds):  # round −1 warms up, with one block
        for begin in range(0, len(texts) if number >= 0 else 1, BLOCK):
            for j in np.roll(np.arange(len(taus)), number + begin // BLOCK).tolist():
                for i, text in enumerate(texts[begin : begin + BLOCK], begin):
                    started = perf_counter()
                    outcome = engine.classify(text, choices[j])
                    seconds[number, j, i] = perf_counter() - started
                    labels[j, i], layers[j, i] = outcome.text_reading.answer, outcome.layer
    each = seconds.mean(2)  # (rounds, taus)
    speedups = each[:, :1] / each
    rows = []
    for j, tau in enumerate(taus):
        depth, on_clock = float(layers[j].mean()), float(np.median(speedups[:, j]))
        exits = np.array([index_of[layer] for layer in layers[j].tolist()])
        predicted = times.speedup(exits, tokens) if tau else 1.0
        rows.append(
            {"tau": tau, "accuracy": float((labels[j] == right).mean()), "mean_exit_layer": depth}
            | {"text_us": 1e6 * float(np.median(each[:, j]))}
            | {"in_layers": calibration.speedup(manifest.num_layers, depth), "on_clock": on_clock}
            | {"on_clock_range": [float(speedups[:, j].min()), float(speedups[:, j].max())]}
            | {"predicted": predicted, "off": predicted / on_clock - 1}
        )
    return {
        "model": served.model.full_name,
        "runtime": served.model.full_runtime,
        "texts": len(texts),
        "rounds": rounds,
        "rows": rows,
    }


def table(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = ["model", "τ", "accuracy, %", "mean exit layer", "a text, µs", "in layers", "by the clock"]
    columns += ["predicted", "off"]
    return columns, [
        [
            *(result["model"], f"{r['tau']:g}", f"{100 * r['accuracy']:.2f}", f"{r['mean_exit_layer']:.2f}"),
            *(f"{r['text_us']:.0f}", f"{r['in_layers']:.2f}×"),
            f"{r['on_clock']:.2f}× ({' … '.join(f'{x:.2f}' for x in r['on_clock_range'])})",
            *(f"{r['predicted']:.2f}×", f"{100 * r['off']:+.1f}%"),
        ]
        for result in results
        for r in result["rows"]
    ]


def curves(results: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Accuracy in percent against both speed-ups, up to SHOWN, by model."""
    return {
        f"{result['model']}, {name}": [
            (r[key], 100 * r["accuracy"]) for r in result["rows"] if r[key] <= SHOWN
        ]
        for result in results
        for key, name in (("in_layers", "in layers"), ("on_clock", "by the clock"))
    }
