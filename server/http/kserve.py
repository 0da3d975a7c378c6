"""KServe's protocol, version 1: POST /v1/models/{model}:predict.

The response has the format in which KServe's Hugging Face server returns probabilities.
"""

from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict

from de3.server.engine.job import Job
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.http.classify import text_of
from de3.server.http.fields import OptionFields, check_count, check_fields, load_json, one_or_more
from de3.server.http.protocol import Call, Protocol


class PredictRequest(Request):
    """A request in this protocol."""

    input_name: ClassVar[str] = "instances"


def _instances(value: Any) -> list[Text]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts, or of objects with text and text_pair")
    return one_or_more(value, text_of)


class PredictFields(BaseModel):
    """The body of a request; the exit options in `parameters` are an extension."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instances: Annotated[list[Text], BeforeValidator(_instances)]
    parameters: dict[str, Any] = {}


def parse(call: Call) -> PredictRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    if isinstance(value, dict):
        check_count(value.get("instances"), "instances", call.max_texts)
    fields = check_fields(PredictFields, value, '{"instances": ["a text"]}')
    parameters = check_fields(OptionFields, fields.parameters, '{"tau": 0.1}')
    return PredictRequest(fields.instances, parameters.options, call.path["model"])


def serialize(_: str, job: Job) -> bytes:
    """{"predictions"}: for each text, the probability of each label by its number, or a regression model's value."""
    readings = [outcome.reading for outcome in job.outcomes()]
    return orjson.dumps(
        {
            "predictions": [
                {str(k): p for k, p in enumerate(r.probs)} if r.value is None else r.value for r in readings
            ]
        }
    )


def error(problem: RequestError) -> bytes:
    """The body of an error, {"error"}."""
    return orjson.dumps({"error": problem.message})


PREDICT = Protocol(parse, serialize, error)
