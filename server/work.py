"""What a request is inside the engine: a job of one or more items, each one text on its way to an exit."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

from exits.rule import ExitRule, Reading
from model_store.model import Model
from model_store.segments import Array, Tokens
from server.protocol import Text


@dataclass(slots=True)
class Outcome:
    """Where and why an item left, and what it cost (seconds).

    Attributes:
        layer: the exit's layer.
        reason: threshold, last_layer or max_layer.
        passed: every exit passed, (layer, reading), the last one being where it left.
    """

    layer: int
    reason: str
    reading: Reading
    passed: list[tuple[int, Reading]]
    tokens: int
    truncated: bool
    queue_s: float
    tokenize_s: float
    model_s: float


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job, and how far it got: between two layers it can wait for a more urgent one.

    Attributes:
        predicted: seconds that it is likely to take through every layer.
        due: when it should be answered (perf_counter seconds); the queue hands out the earliest first.
        layer: the next layer to run.
        hidden: (1, tokens, hidden), what that layer takes; None before layer 0 ran.
        passed: every exit passed, with what it said.
        outcome: there once it left.
    """

    job: "Job"
    index: int
    text: Text
    predicted: float
    due: float
    layer: int = 0
    tokens: Tokens | None = None
    hidden: Array | None = None
    passed: list[tuple[int, Reading]] = field(default_factory=list)
    tokenize_s: float = 0.0
    model_s: float = 0.0
    outcome: Outcome | None = None


@dataclass(slots=True, eq=False)
class Job:
    """The texts of one request, with the rule they share and the future that is waiting for them.

    Every item is finished by exactly one engine thread; the last one wakes the event loop. A job is dropped
    when its client is gone, its time is up or one of its items failed: what has not run then never runs.

    Attributes:
        predict: seconds that a text is likely to take through every layer. An item is due after its own time
            and that of those before it in the list, so short texts overtake long ones and single texts long
            lists, but nothing waits for ever.
        together_s: texts predicted to take no longer may share a call with others; 0: one a call.
    """

    model: Model
    rule: ExitRule
    truncate: bool
    explain: bool
    texts: list[Text]
    predict: Callable[[Text], float]
    future: "asyncio.Future[None]"
    together_s: float = 0.0
    items: list[Item] = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    dropped: bool = False
    waiting: int = 0  # items in the queue; owned by the queue's lock
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        due, self.items = self.submitted, []
        for i, text in enumerate(self.texts):
            predicted = self.predict(text)
            due += predicted
            self.items.append(Item(self, i, text, predicted, due))
        self._left = len(self.items)

    def finish(self, item: Item, outcome: Outcome) -> bool:
        """Record an item's outcome; whether it was the last. Called by an engine thread."""
        item.outcome = outcome
        with self._lock:
            self._left -= 1
            return self._left == 0

    def fail(self, error: Exception) -> None:
        """Fail the whole request with one item's error; called by an engine thread."""
        self.dropped = True
        wake([(self, error)])


def wake(jobs: list[tuple[Job, Exception | None]]) -> None:
    """Tell the event loop that jobs are done, or failed: once for all, as waking it costs a thread switch."""

    def settle() -> None:
        for job, error in jobs:
            if job.future.done():  # the client went away, or another item failed first
                continue
            if error is None:
                job.future.set_result(None)
            else:
                job.future.set_exception(error)

    with suppress(RuntimeError):  # the event loop is closed: nobody is waiting
        jobs[0][0].future.get_loop().call_soon_threadsafe(settle)
