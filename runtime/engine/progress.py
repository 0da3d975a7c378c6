"""Progress of a text through the layers."""

from dataclasses import dataclass

from de3.exits.rule import ExitRule
from de3.exits.windows import EXPECTED_CHANGE, combination
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.segments import Tokens
from de3.model_store.tokenizer import Tokenization, Windows
from de3.runtime.engine.outcome import Window


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
class Progress:
    """The state of a text at a layer boundary, where it can be preempted and requeued; the same for all models.

    Attributes:
        tokenization: the tokenization in progress; None before it starts and after it ends.
        tokens: tokens of the text, or of the window that is running; None until the text is tokenized.
        num_tokens: number of tokens that have been passed to the model so far, over all windows.
        layer: the next layer to run.
        forward: the forward pass of the text, or of its current window; None before it starts and after the text exits.
        is_grouped: the text runs in a group.
        windows: the text's windows; None unless it has several.
        num_ran: number of windows that have run.
        tokenize_s, model_s: seconds spent so far on tokenization and in the layers.
    """

    tokenization: Tokenization | None = None
    tokens: Tokens | None = None
    num_tokens: int = 0
    layer: int = 0
    forward: ForwardPass | None = None
    is_grouped: bool = False
    windows: Windows | None = None
    num_ran: int = 0
    tokenize_s: float = 0.0
    model_s: float = 0.0
