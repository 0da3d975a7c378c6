"""A request to classify texts, its fields in JSON, and its options, which the server and `de3.load` share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from de3.exits.spans import Aggregation
from de3.model_store.manifest import Manifest
from de3.model_store.part import MAX_LABELS, Share
from de3.runtime.engine.request import Request, SpanOptions, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import JsonObject, check_fields, checked_text, one_or_more
from de3.runtime.flags import Wanted
from de3.runtime.options import NO_OPTIONS, ExitOptions, Long, OptionFields, long_of

MAX_TEMPLATE = 100  # characters that replace a span
MAX_MODELS = 16  # models that answer a request


@dataclass(frozen=True, slots=True, eq=False)
class Classification(Request):
    """A request with the options of its answer (answer.py).

    Attributes:
        id: the client's `request_id`, from which the response gets its id; None: use the server's request id.
        raw: respond with logits instead of probabilities.
        top_k: number of labels to list as `top`, the most probable first; 0: none.
        indices: indices of the texts in the input, for messages; empty if they are the whole input.
    """

    takes_spans: ClassVar[bool] = True
    says_unread: ClassVar[bool] = True

    id: str | None = None
    raw: bool = False
    top_k: int = 0
    indices: Sequence[int] = ()

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The same request; raises RequestError for `top_k` or `raw` with a model that has no labels to rank."""
        if manifest.is_spans and (self.top_k or self.raw):
            name = "top_k" if self.top_k else "raw"
            raise RequestError(
                f"{name}: {manifest.full_name} is a token classifier: a text has no probabilities", name
            )
        if self.top_k and manifest.tolerance is not None:
            raise RequestError(
                f"top_k: {manifest.full_name} is a regression model: it has no labels to rank",
                "top_k",
            )
        return self

    def name_of(self, index: int) -> str:
        """The name of one text in error messages."""
        # super() does not work in a dataclass with slots.
        return f"input[{self.indices[index]}]" if self.indices else Request.name_of(self, index)


def text_of(value: Any, where: str) -> Text:
    """The text or pair in a JSON value; raises ValueError for any other value, and for a blank text.

    where: position of the value, for the message.
    """
    if not isinstance(value, dict):
        return Text(checked_text(value, where, "a text, or an object with text and text_pair"))
    if len(value) != 2 or "text" not in value or "text_pair" not in value:
        missing = [key for key in ("text", "text_pair") if key not in value]
        surplus = sorted({*islice(value, 6)} - {"text", "text_pair"})  # the first few; there may be 100,000
        problem = f"{' and '.join(missing)} missing" if missing else f"unknown field {surplus[0][:100]!r}"
        raise ValueError(f"{where}: an object must have exactly text and text_pair: {problem}")
    return Text(
        checked_text(value["text"], f"{where}.text"), checked_text(value["text_pair"], f"{where}.text_pair")
    )


class TextPair(JsonObject):
    """Two texts that are classified together."""

    text: str
    text_pair: str


# For the schema only. `text_of` checks the values, as a pydantic model for each text would be slower.
OneText = Annotated[str, Field(min_length=1)] | TextPair
OneOrMore = OneText | Annotated[list[OneText], Field(min_length=1)]
Texts = Annotated[
    list[Text], BeforeValidator(partial(one_or_more, text_of), json_schema_input_type=OneOrMore)
]


class ModelFields(OptionFields):
    """One of several models that answer a request, and its own exit options."""

    model: str = Field(description="name, or name:version")


def _entries(value: Any) -> Any:
    """The names and entries in a JSON list of models; raises RequestError for an invalid one, and for too many."""
    if not isinstance(value, list):
        return value
    if not 0 < len(value) <= MAX_MODELS:
        raise RequestError(f"models: {len(value)} models; give 1 to {MAX_MODELS}", "models")
    return [one if isinstance(one, str) else _entry(one, f"models[{i}]") for i, one in enumerate(value)]


def _entry(value: Any, where: str) -> ModelFields:
    if not isinstance(value, dict):
        raise RequestError(f"{where}: must be a name, or an object with model and exit options", where)
    try:
        return check_fields(ModelFields, value, "")
    except RequestError as error:
        raise error.inside(where) from None


# For the schema only, as `_entries` checks the values.
Entries = Annotated[list[str | ModelFields], Field(min_length=1, max_length=MAX_MODELS)]


def _min_score(value: Any) -> Any:
    """The value, if it is a score, or an object of scores by label; otherwise raises ValueError."""
    scores = value.values() if isinstance(value, dict) else [value]
    if len(scores) > MAX_LABELS:
        raise ValueError(f"has {len(scores)} labels; at most {MAX_LABELS} are allowed")
    for one in scores:
        if isinstance(one, bool) or not isinstance(one, float | int) or not 0 <= one <= 1:
            raise ValueError("must be a number from 0 to 1, or an object of such numbers by label")
    return value


