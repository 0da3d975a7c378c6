"""The protocol of OpenAI's moderation API, for multi-label models: POST /v1/moderations."""

from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field

from de3.model_store.manifest import Manifest
from de3.server.engine.job import Item, Job
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.http.fields import OptionFields, check_count, check_fields, load_json
from de3.server.http.protocol import Call, Protocol


@dataclass(slots=True, eq=False)
class ModerationRequest(Request):
    """A request that a multi-label model can answer."""

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for another model."""
        if manifest.thresholds is None:
            why = "its classes exclude each other" if manifest.tolerance is None else "its answer is a number"
            raise RequestError(
                f"model: {manifest.name}:{manifest.version} is no multi-label model, as moderation needs; {why}: see "
                "/classify",
                "model",
            )


def _input(value: Any) -> list[Text]:
    """The texts of `input`: one, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError("must not be an empty list; give at least one text")
    for i, text in enumerate(texts):
        if isinstance(text, dict):
            raise ValueError(
                f"[{i}]: must be a text; parts with a type, such as images, cannot be classified"
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{f'[{i}]' if isinstance(value, list) else ''}: must be a text that is not empty"
            )
    return [Text(text) for text in texts]


class ModerationFields(OptionFields):
    """The body; the exit options are ours."""

    input: Annotated[list[Text], BeforeValidator(_input)]
    model: str | None = Field(None, description="name, or name:version; default: the server's")


def parse(call: Call) -> ModerationRequest:
    """The request in a call; raises RequestError."""
    value = load_json(call.body)
    if isinstance(value, dict):
        check_count(value.get("input"), "input", call.max_texts)
    fields = check_fields(ModerationFields, value, '{"input": "a text"}')
    return ModerationRequest(fields.input, fields.options, fields.model)


def serialize(request_id: str, job: Job) -> bytes:
    """{"id", "model", "results"}: of each text the labels above their thresholds, and all probabilities."""
    results = [_result(item, job.model.manifest.labels) for item in job.items]
    return orjson.dumps({"id": f"modr-{request_id}", "model": job.model.full_name, "results": results})


def _result(item: Item, names: list[str]) -> dict[str, Any]:
    assert item.outcome is not None  # the job is done
    reading = item.outcome.reading
    given = set(reading.labels or ())
    return {
        "flagged": bool(given),
        "categories": {name: k in given for k, name in enumerate(names)},
        "category_scores": dict(zip(names, reading.probs, strict=True)),
        "category_applied_input_types": {
            name: ["text"] if k in given else [] for k, name in enumerate(names)
        },
        "exit_layer": item.outcome.layer,
    }


MODERATIONS = Protocol(parse, serialize)
