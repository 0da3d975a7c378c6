"""The OpenAPI schema: named components, summaries, examples to try in /docs."""

from typing import Any, Literal

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from de3.exits.rule import ExitReason
from de3.server.http import errors
from de3.server.http.classify import ClassifyRequest
from de3.server.http.fields import SignalName

REF = "#/components/schemas/{model}"
DESCRIPTION = """
Every encoder layer has a classifier and class prototypes. A text exits at the first layer whose score is below
**tau**: mostly its risk, the chance that full depth answers otherwise. Easy texts exit after a layer or two, hard
ones go deeper.

- `tau: 0` runs every text to full depth; a larger `tau` exits earlier. The default is the model's calibrated tau.
- Instead of `tau`, give a target: `target_speedup`, `max_disagreement` (with full depth, certified) or
  `latency_budget_ms`.
- `explain: true` reports every exit that was passed, and how tau was chosen.
- `ood: true` scores how far a text is out of the calibration's distribution.

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
_ANSWER = {
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
    """An error as OpenAPI documents it."""
    return {
        "description": errors.TYPES[status],
        "content": {"application/json": {"example": orjson.loads(errors.body(status, message, param))}},
    }


_WRONG_TAU = "tau: input should be less than or equal to 1 (allowed: 0 to 1)"

MODELS: dict[str, Any] = {
    "responses": {
        200: {
            "description": "The first answers requests that name no model",
            "content": {"application/json": {"schema": {"$ref": REF.format(model="ModelList")}}},
        }
    }
}
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
                    "schema": {"$ref": REF.format(model="ClassifyResponse")},
                    "example": _ANSWER,
                }
            },
        },
        400: error(400, "the body is not JSON in UTF-8: EOF while parsing an object at line 1 column 1"),
        401: error(401, "an API key is needed; send Authorization: Bearer KEY"),
        404: error(404, "model: no model 'x' is served; there are: sst2:1", "model"),
        408: error(408, "the body did not arrive within 10 s"),
        413: error(413, "the body is larger than 1048576 bytes, the most allowed"),
        422: error(422, _WRONG_TAU, "tau"),
        429: error(429, "over your limit of 100 per 1 second texts"),
        503: error(503, "overloaded: 1024 texts are in flight, at most 1024 are allowed"),
        504: error(504, "no answer within 30 s"),
    },
}


class Exit(BaseModel):
    """Where a text exited, and why; of a text with several windows, the last that ran."""

    layer: int = Field(description="0 is the embeddings")
    num_layers: int
    reason: ExitReason
    tau: float
    signal: SignalName = Field(description="what is compared with tau")
    lam: float | None = Field(alias="lambda", description="of the signal edr")
    score: float | None = Field(description="the signal's value at this exit; null if it has none here")
    entropy: float | None = Field(description="null: a regression model has none")
    distance_ratio: float | None
    edr: float | None


class PassedExit(BaseModel):
    """An exit that a text passed, the last of them the one where it left; of each window that ran."""

    layer: int
    label: str
    value: float | None = Field(None, description="of a regression model, instead of probs")
    probs: list[float] | None
    score: float | None
    entropy: float | None
    distance_ratio: float | None
    edr: float | None
    window: int | None = Field(None, description="of a text with several windows: in which one, from 0")


class Windows(BaseModel):
    """The windows of a text that is longer than the model takes."""

    run: int = Field(description="how many ran until the answer was settled")
    of: int = Field(description="how many the text has")
    layers: list[int] = Field(description="where each one that ran exited")


class TopLabel(BaseModel):
    """One of the most probable labels."""

    label: str
    prob: float


class ClassifiedText(BaseModel):
    """The answer to one text."""

    index: int
    label: str
    value: float | None = Field(None, description="the answer of a regression model")
    probs: list[float] | None = Field(
        description="in the order of the model's labels; null: a regression model has none"
    )
    num_classes: int
    exit: Exit
    labels: list[str] = Field([], description="of a multi-label model: those above their threshold")
    top: list[TopLabel] = Field([], description="with top_k: the most probable labels, in this order")
    truncated: bool = Field(False, description="whether the text was cut")
    windows: Windows | None = Field(None, description="with long: windows, of a text that has several")
    ood_score: float | None = Field(None, description="with ood: near 1 for texts unlike the calibration's")
    out_of_distribution: bool = Field(False, description="whether it was far from every prototype at an exit")
    layers: list[PassedExit] = Field([], description="with explain: every exit passed")


class Usage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ClassifyResponse(BaseModel):
    """The answer to a request: a row for each text, in order."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedText]
    usage: Usage


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
    input: str | None = Field(description="what it takes: text, pair, or null for both")
    precision: str
    runtime: str | None = Field(
        None, description="what runs it: native or onnxruntime; absent while models load"
    )
    instructions: str | None = Field(
        None, description="the native kernels' instruction set, as amx, vnni or dotprod"
    )


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ServedModel]


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(description="the field at fault, if one is")
    code: int = Field(description="the HTTP status")


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorDetails


class OpenInferenceError(BaseModel):
    """An error of the Open Inference Protocol."""

    error: str


class TextEmbeddingsError(BaseModel):
    """An error of Text Embeddings Inference."""

    error: str
    error_type: str


# By the first part of the path.
ERRORS: dict[str, type[BaseModel]] = {"v2": OpenInferenceError, "info": TextEmbeddingsError}


def document(app: FastAPI) -> None:
    """Give an application's schema named components for requests, answers and errors, and plain summaries."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _improve(made())
        return made()

    app.openapi = openapi  # type: ignore[method-assign]


def _improve(schema: dict[str, Any]) -> None:
    models: list[type[BaseModel]] = [ClassifyRequest, ClassifyResponse, ModelList, ErrorResponse]
    models += ERRORS.values()
    _, ours = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which the server never sends
        components.pop(name, None)
    components.update(ours["$defs"])
    for path, operations in schema["paths"].items():
        error_model = ERRORS.get(path.split("/")[1], ErrorResponse).__name__
        for operation in operations.values():
            operation["summary"] = operation.get("description", "").partition("\n")[0].rstrip(".")
            for status, response in operation["responses"].items():
                if status >= "400":
                    content = response.setdefault("content", {}).setdefault("application/json", {})
                    content["schema"] = {"$ref": REF.format(model=error_model)}
                    if status == "422":
                        response["description"] = errors.TYPES[422]