def _templates(value: Any) -> Any:
    """The value, if it is true, false, or an object of templates by label; otherwise raises ValueError."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise ValueError(f"must be true, or an object of up to {MAX_LABELS} templates by label")
    for name, template in value.items():
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            raise ValueError(f"[{name[:100]!r}]: must be a text of at most {MAX_TEMPLATE} characters")
        if template != template.encode(errors="replace").decode():
            raise ValueError(f"[{name[:100]!r}]: has half of a surrogate pair, which is not a character")
    return value


class ClassifyRequest(OptionFields):
    """A request to classify one or more texts."""

    model: str | None = Field(
        None,
        description="name (its current version, or a canary) or name:version; required if several models are "
        "served and none is the default",
    )
    models: Annotated[
        list[str | ModelFields] | None,
        BeforeValidator(_entries, json_schema_input_type=Entries | None),
    ] = Field(
        None,
        description="instead of model: models that all answer, each as it would alone, those with the same encoder on "
        "one pass; a name, or an object with a name and exit options, which replace the request's",
    )
    input: Texts = Field(description="a text, a pair, or a list of them")
    truncate: bool | None = Field(
        None, description="true: the same as long: truncate; false: the same as long: error"
    )
    long: Long | None = Field(
        None,
        description="how to handle texts longer than the model's limit: truncate, windows (run overlapping windows "
        "until their combined answer is settled), or error. Default: --long or, without it, windows for a token "
        "classifier or a model with a flag, else truncate",
    )
    flag: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="a label to watch for: texts exit early only if they are not flagged. With long: windows, the "
        "answer is that of the window where it is most probable; the first window that is flagged is the last to run",
    )
    flag_threshold: float | None = Field(
        None, gt=0, lt=1, description="default: 0.5, or the label's threshold in a multi-label model"
    )
    explain: bool = Field(False, description="report every exit passed")
    ood: bool = Field(
        False, description="report how far a text is from the calibration's distribution, as ood_score"
    )

    raw: bool = Field(False, description="logits instead of probabilities, in probs")
    top_k: int | None = Field(None, ge=1, description="report this many of the most probable labels, as top")
    aggregation: Aggregation | None = Field(
        None,
        description="for a token classifier: how tokens are grouped into spans, as in transformers; default: the "
        "model's (simple, if it was not chosen at import)",
    )
    labels: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="for a token classifier: labels of the spans to return",
    )
    min_score: Annotated[
        float | dict[str, float],
        BeforeValidator(_min_score, json_schema_input_type=Share | dict[str, Share]),
    ] = Field(0.0, description="for a token classifier: lowest score of a span, for all labels or by label")
    redact: Annotated[
        bool | dict[str, str], BeforeValidator(_templates, json_schema_input_type=bool | dict[str, str])
    ] = Field(
        False,
        description="for a token classifier: return the text with each span replaced by its label in brackets, or by "
        "the template of its label; the whole text is read, and not kept",
    )
    request_id: str | None = Field(None, max_length=128, description="id of the response")
    use_activation: bool | None = Field(None, description="false: the same as raw: true")
    activation: bool | None = Field(None, description="the former name of use_activation")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="truncate, except for a model with a flag"
    )
    truncation_side: Literal["right"] | None = Field(
        None, description="accepted; texts are truncated at their end"
    )
    add_special_tokens: Literal[True] | None = Field(
        None, description="accepted; special tokens are always added"
    )
    user: Any = Field(None, description="accepted and ignored")
    rid: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")
    padding: Any = Field(None, description="accepted and ignored")
    cache_salt: Any = Field(None, description="accepted and ignored")
    mm_processor_kwargs: Any = Field(None, description="accepted and ignored")

    @model_validator(mode="after")
    def _check_more(self) -> "ClassifyRequest":
        if self.long is not None and self.truncate is not None and self.truncate == (self.long == "error"):
            raise ValueError(
                f"long: {self.long} contradicts truncate: {str(self.truncate).lower()}; give one of them "
                "(truncate: false is the same as long: error)"
            )
        if self.flag_threshold is not None and self.flag is None:
            raise ValueError("flag_threshold: needs flag, the label to watch for")
        if self.models is not None and self.model is not None:
            raise ValueError("models: cannot be combined with model; name all models in models")
        if self.redact is not False:
            if self.truncate:
                raise ValueError(
                    "redact: contradicts truncate: true, which would leave a part of the text unread"
                )
            if self.long == "truncate":
                raise ValueError(
                    "redact: contradicts long: truncate, which would leave a part of the text unread"
                )
            if self.models is not None:
                raise ValueError("redact: cannot be combined with models; name one model in model")
        _ = self.options_of_models
        return self

    @property
    def spans(self) -> SpanOptions | None:
        """The options for spans; None if none are set."""
        if self.aggregation is None and self.labels is None and not self.min_score and self.redact is False:
            return None  # also if a client sends the defaults
        templates = None if self.redact is False else {} if self.redact is True else self.redact
        return SpanOptions(self.aggregation, self.labels, None, self.min_score, templates)

    @cached_property
    def options_of_models(self) -> list[tuple[str, ExitOptions]]:
        """The models that answer, with the exit options of each; empty without `models`.

        Raises ValueError for options that cannot be combined.
        """
        return [self._options_of(one, f"models[{i}]") for i, one in enumerate(self.models or [])]

    def _options_of(self, one: str | ModelFields, where: str) -> tuple[str, ExitOptions]:
        if isinstance(one, str):
            return one, self.options
        if one.latency_budget_ms is not None or one.best_effort:
            name = "best_effort" if one.latency_budget_ms is None else "latency_budget_ms"
            raise ValueError(
                f"{where}.{name}: a budget is that of the whole answer; set it outside of models"
            )
        if one.options == NO_OPTIONS:
            return one.model, self.options
        try:
            budget, best_effort = self.options.latency_budget_ms, self.options.best_effort
            return one.model, replace(one.options, latency_budget_ms=budget, best_effort=best_effort)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None


def request_of(fields: ClassifyRequest) -> Classification:
    """The request with these fields."""
    return Classification(
        fields.input,
        fields.options,
        fields.model,
        fields.long
        or ("truncate" if fields.truncate else long_of(fields.truncate))
        or long_of(fields.truncate_prompt_tokens),
        fields.explain,
        fields.ood,
        flag=None if fields.flag is None else Wanted([fields.flag], fields.flag_threshold),
        models=fields.options_of_models,
        spans=fields.spans,
        id=fields.request_id,
        raw=fields.raw or fields.use_activation is False or fields.activation is False,
        top_k=fields.top_k or 0,
    )
