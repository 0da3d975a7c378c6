"""Fits exits to records of live traffic, and publishes the model with them; its other weights do not change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from de3.exits import betting, risk
from de3.exits.calibration import FINE_TAUS, times
from de3.exits.criteria import Limits, criteria_of
from de3.exits.flags import Flag
from de3.exits.guarantee import Audited, error_of, profiles
from de3.exits.recorded import Recorded
from de3.export import fit, states
from de3.export.calibrate import Calibrated, CalibrationPart, calibrate
from de3.export.fit import Exits
from de3.export.publish import as_stored, write_exits
from de3.export.record import recorded_spans
from de3.export.records import check, groups_of, opened, opened_model, part_of, recorded, texts_of, thinned
from de3.model_store.fitted import MAX_FITTED, FittedTexts
from de3.model_store.manifest import FITTED, Learned, Manifest, base_of
from de3.model_store.model import fitted_of
from de3.model_store.records import Records
from de3.model_store.store import Artifact, Store
from de3.progress import console
from de3.runtime.fit import Found, HeldOut, Job

HELD_OUT, MAX_HELD_OUT = 0.4, 2000  # share and maximum number of the new texts that test the exits
MAX_LOSS = 0.01  # loss of accuracy at the default τ, which a server without a guarantee uses
SEED = 0
TOKENS = 20_000  # tokens of a token classifier to which exits are fitted
MIN_SHARE = 0.005  # of the texts; a smaller gain in local answers is not worth the layers


@dataclass(frozen=True)
class Fitted:
    """Exits with their risk, and their results on held-out records.

    Attributes:
        speedup: speed-up in layers at the best τ in hindsight whose disagreement is within the guaranteed rate.
        proved_speedup: speed-up in layers at the highest τ that the held-out records prove.
        evidence: the held-out records, in order.
        cut: position in the traffic of the last record that the fit could read.
        texts: the texts that the exits were fitted to.
    """

    exits: Exits
    calibrated: Calibrated
    speedup: float
    proved_speedup: float
    evidence: list[HeldOut]
    cut: int
    texts: FittedTexts


def fit_exits(
    records: Records,
    manifest: Manifest,
    attempt: int,
    limits: Limits,
    first_new: int = 0,
    by_client: bool = False,
    base: Artifact | None = None,
) -> Fitted:
    """Fit exits and risk to records of a model, and test them on later ones.

    attempt: number of the fit, from 1; determines the error probability of the test (see `error_of`). limits: the
    guarantee. first_new: number of the first record that tests may use; earlier records are from before a change in the
    traffic. by_client: each client has a guarantee of its own, so all its held-out records are evidence. base: the
    model, if it is a token classifier, which runs the records' tokens.

    Raises ValueError if there are too few records.
    """
    cut = cut_of(records, first_new, by_client)
    fitted, tests = _split(records, cut, first_new)
    texts = FittedTexts(fitted.pieces, fitted.marks.means, fitted.client_hashes)
    is_near = texts.are_near(tests.marks, tests.client_hashes if by_client else None)
    rng = np.random.default_rng([SEED, attempt])
    held = np.arange(len(tests)) if by_client else thinned(tests, np.arange(len(tests)), rng)
    # Exits are right more often about texts that are near to fitted ones, so their quality shows on others.
    new = np.flatnonzero(~is_near)
    new = thinned(tests, new, rng) if by_client else np.intersect1d(new, held)
    if len(new) < fit.HELD_OUT or len(np.unique(fitted.keys)) < 2 * fit.FOLDS:
        raise ValueError(f"{len(records)} records, {len(new)} new texts among the last of them, are too few")
    kind = _Texts(manifest) if base is None or not manifest.is_spans else _Tokens(base)
    exits, tune = kind.fit(fitted, limits.differing or 0.0)
    tested = kind.recorded(exits, tests)
    certify = part_of(tested.rows(new), groups_of(tests.part(new)))
    cost = 0.0 if manifest.upstream else manifest.exit_cost
    calibrated = calibrate(
        tune, certify, MAX_LOSS, "risk", self_labelled=True, may_pool=False, exit_cost=cost
    )
    scores = calibrated.risk.scores(tested)
    proved, speedup = _speedups(tested.rows(new), scores[new], limits, error_of(attempt))
    evidence = list(
        _evidence(tests.part(held), tested.rows(held), scores[held], is_near[held], cut, limits.flag)
    )
    return Fitted(exits, calibrated, speedup, proved, evidence, cut, texts)


class _Texts:
    """Fits exits to the pooled states of texts."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def fit(self, records: Records, rate: float) -> tuple[Exits, CalibrationPart]:
        """The exits, as they are served, and their cross-fitted outputs."""
        manifest = self._manifest
        texts = texts_of(records, manifest)
        as_served = partial(as_stored, precision=manifest.precision)
        exits, crossed = fit.fit(manifest.num_states, texts, SEED, as_served, ("mean",))
        crossed = _with_costs(crossed, manifest)
        first = 0 if manifest.upstream is None else _first_exit(crossed, rate)
        return exits, part_of(replace(crossed, unused=frozenset(range(first))), texts.groups)

    def recorded(self, exits: Exits, records: Records) -> Recorded:
        """The outputs of exits for other texts."""
        return _with_costs(exits.recorded(texts_of(records, self._manifest)), self._manifest)


