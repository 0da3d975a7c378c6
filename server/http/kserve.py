"""KServe's protocol, version 1: POST /v1/models/{model}:predict.

The response has the format in which KServe's Hugging Face server returns probabilities.
"""

from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BeforeValidator, Field

from de3.exits.reading import TextReading, ValueReading
from de3.runtime.answer import rounded
from de3.runtime.classification import text_of
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.fields import JsonObject, check_count, check_fields, load_json, one_or_more
from de3.runtime.options import OptionFields
from de3.server.http.errors import message_body
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"instances": ["a text"]}'


class PredictRequest(Request):
    """A request in this protocol."""

    input_name: ClassVar[str] = "instances"


def _instances(value: Any) -> list[Text]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts, or of objects with text and text_pair")
    return one_or_more(text_of, value)


class PredictFields(JsonObject):
    """The body of a request; the exit options in `parameters` are an extension."""

    instances: Annotated[list[Text], BeforeValidator(_instances)]
    parameters: dict[str, Any] = Field({})


def parse(call: Call) -> PredictRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    check_count(value, "instances", call.max_texts)
    fields = check_fields(PredictFields, value, EXAMPLE)
    parameters = check_fields(OptionFields, fields.parameters, '{"tau": 0.1}')
    return PredictRequest(fields.instances, parameters.options, call.path["model"])


def serialize(_: str, job: Job) -> bytes:
    """{"predictions"}: for each text, the probability of each label by its number, or a regression model's value."""
    return orjson.dumps(
        {"predictions": [_prediction(outcome.text_reading) for outcome in job.first.outcomes()]}
    )


def _prediction(reading: TextReading) -> dict[str, float] | float:
    if isinstance(reading, ValueReading):
        return reading.value
    return {str(k): p for k, p in enumerate(rounded(reading.probs))}


PREDICT = Protocol(parse, serialize, message_body, example=EXAMPLE)
