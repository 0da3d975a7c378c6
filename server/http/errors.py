"""HTTP errors: the status of each cause, which is the same in every protocol, and the body in OpenAI's format.

The body is {"error": {"message", "type", "param", "code"}}; a protocol may replace it.
"""

import orjson
from starlette.responses import Response

from de3.runtime.errors import Cause, RequestError

# By status: its type in OpenAI's format, and the causes that have it.
_BY_STATUS: dict[int, tuple[str, tuple[Cause, ...]]] = {
    400: ("BadRequestError", ("malformed", "not_json")),
    401: ("AuthenticationError", ("no_key",)),
    403: ("PermissionDeniedError", ("forbidden", "other_origin")),
    404: ("NotFoundError", ("unknown_model", "unknown_path")),
    405: ("MethodNotAllowedError", ("wrong_method",)),
    408: ("RequestTimeoutError", ("slow_body",)),
    409: ("ConflictError", ("conflict",)),
    413: ("RequestTooLargeError", ("too_large",)),
    415: ("UnsupportedMediaTypeError", ("unsupported_encoding",)),
    422: ("UnprocessableEntityError", ("bad_request", "unknown_field", "too_long", "bad_artifact")),
    429: ("RateLimitError", ("rate_limited", "over_share")),
    499: ("Error", ("client_gone",)),  # never sent; used in metrics and logs
    500: ("InternalServerError", ("internal",)),
    502: ("BadGatewayError", ("upstream",)),
    503: ("ServiceUnavailableError", ("loading", "queue_full", "shed", "busy", "budget")),
    504: ("TimeoutError", ("timeout", "upstream_timeout")),
}
TYPES = {status: kind for status, (kind, _) in _BY_STATUS.items()}
STATUSES = {cause: status for status, (_, causes) in _BY_STATUS.items() for cause in causes}


def body(status: int, message: str, param: str | None = None) -> bytes:
    """The body of an error, in OpenAI's format as vLLM uses it."""
    error = {"message": message, "type": TYPES[status], "param": param, "code": status}
    return orjson.dumps({"error": error})


def openai_body(error: RequestError) -> bytes:
    """The body of the response to a failed request, in OpenAI's format."""
    return body(STATUSES[error.cause], error.message, error.field)


def message_body(error: RequestError) -> bytes:
    """The body of the response to a failed request, as {"error": message}."""
    return orjson.dumps({"error": error.message})


def response(error: RequestError, request_id: str | None = None, content: bytes | None = None) -> Response:
    """The HTTP response to a failed request.

    request_id: value of the X-Request-ID header; None: no such header. content: the body; None: one in OpenAI's format.
    """
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.cause == "no_key":
        headers["WWW-Authenticate"] = "Bearer"
    if request_id is not None:
        headers["X-Request-ID"] = request_id
    content = openai_body(error) if content is None else content
    return Response(content, STATUSES[error.cause], headers, "application/json")