class _Tokens:
    """Fits exits to the states of a token classifier's tokens, which the model computes again.

    The risk is fitted to other texts than the exits: to fit both to the same, the states of all tokens would have to be
    in memory.
    """

    def __init__(self, base: Artifact) -> None:
        self._model = opened_model(base)

    def fit(self, records: Records, rate: float) -> tuple[Exits, CalibrationPart]:
        """The exits, as they are served, and their outputs for texts that they were not fitted to."""
        groups = groups_of(records)
        is_fitted = np.random.default_rng(SEED).permutation(int(groups.max()) + 1)[groups] % 2 == 0
        to_fit, others = (records.part(np.flatnonzero(rows)) for rows in (is_fitted, ~is_fitted))
        tokens = [to_fit.tokens(i) for i in range(len(to_fit))]
        exits = fit.fit_tokens(states.of_tokens(self._model, tokens, TOKENS, SEED, "recorded"), SEED)
        return exits, part_of(self.recorded(exits, others), groups[~is_fitted])

    def recorded(self, exits: Exits, records: Records) -> Recorded:
        """The outputs of exits for other texts."""
        tokens = [records.tokens(i) for i in range(len(records))]
        return recorded_spans(self._model, tokens, "recorded texts", exits.classifiers)


def _with_costs(recorded: Recorded, manifest: Manifest) -> Recorded:
    """The outputs, with the costs of a model with an upstream: 1 for its answers, 0 for the model's.

    Its risk weighs no states: the gain before a stronger classifier was not measured.
    """
    costs = [*([0] * manifest.num_states), 1]
    return recorded if manifest.upstream is None else replace(recorded, costs=costs, states=None)


def _first_exit(recorded: Recorded, rate: float) -> int:
    """The first exit that is worth using before an upstream, by index.

    Layers cost next to nothing there, and a text that may leave at several exits leaves at the one that errs: on
    BANKING77, the last exit alone answers 69% of the texts with 2% unlike, all exits together 61%. So the shallowest
    start is chosen that answers about as many texts as the best one.
    """
    scores = risk.cross_fit(recorded)
    shares = []
    for first in range(len(recorded.exit_layers) - 1):
        used = np.where(np.arange(scores.shape[1]) >= first, scores, np.nan)
        differing, costs = profiles(used, recorded.differs, recorded.exit_costs, np.unique(FINE_TAUS))
        shares.append(float(1 - costs.mean(0)[differing.mean(0) <= rate].min()))
    return next(first for first, share in enumerate(shares) if share >= max(shares) - MIN_SHARE)


