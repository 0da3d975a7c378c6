"""The protocol of /classify, a superset of vLLM's and SGLang's: request and response as JSON."""

import gc
import time
from dataclasses import fields
from itertools import islice
from typing import Annotated, Any

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from exits.reading import Reading
from exits.signals import MAX_LAM
from server.engine.work import Item, Job, Request, Text
from server.errors import RequestError
from server.http.protocol import LARGE_BODY_BYTES, Call, Protocol
from server.settings import MAX_BUDGET_MS, ExitOptions

MAX_BRACKETS = 2**17  # in a body, those in texts included: each may be a list or an object to allocate
ALLOWED = {
    "tau": " (allowed: 0 to 1)",
    "lambda": f" (allowed: 0 to {MAX_LAM:g})",
    "target_speedup": " (allowed: 1 or more)",
    "latency_budget_ms": f" (allowed: more than 0, at most {MAX_BUDGET_MS})",
    "max_disagreement": " (allowed: 0 to 1)",
}


def _texts(value: Any) -> list[Text]:
    """The texts of `input`, which is one text or pair, or a list of them. Raises ValueError."""
    if not isinstance(value, list):
        return [_text(value, "")]
    if not value:
        raise ValueError("must not be an empty list; give at least one text")
    return [_text(item, f"[{i}]") for i, item in enumerate(value)]


def _text(value: Any, where: str) -> Text:
    if isinstance(value, dict):
        if len(value) != 2 or "text" not in value or "text_pair" not in value:
            wrong = {*islice(value, 6)} ^ {"text", "text_pair"}  # it may have 100,000 fields
            shown = [key[:100] for key in sorted(wrong)[:5]]
            raise ValueError(
                f"{where}: an object must have text and text_pair, and nothing else; see {shown}"
            )
        return Text(
            _string(value["text"], f"{where}.text"), _string(value["text_pair"], f"{where}.text_pair")
        )
    return Text(_string(value, where))


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
        what = kinds.get(type(value), "null")
        raise ValueError(f"{where}: must be a text, or an object with text and text_pair; got {what}")
    if not value.strip():
        raise ValueError(f"{where}: must not be empty")
    return value


_ONE = [
    {"type": "string", "minLength": 1},
    {
        "type": "object",
        "properties": {"text": {"type": "string"}, "text_pair": {"type": "string"}},
        "required": ["text", "text_pair"],
        "additionalProperties": False,
    },
]
_INPUT_SCHEMA = {"anyOf": [*_ONE, {"type": "array", "minItems": 1, "items": {"anyOf": _ONE}}]}


class ClassifyRequest(BaseModel):
    """A request to classify one or more texts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(
        None, description="name (its current version, or a canary) or name:version; default: the first served"
    )
    input: Annotated[list[Text], BeforeValidator(_texts), WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="a text, a pair, or a list of them"
    )
    tau: float | None = Field(
        None, ge=0, le=1, description="leave at the first exit with EDR < tau; 0: never early"
    )
    lam: float | None = Field(
        None, ge=0, le=MAX_LAM, alias="lambda", description="weight of the distance ratio against entropy"
    )
    max_layer: int | None = Field(None, ge=0, description="go no deeper than this layer")
    target_speedup: float | None = Field(
        None, ge=1, description="instead of tau: the mean speed-up over full depth, by the calibration"
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="instead of tau: answer within this time, at the deepest exit reached by then",
    )
    best_effort: bool = Field(
        False, description="with a budget that cannot be met: answer at the first exit instead of 503"
    )
    max_disagreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="instead of tau: the rate of answers that may differ from full depth, at 95% confidence",
    )
    truncate: bool = Field(True, description="cut texts that are too long instead of refusing them")
    explain: bool = Field(False, description="report every exit passed")
    ood: bool = Field(False, description="report how unlike the calibration's texts a text is, as ood_score")
    user: Any = Field(None, description="accepted and ignored")
    rid: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")

    @model_validator(mode="after")
    def _check_together(self) -> "ClassifyRequest":
        _ = self.options
        return self

    @property
    def options(self) -> ExitOptions:
        """The fields that decide where its texts leave."""
        return ExitOptions(**{name: getattr(self, name) for name in OPTION_FIELDS})


OPTION_FIELDS = [field.name for field in fields(ExitOptions)]
KNOWN = [f.alias or name for name, f in ClassifyRequest.model_fields.items()]
IGNORED = ("user", "rid", "priority")


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError for what is not JSON or has a wrong value.

    Cheap checks come first: pydantic's errors for 100,000 unknown fields would take a quarter of a second.
    """
    body, max_texts = call.body, call.max_texts
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise RequestError(f"the body has more than {MAX_BRACKETS} opening brackets, the most allowed")
    collects = len(body) > LARGE_BODY_BYTES and gc.isenabled()
    if collects:
        gc.disable()  # it would traverse 300,000 new lists again and again
    try:
        value = from_json(body, cache_strings="none")
    except ValueError as error:
        raise RequestError(f"the body is not JSON in UTF-8: {error}", cause="not_json") from None
    finally:
        if collects:
            gc.enable()
    if isinstance(value, dict):
        for field in value:
            if field not in KNOWN:
                name = field[:100]
                known = ", ".join(KNOWN)
                raise RequestError(f"{name}: unknown field; known are {known}", name, "unknown_field")
        for field in IGNORED:
            value.pop(field, None)
        texts = value.get("input")
        if isinstance(texts, list) and len(texts) > max_texts:
            raise RequestError(f"input: {len(texts)} texts, at most {max_texts} are allowed", "input")
    try:
        parsed = ClassifyRequest.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None
    return Request(parsed.input, parsed.options, parsed.model, parsed.truncate, parsed.explain, parsed.ood)


