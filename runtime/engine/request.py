"""A request, independent of its protocol: the texts to classify, and their options."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from de3.exits.spans import OUTSIDE, Aggregation, SpanRule
from de3.model_store.manifest import Manifest
from de3.runtime.engine.outcome import Outcome
from de3.runtime.errors import RequestError
from de3.runtime.flags import Wanted
from de3.runtime.options import NO_OPTIONS, AskedLong, ExitOptions, Long

if TYPE_CHECKING:
    from de3.runtime.engine.served import Served

MAX_NAMED = 40  # labels in a message


@dataclass(frozen=True, slots=True)
class Text:
    """One text, or a pair of texts."""

    text: str
    text_pair: str | None = None

    @property
    def chars(self) -> int:
        """Number of characters; for a pair, of both texts together."""
        return len(self.text) + (len(self.text_pair) if self.text_pair else 0)


@dataclass(frozen=True, slots=True)
class SpanOptions:
    """A request's options for the spans of a token classifier.

    Attributes:
        aggregation: how spans are made; None: the model's own.
        kept: labels of the spans to return; None: all. ignored: labels of spans that are never returned; None: O.
        min_score: lowest score of the spans to return, for all labels or by label.
        templates: the answer is the text with each span replaced, by its label's template or, without one, [LABEL]; no
            audit, record or answer then has the text. None: nothing is replaced.
        merges: see SpanRule; also true with templates.
        names: the protocol's fields for kept, ignored, min_score and templates, for error messages, such as labels or
            detector_params: labels.
    """

    aggregation: Aggregation | None = None
    kept: Sequence[str] | None = None
    ignored: Sequence[str] | None = None
    min_score: float | Mapping[str, float] = 0.0
    templates: Mapping[str, str] | None = None
    merges: bool = False
    names: tuple[str, str, str, str] = ("labels", "ignore_labels", "min_score", "redact")

    @property
    def given(self) -> tuple[bool, ...]:
        """For each of `names`, true if it is set; the aggregation, which every protocol has, counts as the first."""
        is_set = self.kept is not None or self.aggregation is not None
        return is_set, self.ignored is not None, self.min_score != 0.0, self.templates is not None

    def rule_for(self, manifest: Manifest) -> SpanRule:
        """The rule for the spans of a token classifier; raises RequestError for a label that it does not have."""
        labels, aggregation = tuple(manifest.labels), self.aggregation or manifest.aggregation or "simple"
        known = set(SpanRule(labels, aggregation, ignored=frozenset()).names)
        scores = self.min_score if isinstance(self.min_score, Mapping) else {"": self.min_score}
        found = known - {OUTSIDE}
        # The usual label O may be named to be ignored, whether the model has it or not.
        allowed = found, known | {OUTSIDE}, found, found
        named = self.kept, self.ignored, scores.keys() - {""}, self.templates
        for field, names, some in zip(self.names, named, allowed, strict=True):
            for name in names or ():
                if name not in some:
                    raise RequestError(
                        f"{field}: {manifest.full_name} finds no {name[:100]!r}; it finds "
                        f"{', '.join(sorted(found)[:MAX_NAMED])}",
                        field.partition(":")[0],
                    )
        rule = SpanRule(labels, aggregation, None if self.kept is None else frozenset(self.kept))
        ignored = rule.ignored if self.ignored is None else frozenset(self.ignored)
        least = {name: score for name, score in scores.items() if name or score > 0}
        merges = bool(least) and (self.merges or self.templates is not None)
        return replace(rule, ignored=ignored, min_scores=least, merges=merges)


class Entry(NamedTuple):
    """A model that is to answer a request (None: the default), and its exit options.

    Attributes:
        where: the entry in `models`, for error messages; empty without `models`.
        flag: what its texts are flagged for; None: as the model's settings say.
    """

    model: str | None
    options: ExitOptions = NO_OPTIONS
    where: str = ""
    flag: Wanted | None = None


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent a request.

    Attributes:
        client: fair-share key; the engine's time is shared between clients.
        tenant: name of the request's API key, or empty; a guarantee holds for each tenant.
        expires_at: time at which the request times out (perf_counter seconds); None: `timeout_s` (a setting) after
            its submission.
    """

    client: str = ""
    tenant: str = ""
    expires_at: float | None = None


