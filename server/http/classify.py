"""The JSON protocol of /classify, a superset of vLLM's and SGLang's."""

import time
from dataclasses import fields
from typing import Any

import orjson

from de3.runtime.answer import ModelResult, row_of
from de3.runtime.classification import Classification, ClassifyRequest, request_of
from de3.runtime.engine.head import Part
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.fields import LARGE_BODY_BYTES, check_count, check_fields, is_blank, load_json
from de3.server.http import hugging_face, sglang
from de3.server.http.protocol import Call, Protocol

EXAMPLE = '{"input": "a text"}'
MAX_FORM, MAX_FORMS = 512, 256  # characters of a form that is kept; number of forms
_FORMS: dict[
    str, dict[str, Any]
] = {}  # fields of a Classification, but for its texts, by what a client sends


def parse(call: Call) -> Request:
    """The request in a call; raises RequestError if its body is not JSON or is invalid."""
    value = load_json(call.body)
    if isinstance(value, dict):
        text = value.get("input")
        if isinstance(text, str) and len(call.body) <= LARGE_BODY_BYTES and not is_blank(text):
            return _of_one_text(text, value)
        if "input" not in value:
            if "inputs" in value:
                return hugging_face.request_of(value, call.max_texts, nests_one=False)
            if "text" in value:
                return sglang.request_of(value, call.max_texts)
    check_count(value, "input", call.max_texts)
    return request_of(check_fields(ClassifyRequest, value, EXAMPLE))


def _of_one_text(text: str, value: dict[str, Any]) -> Request:
    """The request with these fields, of which the input is a text; what the others ask for is kept for later ones.

    Most clients send the same options with each text. Raises RequestError for an invalid field.
    """
    rest = {name: given for name, given in value.items() if name != "input"}
    form = repr(rest)  # distinguishes 1, 1.0 and true
    kept = _FORMS.get(form)
    if kept is None:
        request = request_of(check_fields(ClassifyRequest, value, EXAMPLE)) if rest else Classification([])
        kept = {one.name: getattr(request, one.name) for one in fields(request) if one.name != "texts"}
        if len(_FORMS) >= MAX_FORMS:
            _FORMS.clear()
        if len(form) <= MAX_FORM:
            _FORMS[form] = kept
    return Classification([Text(text)], **kept)


def serialize(request_id: str, job: Job) -> bytes:
    """The body of the response for a finished job: one row for each text, in order."""
    request = job.request
    if isinstance(request, hugging_face.TaskRequest):
        return hugging_face.serialize(request_id, job)
    if isinstance(request, sglang.LogitsRequest):
        return sglang.serialize(request_id, job)
    assert isinstance(request, Classification)
    tokens = job.tokens
    body: dict[str, Any] = {
        "id": f"classify-{request.id or request_id}",
        "object": "list",
        "created": int(time.time()),
    }
    if request.models:
        body["results"] = [_result(job, part) for part in job.parts]
    else:
        body |= _result(job, job.first)
    body["usage"] = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return orjson.dumps(body)


def _result(job: Job, part: Part) -> ModelResult:
    """The answer of one model."""
    rows = [row_of(item, head) for item, head in job.rows(part)]
    result: ModelResult = {"model": part.model.full_name, "data": rows}
    # The certificate holds only for texts that fit into a single window.
    certificate = part.choice.certificate
    if certificate is not None and all(outcome.num_windows == 1 for outcome in part.outcomes()):
        result["certificate"] = certificate
    if job.request.explain:
        result["tau_choice"] = part.choice.row()
    return result


CLASSIFY = Protocol(parse, serialize, example=EXAMPLE)
