"""Errors as a client sees them: {"error": {"message", "type", "param", "code"}}."""

from typing import Literal

import orjson
from starlette.responses import Response

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


# Why a request was not answered, in a word: a label in the metrics.
Cause = Literal[
    "bad_request",
    "malformed",
    "not_json",
    "unknown_field",
    "unknown_model",
    "too_large",
    "too_long",
    "slow_body",
    "loading",
    "queue_full",
    "shed",
    "budget",
    "timeout",
    "client_gone",
    "no_key",
    "rate_limited",
    "over_share",
    "other_origin",
    "conflict",
    "bad_artifact",
    "internal",
]


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status, one of TYPES.
        message: names the field, what is wrong with it and what is allowed.
        param: the field, if one is to blame.
        cause: for the metrics.
        retry_after: seconds after which to try again (429, 503).
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        cause: Cause = "bad_request",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.cause = status, message, param, cause
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | int | None]]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "Error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self, request_id: str | None = None) -> Response:
        """The HTTP response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if request_id is not None:
            headers["X-Request-ID"] = request_id
        return Response(orjson.dumps(self.body()), self.status, headers, "application/json")
