"""Reads the audit log (`de3 serve --log-audits`) as calibration samples.

The log has the outputs of all exits, so no text is run.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from de3.exits.calibration import Samples
from de3.exits.recorded import Recorded
from de3.export.calibrate import Part
from de3.model_store.manifest import NAME, VERSION, Count, Manifest
from de3.model_store.part import MAX_LABELS, MAX_LAYERS, Layer, Share
from de3.model_store.store import Artifact
from de3.training.progress import console, warn

MAX_AUDITS = 200_000  # kept in memory
MAX_LINE = 2**24  # bytes
MAX_NAMED = 5  # other models named in a message
MIN_TEXTS = 500  # distinct, as for de3 import: fewer certify hardly any τ
MAX_BELOW = 0.05  # share of audits below the usual sampling rate; a higher share gives a warning
SEED = 0

# Within float32, with room for their squares in float64.
Logit = Annotated[float, Field(ge=-1e30, le=1e30)]
# Rounding in float32 can put a cosine distance slightly outside [0, 2].
Distance = Annotated[float, Field(ge=-0.01, le=2.01)]
# Fail fast: otherwise a million wrong values would give a million errors.
Logits = Annotated[list[Logit], Field(max_length=MAX_LABELS, fail_fast=True)]
Distances = Annotated[list[Distance], Field(max_length=MAX_LABELS, fail_fast=True)]


class _Row(BaseModel):
    """A line of the log, which server.audit.log writes. The line is untrusted; its texts are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    time: float = Field(ge=0)
    model: str = Field(pattern=f"^{NAME.pattern}:{VERSION.pattern}$")
    share: Share = Field(gt=0)
    tokens: Count
    layers: list[Layer] = Field(max_length=MAX_LAYERS)
    logits: list[Logits] = Field(max_length=MAX_LAYERS)
    distances: list[Distances | None] = Field(max_length=MAX_LAYERS)


@dataclass(frozen=True, slots=True)
class _Audit:
    """An audited text, which ran to full depth.

    Attributes:
        time: seconds since 1970.
        share: probability of being audited.
        logits, distances: outputs of every exit, (exits, K); distances are NaN at exits without prototypes.
    """

    time: float
    share: float
    tokens: int
    logits: NDArray[np.float32]
    distances: NDArray[np.float32]


@dataclass
class _Seen:
    """Number of rows of the model and of other models, and the names of some of the others."""

    own: int = 0
    others: int = 0
    names: set[str] = field(default_factory=set)

    def add_other(self, model: str) -> None:
        """Count a row of another model."""
        self.others += 1
        if len(self.names) < MAX_NAMED:
            self.names.add(model)


def parts(artifact: Artifact, files: Sequence[Path]) -> tuple[Part, Part]:
    """Tuning and certifying samples from the audits of a model, labelled with full depth's answers.

    Equal texts form a group, and groups are not split between the parts. Raises ValueError for unusable files, and if
    there are fewer than MIN_TEXTS different texts.
    """
    seen = _Seen()
    audits = _representative(_read(artifact, files, seen))
    recorded = _recorded(audits, artifact.manifest)
    groups = _groups(recorded.logits)
    count = int(groups.max()) + 1
    if count < MIN_TEXTS:
        raise ValueError(
            f"{count} different texts, from {seen.own} audits of {artifact.full_name}, are too few to calibrate on: "
            f"at least {MIN_TEXTS} are needed"
        )
    console.print(
        f"{len(audits)} of {seen.own} audits of {artifact.full_name}, {count} different texts: one half to tune on, "
        "the other to certify",
        highlight=False,
        soft_wrap=True,
    )
    in_tune = (np.random.default_rng(SEED).permutation(count) < count // 2)[groups]
    samples = Samples(recorded, groups)
    tune, certify = (samples.rows(which) for which in (in_tune, ~in_tune))
    return _part(tune), _part(certify)


def _part(samples: Samples) -> Part:
    return Part(samples, np.ones(len(samples.groups), np.bool_))


def _read(artifact: Artifact, files: Sequence[Path], seen: _Seen) -> list[_Audit]:
    """The newest audits of a model, at most MAX_AUDITS; raises ValueError if there are none, or a file is repeated."""
    if len({file.resolve() for file in files}) < len(files):
        raise ValueError("--from-audits: the same file is given twice")
    rows = (audit for file in files for audit in _audits(file, artifact, seen))
    newest = heapq.nlargest(MAX_AUDITS, rows, key=lambda audit: audit.time)
    others = f"{seen.others} rows of other models or versions ({', '.join(sorted(seen.names))})"
    where = ", ".join(map(str, files))
    if not newest:
        what = f"only {others}" if seen.others else "it is empty" if len(files) == 1 else "they are empty"
        raise ValueError(f"{where}: no audits of {artifact.full_name}: {what}")
    if seen.others:
        warn([f"{where}: skipped {others}"])
    if seen.own > MAX_AUDITS:
        warn([f"{where}: {seen.own} audits: only the newest {MAX_AUDITS} are used"])
    return newest


def _audits(file: Path, artifact: Artifact, seen: _Seen) -> Iterator[_Audit]:
    """Yield the audits of a model in a file; raises ValueError with file, line and problem."""
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(MAX_LINE + 1), b""), 1):
            where = f"{file}:{number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: a line has more than {MAX_LINE} bytes")
            try:
                row = _row(orjson.loads(line))
                if row.model != artifact.full_name:
                    seen.add_other(row.model)
                    continue
                audit = _audit(row, artifact.manifest)
            except orjson.JSONDecodeError:
                if line.endswith(b"\n"):
                    raise ValueError(f"{where}: not JSON") from None
                warn([f"{where}: skipped the last line, which is incomplete"])
                return
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            seen.own += 1
            yield audit


