"""One HTTP request and its response, as the request log and the traces report them."""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from starlette.types import Scope

from de3.runtime.engine.job import Job
from de3.runtime.errors import Cause
from de3.server.http.errors import STATUSES
from de3.server.infer import Inference

HEADER = b"x-request-id"
WELL_FORMED = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)
_NUMBER = itertools.count()


def _new_prefix() -> None:
    """Set the first half of this process's request ids: drawn at random once, so that an id needs no system call."""
    global _PREFIX  # noqa: PLW0603
    _PREFIX = os.urandom(8).hex()


_PREFIX = ""
_new_prefix()
os.register_at_fork(after_in_child=_new_prefix)  # the processes of a server are forked


def request_id(scope: Scope) -> str:
    """The client's X-Request-ID if it is well-formed, otherwise a new id.

    A well-formed id has up to 128 ASCII letters, digits and _ . : / + = @ -, and so is safe in any log.
    """
    for name, value in scope["headers"]:
        if name == HEADER and WELL_FORMED.fullmatch(value):
            return str(value, "ascii")
    return f"{_PREFIX}{next(_NUMBER):016x}"


@dataclass(slots=True)
class Exchange:
    """One request, filled in as it is answered.

    Attributes:
        route: template of the path, as in `app.py: PROTOCOLS`.
        started, ended: perf_counter seconds.
        owner: owner of the API key; empty if no key is needed.
        status: HTTP status; 499: the client disconnected.
        cause: cause of the failure, as in the metrics; None if the request was answered.
        inference: the parsed request and its progress; None until the request is parsed and charged.
    """

    id: str
    scope: Scope
    route: str
    started: float = field(default_factory=perf_counter)
    ended: float = 0.0
    owner: str = ""
    status: int = 500
    cause: Cause | None = None
    inference: Inference | None = None

    def fail(self, cause: Cause) -> None:
        """Set the cause of the failure, and its status."""
        self.status, self.cause = STATUSES[cause], cause

    @property
    def job(self) -> Job | None:
        """The job of the request's texts; None if the request failed before it had one."""
        return None if self.inference is None else self.inference.job

    @property
    def models(self) -> list[str]:
        """The name:version of each model that answers; "none" if no model was found."""
        served = () if self.inference is None else self.inference.served
        return [one.model.full_name for one in served] or ["none"]


Reporter = Callable[[Exchange], None]
