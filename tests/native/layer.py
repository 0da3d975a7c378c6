"""Run a layer and an exit with each of an extension's kernels, and compare with the reference; standard library only.

    python layer.py FOLDER

FOLDER holds the package de3 with its extension. No other package is needed, so this program runs in an emulator, too.
"""

import random
import sys
from array import array

HIDDEN, HEADS, INNER, METRIC, TOKENS = 128, 4, 320, 64, 21


def floats(count: int, spread: float) -> array:
    return array("f", (random.gauss(0, spread) for _ in range(count)))


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from de3.native import kernels

    random.seed(1)
    model = kernels.new(HIDDEN, HEADS, INNER, 1, 2, True, False)
    words = array("b", (random.randint(-127, 127) for _ in range(2 * HIDDEN)))
    kernels.set_embeddings(model, words, floats(2, 0.01), floats(64 * HIDDEN, 1), floats(2 * HIDDEN, 1))
    shapes = [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)]
    for which, (inputs, outputs) in zip((0, 1, 2, 4), shapes, strict=True):
        weight = array("b", (random.randint(-127, 127) for _ in range(inputs * outputs)))
        scale = array("f", [0.01 / inputs**0.5] * outputs)
        kernels.set_linear(model, 1, which, weight, scale, floats(outputs, 0.1))
    kernels.set_norm(model, 0, 3, floats(HIDDEN, 1), floats(HIDDEN, 1), 1e-12)
    for which in (1, 3):
        kernels.set_norm(model, 1, which, floats(HIDDEN, 1), floats(HIDDEN, 1), 1e-12)
    exits = kernels.new_exits(HIDDEN, 1, True)
    weight = array("b", (random.randint(-127, 127) for _ in range(HIDDEN * METRIC)))
    space = (weight, array("f", [0.01 / HIDDEN**0.5] * METRIC), floats(METRIC, 0.1), floats(2 * METRIC, 1))
    kernels.set_exit(exits, 1, floats(2 * HIDDEN, 0.1), floats(2, 1), *space)
    hidden = memoryview(floats(TOKENS * HIDDEN, 1)).cast("B").cast("f", (1, TOKENS, HIDDEN))
    found = {}
    for name in kernels.implementations():
        kernels.use(name)
        to = memoryview(bytearray(hidden.nbytes)).cast("f", hidden.shape)
        logits, distances = array("f", [0, 0]), array("f", [0, 0])
        kernels.run(model, 1, hidden, None, to)
        kernels.run_exit(exits, 1, hidden, logits, distances)
        found[name] = [*to.cast("B").cast("f"), *logits, *distances]
    expected = found["reference"]
    for name, values in found.items():
        errors = sorted(abs(a - b) for a, b in zip(values, expected, strict=True))
        print(f"{name}: median difference {errors[len(errors) // 2]:.1e}, largest {errors[-1]:.1e}")
        # A rounding error may cross a quantization step.
        assert errors[len(errors) // 2] < 1e-5 and errors[-1] < 0.2


if __name__ == "__main__":
    main()
