"""What the engine works on: a request, and the job that runs it, with an item for each text."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from time import perf_counter
from typing import ClassVar

from de3.exits.reading import Reading
from de3.exits.rule import ExitReason, ExitRule
from de3.exits.windows import Combination
from de3.model_store.manifest import Manifest
from de3.model_store.model import Model
from de3.model_store.segments import Array, ForwardPass, Tokens
from de3.model_store.tokenizer import PIECE, Tokenization, Windows
from de3.server.engine.timing import Timing, tokens_of
from de3.server.ood import OodMonitor
from de3.server.rules import Choice, Rules
from de3.server.settings import ExitOptions

# The engine looks at the queue at least so often, unless one layer of one text takes longer.
MAX_STEP_S = 0.004
# A model is fast if it runs so many texts of so many tokens through all layers in a step.
FAST, FAST_TOKENS = 4, 32
# From the last layer to the response's first byte: of a request, and more for each of its texts.
REPLY_S, REPLY_TEXT_S = 0.0005, 10e-6


@dataclass(frozen=True, slots=True)
class Text:
    """One text, or a pair of texts."""

    text: str
    text_pair: str | None = None

    @property
    def chars(self) -> int:
        """Characters of both."""
        return len(self.text) + (len(self.text_pair) if self.text_pair else 0)


@dataclass(slots=True, eq=False)
class Request:
    """Texts to classify, and how; what every protocol's request becomes.

    Attributes:
        input_name: what the protocol calls the texts, for messages.
        model: name or name:version; None: the server's default.
        explain: report every exit passed.
        ood: report how unlike the calibration's texts a text is.
        windows: the most windows that a text is split into if it is longer than one.
        client: whose request it is: the engine's time is shared between clients.
        expires_at: when its time is up (perf_counter seconds); None: after the server's `timeout_s` from now.
        served, job: the model, and what runs it, once they are known: whoever reports on a failed request finds
            here how far it got.
    """

    input_name: ClassVar[str] = "input"

    texts: Sequence[Text]
    options: ExitOptions = field(default_factory=ExitOptions)
    model: str | None = None
    truncate: bool = True
    explain: bool = False
    ood: bool = False
    windows: int = 1
    client: str = ""
    expires_at: float | None = None
    served: "Served | None" = None
    job: "Job | None" = None

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for a model that cannot answer this kind of request."""

    def name_of(self, index: int) -> str:
        """What a message calls one of the texts."""
        return f"{self.input_name}[{index}]" if len(self.texts) > 1 else self.input_name

    def cancel(self, error: Exception) -> None:
        """End the wait for its job with an error, if it has one that is not done."""
        if self.job is not None and not self.job.future.done():
            self.job.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model, how long it takes here, how its τ is chosen, and the monitor of its texts."""

    model: Model
    timing: Timing
    rules: Rules
    monitor: OodMonitor

    def group_s(self, tokens: int) -> float:
        """What a text of so many tokens takes of MAX_STEP_S in a group.

        The first text of a group waits for the last, so all layers of a fast model's group have to fit into a step.
        Of others, which would never share anything then, a layer has to.
        """
        is_fast = FAST * self.timing.full_depth_s(FAST_TOKENS) <= MAX_STEP_S
        return self.timing.full_depth_s(tokens) if is_fast else self.timing.layer_s(tokens)


@dataclass(frozen=True, slots=True)
class Window:
    """A window that ran, of a text that has several; fields as in Outcome."""

    layer: int
    passed: list[Reading]
    tokens: int
    model_s: float


@dataclass(slots=True)
class Outcome:
    """Where and why an item left, and what it cost (seconds).

    Attributes:
        layer: the exit's layer; of several windows, that of the last one.
        reading: the answer; of several windows the combined one, with the signals of the last one.
        passed: the reading of every exit passed, the last one being where it left; of several windows, of all that ran.
        tokens: of the windows that ran.
        windows: those that ran, of a text that has several.
        num_windows: how many it has.
        is_far: whether it was far from every prototype at some exit.
    """

    layer: int
    reason: ExitReason
    reading: Reading
    passed: list[Reading]
    tokens: int
    truncated: bool
    queue_s: float
    tokenize_s: float
    model_s: float
    is_far: bool = False
    windows: Sequence[Window] = ()
    num_windows: int = 1


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job, and how far it got: at a layer boundary it can be preempted and requeued.

    Attributes:
        predicted_s: seconds that it is likely to take through every layer.
        due: when it should be answered (perf_counter seconds); the queue schedules the earliest first.
        first_exit_s: seconds that it is likely to take to its first exit; known with a deadline only.
        group_s: what it takes of MAX_STEP_S in a group.
        ends: when it must leave (perf_counter seconds), set as it starts; None: no deadline.
        layer: the next layer to run.
        forward: its pass in a group.
        tokens: of the window that is running.
        num_tokens: of what began to run: the text, or some of its windows.
        windows, ran, combination: of a text that has several windows: all, those that ran, and their answer.
        tokenization: the state of its tokenization; None before it began, and when it is done.
        hidden: (1, tokens, hidden), what that layer takes; None before layer 0 ran.
        is_sampled: whether it counts for drift.
        is_drawn: whether it is audited.
        is_short: whether it is tokenized in one step.
        rule: the job's, or a more cautious one once the text is_far from every prototype.
        passed: the reading of every exit passed, in this window.
        outcome: there once it left.
    """

    job: "Job"
    index: int
    text: Text
    predicted_s: float
    due: float
    first_exit_s: float = 0.0
    group_s: float = 0.0
    ends: float | None = None
    layer: int = 0
    forward: ForwardPass | None = None
    tokens: Tokens | None = None
    num_tokens: int = 0
    windows: Windows | None = None
    ran: list[Window] = field(default_factory=list)
    combination: Combination | None = None
    hidden: Array | None = None
    tokenization: Tokenization | None = None
    rule: ExitRule = field(init=False)
    is_far: bool = False
    is_sampled: bool = field(init=False)
    is_drawn: bool = False
    is_short: bool = field(init=False)
    passed: list[Reading] = field(default_factory=list)
    tokenize_s: float = 0.0
    model_s: float = 0.0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.rule = self.job.choice.rule
        monitor = self.job.monitor
        self.is_sampled = monitor is not None and monitor.samples()
        self.is_short = self.text.chars <= 2 * PIECE

    @property
    def asks_all_exits(self) -> bool:
        """Whether every exit is evaluated, even those at which it may not exit."""
        return self.job.asks_all_exits or self.is_sampled or self.is_drawn

    @property
    def can_share(self) -> bool:
        """Whether it may run in a group; what has begun in one goes on in one."""
        fits = self.group_s <= MAX_STEP_S or self.forward is not None
        return self.is_short and self.job.can_share and fits

    @property
    def has_answer(self) -> bool:
        """Whether it passed an exit, in this window or one before."""
        return bool(self.passed or self.ran)

    def restart(self) -> None:
        """Begin again, after a group that failed, to run alone."""
        self.layer, self.forward, self.is_short, self.tokens = 0, None, False, None
        self.num_tokens, self.tokenize_s, self.model_s, self.passed = 0, 0.0, 0.0, []
        self.rule, self.is_far = self.job.choice.rule, False

    def split(self, windows: Windows) -> None:
        """Run in several windows, the first of them next; no group takes such a text."""
        thresholds = self.rule.thresholds
        weights = [span.new for span in windows.spans]
        self.combination = Combination(weights, None if thresholds is None else thresholds.logits)
        self.windows, self.is_short = windows, False
        self.tokens = windows[0]

    def end_window(self) -> None:
        """Record the window that ran; the next one, if there is one, runs next."""
        assert self.windows is not None and self.combination is not None and self.tokens is not None
        if self.passed:  # else its deadline came before its first exit
            seconds = self.model_s - sum(window.model_s for window in self.ran)
            self.ran.append(Window(self.passed[-1].layer, self.passed, len(self.tokens), seconds))
            self.combination.add(self.passed[-1])
        if len(self.ran) < len(self.windows):
            self.layer, self.hidden, self.passed, self.tokens = 0, None, [], self.windows[len(self.ran)]

    def record(self, reading: Reading) -> None:
        """Score and keep an exit's reading; once a text is out of distribution, lower its τ."""
        self.passed.append(reading)
        reading.score = self.rule.signal.score(self.passed)
        monitor = self.job.monitor
        if monitor is not None and not self.is_far and monitor.is_far(reading):
            self.is_far = True
            self.rule = replace(self.rule, tau=self.rule.tau * monitor.caution)


