"""The contract of the protocols: parse calls, serialize finished jobs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request
from de3.runtime.errors import RequestError
from de3.server.http import errors
from de3.server.questions import Questions


@dataclass(frozen=True, slots=True)
class Call:
    """One classification request, as received over HTTP.

    Attributes:
        path: values of the path parameters.
        headers: names and values; names are in lower case.
        max_texts: maximum number of texts in a request.
        questions: those that are bound to models.
    """

    body: bytes
    path: Mapping[str, str] = field(default_factory=dict)
    headers: Sequence[tuple[bytes, bytes]] = ()
    max_texts: int = 256
    questions: Questions = field(default_factory=Questions)


@dataclass(frozen=True, slots=True)
class Protocol:
    """Converts calls to requests, and finished jobs to responses.

    To add a protocol, write a module with these functions and add its path to `app.py: PROTOCOLS`. API
    keys, limits, metrics and logs then apply to it. A complete protocol:

        class LabelFields(BaseModel):
            text: Annotated[str, Field(min_length=1, pattern=r"\\S")]

        def parse(call: Call) -> Request:
            fields = check_fields(LabelFields, load_json(call.body), '{"text": "a text"}')
            return Request([Text(fields.text)])

        def serialize(request_id: str, job: Job) -> bytes:
            return orjson.dumps({"labels": job.first.labels()})

        PROTOCOLS["/label"] = Protocol(parse, serialize)

    A path may have parameters, as in /models/{model}/label; their values are in `Call.path`. If the response depends on
    further fields of the request, put them in a subclass of Request.

    Attributes:
        parse: converts a call to a request; raises RequestError.
        serialize: converts a request id and a finished job to the JSON of the response.
        error: converts an error to JSON; the status is the same in every protocol (`errors.STATUSES`).
        others: first segments of other paths whose errors have this protocol's format.
        example: JSON of a body, for /docs.
    """

    parse: Callable[[Call], Request]
    serialize: Callable[[str, Job], bytes]
    error: Callable[[RequestError], bytes] = errors.openai_body
    others: Sequence[str] = ()
    example: str = "{}"


class Route(NamedTuple):
    """A classification request's path, and the protocol that answers it.

    Attributes:
        template: path with the names of its parameters, as in `app.py: PROTOCOLS`.
        path: values of the path parameters.
    """

    template: str
    protocol: Protocol
    path: Mapping[str, str]
