"""A head: what one model makes of a text, on a pass that it may share with other models."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from de3.exits.kinds import Spans
from de3.exits.reading import Answer, label_of
from de3.exits.rule import ExitReason, ExitRule
from de3.exits.spans import Layout
from de3.exits.windows import EXPECTED_CHANGE, combination
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.segments import Array
from de3.model_store.tokenizer import Windows
from de3.runtime.choice import Choice
from de3.runtime.engine.outcome import Outcome, Window
from de3.runtime.engine.request import Entry
from de3.runtime.engine.served import Served
from de3.runtime.ood import OodMonitor


class WindowProgress:
    """The windows of a text that have run, and their combined answer, for one model.

    Attributes:
        tokens, model_s: tokens of these windows, also of one without an exit, and seconds in the layers.
    """

    def __init__(self, windows: Windows, rule: ExitRule) -> None:
        self.ran: list[Window] = []
        self.tokens, self.model_s = 0, 0.0
        self.combination = combination(rule.kind, windows.spans, rule.flag)

    def add(self, decision: Decision, forward: ForwardPass) -> None:
        """Record a window that ran, unless the deadline passed before its first exit."""
        tokens = len(forward.tokens)
        self.tokens += tokens if forward.layer else 0
        self.model_s += decision.seconds
        if passed := decision.readings:
            self.ran.append(Window(passed[-1].layer, passed, tokens, decision.seconds))
            self.combination.add(passed[-1])

    def is_settled(self, decision: Decision) -> bool:
        """True if further windows would not change the answer, by the last window's decision."""
        return self.combination.is_settled(EXPECTED_CHANGE if decision.rule.tau > 0 else 1.0)


@dataclass(slots=True, eq=False)
class Part:
    """One model's part of a job.

    Attributes:
        choice: its exit rule.
        entry: the exit options and the flag that the client has set for it.
        monitor: its OOD monitor; None for shadow jobs.
        heads: a head for each text of the job, in the order of the request.
    """

    served: Served
    choice: Choice
    entry: Entry
    monitor: OodMonitor | None
    model: Model = field(init=False)
    heads: list["Head"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.served.model

    @property
    def monitors_ood(self) -> bool:
        """True if texts are flagged as out of distribution."""
        return self.monitor is not None and self.monitor.limits is not None

    @property
    def asks_first_exit(self) -> bool:
        """True if the first exit of every text is computed in any case."""
        rule = self.choice.rule
        return rule.tau > 0 and rule.signal.may_exit(self.model.manifest.exit_layers[0])

    def head(self, asks_all_exits: bool) -> "Head":
        """Add a head for the job's next text. asks_all_exits: see Head."""
        head = Head(self)
        head.asks_all_exits = asks_all_exits
        if self.monitor is not None and self.monitor.samples():
            head.is_sampled, head.asks_all_exits = True, asks_all_exits or not self.asks_first_exit
        self.heads.append(head)
        return head

    def outcomes(self) -> list[Outcome]:
        """The outcomes of the texts that have exited, in the order of the request."""
        return [head.outcome for head in self.heads if head.outcome is not None]

    def answers(self) -> Sequence[Answer]:
        """The answers to the texts of a finished job that have not failed, in the order of the request.

        An answer is a label, the labels of a multi-label model joined by commas, a value, or a set of spans.
        """
        if not self.model.manifest.has_classes:
            return [outcome.reading.answer for outcome in self.outcomes()]
        return self.labels()

    def labels(self) -> list[str]:
        """The label of each text that has not failed: a multi-label model's joined by commas, a value's name.

        Not for a token classifier.
        """
        names = self.model.manifest.labels
        return [label_of(outcome.reading, names) for outcome in self.outcomes()]


@dataclass(slots=True, eq=False)
class Head:
    """What one model makes of one text.

    Attributes:
        is_sampled: its reading at the first exit is used to measure drift.
        is_drawn: it was drawn for an audit.
        is_deep: it runs to full depth, whatever τ is.
        asks_all_exits: every exit is evaluated, even those at which it cannot exit.
        keeps_states: the mean hidden state of the text's tokens after each layer is kept, for fitting exits.
        states: these states, (num_layers, hidden), filled in as the layers run; None: not kept.
        decision: the model's decision about the text, or about its current window; None once it has an outcome.
        windows: the windows that have run; None unless the text has several.
        is_settled: further windows would not change the answer.
        outcome: the exit and the answer; None until the text exits.
        error: the error of a text that failed, in a job that keeps errors; None otherwise.
    """

    part: Part
    is_sampled: bool = False
    is_drawn: bool = False
    is_deep: bool = False
    asks_all_exits: bool = False
    keeps_states: bool = False
    states: Array | None = None
    decision: Decision | None = None
    windows: WindowProgress | None = None
    is_settled: bool = False
    outcome: Outcome | None = None
    error: Exception | None = None

    @property
    def has_answer(self) -> bool:
        """True if it has read an exit of the text, in this window or an earlier one."""
        has_read = self.decision is not None and bool(self.decision.readings)
        return has_read or (self.windows is not None and bool(self.windows.ran))

    def start_windows(self, windows: Windows) -> None:
        """Prepare for a text in several windows."""
        # A token classifier's texts in windows are not audited, and it takes only one of them to miss a span. As for
        # what a guard misses, only texts in one window are certified, and only they are held out for exits that are
        # learned.
        choice, manifest = self.part.choice, self.part.model.manifest
        has_none = isinstance(choice.rule.kind, Spans) or (
            choice.rule.flag is not None and manifest.learned is not None
        )
        self.is_deep |= choice.one_window or (has_none and choice.guarantee is not None)
        self.windows = WindowProgress(windows, choice.rule)

    def end_window(self, forward: ForwardPass) -> ExitReason | None:
        """Record the window that ran; returns why it ended."""
        assert self.windows is not None and self.decision is not None
        self.windows.add(self.decision, forward)
        self.is_settled = self.windows.is_settled(self.decision)
        return self.decision.reason

    def expire(self) -> None:
        """End a text in windows at its deadline, with the answer so far."""
        assert self.decision is not None
        self.decision.reason = "deadline"

    def decide(self, layout: Layout | None) -> Decision:
        """Begin the decision about the text, or about its next window, whose tokens have this layout."""
        model, monitor, rule = self.part.model, self.part.monitor, self.part.choice.rule
        rule = replace(rule, tau=0.0) if self.is_deep else rule
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
            layout,
        )
        return self.decision