NOBODY = Sender()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Texts to classify, and their options: what was asked. Every protocol parses its bodies into a Request.

    Attributes:
        input_name: the protocol's field for the texts, for error messages.
        needs_a_set_default: if several models fit, a request that does not name one is answered only by a default from
            the settings, not by the first model: one guard must not answer in place of another.
        takes_spans: the protocol can return spans, so token classifiers can answer.
        usual_long: how the protocol reads long texts, unless the request or the model's settings say otherwise.
        says_unread: its response says if a part of a text was not read, or not in time. In other protocols, texts that
            are too long for windows are refused, and a budget that ends too early is an error.
        model: name or name:version; None: the server's default.
        long: how the request wants long texts to be read; None: as the model's settings or the protocol say.
        explain: report the reading of every exit that a text passes.
        ood: report the OOD score of each text.
        flag: what the texts are flagged for; None: as the model's settings say.
        spans: options for the spans of token classifiers; None: none are set.
        keeps_errors: the RequestError of a text, such as one that is too long, is recorded in the text's item, and the
            other texts are still answered; any other error fails the whole job. If false, every error does.
        models: the models that all answer, each with its options; empty: `model` answers, with `options`.
    """

    input_name: ClassVar[str] = "input"
    needs_a_set_default: ClassVar[bool] = False
    takes_spans: ClassVar[bool] = False
    usual_long: ClassVar[Long] = "truncate"
    says_unread: ClassVar[bool] = False

    texts: Sequence[Text]
    options: ExitOptions = NO_OPTIONS
    model: str | None = None
    long: AskedLong | None = None
    explain: bool = False
    ood: bool = False
    flag: Wanted | None = None
    spans: SpanOptions | None = None
    keeps_errors: bool = False
    models: Sequence[tuple[str, ExitOptions]] = ()

    @property
    def is_private(self) -> bool:
        """True if nothing may keep its texts: they are redacted."""
        return self.spans is not None and self.spans.templates is not None

    @property
    def entries(self) -> list[Entry]:
        """The models that are to answer."""
        if not self.models:
            return [Entry(self.model, self.options, "", self.flag)]
        return [
            Entry(name, options, f"models[{i}]", self.flag) for i, (name, options) in enumerate(self.models)
        ]

    @property
    def weight(self) -> int:
        """Number of texts for the rate limit, each counted once for each model."""
        return len(self.texts) * len(self.entries)

    def served(self, get: "Callable[..., Served]") -> "list[Served]":
        """The models that answer, one for each entry; raises RequestError.

        get: returns the model of a name (None: the default), given `fits` and `needs_a_set_default`.
        """
        found = []
        for entry in self.entries:
            try:
                found.append(get(entry.model, self.fits, self.needs_a_set_default))
            except RequestError as error:
                raise error.inside(entry.where) from None
        return found

    @property
    def others(self) -> int | None:
        """Number of its questions that no model answers, but a decision server; None: it has no questions."""
        return None

    async def ask_others(self, ask: Callable[[Any], Awaitable[Any]]) -> None:
        """Have the decision server answer these questions, beside the models; raises RequestError.

        ask: returns the server's reply to upstream.client.Asked; raises RequestError.
        """

    def fits(self, manifest: Manifest) -> bool:
        """True if the model can answer this kind of request; chooses the model if a request does not name one."""
        return manifest.is_spans if self.spans is not None else self.takes_spans or not manifest.is_spans

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The request as a model is to answer it; raises RequestError if it cannot. Subclasses override it.

        flag: the flag of the model's settings.
        """
        return self

    def check(self, outcome: Outcome) -> None:
        """Raise RequestError if a budget ended too early, and the response cannot say so."""
        if not self.says_unread:
            outcome.check_all_ran()

    def name_of(self, index: int) -> str:
        """The name of one text in error messages: the field, with an index if the request has several texts."""
        return f"{self.input_name}[{index}]" if len(self.texts) > 1 else self.input_name
