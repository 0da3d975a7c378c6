"""Why a request is not answered. Each protocol maps a cause to its own status and error format."""

from typing import Literal

# A label in the metrics, so the values are few.
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
    "slow_body",
    "loading",
    "queue_full",
    "shed",
    "budget",
    "timeout",
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
    """A request that is not answered.

    Attributes:
        message: what is wrong, beginning with the field at fault, and what is allowed.
        field: that field of the request; None where no field is at fault.
        retry_after_s: seconds after which the same request may succeed; None: it will not by itself.
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
