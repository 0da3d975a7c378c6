"""The protocol of /classify, a superset of vLLM's and SGLang's: request and response as JSON."""

import time
from itertools import islice
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema

from exits.reading import Reading
from server.engine.work import Item, Job, Request, Text
from server.http import hugging_face
from server.http.fields import OptionFields, check_count, check_fields, load_json
from server.http.protocol import Call, Protocol


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


class ClassifyRequest(OptionFields):
    """A request to classify one or more texts."""

    model: str | None = Field(
        None, description="name (its current version, or a canary) or name:version; default: the first served"
    )
    input: Annotated[list[Text], BeforeValidator(_texts), WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="a text, a pair, or a list of them"
    )
    truncate: bool = Field(True, description="cut texts that are too long instead of refusing them")
    explain: bool = Field(False, description="report every exit passed")
    ood: bool = Field(False, description="report how unlike the calibration's texts a text is, as ood_score")
    user: Any = Field(None, description="accepted and ignored")
    rid: Any = Field(None, description="accepted and ignored")
    priority: Any = Field(None, description="accepted and ignored")


IGNORED = ("user", "rid", "priority")


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError for what is not JSON or has a wrong value."""
    value = load_json(call.body)
    if isinstance(value, dict) and "inputs" in value and "input" not in value:
        return hugging_face.request_of(value, call.max_texts, nests_one=False)
    if isinstance(value, dict):
        for field in IGNORED:
            value.pop(field, None)
        check_count(value.get("input"), "input", call.max_texts)
    parsed = check_fields(ClassifyRequest, value, '{"input": "a text"}')
    return Request(parsed.input, parsed.options, parsed.model, parsed.truncate, parsed.explain, parsed.ood)


def serialize(request_id: str, job: Job) -> bytes:
    """The response's body for a job that is done: one row for each text, in order."""
    if isinstance(job.request, hugging_face.TaskRequest):
        return hugging_face.serialize(request_id, job)
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
