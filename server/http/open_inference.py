"""The Open Inference Protocol, version 2, over REST: POST /v2/models/{model}[/versions/{version}]/infer.

Input: `text`, and `text_pair` for pairs, of datatype BYTES and shape [n] or [n, 1], as JSON or as binary
tensors. Output: `label`, `probs` (`value` for a regression model) and `exit_layer`, as JSON. The exit options are
in `parameters`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any, ClassVar, Self

import orjson
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import Field

from de3.exits.kinds import Value
from de3.model_store.manifest import Manifest
from de3.runtime.answer import rounded
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Text
from de3.runtime.errors import RequestError
from de3.runtime.fields import JsonObject, check_fields, checked_text, load_json
from de3.runtime.flags import Wanted
from de3.runtime.options import OptionFields, long_of
from de3.server.http.errors import message_body
from de3.server.http.protocol import Call, Protocol
from de3.server.service import Service

INPUTS = ("text", "text_pair")
OUTPUTS, VALUE_OUTPUTS = ("label", "probs", "exit_layer"), ("label", "value", "exit_layer")
HEADER_LENGTH = b"inference-header-content-length"
EXAMPLE = '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a text"]}]}'


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest(Request):
    """A request in this protocol, with the options for its response.

    Attributes:
        id: the client's request id, which the response repeats; None: the client sent none.
        outputs: names of the requested outputs; empty: all.
    """

    input_name: ClassVar[str] = "inputs: text"

    id: str | None = None
    outputs: Sequence[str] = ()

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The same request; raises RequestError for an output that the model does not have."""
        for name in self.outputs:
            if name not in outputs_of(manifest):
                raise RequestError(
                    f"outputs: {manifest.name} has no {name!r}; available: {', '.join(outputs_of(manifest))}",
                    "outputs",
                )
        return self


def outputs_of(manifest: Manifest) -> Sequence[str]:
    """The names of a model's outputs; a token classifier has none in this protocol."""
    if manifest.is_spans:
        return ()
    return OUTPUTS if manifest.tolerance is None else VALUE_OUTPUTS


class Parameters(OptionFields):
    """The `parameters` of a request: the exit options, and fields that the protocol's clients send."""

    truncate: bool | None = None
    binary_data_output: Any = Field(None, description="accepted; outputs are JSON")
    priority: Any = Field(None, description="accepted and ignored")
    timeout: Any = Field(None, description="accepted and ignored")


