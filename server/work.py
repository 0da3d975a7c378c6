"""What a request is inside the engine: a job of one or more items, each one text on its way to an exit."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from time import perf_counter

from exits.reading import Reading
from exits.rule import ExitReason, ExitRule
from model_store.model import Model
from model_store.segments import Array, Tokens
from model_store.tokenizer import PIECE, Tokenization
from server.protocol import Text
from server.watch import Watch


@dataclass(slots=True)
class Outcome:
    """Where and why an item left, and what it cost (seconds).

    Attributes:
        layer: the exit's layer.
        is_far: whether it was far from every prototype at some exit.
        passed: every exit passed, (layer, reading), the last one being where it left.
    """

    layer: int
    reason: ExitReason
    reading: Reading
    passed: list[tuple[int, Reading]]
    tokens: int
    truncated: bool
    queue_s: float
    tokenize_s: float
    model_s: float
    is_far: bool = False


# From the last layer to the answer's first byte: of a request, and more for each of its texts.
REPLY_S, REPLY_TEXT_S = 0.0005, 10e-6


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job, and how far it got: between two layers it can wait for a more urgent one.

    Attributes:
        predicted: seconds that it is likely to take through every layer.
        first_s: seconds that it is likely to take to its first exit; known with a deadline only.
        ends: when it must leave (perf_counter seconds), set as it starts; None: no deadline.
        due: when it should be answered (perf_counter seconds); the queue hands out the earliest first.
        layer: the next layer to run.
        tokenization: how far its tokenizing is; None before it began, and when it is done.
        hidden: (1, tokens, hidden), what that layer takes; None before layer 0 ran.
        sampled: whether it counts for drift.
        is_short: whether it is tokenized in one step, and may share a pass with others.
        rule: the job's, or a more cautious one once the text is_far from every prototype.
        passed: every exit passed, with what it said.
        outcome: there once it left.
    """

    job: "Job"
    index: int
    text: Text
    predicted: float
    due: float
    first_s: float = 0.0
    ends: float | None = None
    layer: int = 0
    tokens: Tokens | None = None
    hidden: Array | None = None
    tokenization: Tokenization | None = None
    rule: ExitRule = field(init=False)
    is_far: bool = False
    sampled: bool = field(init=False)
    is_short: bool = field(init=False)
    passed: list[tuple[int, Reading]] = field(default_factory=list)
    tokenize_s: float = 0.0
    model_s: float = 0.0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        watch = self.job.watch
        self.rule, self.sampled = self.job.rule, watch is not None and watch.samples()
        self.is_short = self.text.chars <= 2 * PIECE

    def say(self, layer: int, reading: Reading) -> None:
        """Note what an exit says, and whether it asks for caution."""
        self.passed.append((layer, reading))
        reading.score = self.rule.signal.score([r for _, r in self.passed])
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
        layer_s: seconds of one layer for so many tokens.
        piece_s: seconds that tokenizing a piece of a text takes at most.
        first_s: seconds that a text is likely to take to its first exit.
        budget_s: seconds from now to the deadline of every text; None: there is none.
        best_effort: where the deadline cannot be kept, answer at the first exits as soon as can be.
        is_shadow: nobody waits for it: it runs while nothing else does.
        client: whose it is; the engine's time is shared between clients.
        is_promised: whether its deadline is: it comes before what has none.
        every: ask every exit, even those that cannot end the way.
        deadline: when the last text must leave (perf_counter seconds).
        is_late: whether it will be later than asked for.
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
    layer_s: Callable[[int], float] = lambda _: 0.0
    first_s: Callable[[Text], float] = lambda _: 0.0
    budget_s: float | None = None
    best_effort: bool = False
    watch: Watch | None = None
    is_shadow: bool = False
    client: str = ""
    piece_s: float = 0.0
    is_promised: bool = field(default=False, init=False)
    every: bool = field(init=False)
    deadline: float | None = None
    is_late: bool = False
    items: list[Item] = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    dropped: bool = False
    waiting: int = 0  # items in the queue; owned by the queue's lock, as is the next
    promised_s: float = 0.0  # seconds that those of them are predicted to take, if the deadline is promised
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        # A budget needs an answer at any time, a score and a flag what every exit said.
        flags = self.watch is not None and self.watch.limits is not None
        self.every = self.explain or self.ood or flags or self.budget_s is not None
        if self.budget_s is not None:
            self.together_s = 0.0  # by itself, so that it can leave after any layer
            reply_s = REPLY_S + REPLY_TEXT_S * len(self.texts)
            self.deadline = self.submitted + self.budget_s - reply_s
        due, self.items = self.submitted, []
        for i, text in enumerate(self.texts):
            predicted = self.predict(text)
            due += predicted
            self.items.append(Item(self, i, text, predicted, due))
            if self.budget_s is not None:
                self.items[-1].first_s = self.first_s(text)
        self._left = len(self.items)

    def hasten(self) -> None:
        """Its deadline is promised: it overtakes what has none."""
        assert self.deadline is not None
        self.is_promised = True
        for item in self.items:
            item.due = self.deadline

    @property
    def finished(self) -> int:
        """Texts that left."""
        return len(self.items) - self._left

    def finish(self, item: Item, outcome: Outcome) -> bool:
        """Record an item's outcome; whether it was the last. Called by an engine thread."""
        item.outcome = outcome
        with self._lock:
            self._left -= 1
            return self._left == 0

    def release(self) -> None:
        """Let go of the items, which refer back to it: large texts must not wait for the collector."""
        self.items = []

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