def cut_of(records: Records, first_new: int = 0, by_client: bool = False) -> int:
    """The position in the traffic up to which a fit may read records: later ones test it.

    It is one position for all clients. Otherwise a client could send copies of another one's texts that are held out:
    exits that were fitted to the copies would pass any test on the originals.
    """
    is_new = (records.numbers >= first_new) & ~records.extra
    numbers, clients = records.numbers[is_new], np.unique(records.clients[is_new])
    count = min(round(HELD_OUT * len(numbers)), MAX_HELD_OUT * (len(clients) if by_client else 1))
    return int(numbers[-count - 1]) if 0 < count < len(numbers) else 0


def _split(records: Records, cut: int, first_new: int) -> tuple[Records, Records]:
    """The records to fit exits to, and those that test them."""
    is_old = records.numbers < first_new
    old, new = np.flatnonzero(is_old), np.flatnonzero(~is_old & (records.numbers <= cut))
    # At most as many records from before a change in the traffic as from after it.
    if first_new and len(old) > len(new):
        old = np.sort(np.random.default_rng(SEED).permutation(old)[: len(new)])
    fitted = np.concatenate([old, new])[-MAX_FITTED:]
    return records.part(fitted), records.part((records.numbers > cut) & ~is_old & ~records.extra)


def _speedups(
    recorded: Recorded, scores: NDArray[np.float64], limits: Limits, error: float
) -> tuple[float, float]:
    """Speed-ups at the highest τ that these texts prove, and at the best τ in hindsight."""
    taus, deep = np.unique(FINE_TAUS), _blocked(recorded, limits.flag)
    costs = profiles(scores, recorded.differs, recorded.exit_costs, taus, deep).layers
    speedups = recorded.exit_costs[-1] / np.maximum(costs.mean(0), 1e-3)
    is_proved, is_within = np.ones(len(taus), np.bool_), np.ones(len(taus), np.bool_)
    criteria = criteria_of(recorded.kind, limits)
    for one, (unlike, rows) in zip(criteria, recorded.failures(limits.flag), strict=True):
        if one.limit is None:
            continue
        deep_rows = None if deep is None else deep[rows]
        differing = profiles(scores[rows], unlike, recorded.exit_costs, taus, deep_rows).differs
        counts = np.full(len(taus), len(rows)), differing.sum(0)
        is_proved &= betting.e_values(*counts, np.full(len(taus), one.limit)) >= 1 / error
        is_within &= differing.sum(0) <= one.limit * len(rows)

    def last(holds: NDArray[np.bool_]) -> float:
        """The speed-up at the last τ before the first for which `holds` is false; τ = 0 always holds."""
        wrong = np.flatnonzero(~holds[1:])
        return float(speedups[wrong[0] if len(wrong) else -1])

    return last(is_proved), last(is_within)


def _blocked(recorded: Recorded, flag: Flag | None) -> NDArray[np.bool_] | None:
    return None if flag is None else recorded.blocked(flag)


def _evidence(
    records: Records,
    recorded: Recorded,
    scores: NDArray[np.float64],
    is_near: NDArray[np.bool_],
    cut: int,
    flag: Flag | None,
) -> Iterator[HeldOut]:
    """Yield the evidence of each held-out record. is_near: whether it is near to a record that the fit read."""
    by_criterion = [
        dict(zip(rows.tolist(), fails.tolist(), strict=True)) for fails, rows in recorded.failures(flag)
    ]
    deep = _blocked(recorded, flag)
    for i, one in enumerate(scores):
        yield HeldOut(
            records.names[records.clients[i]],
            None if is_near[i] else int(records.keys[i]),
            int(records.numbers[i]),
            cut,
            Audited(
                [None if np.isnan(score) else float(score) for score in one],
                [failures.get(i) for failures in by_criterion],
                () if deep is None else deep[i].tolist(),
            ),
        )


