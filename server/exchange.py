"""A request to /classify and what came of it, for whoever reports on it: the request log, the traces."""

import itertools
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from starlette.types import Scope

from server.errors import Cause
from server.work import Job

HEADER = b"x-request-id"
_WELL_FORMED = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)
# Unique without asking the system for randomness for every answer.
_ID, _NUMBER = uuid.uuid4().hex[:16], itertools.count()


def request_id(scope: Scope) -> str:
    """The id that a client sent as X-Request-ID, or a new one where it sent none that is well formed.

    Well formed are up to 128 ASCII letters, digits and _ . : / + = @ -, so that an id is safe in any log.
    """
    for name, value in scope["headers"]:
        if name == HEADER and _WELL_FORMED.fullmatch(value):
            return str(value, "ascii")
    return f"{_ID}{next(_NUMBER):016x}"


@dataclass(slots=True)
class Exchange:
    """One request, filled in as it is answered.

    Attributes:
        started, ended: perf_counter seconds.
        owner: who has the API key; empty where none is needed.
        model: name:version, or none where no model was found.
        status: HTTP status; 499: the client went away.
        cause: why it was not answered, as in the metrics; None if it was.
        job: its texts; None where it was refused before it had any.
    """

    id: str
    scope: Scope
    started: float = field(default_factory=perf_counter)
    ended: float = 0.0
    owner: str = ""
    model: str = "none"
    status: int = 500
    cause: Cause | None = None
    job: Job | None = None


Reporter = Callable[[Exchange], None]
