"""The messages between a server and the process of a fit (export/fit_process.py), as JSON: the job and its result."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from de3.exits.criteria import Limits
from de3.exits.guarantee import Audited


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text that is evidence about the exits of a fit: it arrived after the last text that the fit could read.

    Raises ValueError for a text that arrived before.

    Attributes:
        client: as in server.learn.record.Record.
        key: hash of its tokens; None if the text is near to one that the exits were fitted to (see model_store.fitted),
            so it counts only against them.
        number: position of the text in the traffic, as in Records.
        cut: position of the last text that the fit could read; see model_store.manifest.Learned.
        audited: its evidence.
    """

    client: str
    key: int | None
    number: int
    cut: int
    audited: Audited

    def __post_init__(self) -> None:
        if self.number <= self.cut:
            raise ValueError(f"text {self.number} could be read by the fit, which ends at {self.cut}")


class Job(BaseModel):
    """A fit that a server requests, or a test of exits that were fitted before.

    Attributes:
        base: folder of the model, or of the version to be tested.
        records: file of records.
        store: folder of the store for the new version.
        version: number of the new version.
        attempt: number of this fit.
        limits: the guarantee.
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
    limits: Limits
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