def _row(fields: Any) -> _Row:
    """Validate a line of the log; raises ValueError for its first problem."""
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    try:
        return _Row.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _audit(row: _Row, manifest: Manifest) -> _Audit:
    """Convert a row of this model to an audit; raises ValueError if the row does not match the model's exits."""
    layers, count = manifest.exit_layers, len(manifest.labels)
    if row.layers != layers:
        raise ValueError(f"layers: must be the model's exits, {layers}, got {row.layers!s:.100}")
    if [len(values) for values in row.logits] != [count] * len(layers):
        raise ValueError(f"logits: must be {len(layers)} lists, one for each exit, of {count} numbers each")
    wanted = [count if layer in manifest.prototype_layers else None for layer in layers]
    if [None if values is None else len(values) for values in row.distances] != wanted:
        raise ValueError(
            f"distances: must be {len(layers)} lists, one for each exit, of {count} numbers each, or null where there "
            "are no prototypes"
        )
    distances = np.full((len(layers), count), np.nan, np.float32)
    for values, given in zip(distances, row.distances, strict=True):
        if given is not None:
            values[:] = given
    return _Audit(row.time, row.share, row.tokens, np.array(row.logits, np.float32), distances)


def _representative(audits: list[_Audit]) -> list[_Audit]:
    """The audits, thinned at random as if all had been sampled at the most common rate.

    Audits sampled at a lower rate cannot be corrected for; if there are many, the user is warned.
    """
    shares = np.array([audit.share for audit in audits])
    values, counts = np.unique(shares, return_counts=True)
    usual = float(values[counts.argmax()])
    is_kept = np.random.default_rng(SEED).random(len(audits)) * shares < usual
    below = float((shares[is_kept] < usual).mean())
    if below > MAX_BELOW:
        warn(
            [
                f"{100 * below:.0f}% of the audits were sampled below the usual rate of {100 * usual:.3g}%, as a "
                "server under load does: busy periods are under-represented"
            ]
        )
    return [audit for audit, kept in zip(audits, is_kept, strict=True) if kept]


def _recorded(audits: Sequence[_Audit], manifest: Manifest) -> Recorded:
    """The outputs of all exits in the audits, with full depth's answers as labels."""
    thresholds = manifest.label_thresholds
    recorded = Recorded(
        manifest.exit_layers,
        np.stack([audit.logits for audit in audits]),
        np.stack([audit.distances for audit in audits]),
        np.zeros(len(audits)),
        np.array([audit.tokens for audit in audits], np.int64),
        thresholds=None if thresholds is None else np.array(thresholds.logits),
        tolerance=manifest.tolerance,
    )
    return replace(recorded, labels=recorded.answers[:, -1])


def _groups(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Group number of each sample, (n,): equal texts give the same logits, bit for bit, and form a group."""
    numbers = dict[bytes, int]()
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in logits], np.int64)
