"""Times texts in the engine, one after another; `de3 evaluate` predicts the speed-up in time from the results."""

from collections.abc import Sequence
from time import thread_time

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.data.tables import pair_of
from de3.runtime.choice import Choice
from de3.runtime.engine.group import run_group
from de3.runtime.engine.job import Item, Job, Result
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.plan import Plan
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.request import Entry, Request, Text
from de3.runtime.engine.run import run
from de3.runtime.engine.served import Served
from de3.runtime.options import ExitOptions
from de3.training.evaluate import Times

BLOCK = 25  # texts that run to one depth before any run to the next
EVERY_EXIT = 5e-324  # the smallest τ that evaluates every exit; only a score of 0 is below it


class Engine:
    """The server's engine without threads: a queue that the calling thread processes."""

    def __init__(self, served: Served) -> None:
        self._served, self._queue = served, WorkQueue(1)

    def classify(self, text: Text, choice: Choice) -> Outcome:
        """The outcome of one text, run as the engine's threads run it; raises its error if it fails."""
        plan = Plan([Entry(None)], [choice])
        self._queue.put(Job([self._served], plan, Request([text]), lambda _: None))
        items, results = self._queue.next(), list[tuple[Item, Result]]()
        alone = items
        if items[0].can_share:
            alone = run_group(items, self._queue, 1, lambda _: None, results.extend)
        outcomes = [result for _, result in results] + [run(item, self._queue) for item in alone]
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        assert outcomes[0] is not None  # nothing preempts it
        return outcomes[0][0]


def text_of(example: Example) -> Text:
    """The text or pair of an example, as the engine takes it."""
    return Text(*pair_of(example.text))


def measure_times(served: Served, examples: Sequence[Example], count: int = 100) -> Times:
    """CPU times at τ = 0 and to each exit: lines fitted to at most `count` examples that this thread runs.

    Each depth runs a block of texts at a time, so that its weights stay in the caches, as when serving.
    """
    manifest, texts = served.model.manifest, [text_of(example) for example in list(examples)[:count]]
    options = [ExitOptions(tau=EVERY_EXIT, max_layer=layer) for layer in manifest.exit_layers]
    choices = [served.rules.choose(each) for each in (ExitOptions(tau=0.0), *options)]
    tokens = np.array([len(served.model.tokenize(text.text, text.text_pair)) for text in texts])
    seconds = np.zeros((len(choices), len(texts)))
    engine = Engine(served)
    for begin in range(0, len(texts), BLOCK):
        for choice, row in zip(choices, seconds, strict=True):
            engine.classify(texts[begin], choice)  # loads the weights of its layers into the caches
            for i, text in enumerate(texts[begin : begin + BLOCK], begin):
                started = thread_time()
                engine.classify(text, choice)
                row[i] = thread_time() - started
    full, *exits = (_line(tokens, row) for row in seconds)
    return Times(full, np.array(exits))


def _line(tokens: NDArray[np.int64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intercept and slope, (2,), of a least-squares line of seconds by number of tokens; the slope is not negative."""
    from_mean = tokens - tokens.mean()
    slope = max(0.0, float((from_mean * seconds).sum()) / max(1e-9, float((from_mean**2).sum())))
    return np.array([seconds.mean() - slope * tokens.mean(), slope])
