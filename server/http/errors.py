"""HTTP errors: the status of each cause, which is the same in every protocol, and the body in OpenAI's format.

The body is {"error": {"message", "type", "param", "code"}}; a protocol may replace it.
"""

import orjson
from starlette.responses import Response

from de3.server.errors import Cause, RequestError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
STATUSES: dict[Cause, int] = {
    "bad_request": 422,
    "malformed": 400,
    "not_json": 400,
    "unknown_field": 422,
    "unknown_model": 404,
    "unknown_path": 404,
    "wrong_method": 405,
    "too_large": 413,
    "too_long": 422,
    "slow_body": 408,
    "loading": 503,
    "queue_full": 503,
    "shed": 503,
    "busy": 503,
    "budget": 503,
    "timeout": 504,
    "client_gone": 499,  # never sent; used in metrics and logs
    "no_key": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "over_share": 429,
    "other_origin": 403,
    "conflict": 409,
    "bad_artifact": 422,
    "internal": 500,
}


def body(status: int, message: str, param: str | None = None) -> bytes:
    """The body of an error, in OpenAI's format as vLLM uses it."""
    kind = TYPES.get(status, "Error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def openai_body(error: RequestError) -> bytes:
    """The body of the response to a failed request, in OpenAI's format."""
    return body(STATUSES[error.cause], error.message, error.field)


def message_body(error: RequestError) -> bytes:
    """The body of the response to a failed request, as {"error": message}."""
    return orjson.dumps({"error": error.message})


def response(error: RequestError, request_id: str | None = None, content: bytes | None = None) -> Response:
    """The HTTP response to a failed request.

    request_id: for the X-Request-ID header; None: no such header. content: the body; None: in OpenAI's format.
    """
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.cause == "no_key":
        headers["WWW-Authenticate"] = "Bearer"
    if request_id is not None:
        headers["X-Request-ID"] = request_id
    content = openai_body(error) if content is None else content
    return Response(content, STATUSES[error.cause], headers, "application/json")
