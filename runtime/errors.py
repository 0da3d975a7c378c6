"""Request errors. `server/http/errors.py` maps a cause to its status; each protocol has its own error format."""

from typing import Literal

# Causes are values of a metric label, so they are a fixed set.
Cause = Literal[
    "bad_request",
    "malformed",
    "not_json",
    "unknown_field",
    "unknown_model",
    "unknown_path",
    "wrong_method",
    "too_large",
    "too_long",
    "unsupported_encoding",
    "slow_body",
    "loading",
    "queue_full",
    "shed",
    "busy",
    "budget",
    "timeout",
    "upstream",
    "upstream_timeout",
    "client_gone",
    "no_key",
    "forbidden",
    "rate_limited",
    "over_share",
    "other_origin",
    "conflict",
    "bad_artifact",
    "internal",
]


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        message: the problem. For an invalid value of a request, it begins with the field, and names the allowed values
            where they are known.
        field: the invalid field of the request; None: no field is invalid.
        cause: reason for the error, which determines the HTTP status; also a label in the metrics.
        retry_after_s: seconds after which the same request may succeed; None: never, or unknown.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        cause: Cause = "bad_request",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.field, self.cause, self.retry_after_s = message, field, cause, retry_after_s

    def inside(self, where: str) -> "RequestError":
        """The error, whose field is inside another, such as models[1]; where: the other; empty: none."""
        if not where:
            return self
        field = None if self.field is None else f"{where}.{self.field}"
        return RequestError(f"{where}.{self.message}", field, self.cause, self.retry_after_s)
