"""The messages between a server and the process of a fit (export/fit_process.py), as JSON: the job and its result."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from de3.server.learn.record import HeldOut


class Job(BaseModel):
    """A fit that a server requests, or a test of exits that were fitted before.

    Attributes:
        base: folder of the model, or of the version to be tested.
        records: file of records.
        store: folder of the store for the new version.
        version: number of the new version.
        attempt: number of this fit.
        rate: the guaranteed rate of disagreement.
        first_new, by_client: see export.learn.fit_exits.
        speedup: speed-up in layers that is served now.
        memory: memory limit, bytes.
        after: for a test, the highest number of the records that are too old; None for a fit.
    """

    model_config = ConfigDict(frozen=True)

    base: Path
    records: Path
    store: Path
    version: int
    attempt: int
    rate: float
    first_new: int
    by_client: bool
    speedup: float
    memory: int
    after: int | None = None


class Found(BaseModel):
    """The result of a job; a test has only evidence.

    Attributes:
        path: folder of the new version; None if nothing was published.
        records, held_out: number of records, and number of those that tested the exits.
        speedup: speed-up in layers at the best τ in hindsight, on the held-out records.
        proved_speedup: speed-up in layers at the τ that these records prove.
        served_speedup: speed-up in layers that the fit had to beat.
        seconds: duration of the job, including its process's start and pauses.
        evidence: the held-out texts.
    """

    model_config = ConfigDict(frozen=True)

    path: Path | None = None
    records: int = 0
    held_out: int = 0
    speedup: float = 0.0
    proved_speedup: float = 0.0
    served_speedup: float = 0.0
    seconds: float = 0.0
    evidence: list[HeldOut] = []
