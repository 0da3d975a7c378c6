"""How long a model takes on this machine, measured once while it warms up."""

from bisect import bisect_left
from statistics import median
from time import perf_counter

from model_store.model import Model
from server.protocol import Text

LENGTHS = (8, 32, 128, 512)
RUNS = 3
CHARS_PER_TOKEN = 4  # of English; the order of work and what runs together depend on it


class Timing:
    """Seconds through every layer, by number of tokens."""

    def __init__(self, model: Model) -> None:
        """Measure; also serves as warm-up: every layer runs on short texts and on the longest."""
        self._most = model.manifest.max_tokens
        self._lengths = sorted({min(n, self._most) for n in (*LENGTHS, self._most)})
        self._seconds: list[float] = []
        for length in self._lengths:
            tokens = model.tokenize("a " * (length - 2))
            times = []
            for _ in range(RUNS if length <= 512 else 1):
                started = perf_counter()
                model.full_depth(tokens)
                times.append(perf_counter() - started)
            self._seconds.append(median(times))

    def full_depth_s(self, tokens: int) -> float:
        """Seconds through every layer for this many tokens: linear between what was measured."""
        n, x, y = min(tokens, self._most), self._lengths, self._seconds
        if len(x) == 1 or n <= x[0]:
            return y[0]
        right = min(bisect_left(x, n), len(x) - 1)
        share = (n - x[right - 1]) / (x[right] - x[right - 1])
        return y[right - 1] + share * (y[right] - y[right - 1])

    def predict(self, text: Text) -> float:
        """Seconds for a text, its tokens estimated from its characters."""
        chars = len(text.text) + (len(text.text_pair) if text.text_pair else 0)
        return self.full_depth_s(2 + chars // CHARS_PER_TOKEN)
