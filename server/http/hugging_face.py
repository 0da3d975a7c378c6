"""The protocols of Hugging Face's tasks text-classification and, with a token classifier, token-classification.

It answers POST /, which InferenceClient(base_url) sends, and bodies with `inputs` on /classify. `parameters` may have
`top_k` and `function_to_apply` or, for a token classifier, `aggregation_strategy` and `ignore_labels`; `stride` has no
effect, as the windows of long texts always overlap. Spans are `{"entity_group", "score", "word", "start", "end"}`, with
`entity` instead of `entity_group` if the strategy is `none`; `word` is the slice of the text as sent.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.kinds import Spans
from de3.exits.reading import TextReading, ValueReading, read, sigmoid
from de3.exits.spans import Aggregation
from de3.model_store.manifest import Manifest
from de3.model_store.part import MAX_LABELS
from de3.runtime.answer import DECIMALS, ranked
from de3.runtime.engine.job import Job
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.request import Request, SpanOptions, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import JsonObject, check_count, check_fields, checked_text, load_json, one_or_more
from de3.runtime.flags import Wanted
from de3.runtime.options import OptionFields, long_of
from de3.server.http.errors import message_body
from de3.server.http.protocol import Call, Protocol

Function = Literal["softmax", "sigmoid", "none"]
EXAMPLE = '{"inputs": "a text"}'


@dataclass(frozen=True, slots=True, eq=False)
class TaskRequest(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        is_nested: the response is a list with an entry for each text.
        is_list: `inputs` is a list of texts; with a token classifier, it decides instead of is_nested.
        only_classes: the given parameter that a token classifier does not have; None: there is none.
        top_k: maximum number of labels for each text; None: all.
        function: turns logits into scores; None: the model's own (sigmoid for a multi-label model, none for a
            regression model, else softmax).
    """

    input_name: ClassVar[str] = "inputs"
    takes_spans: ClassVar[bool] = True

    is_nested: bool = True
    is_list: bool = False
    only_classes: str | None = None
    top_k: int | None = None
    function: Function | None = None

    def fits(self, manifest: Manifest) -> bool:
        """True if the model has the given parameters."""
        # super() does not work in a dataclass with slots.
        return Request.fits(self, manifest) and not (manifest.is_spans and self.only_classes)

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The request for a model; raises RequestError for a parameter that a token classifier does not have."""
        if manifest.is_spans and self.only_classes is not None:
            raise RequestError(
                f"{self.only_classes}: {manifest.full_name} is a token classifier: a text has no probabilities",
                self.only_classes,
            )
        return self


def _text(value: Any, where: str) -> Text:
    if not isinstance(value, dict):
        return Text(checked_text(value, where, "a text, or an object with text"))
    if not {"text"} <= value.keys() <= {"text", "text_pair"}:
        raise ValueError(f"{where}: an object must have text, and may have text_pair")
    text = checked_text(value["text"], f"{where}.text")
    return Text(text, checked_text(value["text_pair"], f"{where}.text_pair") if len(value) == 2 else None)


class Parameters(OptionFields):
    """The `parameters` of a request, extended by the exit options."""

    top_k: int | None = Field(None, ge=1, description="maximum number of labels of a text")
    function_to_apply: Function | None = Field(
        None, description="default: softmax; sigmoid for a multi-label model, none for a regression model"
    )
    aggregation_strategy: Aggregation | None = Field(None, description="for a token classifier")
    ignore_labels: list[str] | None = Field(
        None, max_length=MAX_LABELS, description="for a token classifier; default: O"
    )
    stride: int | None = Field(
        None, ge=0, description="for a token classifier; no effect: windows always overlap"
    )
    truncation: bool | Literal["only_first", "longest_first"] | None = Field(
        None,
        description="true: truncate texts that are too long; false: refuse them. Default: as the model's settings "
        "say or, without them, true, but a token classifier or a model with a flag reads windows",
    )
    padding: Any = Field(None, description="accepted and ignored")
    max_length: Any = Field(None, description="accepted and ignored")

    @property
    def spans(self) -> SpanOptions | None:
        """The options for spans; None if none are given."""
        given = self._first("aggregation_strategy", "ignore_labels", "stride")
        if given is None:
            return None
        names = given, "ignore_labels", "", ""
        return SpanOptions(self.aggregation_strategy, ignored=self.ignore_labels, names=names)

    @property
    def only_classes(self) -> str | None:
        """The given parameter that a token classifier does not have; None: there is none."""
        return self._first("top_k", "function_to_apply")

    def _first(self, *names: str) -> str | None:
        return next((name for name in names if getattr(self, name) is not None), None)


class TaskFields(JsonObject):
    """The body of a request."""

    model: str | None = None
    inputs: Annotated[list[Text], BeforeValidator(partial(one_or_more, _text))]
    parameters: dict[str, Any] | None = None


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError if it is invalid."""
    return request_of(load_json(call.body), call.max_texts)


