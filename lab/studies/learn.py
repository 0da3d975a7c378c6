"""The guarantee of a server that learns, on simulated traffic: the share of streams that break it."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import FINE_TAUS
from de3.exits.criteria import Limits
from de3.exits.guarantee import Guarantee, Profiles, error_of, profiles
from de3.export.classifier import Stock, convert
from de3.export.learn import fit_exits
from de3.export.records import texts_of
from de3.model_store.fitted import MOST_PIECES
from de3.model_store.manifest import Manifest, base_of
from de3.model_store.model import Model
from de3.model_store.records import Records
from de3.model_store.store import Store
from de3.progress import console, track
from de3.server.audit.auditor import Traffic

SIZES = (500, 750, 1125, 1687, 2530, 3795)  # number of texts before each fit
END = 8000  # number of texts in a stream
RATES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Version:
    """The exits of one fit, evaluated on unseen texts.

    Attributes:
        differs, layers: disagreement with full depth and exit layer of each unseen text at each τ, (n, taus).
        held_out: number of held-out texts of the fit.
        rates: true rate of disagreement at each τ, (taus,).
    """

    differs: NDArray[np.bool_]
    layers: NDArray[np.int64]
    held_out: int
    rates: NDArray[np.float64]


def records_of(stock: Path, texts: Sequence[str]) -> tuple[Manifest, Records]:
    """The manifest of the stock classifier in int8, and records of the texts as a server makes them."""
    with TemporaryDirectory() as folder:
        convert(Stock.open("stock", stock), Store(Path(folder)), "base", "int8")
        model = Model(Store(Path(folder)).open("base"))
    manifest, n = model.manifest, len(texts)
    states = np.zeros((n, manifest.num_layers, manifest.hidden_size), np.float16)
    logits = np.zeros((n, len(manifest.labels)), np.float32)
    pieces, spreads = np.zeros((n, MOST_PIECES), np.uint32), np.zeros(n, np.float32)
    for i, text in enumerate(track(texts, "Running the model")):
        tokens = model.tokenize(text)
        steps, marks = model.full_depth(tokens), model.marks(tokens)
        pieces[i], spreads[i] = marks.pieces, marks.spreads
        states[i], logits[i] = [model.pooling.mean(step.hidden) for step in steps[:-1]], steps[-1].logits
    number = np.arange(n)
    keys, clients = number.astype(np.uint64), np.zeros(n, np.int32)
    sample = states, logits, np.ones(n), keys, number, clients, ["one"], [float(n)], np.zeros(n, np.bool_)
    ids = np.zeros((n, 0), np.int32)
    return manifest, Records(base_of(manifest), *sample, ids=ids, pieces=pieces, spreads=spreads)


def chain(manifest: Manifest, records: Records, rate: float, seed: int) -> list[Version]:
    """The versions of one server: a fit for each of SIZES, measured on the texts that none of the fits saw."""
    console.quiet = True
    order = np.random.default_rng(seed).permutation(len(records))
    unseen = texts_of(records.part(order[SIZES[-1] :]), manifest)
    versions, taus = [], np.unique(FINE_TAUS)
    for attempt, size in enumerate(SIZES, 1):
        fitted = fit_exits(records.part(np.sort(order[:size])), manifest, attempt, Limits(rate))
        recorded = fitted.exits.recorded(unseen)
        scores = fitted.calibrated.risk.scores(recorded)
        differs, layers = profiles(scores, recorded.differs, recorded.exit_layers, taus)
        versions.append(Version(differs, layers, len(fitted.evidence), differs.mean(0)))
    return versions


def stream(versions: Sequence[Version], rate: float, seed: int) -> tuple[bool, float]:
    """Simulate one stream of resampled texts after the first fit.

    Returns True if the true rate at the τ in force ever exceeded the guarantee, and the mean exit layer.
    """
    rng, taus = np.random.default_rng(seed), np.unique(FINE_TAUS)
    is_broken, layers, traffic = False, 0.0, Traffic(processes=1, texts=SIZES[0])
    for attempt, version in enumerate(versions, 1):
        guarantee = Guarantee(rate, taus, error=error_of(attempt))
        n = len(version.differs)
        held = rng.integers(n, size=version.held_out)
        guarantee.count(1.0, Profiles(version.differs[held], version.layers[held]))
        guarantee.advance()
        end = SIZES[attempt] if attempt < len(SIZES) else END
        for i in rng.integers(n, size=end - traffic.texts):
            is_broken |= bool(version.rates[guarantee.index] > rate)
            layers += float(version.layers[i, guarantee.index])
            share = 1.0 if guarantee.index == 0 else max(0.05, traffic.share)
            traffic.texts += 1
            if rng.random() < share:
                guarantee.count(share, Profiles(version.differs[i, None], version.layers[i, None]))
                guarantee.advance()
    return is_broken, layers / (END - SIZES[0])


def sizes(
    stock: Path, texts: Sequence[str], counts: Sequence[int], unseen: int
) -> list[tuple[int, list[float]]]:
    """Speed-ups in layers, at each of RATES, of exits fitted to each number of texts in `counts`, by that number.

    unseen: number of texts to measure on; τ is the best on these in hindsight. A count above the number of the
    remaining texts is left out.
    """
    manifest, records = records_of(stock, texts)
    order, taus = np.random.default_rng(0).permutation(len(records)), np.unique(FINE_TAUS)
    tested, rows = texts_of(records.part(order[-unseen:]), manifest), []
    console.quiet = True
    for count in counts:
        if count > len(records) - unseen:
            continue
        fitted = fit_exits(records.part(np.sort(order[:count])), manifest, 1, Limits(RATES[1]))
        recorded = fitted.exits.recorded(tested)
        scores = fitted.calibrated.risk.scores(recorded)
        differs, layers = profiles(scores, recorded.differs, recorded.exit_layers, taus)
        found = []
        for rate in RATES:
            wrong = np.flatnonzero(differs.mean(0) > rate)
            index = (wrong[0] if len(wrong) else len(taus)) - 1
            found.append(manifest.num_layers / max(float(layers[:, index].mean()), 0.01))
        rows.append((count, found))
    return rows


def run(
    stock: Path, texts: Sequence[str], rate: float, fits: int, streams: int, workers: int
) -> tuple[int, int, float]:
    """Simulate streams; returns how many ever broke the guarantee, how many there were, and the speed-up in layers."""
    manifest, records = records_of(stock, texts)
    broken, layers = 0, list[float]()
    with ProcessPoolExecutor(workers) as pool:
        chains = list(track(pool.map(partial(chain, manifest, records, rate), range(fits)), "Fitting", fits))
        jobs = [(versions, seed) for seed, versions in enumerate(chains)]
        each = streams // fits
        for results in track(pool.map(partial(_streams, rate=rate, count=each), jobs), "Streams", fits):
            broken += sum(is_broken for is_broken, _ in results)
            layers += [mean for _, mean in results]
    return broken, each * fits, manifest.num_layers / float(np.mean(layers))


def _streams(job: tuple[list[Version], int], rate: float, count: int) -> list[tuple[bool, float]]:
    versions, seed = job
    return [stream(versions, rate, 10_000 * (seed + 1) + i) for i in range(count)]