@dataclass(slots=True, eq=False)
class Job:
    """The items of one request, with the rule they share and the future that waits for them.

    Every item is finished by exactly one engine thread; the last one wakes the event loop. A job is dropped
    when its client is gone, its time is up or one of its items failed: what has not run then never runs.

    An item is due after its own predicted time and that of the items before it in the batch, so short texts
    overtake long ones and single texts large batches, but nothing waits forever.

    Attributes:
        is_shadow: nobody waits for it: it runs while nothing else does.
        is_audit: it is a shadow that runs a text to full depth which was answered already.
        audit_share: the probability with which its texts were drawn for audits; 0: they do not count.
        audit_epoch: tells the evidence for which they were drawn from that after a reset.
        is_dropped: nobody waits for it any more.
        is_promised: its deadline was accepted: it is scheduled before jobs without one.
        is_late: best effort: the deadline that it asked for cannot be met.
        asks_all_exits: every exit is evaluated, even those at which its items may not exit.
        deadline: when the last text must leave (perf_counter seconds); None: there is none.
        pending: its items in the queue; kept by the queue, as is promised_s, their predicted time if promised.
    """

    served: Served
    choice: Choice
    request: Request
    future: "asyncio.Future[None]"
    is_shadow: bool = False
    is_audit: bool = False
    audit_share: float = 0.0
    audit_epoch: int = 0
    submitted: float = field(default_factory=perf_counter)
    items: list[Item] = field(init=False)
    is_dropped: bool = False
    is_promised: bool = False
    is_late: bool = False
    asks_all_exits: bool = field(init=False)
    deadline: float | None = None
    pending: int = 0
    promised_s: float = 0.0
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        request, timing, budget_s = self.request, self.served.timing, self.choice.budget_s
        # A deadline needs an answer at any time; a score and a flag need what every exit said.
        is_flagged = self.monitor is not None and self.monitor.limits is not None
        self.asks_all_exits = (
            request.explain or request.ood or is_flagged or budget_s is not None or self.is_audit
        )
        if budget_s is not None:
            self.deadline = self.submitted + budget_s - REPLY_S - REPLY_TEXT_S * len(request.texts)
        due, self.items = self.submitted, []
        for index, text in enumerate(request.texts):
            predicted_s = timing.predict(text.chars, request.windows)
            due += predicted_s
            item = Item(self, index, text, predicted_s, due)
            if self.can_share:
                item.group_s = self.served.group_s(tokens_of(text.chars))
            if budget_s is not None:
                item.first_exit_s = timing.predict_first_exit(text.chars, request.windows)
            self.items.append(item)
        self._left = len(self.items)

    @property
    def model(self) -> Model:
        """The model that runs it."""
        return self.served.model

    @property
    def monitor(self) -> OodMonitor | None:
        """What watches its texts; nothing does a shadow's."""
        return None if self.is_shadow else self.served.monitor

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.request.client

    @property
    def can_share(self) -> bool:
        """Whether its texts may run in groups; of an audit whether it runs in the kernels alone."""
        # With a deadline by itself, so that it can leave after any layer.
        # A signal that the kernels do not have is scored between the layers, too.
        is_other_shadow = self.is_shadow and not self.is_audit
        runs_alone = self.deadline is not None or is_other_shadow or self.choice.rule.signal.code is None
        return not runs_alone and self.model.through is not None

    @property
    def tokens(self) -> int:
        """Tokens of its texts, as far as they ran."""
        return sum(item.num_tokens for item in self.items)

    @property
    def finished(self) -> int:
        """Texts that left."""
        return len(self.items) - self._left

    def promise(self) -> None:
        """Its deadline is promised: it overtakes what has none."""
        assert self.deadline is not None
        self.is_promised = True
        for item in self.items:
            item.due = self.deadline

    def finish(self, item: Item, outcome: Outcome) -> bool:
        """Record an item's outcome; whether it was the last. Called by an engine thread."""
        item.outcome = outcome
        with self._lock:
            self._left -= 1
            return self._left == 0

    def answers(self) -> list[str | float]:
        """The label, labels or value of each text; of a job that is done."""
        values = [item.outcome.reading.value for item in self.items if item.outcome is not None]
        both = zip(self.labels(), values, strict=True)
        return [label if value is None else value for label, value in both]

    def labels(self) -> list[str]:
        """The label of each text, or those of a multi-label model with commas between; of a job that is done."""
        names = self.model.manifest.labels
        readings = [item.outcome.reading for item in self.items if item.outcome is not None]
        return [
            names[r.label] if r.labels is None else ", ".join(names[k] for k in r.labels) for r in readings
        ]

    def release(self) -> None:
        """Let go of the items, which refer back to it: large texts must not wait for the garbage collector."""
        self.items = []
        self.request.job = None

    def fail(self, error: Exception) -> None:
        """Fail the whole request with one item's error; called by an engine thread."""
        self.is_dropped = True
        wake([(self, error)])


def wake(jobs: list[tuple[Job, Exception | None]]) -> None:
    """Tell the event loop that jobs are done or failed: once for all, as waking it costs a thread switch."""

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
