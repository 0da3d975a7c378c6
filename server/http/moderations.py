"""The protocol of OpenAI's moderation API, for multi-label models: POST /v1/moderations."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field

from de3.model_store.manifest import Manifest
from de3.server.answer import rounded
from de3.server.engine.job import Job
from de3.server.engine.outcome import Outcome
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.fields import check_count, check_fields, load_json, one_or_more, plain_text
from de3.server.http.protocol import Call, Protocol
from de3.server.options import OptionFields
from de3.server.rules import one_answer


@dataclass(slots=True, eq=False)
class ModerationRequest(Request):
    """A request that only a multi-label model can answer."""

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError unless the model is multi-label."""
        if manifest.thresholds is None:
            raise RequestError(
                f"model: {manifest.full_name} is not a multi-label model, which moderation requires: "
                f"{one_answer(manifest)}; use /classify",
                "model",
            )


def _text(value: Any, where: str) -> Text:
    if isinstance(value, dict):
        raise ValueError(f"{where}: must be a text; parts with a type, such as images, cannot be classified")
    return plain_text(value, where)


class ModerationFields(OptionFields):
    """The body of a request; the exit options are an extension."""

    input: Annotated[list[Text], BeforeValidator(partial(one_or_more, _text))]
    model: str | None = Field(None, description="name, or name:version; default: the server's")


def parse(call: Call) -> ModerationRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    check_count(value, "input", call.max_texts)
    fields = check_fields(ModerationFields, value, '{"input": "a text"}')
    return ModerationRequest(fields.input, fields.options, fields.model)


def serialize(request_id: str, job: Job) -> bytes:
    """{"id", "model", "results"}: for each text, the labels above their thresholds, and all probabilities."""
    results = [_result(outcome, job.model.manifest.labels) for outcome in job.outcomes()]
    return orjson.dumps({"id": f"modr-{request_id}", "model": job.model.full_name, "results": results})


def _result(outcome: Outcome, names: list[str]) -> dict[str, Any]:
    reading = outcome.reading
    given = set(reading.labels or ())
    return {
        "flagged": bool(given),
        "categories": {name: k in given for k, name in enumerate(names)},
        "category_scores": dict(zip(names, rounded(reading.probs), strict=True)),
        "category_applied_input_types": {
            name: ["text"] if k in given else [] for k, name in enumerate(names)
        },
        "exit_layer": outcome.layer,
    }


MODERATIONS = Protocol(parse, serialize)
