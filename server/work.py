"""What a request is inside the engine: a job of one or more items, each one text on its way to an exit."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

from exits.rule import ExitRule, Reading
from model_store.model import Model
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
    """One text of a job; `outcome` is there once it left."""

    job: "Job"
    index: int
    text: Text
    outcome: Outcome | None = None


@dataclass(slots=True, eq=False)
class Job:
    """The texts of one request, with the rule they share and the future that is waiting for them.

    Every item is finished by exactly one engine thread; the last one wakes the event loop. A job is dropped
    when its client is gone, its time is up or one of its items failed: what has not run then never runs.
    """

    model: Model
    rule: ExitRule
    truncate: bool
    texts: list[Text]
    future: "asyncio.Future[None]"
    items: list[Item] = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    dropped: bool = False
    waiting: int = 0  # items in the queue; owned by the queue's lock
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.items = [Item(self, i, text) for i, text in enumerate(self.texts)]
        self._left = len(self.items)

    def finish(self, item: Item, outcome: Outcome) -> None:
        """Record an item's outcome; called by an engine thread."""
        item.outcome = outcome
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._wake(None)

    def fail(self, error: Exception) -> None:
        """Fail the whole request with one item's error; called by an engine thread."""
        self.dropped = True
        self._wake(error)

    def _wake(self, error: Exception | None) -> None:
        def settle() -> None:
            if self.future.done():  # the client went away, or another item failed first
                return
            if error is None:
                self.future.set_result(None)
            else:
                self.future.set_exception(error)

        with suppress(RuntimeError):  # the event loop is closed: nobody is waiting
            self.future.get_loop().call_soon_threadsafe(settle)