class Tensor(JsonObject):
    """An input tensor."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field({})


class Output(JsonObject):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = Field({})


class InferFields(JsonObject):
    """The JSON of a request."""

    id: str | None = None
    parameters: dict[str, Any] = Field({})
    inputs: list[Tensor] = Field(max_length=len(INPUTS))
    outputs: list[Output] = Field([], max_length=len(OUTPUTS))


def parse(call: Call) -> InferRequest:
    """The request in a call; raises RequestError if it is invalid."""
    head, binary = _split(call)
    fields = check_fields(InferFields, load_json(head), EXAMPLE)
    parameters = check_fields(Parameters, fields.parameters, '{"tau": 0.1}')
    columns: dict[str, list[str]] = {}
    for tensor in fields.inputs:
        if tensor.name not in INPUTS or tensor.name in columns:
            raise RequestError(f"inputs: {tensor.name[:100]!r} is not one of {', '.join(INPUTS)}", "inputs")
        size = tensor.parameters.get("binary_data_size")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary):
                raise RequestError(
                    f"inputs: {tensor.name}: binary_data_size does not match the body", "inputs"
                )
            columns[tensor.name], binary = _decode(binary[:size], tensor, call.max_texts), binary[size:]
        else:
            columns[tensor.name] = _strings(tensor, call.max_texts)
    if binary:
        raise RequestError("inputs: the body has more binary data than its tensors", "inputs")
    texts, pairs = columns.get("text"), columns.get("text_pair")
    if not texts or (pairs is not None and len(pairs) != len(texts)):
        raise RequestError("inputs: text is required, and text_pair must have the same length", "inputs")
    known = (*OUTPUTS, "value")
    unknown = [output.name for output in fields.outputs if output.name not in known]
    if unknown:
        raise RequestError(f"outputs: {unknown[0][:100]!r} is not one of {', '.join(known)}", "outputs")
    name = call.path["model"]
    return InferRequest(
        [Text(text, pairs[i] if pairs else None) for i, text in enumerate(texts)],
        parameters.options,
        f"{name}:{call.path['version']}" if "version" in call.path else name,
        long_of(parameters.truncate),
        id=fields.id,
        outputs=[output.name for output in fields.outputs],
    )


def _split(call: Call) -> tuple[bytes, bytes]:
    """The JSON of a body, and the binary tensors after it.

    Raises RequestError if the header Inference-Header-Content-Length does not match the body.
    """
    for name, value in call.headers:
        if name == HEADER_LENGTH:
            if not value.isdigit() or len(value) > 18 or int(value) > len(call.body):
                raise RequestError(
                    "Inference-Header-Content-Length: does not match the body", cause="not_json"
                )
            return call.body[: int(value)], call.body[int(value) :]
    return call.body, b""


def _count(tensor: Tensor, most: int) -> int:
    """The number of strings in a tensor; raises RequestError for an invalid tensor, or more than `most` strings."""
    where = f"inputs: {tensor.name}"
    if tensor.datatype != "BYTES":
        raise RequestError(f"{where}: the datatype must be BYTES, got {tensor.datatype[:20]!r}", "inputs")
    shape = tensor.shape
    if not 1 <= len(shape) <= 2 or shape[0] < 1 or shape[1:] not in ([], [1]):
        raise RequestError(f"{where}: the shape must be [n] or [n, 1]", "inputs")
    if shape[0] > most:
        raise RequestError(f"{where}: {shape[0]} texts; at most {most} are allowed", "inputs")
    return shape[0]


def _strings(tensor: Tensor, most: int) -> list[str]:
    count, data = _count(tensor, most), tensor.data or []
    if len(data) == count and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    if len(data) != count:
        raise RequestError(
            f"inputs: {tensor.name}: has {len(data)} texts, but its shape says {count}", "inputs"
        )
    return [_checked(text, tensor.name, i) for i, text in enumerate(data)]


def _decode(data: bytes, tensor: Tensor, most: int) -> list[str]:
    """The strings of a binary BYTES tensor, each preceded by its length in bytes as a little-endian uint32.

    Raises RequestError if the data do not fit the shape, if there are more than `most` strings, or if a string is blank
    or not UTF-8.
    """
    texts: list[str] = []
    at = 0
    for i in range(_count(tensor, most)):
        start = at + 4
        end = start + int.from_bytes(data[at:start], "little")
        if len(data) < end or len(data) < start:
            raise RequestError(f"inputs: {tensor.name}: has fewer texts than its shape says", "inputs")
        try:
            texts.append(_checked(data[start:end].decode(), tensor.name, i))
        except UnicodeDecodeError:
            raise RequestError(f"inputs: {tensor.name}[{i}]: must be UTF-8", "inputs") from None
        at = end
    if at < len(data):
        raise RequestError(f"inputs: {tensor.name}: has more texts than its shape says", "inputs")
    return texts


def _checked(text: Any, name: str, i: int) -> str:
    try:
        return checked_text(text, f"inputs: {name}[{i}]")
    except ValueError as error:
        raise RequestError(str(error), "inputs") from None


def serialize(_: str, job: Job) -> bytes:
    """The requested outputs, one row for each text."""
    request, manifest = job.request, job.first.model.manifest
    assert isinstance(request, InferRequest)
    outcomes = job.first.outcomes()
    count = len(outcomes)
    tensors = {
        "label": _tensor("BYTES", [count], job.first.labels()),
        "exit_layer": _tensor("INT64", [count], [o.layer for o in outcomes]),
    }
    if isinstance(manifest.kind, Value):
        tensors["value"] = _tensor("FP64", [count], [o.value for o in outcomes])
    else:
        probs = [p for o in outcomes for p in rounded(o.probs)]
        tensors["probs"] = _tensor("FP64", [count, len(manifest.labels)], probs)
    names = request.outputs or outputs_of(manifest)
    body = {
        "model_name": manifest.name,
        "model_version": str(manifest.version),
        "outputs": [{"name": name, **tensors[name]} for name in names],
    }
    return orjson.dumps(body if request.id is None else body | {"id": request.id})


def _tensor(datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"datatype": datatype, "shape": shape, "data": data}


def add_routes(app: FastAPI, service: Service, **common: Any) -> None:
    """Add the routes for health, readiness and metadata.

    common: further arguments of the decorators, except for the health and readiness of the server.
    """
    tags: Any = {"tags": ["Open Inference Protocol"], **common}

    @app.get("/v2", **tags)
    async def server_metadata() -> dict[str, Any]:
        """Name and version of the server."""
        return {"name": "de3", "version": version_of("de3"), "extensions": []}

    @app.get("/v2/health/live", tags=["Open Inference Protocol"])
    async def server_live() -> dict[str, bool]:
        """200 while the process is running."""
        return {"live": True}

    @app.get(
        "/v2/health/ready", tags=["Open Inference Protocol"], responses={503: {"description": "not ready"}}
    )
    async def server_ready() -> JSONResponse:
        """200 once every model is loaded and warmed up, else 503."""
        is_ready = await service.status() == "ready"
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    of_model: Any = {
        "responses": {404: {"description": "no such model"}, 503: {"description": "not ready"}},
        **tags,
    }

    @app.get("/v2/models/{model}/ready", **of_model)
    async def model_ready(model: str) -> dict[str, Any]:
        """200 if the model is served."""
        return {"name": service.manifest(model).name, "ready": True}

    @app.get("/v2/models/{model}/versions/{version}/ready", **of_model)
    async def model_version_ready(model: str, version: str) -> dict[str, Any]:
        """200 if this version of the model is served."""
        return {"name": service.manifest(f"{model}:{version}").name, "ready": True}

    @app.get("/v2/models/{model}", **of_model)
    async def model_metadata(model: str) -> dict[str, Any]:
        """The model's inputs and outputs."""
        return _metadata(service.manifest(model), service)

    @app.get("/v2/models/{model}/versions/{version}", **of_model)
    async def model_version_metadata(model: str, version: str) -> dict[str, Any]:
        """This version's inputs and outputs."""
        return _metadata(service.manifest(f"{model}:{version}"), service)


def _metadata(manifest: Manifest, service: Service) -> dict[str, Any]:
    shapes: dict[str, tuple[str, list[int]]] = {
        "text": ("BYTES", [-1]),
        "text_pair": ("BYTES", [-1]),
        "label": ("BYTES", [-1]),
        "probs": ("FP64", [-1, len(manifest.labels)]),
        "value": ("FP64", [-1]),
        "exit_layer": ("INT64", [-1]),
    }
    if manifest.input == "text":
        del shapes["text_pair"]
    tensors = {name: {"name": name, "datatype": d, "shape": s} for name, (d, s) in shapes.items()}
    return {
        "name": manifest.name,
        "versions": [str(m.version) for m in service.manifests() if m.name == manifest.name],
        "platform": "de3",
        "inputs": [tensors[name] for name in INPUTS if name in tensors],
        "outputs": [tensors[name] for name in outputs_of(manifest)],
    }


INFER = Protocol(parse, serialize, message_body, example=EXAMPLE)
