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
    """The windows of a text that has several: all, those that ran, and their combined answer."""

    def __init__(self, windows: Windows, rule: ExitRule, flag: Flag | None) -> None:
        thresholds = None if rule.thresholds is None else rule.thresholds.logits
        self.all = windows
        self.ran: list[Window] = []
        self.combination = Combination([span.new for span in windows.spans], thresholds, flag)


@dataclass(slots=True, eq=False)
class Progress:
    """The state of a text at a layer boundary, where it can be preempted and requeued.

    Attributes:
        rule: the job's, or a more cautious one once the text is_far from every prototype.
        tokenization: None before it starts and after it ends.
        tokens: of the window that is running; None until they are known.
        num_tokens: number of tokens that have started to run: of the text, or of some of its windows.
        layer: the next layer to run.
        hidden: (1, tokens, hidden), the input of that layer; None before layer 0 ran.
        forward: its forward pass in a group.
        states: the mean of the tokens after each layer but the last, (num_layers, hidden), as far as it came; None: not
            kept.
        passed: the reading of every exit passed, in this window.
        windows: None unless the text has several.
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
        """True if it passed an exit, in this window or an earlier one."""
        return bool(self.passed or (self.windows is not None and self.windows.ran))

    def split(self, windows: Windows, flag: Flag | None) -> None:
        """Split the text into several windows; the first one runs next."""
        self.windows = WindowProgress(windows, self.rule, flag)
        self.tokens = windows[0]

    def end_window(self) -> None:
        """Record the window that ran, and continue with the next one, if any."""
        windows = self.windows
        assert windows is not None and self.tokens is not None
        if self.passed:  # else its deadline passed before its first exit
            seconds = self.model_s - sum(window.model_s for window in windows.ran)
            windows.ran.append(Window(self.passed[-1].layer, self.passed, len(self.tokens), seconds))
            windows.combination.add(self.passed[-1])
        if len(windows.ran) < len(windows.all):
            self.layer, self.hidden, self.passed = 0, None, []
            self.tokens = windows.all[len(windows.ran)]

    def record(self, reading: Reading, monitor: OodMonitor | None) -> None:
        """Score and store an exit's reading; once a text is out of distribution, lower its τ."""
        self.passed.append(reading)
        reading.score = self.rule.signal.score(self.passed)
        if monitor is not None and not self.is_far and monitor.is_far(reading):
            self.be_cautious(monitor)

    def be_cautious(self, monitor: OodMonitor) -> None:
        """Lower τ, as the text is out of distribution."""
        self.is_far = True
        self.rule = replace(self.rule, tau=self.rule.tau * monitor.caution)
