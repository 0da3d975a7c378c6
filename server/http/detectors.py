"""The detectors of FMS Guardrails: POST /api/v1/text/contents."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from de3.model_store.manifest import Manifest
from de3.server.engine.job import Item, Job
from de3.server.engine.request import Request, Text
from de3.server.errors import RequestError
from de3.server.http.errors import STATUSES
from de3.server.http.fields import (
    OptionFields,
    check_count,
    check_fields,
    checked_text,
    load_json,
    one_or_more,
)
from de3.server.http.protocol import Call, Protocol

THRESHOLD = 0.5


@dataclass(slots=True, eq=False)
class ContentsRequest(Request):
    """A request, with the options of its response.

    Attributes:
        threshold: probability from which a label is a detection; None: 0.5, or a multi-label model's own.
        safe: names of the labels that are no detections; None: the first label, of mutually exclusive ones.
    """

    input_name: ClassVar[str] = "contents"

    threshold: float | None = None
    safe: list[str] | None = None

    def check(self, manifest: Manifest) -> None:
        """Raise RequestError for a regression model, and for a label that the model does not have."""
        if manifest.tolerance is not None:
            raise RequestError(
                f"model: {manifest.name}:{manifest.version} is a regression model: it detects no labels",
                "model",
            )
        for name in self.safe or ():
            if name not in manifest.labels:
                raise RequestError(
                    f"detector_params: safe_labels: {name[:100]!r} is not a label of {manifest.name}",
                    "detector_params",
                )


def _contents(value: Any) -> list[Text]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return one_or_more(value, lambda text, where: Text(checked_text(text, where)))


class Parameters(OptionFields):
    """`detector_params`; the exit options and model are an extension."""

    threshold: float | None = Field(None, ge=0, le=1)
    safe_labels: list[str] | None = Field(None, max_length=10_000)
    model: str | None = None


class ContentsFields(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    contents: Annotated[list[Text], BeforeValidator(_contents)]
    detector_params: dict[str, Any] | None = None


def parse(call: Call) -> ContentsRequest:
    """The request in a call; raises RequestError."""
    value = load_json(call.body)
    if isinstance(value, dict):
        check_count(value.get("contents"), "contents", call.max_texts)
    fields = check_fields(ContentsFields, value, '{"contents": ["a text"]}')
    parameters = check_fields(Parameters, fields.detector_params or {}, '{"threshold": 0.5}')
    return ContentsRequest(
        fields.contents,
        parameters.options,
        parameters.model,
        threshold=parameters.threshold,
        safe=parameters.safe_labels,
    )


def serialize(_: str, job: Job) -> bytes:
    """The detections of each text: labels whose probability reaches the threshold, but for those that are safe."""
    assert isinstance(job.request, ContentsRequest)
    return orjson.dumps([_detections(item, job, job.request) for item in job.items])


def _detections(item: Item, job: Job, request: ContentsRequest) -> list[dict[str, Any]]:
    assert item.outcome is not None  # the job is finished
    reading, labels = item.outcome.reading, job.model.manifest.labels
    safe = set(request.safe if request.safe is not None else labels[:1] if reading.labels is None else ())
    found = []
    for k, (label, prob) in enumerate(zip(labels, reading.probs, strict=True)):
        if request.threshold is not None or reading.labels is None:
            is_found = prob >= (THRESHOLD if request.threshold is None else request.threshold)
        else:
            is_found = k in reading.labels
        if is_found and label not in safe:
            found.append(
                {
                    "start": 0,
                    "end": len(item.text.text),
                    "text": item.text.text,
                    "detection": label,
                    "detection_type": label,
                    "score": prob,
                }
            )
    return found


def error(problem: RequestError) -> bytes:
    """The body of an error, {"code", "message"}."""
    return orjson.dumps({"code": STATUSES[problem.cause], "message": problem.message})


CONTENTS = Protocol(parse, serialize, error)
