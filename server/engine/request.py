"""A request in any protocol: texts to classify, and its options."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from de3.model_store.manifest import Manifest
from de3.server.settings import ExitOptions


@dataclass(frozen=True, slots=True)
class Text:
    """One text, or a pair of texts."""

    text: str
    text_pair: str | None = None

    @property
    def chars(self) -> int:
        """Number of characters, of both texts."""
        return len(self.text) + (len(self.text_pair) if self.text_pair else 0)


@dataclass(slots=True, eq=False)
class Request:
    """Texts to classify, and their options; every protocol parses its bodies into a Request.

    Attributes:
        input_name: the protocol's name for the texts, in messages.
        model: name or name:version; None: the server's default.
        explain: report every exit passed.
        ood: report the OOD score of each text.
        windows: maximum number of windows into which a long text is split.
        flag: name of a label to watch for in the windows, and the probability from which a text is flagged (None: the
            label's own threshold, or 0.5).
        client: fair-share key; the engine's time is shared between clients.
        expires_at: when it times out (perf_counter seconds); None: the server's `timeout_s` after its submission.
        keeps_errors: a text that cannot be answered is noted in its item, and the others go on; else the job fails.
    """

    input_name: ClassVar[str] = "input"

    texts: Sequence[Text]
    options: ExitOptions = field(default_factory=ExitOptions)
    model: str | None = None
    truncate: bool = True
    explain: bool = False
    ood: bool = False
    windows: int = 1
    flag: tuple[str, float | None] | None = None
    client: str = ""
    expires_at: float | None = None
    keeps_errors: bool = False

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for a model that cannot answer this kind of request."""

    def name_of(self, index: int) -> str:
        """The name of one of the texts in messages."""
        return f"{self.input_name}[{index}]" if len(self.texts) > 1 else self.input_name
