"""The protocol of OpenAI's moderation API, for multi-label models and those of two classes: POST /v1/moderations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BeforeValidator, Field

from de3.model_store.manifest import Manifest
from de3.runtime.engine.job import Job
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.request import Text
from de3.runtime.fields import check_count, check_fields, load_json, one_or_more, plain_text
from de3.runtime.options import OptionFields
from de3.server.http.detectors import Detection, safe_labels
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"input": "a text"}'


@dataclass(frozen=True, slots=True, eq=False)
class ModerationRequest(Detection):
    """A request that a multi-label model, or one with a safe class, can answer.

    Attributes:
        is_parts: the texts are parts of one input, which has one result.
    """

    takes_spans: ClassVar[bool] = False

    is_parts: bool = False

    def fits(self, manifest: Manifest) -> bool:
        """True for a multi-label model, for one whose safe class is known, and for one of two classes."""
        return manifest.has_classes and (safe_labels(manifest) is not None or len(manifest.labels) == 2)


def _part(value: Any, where: str) -> Text:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise ValueError(
            f'{where}: must be {{"type": "text", "text": "a text"}}; images cannot be classified'
        )
    for key in value:
        if key not in ("type", "text"):
            raise ValueError(f"{where}.{key[:100]}: unknown field; known fields: type, text")
    return plain_text(value.get("text"), f"{where}.text")


def _inputs(value: Any) -> tuple[list[Text], bool]:
    """The texts of `input`, and whether they are parts of a single input."""
    is_parts = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return one_or_more(_part if is_parts else plain_text, value), is_parts


class ModerationFields(OptionFields):
    """The body of a request; the exit options are an extension."""

    input: Annotated[tuple[list[Text], bool], BeforeValidator(_inputs)]
    model: str | None = Field(None, description="name, or name:version; default: the server's")
    safe_labels: list[str] | None = Field(
        None, max_length=10_000, description="labels that are not categories"
    )


def parse(call: Call) -> ModerationRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    check_count(value, "input", call.max_texts)
    fields = check_fields(ModerationFields, value, EXAMPLE)
    texts, is_parts = fields.input
    safe = None if fields.safe_labels is None else frozenset(fields.safe_labels)
    return ModerationRequest(texts, fields.options, fields.model, safe=safe, is_parts=is_parts)


def serialize(request_id: str, job: Job) -> bytes:
    """{"id", "model", "results"}: for each input, the labels that it is flagged for, and their probabilities."""
    assert isinstance(job.request, ModerationRequest)
    outcomes, manifest = job.first.outcomes(), job.first.model.manifest
    inputs = [outcomes] if job.request.is_parts else [[outcome] for outcome in outcomes]
    results = [_result(one, job.request, manifest) for one in inputs]
    return orjson.dumps({"id": f"modr-{request_id}", "model": manifest.full_name, "results": results})


def _result(outcomes: Sequence[Outcome], request: ModerationRequest, manifest: Manifest) -> dict[str, Any]:
    """The result of one input, from its parts: the highest score of each label that is not safe."""
    probs = [max(column) for column in zip(*(outcome.probs for outcome in outcomes), strict=True)]
    given = {name for outcome in outcomes for name, _ in request.found(outcome, manifest.labels)}
    names = [(k, name) for k, name in enumerate(manifest.labels) if name not in (request.safe or ())]
    return {
        "flagged": bool(given),
        "categories": {name: name in given for _, name in names},
        "category_scores": {name: round(probs[k], 6) for k, name in names},
        "category_applied_input_types": {name: ["text"] if name in given else [] for _, name in names},
        "exit_layer": max(outcome.layer for outcome in outcomes),
    }


MODERATIONS = Protocol(parse, serialize, example=EXAMPLE)