def _explain(error: ValidationError) -> RequestError:
    """The first problem that pydantic found, with the field's name and what is allowed."""
    first = error.errors(include_url=False)[0]
    kind, loc, message = first["type"], first["loc"], first["msg"]
    if not loc:
        # From ExitOptions, whose message begins with the field; or the body is not an object.
        text = str(first["ctx"]["error"]) if kind == "value_error" else ""
        text = text or 'the body must be a JSON object like {"input": "a text"}'
        return RequestError(text, text.partition(":")[0] if kind == "value_error" else None)
    field = str(loc[0])[:100]
    if kind == "missing":
        return RequestError(f"{field}: is required", field)
    if kind == "value_error":  # from _texts; it may begin with the place inside the field
        inner = str(first["ctx"]["error"])
        return RequestError(f"{field}{inner if inner[:1] in '[:.' else ': ' + inner}", field)
    allowed = ALLOWED.get(field, "")
    return RequestError(f"{field}: {message[0].lower()}{message[1:]}{allowed}", field)


def serialize(request_id: str, job: Job) -> bytes:
    """The response's body for a job that is done: one row for each text, in order."""
    tokens = job.tokens
    body: dict[str, Any] = {
        "id": f"classify-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": job.model.full_name,
        "data": [_row(item, job) for item in job.items],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }
    certificate = job.served.rules.certificate(job.choice)
    if certificate is not None:
        body["certificate"] = certificate
    if job.request.explain:
        body["tau_choice"] = job.choice.row()
    return orjson.dumps(body)


def _row(item: Item, job: Job) -> dict[str, Any]:
    """The answer to one text."""
    outcome, manifest = item.outcome, job.model.manifest
    assert outcome is not None  # the job is done
    reading = outcome.reading
    row: dict[str, Any] = {
        "index": item.index,
        "label": manifest.labels[reading.label],
        "probs": reading.probs,
        "num_classes": len(manifest.labels),
        "exit": {
            "layer": outcome.layer,
            "num_layers": manifest.num_layers,
            "reason": outcome.reason,
            "tau": item.rule.tau,
            "lambda": item.rule.signal.lam,
            **_signals(reading),
        },
    }
    if outcome.truncated:
        row["truncated"] = True
    if job.request.ood:
        row["ood_score"] = job.served.monitor.score(outcome.passed)
    if outcome.is_far:
        row["out_of_distribution"] = True
    if job.request.explain:
        row["layers"] = [
            {"layer": layer, **_signals(r), "label": manifest.labels[r.label], "probs": r.probs}
            for layer, r in outcome.passed
        ]
    return row


def _signals(reading: Reading) -> dict[str, Any]:
    """The signals of one exit."""
    return {"entropy": reading.entropy, "distance_ratio": reading.distance_ratio, "edr": reading.score}


CLASSIFY = Protocol(parse, serialize)
