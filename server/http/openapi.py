"""The OpenAPI schema: named components, summaries, and examples to try in /docs."""

import re
from inspect import getmodule
from typing import Any, Literal

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from de3.runtime.answer import ClassifyResponse, ClassifySeveralResponse
from de3.runtime.classification import ClassifyRequest
from de3.runtime.errors import Cause, RequestError
from de3.server.http import errors
from de3.server.http.protocol import Protocol

REF = "#/components/schemas/{model}"
DESCRIPTION = """
Encoder layers have exits: a classifier and, in many models, class prototypes. A text exits at the first layer whose
score is below **tau**. The score of most models is the risk: the probability that the answer differs from that at
full depth. Easy texts exit after a layer or two, hard ones go deeper.

- `tau: 0` runs every text to full depth; a larger `tau` exits earlier. The default is the model's calibrated tau.
- Instead of `tau`, give a target: `target_speedup`, `max_disagreement` (with full depth, certified) or
  `latency_budget_ms`.
- `explain: true` reports every exit that was passed, and how tau was chosen.
- `ood: true` scores how far a text is from the calibration's distribution.

Errors have the shape `{"error": {"message", "type", "param", "code"}}`.
"""

_REQUESTS = {
    "one text": {"input": "a warm , funny , engaging film"},
    "many texts": {"input": ["a warm , funny , engaging film", "it is a dull mess from start to finish"]},
    "full depth": {"input": "not exactly a masterpiece , but it has its moments", "tau": 0},
    "explained": {"input": "not exactly a masterpiece , but it has its moments", "explain": True},
    "at most 3 layers": {"input": "not exactly a masterpiece , but it has its moments", "max_layer": 3},
    "three times as fast": {"input": "a warm , funny , engaging film", "target_speedup": 3},
    "within 8 ms": {"input": "a warm , funny , engaging film", "latency_budget_ms": 8},
    "at most 2% disagreement": {"input": "a warm , funny , engaging film", "max_disagreement": 0.02},
    "out of distribution?": {"input": "the battery lasts two days", "ood": True},
    "a long text": {"input": "it begins slowly , and then it does not end . " * 60, "long": "windows"},
    "a pair": {"input": {"text": "Is the film good?", "text_pair": "It is."}},
}
_RESPONSES = ("ClassifyResponse", "ClassifySeveralResponse")  # the second if the request has models
_ANSWER: ClassifyResponse = {
    "id": "classify-5f0c9c1d6e9a4c0f8f1b9d1f2a3b4c5d",
    "object": "list",
    "created": 1790000000,
    "model": "sst2:1",
    "data": [
        {
            "index": 0,
            "label": "positive",
            "probs": [0.01, 0.99],
            "num_classes": 2,
            "exit": {
                "layer": 1,
                "num_layers": 6,
                "reason": "threshold",
                "tau": 0.08,
                "signal": "risk",
                "lambda": None,
                "score": 0.02,
                "entropy": 0.08,
                "distance_ratio": 0.05,
                "edr": 0.06,
            },
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9},
}


def error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The documentation of an error response."""
    return {
        "description": errors.TYPES[status],
        "content": {"application/json": {"example": orjson.loads(errors.body(status, message, param))}},
    }


_WRONG_TAU = "tau: input should be less than or equal to 1 (allowed: 0 to 1)"
# A cause of each status with which a protocol answers.
_CAUSES: tuple[Cause, ...] = (
    *("not_json", "no_key", "unknown_model", "slow_body", "too_large", "bad_request", "rate_limited"),
    *("upstream", "loading", "timeout"),
)


def protocol_route(path: str, protocol: Protocol) -> dict[str, Any]:
    """The documentation of a protocol's path, from its module's docstring, as arguments of FastAPI's decorator."""
    body = {"schema": {"type": "object"}, "example": orjson.loads(protocol.example)}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    return {
        "name": re.sub(r"\W+", "_", path).strip("_") or "root",
        "tags": ["other protocols"],
        "description": getattr(getmodule(protocol.parse), "__doc__", ""),
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"required": True, "content": {"application/json": body}},
        },
        "responses": {errors.STATUSES[cause]: _failure(cause, protocol) for cause in _CAUSES},
    }


def _failure(cause: Cause, protocol: Protocol) -> dict[str, Any]:
    example = orjson.loads(protocol.error(RequestError("the problem", cause=cause)))
    return {
        "description": errors.TYPES[errors.STATUSES[cause]],
        "content": {"application/json": {"example": example}},
    }


