"""What a request is inside the engine: a job of one or more items, each one text on its way to an exit."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from time import perf_counter

from exits.rule import ExitRule, Reading
from model_store.model import Model
from model_store.segments import Array, Tokens
from server.protocol import Text
from server.watch import Watch


@dataclass(slots=True)
class Outcome:
    """Where and why an item left, and what it cost (seconds).

    Attributes:
        layer: the exit's layer.
        is_far: whether it was far from every prototype at some exit.
        reason: threshold, last_layer, max_layer or deadline.
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
    is_far: bool = False


# What has a deadline overtakes what has none and waits for less than this.
HASTE_S = 1.0
# From the last layer to the answer's first byte.
REPLY_S = 0.0005


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job, and how far it got: between two layers it can wait for a more urgent one.

    Attributes:
        predicted: seconds that it is likely to take through every layer.
        expected: seconds that it is likely to take, leaving early.
        ends: when it must leave (perf_counter seconds), set as it starts; None: no deadline.
        due: when it should be answered (perf_counter seconds); the queue hands out the earliest first.
        layer: the next layer to run.
        hidden: (1, tokens, hidden), what that layer takes; None before layer 0 ran.
        sampled: whether it counts for drift.
        rule: the job's, or a more cautious one once the text is_far from every prototype.
        passed: every exit passed, with what it said.
        outcome: there once it left.
    """

    job: "Job"
    index: int
    text: Text
    predicted: float
    expected: float
    due: float
    ends: float | None = None
    layer: int = 0
    tokens: Tokens | None = None
    hidden: Array | None = None
    rule: ExitRule = field(init=False)
    is_far: bool = False
    sampled: bool = field(init=False)
    passed: list[tuple[int, Reading]] = field(default_factory=list)
    tokenize_s: float = 0.0
    model_s: float = 0.0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        watch = self.job.watch
        self.rule, self.sampled = self.job.rule, watch is not None and watch.samples()

    def say(self, layer: int, reading: Reading) -> None:
        """Note what an exit says, and whether it asks for caution."""
        self.passed.append((layer, reading))
        watch = self.job.watch
        if watch is not None and not self.is_far and watch.is_far(layer, reading):
            self.is_far = True
            self.rule = replace(self.rule, tau=self.rule.tau * watch.caution)


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
        share: the part of the layers' time that a text is expected to need, leaving early.
        layer_s: seconds of one layer for so many tokens.
        every: ask every exit, even those that cannot end the way.
        budget_s: seconds from now to the deadline of every text; None: there is none.
    """

    model: Model
    rule: ExitRule
    truncate: bool
    explain: bool
    ood: bool
    texts: list[Text]
    predict: Callable[[Text], float]
    future: "asyncio.Future[None]"
    together_s: float = 0.0
    share: float = 1.0
    layer_s: Callable[[int], float] = lambda _: 0.0
    budget_s: float | None = None
    watch: Watch | None = None
    every: bool = field(init=False)
    items: list[Item] = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    dropped: bool = False
    waiting: int = 0  # items in the queue; owned by the queue's lock
    _left: int = field(init=False)
    _ahead: float = field(init=False)  # predicted seconds of the items that have not begun
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        # A budget needs an answer at any time, and a score what every exit said.
        self.every = self.explain or self.ood or self.budget_s is not None
        if self.budget_s is not None:
            self.together_s = 0.0  # by itself, so that it can leave after any layer
        due, self.items = self.submitted, []
        for i, text in enumerate(self.texts):
            predicted = self.predict(text)
            expected = predicted * self.share
            due += predicted
            item = Item(self, i, text, predicted, expected, due)
            if self.budget_s is not None:
                item.due = min(due, self.submitted + self.budget_s) - HASTE_S
                item.expected = min(expected, self.budget_s)
            self.items.append(item)
        self._left = len(self.items)
        self._ahead = sum(item.predicted for item in self.items)

    def begin(self, item: Item, threads: int) -> None:
        """Set when an item must leave: it gets its part of the time left, as others wait to begin."""
        if self.budget_s is None:
            return
        now = perf_counter()
        left = self.submitted + self.budget_s - REPLY_S - now
        with self._lock:
            part = threads * item.predicted / self._ahead if self._ahead > 0 else 1.0
            self._ahead -= item.predicted
        item.ends = now + left * min(1.0, part)

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
