"""The protocol of Hugging Face's text-classification task.

It answers POST /, which InferenceClient(base_url) sends, and bodies with `inputs` on /classify.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.reading import Reading, read, sigmoid
from de3.server.answer import ranked
from de3.server.engine.job import Job
from de3.server.engine.request import Request, Text
from de3.server.fields import JsonObject, check_count, check_fields, checked_text, load_json, one_or_more
from de3.server.http.errors import message_body
from de3.server.http.protocol import Call, Protocol
from de3.server.options import OptionFields

Function = Literal["softmax", "sigmoid", "none"]
EXAMPLE = '{"inputs": "a text"}'


@dataclass(slots=True, eq=False)
class TaskRequest(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        is_nested: the response is a list with an entry for each text.
        top_k: maximum number of labels for each text; None: all.
        function: turns logits into scores; None: the model's own (sigmoid for a multi-label model, none for a
            regression model, else softmax).
    """

    input_name: ClassVar[str] = "inputs"

    is_nested: bool = True
    top_k: int | None = None
    function: Function | None = None


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
    truncation: bool | Literal["only_first", "longest_first"] | None = Field(
        True, description="truncate texts that are too long instead of refusing them"
    )
    padding: Any = Field(None, description="accepted and ignored")
    max_length: Any = Field(None, description="accepted and ignored")


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
    return TaskRequest(
        fields.inputs,
        parameters.options,
        fields.model,
        truncate=parameters.truncation is not False,
        is_nested=nests_one or isinstance(value["inputs"], list),
        top_k=parameters.top_k,
        function=parameters.function_to_apply,
    )


def serialize(_: str, job: Job) -> bytes:
    """[{"label", "score"}, …], the most probable first; if nested, a list of such lists."""
    assert isinstance(job.request, TaskRequest)
    labels, request = job.model.manifest.labels, job.request
    rows = [_scores(outcome.reading, labels, request) for outcome in job.outcomes()]
    return orjson.dumps(rows if job.request.is_nested else rows[0])


def _scores(reading: Reading, labels: list[str], request: TaskRequest) -> list[dict[str, Any]]:
    function = request.function or ("none" if reading.value is not None else None)
    best = ranked(_apply(function, reading), labels, request.top_k, exact=function == "none")
    return [{"label": label, "score": score} for score, label in best]


def _apply(function: Function | None, reading: Reading) -> list[float]:
    if function == "none":
        return reading.logits
    if function is None:
        return reading.probs
    if function == "softmax":
        return [1.0] if reading.value is not None else read(reading.layer, reading.logits, None).probs
    return [sigmoid(x) for x in reading.logits]


TEXT_CLASSIFICATION = Protocol(parse, serialize, message_body, example=EXAMPLE)
