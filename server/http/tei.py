"""The protocol of Text Embeddings Inference: POST /predict, GET /info."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import orjson
from fastapi import FastAPI
from pydantic import BeforeValidator, Field

from de3.exits.reading import TextReading, ValueReading, sigmoid
from de3.runtime.answer import ranked
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.errors import Cause, RequestError
from de3.runtime.fields import check_count, check_fields, checked_text, load_json
from de3.runtime.options import Long, OptionFields, long_of
from de3.server.http.protocol import Call, Protocol
from de3.server.service import Service

EXAMPLE = '{"inputs": "a text"}'
# TEI's error types by cause; any other cause is a validation error.
ERROR_TYPES: dict[Cause, str] = {
    **dict.fromkeys(("over_share", "rate_limited", "queue_full", "shed", "loading", "budget"), "overloaded"),
    **dict.fromkeys(("timeout", "internal", "upstream", "upstream_timeout"), "backend"),
}


@dataclass(frozen=True, slots=True, eq=False)
class PredictRequest(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        is_batch: the response is a list with an entry for each text.
        raw_scores: respond with logits instead of probabilities.
    """

    input_name: ClassVar[str] = "inputs"
    usual_long: ClassVar[Long] = "error"

    is_batch: bool = False
    raw_scores: bool = False


def _inputs(value: Any) -> tuple[list[Text], bool]:
    """The texts of `inputs`, and whether they are a batch. As in TEI, a flat list of two texts is one pair."""
    if isinstance(value, str):
        return [_text([value], "")], False
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of one text or of two (a pair), or a list of such lists")
    if isinstance(value[0], str):
        return [_text(value, "")], False
    return [_text(entry, f"[{i}]") for i, entry in enumerate(value)], True


def _text(entry: Any, where: str) -> Text:
    if not isinstance(entry, list) or not 1 <= len(entry) <= 2:
        raise ValueError(f"{where}: must be a list of one text, or of two for a pair")
    return Text(*(checked_text(text, where) for text in entry))


class PredictFields(OptionFields):
    """The body of /predict; the exit options are an extension."""

    inputs: Annotated[tuple[list[Text], bool], BeforeValidator(_inputs)]
    raw_scores: bool = Field(False, description="logits instead of probabilities")
    truncate: bool | None = Field(
        False, description="truncate texts that are too long instead of refusing them"
    )
    truncation_direction: Any = Field("right", description="accepted; texts are truncated at their end")


def parse(call: Call) -> PredictRequest:
    """The request in a call; raises RequestError if it is invalid."""
    value = load_json(call.body)
    if isinstance(value, dict):
        inputs = value.get("inputs")
        # If this is false, `inputs` is one text or one pair.
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], list):
            check_count(value, "inputs", call.max_texts)
    fields = check_fields(PredictFields, value, EXAMPLE)
    texts, is_batch = fields.inputs
    return PredictRequest(
        texts,
        fields.options,
        long=long_of(fields.truncate or None),
        is_batch=is_batch,
        raw_scores=fields.raw_scores,
    )


def serialize(_: str, job: Job) -> bytes:
    """[{"score", "label"}, …], the most probable first; for a batch, a list of such lists."""
    assert isinstance(job.request, PredictRequest)
    labels, raw = job.first.model.manifest.labels, job.request.raw_scores
    rows = [_scores(outcome.text_reading, labels, raw) for outcome in job.first.outcomes()]
    return orjson.dumps(rows if job.request.is_batch else rows[0])


def _scores(reading: TextReading, labels: list[str], raw: bool) -> list[dict[str, Any]]:
    # TEI applies the sigmoid to a single output.
    probs = [sigmoid(reading.value)] if isinstance(reading, ValueReading) else reading.probs
    best = ranked(reading.logits if raw else probs, labels, None, exact=raw)
    return [{"score": score, "label": label} for score, label in best]


def error(problem: RequestError) -> bytes:
    """The body of an error, {"error", "error_type"}."""
    kind = ERROR_TYPES.get(problem.cause, "validation")
    return orjson.dumps({"error": problem.message, "error_type": kind})


def add_routes(app: FastAPI, service: Service, **common: Any) -> None:
    """Add the route GET /info. common: further arguments of its decorator."""

    @app.get("/info", tags=["Text Embeddings Inference"], **common)
    async def info() -> dict[str, Any]:
        """The default model and the server's limits, in the format of Text Embeddings Inference."""
        manifest, settings = service.manifest(None), service.settings
        ids = {str(k): label for k, label in enumerate(manifest.labels)}
        return {
            "model_id": manifest.full_name,
            "model_sha": None,
            "model_dtype": manifest.precision,
            "model_type": {
                "classifier": {"id2label": ids, "label2id": {label: int(k) for k, label in ids.items()}}
            },
            "max_concurrent_requests": settings.max_queue,
            "max_input_length": manifest.max_tokens,
            "max_batch_tokens": settings.max_texts * manifest.max_tokens,
            "max_batch_requests": settings.max_texts,
            "max_client_batch_size": settings.max_texts,
            "auto_truncate": False,
            "tokenization_workers": settings.engine_threads(),
            "version": version("de3"),
        }


PREDICT = Protocol(parse, serialize, error, ("info",), example=EXAMPLE)