def publish(
    base: Artifact,
    fitted: Fitted,
    store: Store,
    attempt: int | None,
    records: int,
    name: str | None = None,
    version: int | None = None,
) -> Path:
    """Publish a model with these exits; returns its folder.

    attempt: number of the server's fit; None if a guarantee treats the result as a new model. records: number of
    records that the fit was given, including held-out ones. name, version: the published name and version; by default,
    the base's name and the next version in the store. Raises StoreError for a damaged base, and OSError if the version
    exists.
    """
    manifest, exits = base.manifest, fitted.exits
    learned = attempt and Learned(base=base_of(manifest), attempt=attempt, records=records, cut=fitted.cut)
    fields = {
        "learned": learned,
        **({} if version is None else {"version": version}),
        **fitted.calibrated.fields(),
    }
    if manifest.upstream is not None:  # full depth is not an exit of the model
        exits = replace(exits, has_last=True)
        references = fitted.calibrated.calibration.references[: manifest.num_states]
        fields["calibration"] = fitted.calibrated.calibration.model_copy(update={"references": references})
    made = name or manifest.name
    with store.new_version(made) as draft:
        texts = fitted.texts
        tensors = {"pieces": texts.pieces, "means": texts.means, "clients": texts.clients}
        draft.write({FITTED: save_tensors(tensors)})
        return draft.publish(write_exits(base, exits, draft, name=made, **fields))


def import_records(base: Artifact, files: Sequence[Path], store: Store, name: str, rate: float) -> Path:
    """Publish a model with exits that are fitted to the records of one or more servers; returns its folder.

    rate: rate of disagreement at which the speed-up is printed; it does not influence the exits.

    Raises ValueError for unusable files or too few records, and StoreError for a damaged model.
    """
    records = opened(files, base.manifest)
    fitted = fit_exits(records, base.manifest, 1, Limits(rate), base=base)
    console.print(
        f"on {len(fitted.evidence)} held-out records the exits allow a speed-up of {times(fitted.speedup)} in layers "
        f"at {100 * rate:g}% disagreement",
        highlight=False,
    )
    return publish(base, fitted, store, None, len(records), name)


def learn(base: Artifact, records: Records, store: Store, job: Job) -> Found:
    """Fit exits to records of a model; publish them if they allow a higher speed-up than is served now.

    Whether they are served is up to the server, as it depends on how much each tenant's held-out records prove. Raises
    ValueError for too few records or those of another model, and StoreError for a damaged model.
    """
    manifest = base.manifest
    check(records, manifest)
    fitted = fit_exits(records, manifest, job.attempt, job.limits, job.first_new, job.by_client, base)
    path, is_better = None, fitted.speedup > job.speedup
    if is_better:
        path = publish(base, fitted, store, job.attempt, len(records), version=job.version)
    return Found(
        path=path,
        speedup=round(fitted.speedup, 3),
        proved_speedup=round(fitted.proved_speedup, 3),
        served_speedup=round(job.speedup, 3),
        held_out=len(fitted.evidence),
        records=len(records),
        evidence=fitted.evidence if is_better else [],
    )


def test(
    model: Artifact, records: Records, after: int, by_client: bool = False, flag: Flag | None = None
) -> Found:
    """Test the exits of a learned version on the records with higher numbers than `after`; returns the evidence.

    by_client: see fit_exits. flag: the guarantee's. Raises ValueError for records of another model, and StoreError for
    a damaged model.
    """
    check(records, model.manifest)
    learned, texts = model.manifest.learned, fitted_of(model)
    if learned is None or learned.cut is None or texts is None:
        return Found()
    rows = np.flatnonzero(~records.extra)
    if not by_client:
        rows = thinned(records, rows, np.random.default_rng([SEED, after]))
    rows = rows[records.numbers[rows] > max(after, learned.cut)]
    if not len(rows):
        return Found()
    newer = records.part(rows)
    outputs = recorded(model, newer)
    scores = model.manifest.default_signal.scores(outputs)
    is_near = texts.are_near(newer.marks, newer.client_hashes if by_client else None)
    return Found(evidence=list(_evidence(newer, outputs, scores, is_near, learned.cut, flag)))
