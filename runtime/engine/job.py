"""The unit of the engine's work: a job, with an item for each text of its request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from time import perf_counter

from de3.exits.kinds import Spans
from de3.exits.reading import Answer, label_of
from de3.model_store.encoder import Encoder
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.segments import Array, Tokens
from de3.model_store.tokenizer import PIECE, Windows
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.plan import check_spans, check_texts, plan_of
from de3.runtime.engine.progress import Progress, WindowProgress
from de3.runtime.engine.request import NOBODY, Entry, Request, Sender, Text
from de3.runtime.engine.served import MAX_STEP_S, Served
from de3.runtime.engine.timing import tokens_of
from de3.runtime.ood import OodMonitor
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Choice

# Seconds from the last layer to the first byte of the response: a part per request, and a part per text.
REPLY_S, REPLY_TEXT_S = 0.0005, 10e-6


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job: its due time, progress and outcome.

    If several models answer a request on one pass, each has a job, but only the first job's items are scheduled; they
    have the other jobs' items for the same text as fellows.

    Attributes:
        predicted_s: predicted seconds through every layer.
        due: time by which it should be answered (perf_counter seconds); a client's earliest item is scheduled first.
        first_exit_s: predicted seconds to the first exit; set only if the job has a deadline.
        group_s: predicted seconds that the text adds to a step of its group; 0 if the job's texts run alone.
        ends: time by which it must exit (perf_counter seconds), set when it starts to run; None before that, and
            without a deadline.
        is_short: short enough to run in a group and to be tokenized in one step.
        is_sampled: its reading at the first exit is used to measure drift.
        is_drawn: it was drawn for an audit.
        is_deep: it runs to full depth, whatever τ is.
        asks_all_exits: every exit is evaluated, even those at which it cannot exit.
        keeps_states: the mean hidden state of its tokens after each layer is kept, for fitting exits.
        states: these states, (num_layers, hidden), filled in as the layers run; None: not kept.
        fellows: items of other models that are answered on the same pass, and share its progress.
        decision: the model's decision about the text, or about its current window.
        windows: the windows that have run, for this model; None unless the text has several.
        is_settled: further windows would not change this model's answer.
        outcome: its exit and its answer; None until it exits.
        error: the error of a text that failed, in a job that keeps errors; None otherwise.
    """

    job: "Job"
    index: int
    text: Text
    predicted_s: float
    due: float
    first_exit_s: float = 0.0
    group_s: float = 0.0
    ends: float | None = None
    is_short: bool = True
    is_sampled: bool = False
    is_drawn: bool = False
    is_deep: bool = False
    asks_all_exits: bool = False
    keeps_states: bool = False
    states: Array | None = None
    progress: Progress = field(default_factory=Progress)
    fellows: Sequence["Item"] = ()
    decision: Decision | None = None
    windows: WindowProgress | None = None
    is_settled: bool = False
    outcome: Outcome | None = None
    error: Exception | None = None

    @property
    def can_share(self) -> bool:
        """True if it may run in a group; a text that started in a group stays in one."""
        fits = self.group_s <= MAX_STEP_S or self.progress.is_grouped
        return self.is_short and self.job.in_groups and fits

    @property
    def team(self) -> list["Item"]:
        """The item and its fellows."""
        return [self, *self.fellows] if self.fellows else [self]

    @property
    def has_answers(self) -> bool:
        """True if every model has read an exit of the text, in this window or an earlier one."""
        return all(
            (one.windows is not None and one.windows.ran)
            or (one.decision is not None and one.decision.readings)
            for one in self.team
        )

    def restart(self) -> None:
        """Reset a text whose group failed, so that it runs again from the start, alone."""
        self.is_short, self.progress = False, Progress()
        for one in self.team:
            one.progress, one.decision = self.progress, None

    def start(self, tokens: Tokens) -> None:
        """Begin the forward pass of the text, or of its next window, for the models that are not settled."""
        self.progress.tokens, self.progress.layer = tokens, 0
        decisions = [one.decide() for one in self.team if not one.is_settled]
        self.progress.forward = ForwardPass(tokens, decisions)

    def start_windows(self, windows: Windows) -> None:
        """Begin the first window of a text that has several."""
        self.progress.windows = windows
        for one in self.team:
            # A token classifier's texts in windows are not audited, and it takes only one of them to miss a span. As
            # for what a guard misses, only texts in one window are certified.
            rule, choice = one.job.choice.rule, one.job.choice
            one.is_deep |= choice.one_window
            one.is_deep |= isinstance(rule.kind, Spans) and choice.guarantee is not None
            one.windows = WindowProgress(windows, rule)
        self.start(windows[0])

    def next_window(self) -> bool:
        """Record the window that ran, and begin the next one; False if no further window is needed."""
        progress = self.progress
        windows, forward = progress.windows, progress.forward
        assert windows is not None and forward is not None
        progress.num_ran += 1
        is_due, unsettled = False, list[Decision]()
        for one in self.team:
            if not one.is_settled:
                assert one.windows is not None and one.decision is not None
                one.windows.add(one.decision, forward)
                one.is_settled = one.windows.is_settled(one.decision)
                is_due |= one.decision.reason == "deadline"
                unsettled += [one.decision] * (not one.is_settled)
        if is_due:
            for decision in unsettled:
                decision.reason = "deadline"
        if is_due or not unsettled:
            return False
        self.start(windows[progress.num_ran])
        return True

    def decide(self) -> Decision:
        """Begin the model's decision about the text, or about its next window."""
        model, monitor, rule = self.job.model, self.job.monitor, self.job.choice.rule
        rule = replace(rule, tau=0.0) if self.is_deep else rule
        tokens = self.progress.tokens
        before = self.decision  # the previous window's
        if self.keeps_states and self.windows is None:
            self.states = model.empty_states()
        self.decision = Decision(
            model.exits,
            rule if before is None else before.rule,
            model.deepest_exit(rule.max_layer),
            self.asks_all_exits,
            None if monitor is None else monitor.limits,
            1.0 if monitor is None else monitor.tau_factor,
            before is not None and before.is_far,
            self.states,
            None if tokens is None else tokens.layout,
        )
        return self.decision


