"""Progress of a text through the layers."""

from dataclasses import dataclass

from de3.exits.rule import ExitRule
from de3.exits.windows import Combination, Flag
from de3.model_store.forward import ForwardPass
from de3.model_store.segments import Array, Tokens
from de3.model_store.tokenizer import Tokenization, Windows
from de3.server.engine.outcome import Window


class WindowProgress:
    """Windows of a text that has several: all of them, those that have run, and their combined answer."""

    def __init__(self, windows: Windows, rule: ExitRule, flag: Flag | None) -> None:
        thresholds = None if rule.thresholds is None else rule.thresholds.logits
        self.all = windows
        self.ran: list[Window] = []
        self.combination = Combination([span.new for span in windows.spans], thresholds, flag)


@dataclass(slots=True, eq=False)
class Progress:
    """The state of a text at a layer boundary, where it can be preempted and requeued.

    Attributes:
        tokenization: the tokenization in progress; None before it starts and after it ends.
        tokens: tokens of the text, or of the window that is running; None until the text is tokenized.
        num_tokens: number of tokens that have been passed to the model so far, over all windows.
        layer: the next layer to run.
        forward: the forward pass of the text, or of its current window; None before it starts and after the text exits.
        is_grouped: the text runs in a group.
        states: mean hidden state of the tokens after each layer but the last, (num_layers, hidden), filled in as the
            layers run; None: not needed.
        windows: the text's windows; None unless it has several.
        tokenize_s, model_s: seconds spent so far on tokenization and in the layers.
    """

    tokenization: Tokenization | None = None
    tokens: Tokens | None = None
    num_tokens: int = 0
    layer: int = 0
    forward: ForwardPass | None = None
    is_grouped: bool = False
    states: Array | None = None
    windows: WindowProgress | None = None
    tokenize_s: float = 0.0
    model_s: float = 0.0

    @property
    def has_answer(self) -> bool:
        """True if the text has passed an exit, in this window or an earlier one."""
        has_ran = self.windows is not None and bool(self.windows.ran)
        return has_ran or (self.forward is not None and bool(self.forward.readings))

    def end_window(self) -> None:
        """Record the window that ran."""
        windows, forward = self.windows, self.forward
        assert windows is not None and forward is not None
        if passed := forward.readings:  # otherwise the deadline passed before the window's first exit
            windows.ran.append(Window(passed[-1].layer, passed, len(forward.tokens), forward.seconds))
            windows.combination.add(passed[-1])
