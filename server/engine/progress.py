"""Progress of a text through the layers."""

from dataclasses import dataclass, field, replace

from de3.exits.reading import Reading
from de3.exits.rule import ExitRule
from de3.exits.windows import Combination, Flag
from de3.model_store.segments import Array, ForwardPass, Tokens
from de3.model_store.tokenizer import Tokenization, Windows
from de3.server.engine.outcome import Window
from de3.server.ood import OodMonitor


class WindowProgress:
    """The windows of a text that has several: all of them, those that have run, and their combined answer."""

    def __init__(self, windows: Windows, rule: ExitRule, flag: Flag | None) -> None:
        thresholds = None if rule.thresholds is None else rule.thresholds.logits
        self.all = windows
        self.ran: list[Window] = []
        self.combination = Combination([span.new for span in windows.spans], thresholds, flag)


@dataclass(slots=True, eq=False)
class Progress:
    """The state of a text at a layer boundary, where it can be preempted and requeued.

    Attributes:
        rule: the job's rule; once is_far is set, the same rule with τ multiplied by the monitor's tau_factor.
        tokenization: the tokenization in progress; None before it starts and after it ends.
        tokens: tokens of the text, or of the window that is running; None until the text is tokenized.
        num_tokens: number of tokens that have been passed to the model so far, over all windows.
        layer: the next layer to run.
        hidden: input of that layer, (1, tokens, hidden); None before layer 0 has run, and in a group.
        forward: the forward pass of a text in a group; None if it runs alone.
        states: mean hidden state of the tokens after each layer but the last, (num_layers, hidden), filled in as the
            layers run; None: not needed.
        passed: the reading of every exit passed, in the current window.
        is_far: the text was far from every prototype at some exit.
        windows: the text's windows; None unless it has several.
        tokenize_s, model_s: seconds spent so far on tokenization and in the layers.
    """

    rule: ExitRule
    tokenization: Tokenization | None = None
    tokens: Tokens | None = None
    num_tokens: int = 0
    layer: int = 0
    hidden: Array | None = None
    forward: ForwardPass | None = None
    states: Array | None = None
    passed: list[Reading] = field(default_factory=list)
    is_far: bool = False
    windows: WindowProgress | None = None
    tokenize_s: float = 0.0
    model_s: float = 0.0

    @property
    def has_answer(self) -> bool:
        """True if the text has passed an exit, in this window or an earlier one."""
        return bool(self.passed or (self.windows is not None and self.windows.ran))

    def split(self, windows: Windows, flag: Flag | None) -> None:
        """Split the text into several windows; the first one runs next."""
        self.windows = WindowProgress(windows, self.rule, flag)
        self.tokens = windows[0]

    def end_window(self) -> None:
        """Record the window that ran, and continue with the next one, if any."""
        windows = self.windows
        assert windows is not None and self.tokens is not None
        if self.passed:  # otherwise the deadline passed before the window's first exit
            seconds = self.model_s - sum(window.model_s for window in windows.ran)
            windows.ran.append(Window(self.passed[-1].layer, self.passed, len(self.tokens), seconds))
            windows.combination.add(self.passed[-1])
        if len(windows.ran) < len(windows.all):
            self.layer, self.hidden, self.passed = 0, None, []
            self.tokens = windows.all[len(windows.ran)]

    def record(self, reading: Reading, monitor: OodMonitor | None) -> None:
        """Score and store an exit's reading; lower τ at the first exit where the text is out of distribution."""
        self.passed.append(reading)
        reading.score = self.rule.signal.score(self.passed)
        if monitor is not None and not self.is_far and monitor.is_far(reading):
            self.be_cautious(monitor)

    def be_cautious(self, monitor: OodMonitor) -> None:
        """Mark the text as out of distribution, and multiply its τ by the monitor's tau_factor."""
        self.is_far = True
        self.rule = replace(self.rule, tau=self.rule.tau * monitor.tau_factor)
