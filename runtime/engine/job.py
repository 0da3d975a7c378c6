"""The unit of the engine's work: a job, with an item for each text of its request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

from de3.model_store.encoder import Encoder
from de3.model_store.forward import ForwardPass
from de3.model_store.segments import Tokens
from de3.model_store.tokenizer import PIECE, Tokenization, Windows
from de3.runtime.engine.head import Head, Part
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.plan import Plan, check_spans, check_texts, plan_of
from de3.runtime.engine.request import NOBODY, Request, Sender, Text
from de3.runtime.engine.served import MAX_STEP_S, Served
from de3.runtime.engine.timing import tokens_of

# Seconds from the last layer to the first byte of the response: a part per request, and a part per text.
REPLY_S, REPLY_TEXT_S = 0.0005, 10e-6

MAX_HEADS = 16  # models that share a pass, as in native/layers.h

Result = list[Outcome] | Exception  # what an item's heads have found, or the error that it failed with


@dataclass(slots=True, eq=False)
class Item:
    """One text of a job: its due time, and its pass through the layers, with a head for each model.

    At a layer boundary, it can be preempted and requeued.

    Attributes:
        shared: the models that share the pass.
        heads: in the order of their parts.
        predicted_s: predicted seconds through every layer.
        due: time by which it should be answered (perf_counter seconds); a client's earliest item is scheduled first.
        first_exit_s: predicted seconds to the first exit; set only if the job has a deadline.
        group_s: predicted seconds that the text adds to a step of its group; 0 if the job's texts run alone.
        ends: time by which it must exit (perf_counter seconds), set when it starts to run; None before that, and
            without a deadline.
        is_short: short enough to run in a group and to be tokenized in one step.
        is_grouped: it started in a group.
        tokenization: the tokenization in progress; None before it starts and after it ends.
        tokens: tokens of the text, or of the window that is running; None until the text is tokenized.
        num_tokens: number of tokens that have been passed to the model so far, over all windows.
        layer: the next layer to run.
        forward: the forward pass of the text, or of its current window; None before it starts and after the text exits.
        windows: the text's windows; None unless it has several.
        num_ran: number of windows that have run.
        tokenize_s, model_s: seconds spent so far on tokenization and in the layers.
    """

    job: "Job"
    shared: "SharedPass"
    index: int
    text: Text
    heads: list[Head]
    predicted_s: float
    due: float
    first_exit_s: float = 0.0
    group_s: float = 0.0
    ends: float | None = None
    is_short: bool = True
    is_grouped: bool = False
    tokenization: Tokenization | None = None
    tokens: Tokens | None = None
    num_tokens: int = 0
    layer: int = 0
    forward: ForwardPass | None = None
    windows: Windows | None = None
    num_ran: int = 0
    tokenize_s: float = 0.0
    model_s: float = 0.0

    @property
    def can_share(self) -> bool:
        """True if it may run in a group; a text that started in a group stays in one."""
        return self.is_short and self.shared.in_groups and (self.group_s <= MAX_STEP_S or self.is_grouped)

    def restart(self) -> None:
        """Reset a text whose group failed, so that it runs again from the start, alone."""
        self.is_short = self.is_grouped = False
        self.tokens, self.num_tokens, self.layer, self.forward = None, 0, 0, None
        self.tokenize_s = self.model_s = 0.0
        for head in self.heads:
            head.decision = None

    def start(self, tokens: Tokens) -> None:
        """Begin the forward pass of the text, or of its next window, for the heads that are not settled."""
        self.tokens, self.layer = tokens, 0
        decisions = [head.decide(tokens.layout) for head in self.heads if not head.is_settled]
        self.forward = ForwardPass(tokens, decisions)

    def start_windows(self, windows: Windows) -> None:
        """Begin the first window of a text that has several."""
        self.windows = windows
        for head in self.heads:
            head.start_windows(windows)
        self.start(windows[0])

    def next_window(self) -> bool:
        """Record the window that ran, and begin the next one; False if no further window is needed."""
        windows, forward = self.windows, self.forward
        assert windows is not None and forward is not None
        self.num_ran += 1
        running = [head for head in self.heads if not head.is_settled]
        is_due = "deadline" in [head.end_window(forward) for head in running]
        left = [head for head in running if not head.is_settled]
        if is_due:
            for head in left:
                head.expire()
        if is_due or not left:
            return False
        self.start(windows[self.num_ran])
        return True


@dataclass(slots=True, eq=False)
class SharedPass:
    """The models of a job that have one encoder: each text passes through its layers once for all of them.

    Attributes:
        parts: their parts, in the order of the request.
        deepest: the model with the most layers, by whose timing the texts are scheduled.
        encoder: its encoder, on which the texts run.
        in_groups: the texts may run in groups.
    """

    parts: list[Part]
    deepest: Served
    encoder: Encoder
    in_groups: bool


@dataclass(slots=True, eq=False)
class Job:
    """The texts of one request, and the models that answer it.

    Every item is finished by exactly one engine thread. A job is dropped when its client disconnects, it times out or
    one of its items fails: its pending items then never run.

    The due time of an item is the job's submission plus the predicted time of the item itself and of all items
    before it in the batch. So short texts overtake long ones and single texts overtake large batches, but no text
    waits forever. If the job's deadline is admitted, it is the due time of every item.

    Attributes:
        served: the models, in the order of the request, and of the plan.
        on_done: called through the engine's `dispatch`: with None once every item has finished, or with the error of an
            item, perhaps more than once. If the job is dropped for another reason, it may never be called.
        sender: who sent the request.
        is_shadow: background job; it runs while nothing else is pending, and its answers are not returned.
        parts: each model's part.
        first: the first model's part, which is the answer in protocols that know only one model.
        passes: one for each encoder of the models, or more if it has more than MAX_HEADS.
        items: the texts, in the order of the request, once for each pass.
        client: client of the request.
        weight: number of its texts, each counted once for each model.
        is_dropped: its result is no longer needed.
        deadline: time by which the last text must exit (perf_counter seconds); None: no deadline.
        is_admitted: its deadline was admitted, so it is scheduled before jobs without one.
        is_late: the requested deadline cannot be met, and the request accepts a later one (best_effort).
        pending: number of its items in the queue; set by the queue.
        admitted_s: predicted seconds of these items if the deadline was admitted, else 0; set by the queue.
    """

    served: Sequence[Served]
    plan: Plan
    request: Request
    on_done: Callable[[Exception | None], None]
    sender: Sender = NOBODY
    is_shadow: bool = False
    submitted: float = field(default_factory=perf_counter)
    parts: list[Part] = field(init=False)
    items: list[Item] = field(init=False)
    first: Part = field(init=False)
    passes: list[SharedPass] = field(init=False)
    client: str = field(init=False)
    weight: int = field(init=False)
    is_dropped: bool = False
    deadline: float | None = None
    is_admitted: bool = False
    is_late: bool = False
    pending: int = 0
    admitted_s: float = 0.0
    _left: int = field(init=False)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        request, plan, served = self.request, self.plan, self.served
        self.client, self.weight = self.sender.client, len(request.texts) * len(served)
        self.parts = [
            Part(one, choice, entry, None if self.is_shadow else one.monitor)
            for one, choice, entry in zip(served, plan.choices, plan.entries, strict=True)
        ]
        self.first = self.parts[0]
        # A text with a deadline must have an answer at any time. The OOD score and the OOD flag use the readings of all
        # exits.
        asks_all_exits = request.explain or request.ood or plan.budget_s is not None
        if plan.budget_s is not None:
            self.deadline = self.submitted + plan.budget_s - REPLY_S - REPLY_TEXT_S * len(request.texts)
        self.passes, self.items = self._passes(), []
        due, windows = self.submitted, plan.windows
        for shared in self.passes:
            deepest, in_groups = shared.deepest, shared.in_groups
            for index, text in enumerate(request.texts):
                chars = text.chars
                predicted_s = deepest.timing.predict(chars, windows)
                due += predicted_s
                heads = [part.head(asks_all_exits or part.monitors_ood) for part in shared.parts]
                item = Item(self, shared, index, text, heads, predicted_s, due)
                item.is_short = chars <= 2 * PIECE
                if in_groups:
                    item.group_s = deepest.group_s(tokens_of(chars))
                if self.deadline is not None:
                    item.first_exit_s = max(
                        part.served.timing.predict_first_exit(chars, windows) for part in shared.parts
                    )
                self.items.append(item)
        self._left = len(self.items)

    def _passes(self) -> list[SharedPass]:
        """The passes; the deepest models come first, as others may have their first layers."""
        plan, passes = self.plan, list[SharedPass]()
        for part in self.parts if len(self.parts) == 1 else sorted(self.parts, key=_depth, reverse=True):
            fitting = (
                one for one in passes if len(one.parts) < MAX_HEADS and one.deepest.model.can_run(part.model)
            )
            if (shared := next(fitting, None)) is not None:
                shared.parts.append(part)
                continue
            encoder = part.model.encoder
            # A text with a deadline runs alone, so that it can exit after any layer. So does a text whose signal the
            # kernels lack, because it is scored between the layers.
            has_kernels = encoder.forward is not None and plan.has_codes
            in_groups = has_kernels and plan.budget_s is None and not self.is_shadow
            passes.append(SharedPass([part], part.served, encoder, in_groups))
        return passes

    @property
    def tokens(self) -> int:
        """Number of tokens that have been passed to the models so far, over all texts of the job."""
        return sum(item.num_tokens for item in self.items)

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

    def finish(self, item: Item, result: Result) -> bool:
        """Record an item's outcomes or error; True if it is the job's last item. Called by an engine thread."""
        if isinstance(result, Exception):
            for head in item.heads:
                head.error = result
        else:
            for head, outcome in zip(item.heads, result, strict=True):
                head.outcome = outcome
        with self._lock:
            self._left -= 1
            return self._left == 0

    def rows(self, part: Part) -> list[tuple[Item, Head]]:
        """The texts' items and heads for one model, in the order of the request."""
        items = (
            self.items if len(self.passes) == 1 else [one for one in self.items if part in one.shared.parts]
        )
        return list(zip(items, part.heads, strict=True))

    def release(self) -> None:
        """Release the items, which refer back to the job; otherwise only the garbage collector would free the texts."""
        self.items = []
        for part in self.parts:
            part.heads = []


def job_of(
    served: Sequence[Served],
    request: Request,
    level: int,
    on_done: Callable[[Exception | None], None],
    sender: Sender = NOBODY,
) -> Job:
    """Create the job of a request.

    served: the models of the request's entries. level: load level. Raises RequestError if a model
    cannot answer the request.
    """
    check_spans(request, served)
    for one in served:
        request = request.for_model(one.model.manifest, one.rules.flag)
        check_texts(request, one)
    return Job(served, plan_of(served, request, level, sender.tenant), request, on_done, sender)


def _depth(part: Part) -> int:
    return part.model.manifest.num_layers