def request_of(value: Any, max_texts: int, nests_one: bool = True) -> TaskRequest:
    """The request in a parsed body; raises RequestError if it is invalid or has more than `max_texts` texts.

    nests_one: respond with a list of lists even to a single text.
    """
    if isinstance(value, dict):
        value.pop("options", None)  # options of the hosted API, such as use_cache
    check_count(value, "inputs", max_texts)
    fields = check_fields(TaskFields, value, EXAMPLE)
    parameters = check_fields(Parameters, fields.parameters or {}, '{"top_k": 2}')
    is_list = isinstance(value["inputs"], list)
    return TaskRequest(
        fields.inputs,
        parameters.options,
        fields.model,
        long_of(parameters.truncation),
        spans=parameters.spans,
        is_nested=nests_one or is_list,
        is_list=is_list,
        only_classes=parameters.only_classes,
        top_k=parameters.top_k,
        function=parameters.function_to_apply,
    )


def serialize(_: str, job: Job) -> bytes:
    """[{"label", "score"}, …], the most probable first; if nested, a list of such lists. Or spans, in order."""
    assert isinstance(job.request, TaskRequest)
    if job.first.model.manifest.is_spans:
        entities = list(map(_entities, job.request.texts, job.first.outcomes()))
        return orjson.dumps(entities if job.request.is_list else entities[0])
    labels, request = job.first.model.manifest.labels, job.request
    rows = [_scores(outcome.text_reading, labels, request) for outcome in job.first.outcomes()]
    return orjson.dumps(rows if job.request.is_nested else rows[0])


def _entities(text: Text, outcome: Outcome) -> list[dict[str, Any]]:
    """The spans of a text, as transformers' pipeline returns them.

    Without those that repeat another, such as the pieces of one emoji, and those without characters: vLLM's semantic
    router refuses them.
    """
    kind = outcome.rule.kind
    assert isinstance(kind, Spans)
    name = "entity" if kind.rule.aggregation == "none" else "entity_group"
    distinct = {span[:3]: span for span in outcome.reading.spans if span.start < span.end}
    return [
        {
            name: span.label,
            "score": round(span.score, DECIMALS),
            "word": text.text[span.start : span.end],
            "start": span.start,
            "end": span.end,
        }
        for span in distinct.values()
    ]


def _scores(reading: TextReading, labels: list[str], request: TaskRequest) -> list[dict[str, Any]]:
    function = request.function or ("none" if isinstance(reading, ValueReading) else None)
    best = ranked(_apply(function, reading), labels, request.top_k, exact=function == "none")
    return [{"label": label, "score": score} for score, label in best]


def _apply(function: Function | None, reading: TextReading) -> list[float]:
    if function == "none":
        return reading.logits
    if function is None and not isinstance(reading, ValueReading):
        return reading.probs
    if function == "softmax":
        return [1.0] if isinstance(reading, ValueReading) else read(reading.layer, reading.logits, None).probs
    return [sigmoid(x) for x in reading.logits]


TEXT_CLASSIFICATION = Protocol(parse, serialize, message_body, example=EXAMPLE)