def answer(model: str, description: str) -> dict[int | str, Any]:
    """The documentation of a response with one of the models below."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=model)}}}
    return {200: {"description": description, "content": content}}


CLASSIFY: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": REF.format(model="ClassifyRequest")},
                    "examples": {name: {"value": value} for name, value in _REQUESTS.items()},
                }
            },
        }
    },
    "responses": {
        200: {
            "description": "One row for each text, in order",
            "content": {
                "application/json": {
                    "schema": {"anyOf": [{"$ref": REF.format(model=model)} for model in _RESPONSES]},
                    "example": _ANSWER,
                }
            },
        },
        400: error(400, "the body is not JSON in UTF-8: EOF while parsing an object at line 1 column 1"),
        401: error(401, "an API key is needed; send Authorization: Bearer KEY"),
        404: error(404, "model: no model 'x' is served; available: sst2:1", "model"),
        408: error(408, "the body did not arrive within 10 s"),
        413: error(413, "the body is larger than the limit of 1048576 bytes"),
        422: error(422, _WRONG_TAU, "tau"),
        429: error(429, "over your rate limit, in texts: 100 per 1 second"),
        503: error(503, "overloaded: 1024 texts are in flight; at most 1024 are allowed"),
        502: error(502, "the model's upstream fails"),
        504: error(504, "no answer within 30 s"),
    },
}


class ServedModel(BaseModel):
    """A served version of a model; further fields describe its role, defaults and calibration."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(description="name:version")
    name: str
    version: int
    labels: list[str]
    num_layers: int
    exit_layers: list[int]
    max_tokens: int
    input: str | None = Field(description="text, pair, or null: takes both")
    aggregation: str | None = Field(
        description="of a token classifier's spans by default; null for other models"
    )
    span_labels: list[str] | None = Field(
        description="the labels of a token classifier's spans; null for other models"
    )
    precision: str
    aliases: list[str] = Field([], description="its other names (--alias); absent while models load")
    shares_encoder_with: list[str] = Field(
        [], description="models that can answer on one pass with it; absent while models load"
    )
    flag: dict[str, Any] | None = Field(
        None, description="what it is to find (--flag): labels, threshold, is_below; absent while models load"
    )
    questions: list[dict[str, Any]] = Field(
        [],
        description="questions of /v1/decisions and /v1/systemone that it answers without a file (--questions)",
    )
    max_missed: float | None = Field(
        None,
        description="limit on the share of flagged texts that early exits miss in requests without options; null: none",
    )
    runtime: str | None = Field(None, description="native or onnxruntime; absent while models load")
    instructions: str | None = Field(
        None, description="the instruction set of the native kernels, such as amx, vnni or dotprod"
    )


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ServedModel]


class ErrorDetails(BaseModel):
    """The details of an error."""

    message: str
    type: str
    param: str | None = Field(description="the invalid field, if any")
    code: int = Field(description="the HTTP status")


class ErrorResponse(BaseModel):
    """The body of an error response."""

    error: ErrorDetails


class OpenInferenceError(BaseModel):
    """An error of the Open Inference Protocol."""

    error: str


class TextEmbeddingsError(BaseModel):
    """An error of Text Embeddings Inference."""

    error: str
    error_type: str


# Schemas of error bodies by the first part of the path; the errors of other paths are ErrorResponse.
ERRORS: dict[str, type[BaseModel]] = {"v2": OpenInferenceError, "info": TextEmbeddingsError}


def document(app: FastAPI) -> None:
    """Add summaries, and named components for requests, answers and errors, to an application's schema."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _improve(made())
        return made()

    app.openapi = openapi  # type: ignore[method-assign]


def _improve(schema: dict[str, Any]) -> None:
    responses = (ClassifyResponse, ClassifySeveralResponse)
    types: list[Any] = [ClassifyRequest, *responses, ModelList, ErrorResponse, *ERRORS.values()]
    _, ours = TypeAdapter.json_schemas(
        [(each, "validation", TypeAdapter(each)) for each in types], ref_template=REF
    )
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which the server never sends
        components.pop(name, None)
    components.update(ours["$defs"])
    for path, operations in schema["paths"].items():
        error_model = ERRORS.get(path.split("/")[1], ErrorResponse).__name__
        for operation in operations.values():
            operation["summary"] = operation.get("description", "").partition("\n")[0].rstrip(".")
            for status, response in operation["responses"].items():
                if status >= "400" and operation["tags"] != ["other protocols"]:
                    content = response.setdefault("content", {}).setdefault("application/json", {})
                    content["schema"] = {"$ref": REF.format(model=error_model)}
                    if status == "422":
                        response["description"] = errors.TYPES[422]
