"""Speed of a model on this machine, measured once while it warms up.

Times are CPU times of the thread: under load, wall-clock time would include waits for a processor.
"""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, thread_time

import numpy as np

from de3.exits.windows import capacity, spans
from de3.model_store.model import Model
from de3.model_store.tokenizer import PIECE, max_chars

LENGTHS = (8, 32, 128, 512)
RUNS = 5
SPECIAL = 2  # special tokens around a text
CHARS_PER_TOKEN = 4  # typical of English; the schedule and the groups depend on it
# Texts for timing the tokenizer: plain words; words that split into many pieces; and WordPiece's worst case, words of
# the maximum length that split into single letters.
PLAIN, ODD, LONG = "a plain word and another ", "x1-\u00e9\u4e2d?Zq;", "qxzj" * 25 + " "


class Timing:
    """Seconds to the first exit and through every layer, by number of tokens."""

    def __init__(self, model: Model, check: Callable[[], None] = lambda: None, runs: int = RUNS) -> None:
        """Measure the model, which also warms it up: every layer runs on short texts and on the longest.

        check: called before each run; an exception from it ends the measurement. runs: number of runs of each text; a
        text of more than 512 tokens runs once.
        """
        self._most = model.manifest.max_tokens
        self._plain_s = _tokenizing(model, PLAIN, check, runs)  # per character
        self._char_s = max(self._plain_s, *(_tokenizing(model, text, check, runs) for text in (ODD, LONG)))
        self._first_exit = model.manifest.exit_layers[0]
        self._layers = model.manifest.num_layers - self._first_exit  # number of layers after the first exit
        lengths = sorted({min(n, self._most) for n in (*LENGTHS, self._most)})
        times = []  # median seconds to the first exit, and through every layer
        for length in lengths:
            runs_of = [_run(model, "a " * (length - 2), check) for _ in range(runs if length <= 512 else 1)]
            times.append([median(seconds) for seconds in zip(*runs_of, strict=True)])
        # Tables by number of tokens, as each text needs these values a dozen times.
        self._first_s, self._full_s = (
            list(map(float, np.interp(range(self._most + 1), lengths, seconds)))
            for seconds in zip(*times, strict=True)
        )
        self._layer_s = [self._one_layer_s(*pair) for pair in zip(self._first_s, self._full_s, strict=True)]

    def _one_layer_s(self, first: float, full: float) -> float:
        if not self._layers:  # the first exit is also the last
            return full / self._first_exit
        return (full - first) / self._layers

    def full_depth_s(self, tokens: int) -> float:
        """Seconds through every layer for this many tokens, interpolated between the measured lengths."""
        return self._full_s[tokens if tokens < self._most else self._most]

    def first_exit_s(self, tokens: int) -> float:
        """Seconds to the first exit for this many tokens."""
        return self._first_s[tokens if tokens < self._most else self._most]

    def layer_s(self, tokens: int) -> float:
        """Mean seconds of one layer after the first exit for this many tokens."""
        return self._layer_s[tokens if tokens < self._most else self._most]

    def speedup(self, tokens: int, layer: int) -> float:
        """Time through every layer divided by the time to the exit at `layer`, for this many tokens."""
        n, deeper = min(tokens, self._most), max(0, layer - self._first_exit)
        return self._full_s[n] / (self._first_s[n] + deeper * self._layer_s[n])

    def predict(self, chars: int, windows: int = 1) -> float:
        """Predicted seconds to tokenize a text with this many characters and run it to full depth.

        windows: maximum number of windows; all are assumed to run. Long texts are assumed to be tokenized at the
        slowest measured rate. Short texts, which run in groups, are assumed to tokenize like plain words: the slowest
        rate would greatly overestimate their time.
        """
        tokens = tokens_of(chars)
        if windows > 1 and tokens > self._most:
            room = self._most - SPECIAL
            parts = spans(min(tokens - SPECIAL, capacity(room, windows)), room)
            seconds = sum(self.full_depth_s(part.end - part.start + SPECIAL) for part in parts)
        else:
            seconds = self.full_depth_s(tokens)
        return seconds + (self._tokenizer_s(chars, windows) if chars > PIECE else self._plain_s * chars)

    @property
    def piece_s(self) -> float:
        """Seconds to tokenize a long piece of a text, at the slowest measured rate."""
        return 2 * PIECE * self._char_s

    def predict_first_exit(self, chars: int, windows: int = 1) -> float:
        """Predicted seconds to tokenize a text with this many characters and run it to its first exit.

        The text is assumed to be tokenized at the slowest measured rate. If it has several windows, its first exit is
        in the first one.
        """
        return self.first_exit_s(tokens_of(chars)) + self._tokenizer_s(chars, windows)

    def _tokenizer_s(self, chars: int, windows: int) -> float:
        return self._char_s * min(chars, max_chars(self._most, windows))  # truncated characters cost nothing


def tokens_of(chars: int) -> int:
    """Estimated number of tokens of a text with this many characters."""
    return SPECIAL + chars // CHARS_PER_TOKEN


def run_longest(models: Sequence[Model]) -> None:
    """Run the longest text of each model through every layer, so that the thread's buffers fit any later text."""
    for model in models:
        model.full_depth(model.tokenize("a " * model.manifest.max_tokens))


def _tokenizing(model: Model, text: str, check: Callable[[], None], runs: int) -> float:
    """Seconds per character to tokenize repetitions of this text."""
    piece, times = (text * (1 + 2 * PIECE // len(text)))[: 2 * PIECE], []
    for _ in range(runs):
        check()
        started = _now()
        model.tokenizer.encode([(piece, None)])
        times.append(_since(started))
    return median(times) / len(piece)


def _run(model: Model, text: str, check: Callable[[], None]) -> tuple[float, float]:
    """Seconds to a text's first exit, and through every layer."""
    check()
    tokens, first = model.tokenize(text), 0.0
    started = _now()
    layers, exits = model.encoder.layers, model.exits
    hidden = layers.embed(tokens)
    for layer in range(exits.num_layers + 1):
        if layer > 0:
            hidden = layers.run(layer, hidden)
        if layer in exits.layers:
            exits.run(layer, hidden)
        if layer == exits.layers[0]:
            first = _since(started)
    return first, _since(started)


def _now() -> tuple[float, float]:
    return thread_time(), perf_counter()


def _since(then: tuple[float, float]) -> float:
    """Elapsed CPU seconds of the thread; wall-clock seconds if the CPU time is too coarse."""
    return thread_time() - then[0] or perf_counter() - then[1]