@dataclass(slots=True, eq=False)
class Job:
    """The items of one request, and the rule that they share.

    Every item is finished by exactly one engine thread. A job is dropped when its client disconnects, it times out or
    one of its items fails: its pending items then never run.

    The due time of an item is the job's submission plus the predicted time of the item itself and of all items
    before it in the batch. So short texts overtake long ones and single texts overtake large batches, but no text
    waits forever. If the job's deadline is admitted, it is the due time of every item.

    Attributes:
        on_done: called through the engine's `dispatch`: with None once every item has finished, or with the error of an
            item, perhaps more than once. If the job is dropped for another reason, it may never be called.
        is_shadow: background job; it runs while nothing else is pending, and its answers are not returned.
        fellows: jobs of other models, with the same texts, that are answered on this job's pass.
        own_options: exit options of this model, if several answer; None: those of the request.
        windows, truncate: see Plan.
        model: the model that runs the job.
        monitor: OOD monitor; None for shadow jobs.
        client: client of the request.
        weight: number of its texts, each counted once for each model.
        in_groups: its texts may run in groups.
        has_layouts: a token classifier needs the layout of its texts' tokens.
        asks_all_exits: every exit is evaluated, even those at which its items cannot exit.
        is_dropped: its result is no longer needed.
        deepest: the model with the most layers, by whose timing the texts are scheduled.
        encoder: its encoder, on which the texts run.
        budget_s: the shortest latency budget of its models, seconds; None: no budget.
        deadline: time by which the last text must exit (perf_counter seconds); None: no deadline.
        is_admitted: its deadline was admitted, so it is scheduled before jobs without one.
        is_late: the requested deadline cannot be met, and the request accepts a later one (best_effort).
        pending: number of its items in the queue; set by the queue.
        admitted_s: predicted seconds of these items if the deadline was admitted, else 0; set by the queue.
        sender: who sent the request.
    """

    served: Served
    choice: Choice
    request: Request
    on_done: Callable[[Exception | None], None]
    is_shadow: bool = False
    fellows: Sequence["Job"] = ()
    own_options: ExitOptions | None = None
    windows: int = 1
    truncate: bool = True
    submitted: float = field(default_factory=perf_counter)
    model: Model = field(init=False)
    monitor: OodMonitor | None = field(init=False)
    client: str = field(init=False)
    weight: int = field(init=False)
    items: list[Item] = field(init=False)
    in_groups: bool = field(init=False)
    has_layouts: bool = field(init=False)
    asks_all_exits: bool = field(init=False)
    is_dropped: bool = False
    deepest: Served = field(init=False)
    encoder: Encoder = field(init=False)
    budget_s: float | None = field(init=False)
    deadline: float | None = None
    is_admitted: bool = False
    is_late: bool = False
    pending: int = 0
    admitted_s: float = 0.0
    sender: Sender = NOBODY
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        request, deepest, budget_s = self.request, self.served, self.choice.budget_s
        self.model, self.client = deepest.model, self.sender.client
        self.monitor = None if self.is_shadow else deepest.monitor
        has_codes = self.choice.rule.signal.code is not None
        for job in self.fellows:
            deepest = max(deepest, job.served, key=_depth)
            budget_s = min(filter(None, (budget_s, job.choice.budget_s)), default=None)
            has_codes &= job.choice.rule.signal.code is not None
        self.deepest, self.encoder, self.budget_s = deepest, deepest.model.encoder, budget_s
        # A text with a deadline runs alone, so that it can exit after any layer. So does a text whose signal the
        # kernels lack, because it is scored between the layers.
        has_kernels = self.encoder.forward is not None and has_codes
        self.in_groups = has_kernels and budget_s is None and not self.is_shadow
        # A text with a deadline must have an answer at any time. The OOD score and the OOD flag use the readings of all
        # exits.
        monitors_ood = self.monitor is not None and self.monitor.limits is not None
        self.asks_all_exits = request.explain or request.ood or monitors_ood or budget_s is not None
        if budget_s is not None:
            self.deadline = self.submitted + budget_s - REPLY_S - REPLY_TEXT_S * len(request.texts)
        self.has_layouts = isinstance(self.choice.rule.kind, Spans)
        if self.fellows:
            self.has_layouts |= any(job.has_layouts for job in self.fellows)
        self.weight = len(request.texts) * (1 + len(self.fellows))
        monitor = self.monitor
        due, self.items = self.submitted, []
        for index, text in enumerate(request.texts):
            chars = text.chars
            predicted_s = deepest.timing.predict(chars, self.windows)
            due += predicted_s
            item = Item(self, index, text, predicted_s, due)
            item.is_short, item.asks_all_exits = chars <= 2 * PIECE, self.asks_all_exits
            if monitor is not None and monitor.samples():
                item.is_sampled, item.asks_all_exits = True, item.asks_all_exits or not self.asks_first_exit
            if self.in_groups:
                item.group_s = deepest.group_s(tokens_of(chars))
            if budget_s is not None:
                timings = (job.served.timing for job in self.team)
                item.first_exit_s = max(t.predict_first_exit(chars, self.windows) for t in timings)
            if self.fellows:
                item.fellows = [job.items[index] for job in self.fellows]
            for one in item.fellows:  # another model's budget may end its pass, too
                one.progress, one.asks_all_exits = item.progress, one.asks_all_exits or budget_s is not None
            self.items.append(item)
        self._left = len(self.items)

    @property
    def asks_first_exit(self) -> bool:
        """True if the first exit of every text is computed in any case."""
        rule = self.choice.rule
        return rule.tau > 0 and rule.signal.may_exit(self.model.manifest.exit_layers[0])

    @property
    def options(self) -> ExitOptions:
        """The exit options that the client has set."""
        return self.request.options if self.own_options is None else self.own_options

    @property
    def team(self) -> list["Job"]:
        """The job and its fellows, in the order of the request."""
        return [self, *self.fellows]

    @property
    def tokens(self) -> int:
        """Number of tokens that have been passed to the model so far, over all texts of the job."""
        return sum(item.progress.num_tokens for item in self.items)

    @property
    def finished(self) -> int:
        """Number of texts that have exited or failed."""
        return len(self.items) - self._left

    def admit(self) -> None:
        """Mark the deadline as admitted: the job then overtakes jobs without an admitted deadline."""
        assert self.deadline is not None
        self.is_admitted = True
        for item in self.items:
            item.due = self.deadline

    def finish(self, item: Item, result: Outcome | Exception) -> bool:
        """Record an item's outcome or error; True if it is the job's last item. Called by an engine thread."""
        if isinstance(result, Outcome):
            item.outcome = result
        else:
            item.error = result
        with self._lock:
            self._left -= 1
            return self._left == 0

    def outcomes(self) -> list[Outcome]:
        """The outcomes of the texts that have exited, in the order of the request."""
        return [item.outcome for item in self.items if item.outcome is not None]

    def answers(self) -> list[Answer]:
        """The answers to the texts of a finished job that have not failed, in the order of the request.

        An answer is a label, the labels of a multi-label model joined by commas, a value, or a set of spans.
        """
        if not self.model.manifest.has_classes:
            return [outcome.reading.answer for outcome in self.outcomes()]
        return list(self.labels())

    def labels(self) -> list[str]:
        """The label of each text that has not failed: a multi-label model's joined by commas, a value's name.

        Not for a token classifier.
        """
        names = self.model.manifest.labels
        return [label_of(outcome.reading, names) for outcome in self.outcomes()]

    def release(self) -> None:
        """Release the items, which refer back to the job; otherwise only the garbage collector would free the texts."""
        for job in self.team:
            job.items = []


def job_of(
    served: Sequence[Served],
    request: Request,
    entries: Sequence[Entry],
    level: int,
    on_done: Callable[[Exception | None], None],
    sender: Sender = NOBODY,
) -> Job:
    """Create the jobs of a request to models that have the same encoder; returns the first, with its fellows.

    served: the models of `entries`, which are those of the request. level: load level. Raises RequestError if a model
    cannot answer the request, or has another encoder.
    """
    check_spans(request, served)
    for one in served:
        request = request.for_model(one.model.manifest, one.rules.flag)
        check_texts(request, one)
    plan = plan_of(served, request, entries, level, sender.tenant)

    def job_of_model(number: int, fellows: Sequence[Job] = ()) -> Job:
        return Job(
            *(served[number], plan.choices[number], request, on_done),
            fellows=fellows,
            own_options=plan.options[number],
            windows=plan.windows,
            truncate=plan.truncate,
            sender=sender,
        )

    return job_of_model(0, [job_of_model(number) for number in range(1, len(served))])


def _depth(served: Served) -> int:
    return served.model.manifest.num_layers
