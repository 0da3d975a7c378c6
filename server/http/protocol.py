"""What distinguishes one protocol from another."""

from collections.abc import Callable
from dataclasses import dataclass

from server.engine.work import Job, Request
from server.errors import RequestError
from server.http import errors

LARGE_BODY_BYTES = 16 * 1024  # parsing it may take milliseconds


@dataclass(frozen=True, slots=True)
class Protocol:
    """How bodies become requests, and finished jobs become responses.

    To add a protocol, write a module with these functions and add its path to `app.py: PROTOCOLS`. Keys,
    limits, metrics and logs come with it. A protocol in full:

        def parse(body: bytes, max_texts: int) -> Request:
            try:
                return Request([Text(orjson.loads(body)["text"])])
            except (ValueError, KeyError, TypeError):
                raise RequestError("the body must be a JSON object with a text") from None

        def serialize(request_id: str, job: Job) -> bytes:
            return orjson.dumps({"labels": job.labels()})

        PROTOCOLS["/label"] = Protocol(parse, serialize)

    Attributes:
        parse: (body, most texts allowed) to a request; raises RequestError.
        serialize: (request id, job that is done) to the JSON of the response.
        error: the JSON of an error, whose status is the same in every protocol (`errors.STATUSES`).
    """

    parse: Callable[[bytes, int], Request]
    serialize: Callable[[str, Job], bytes]
    error: Callable[[RequestError], bytes] = errors.openai_body
