"""Simulated streams of a guard whose missed texts are bounded (--guarantee-missed), with known rates.

Texts are drawn at random from recorded ones, flagged ones with a given share, and counted by the server's own code. In
half of the streams, the traffic changes halfway: flagged texts that early exits miss become three times as frequent.
Audits run immediately.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.bound import CONFIDENCE
from de3.exits.calibration import FINE_TAUS
from de3.exits.criteria import Limits, criteria_of
from de3.exits.flags import Flag
from de3.exits.guarantee import Audited, Profiles, profiles
from de3.exits.recorded import Recorded
from de3.exits.signals import Signal
from de3.progress import track
from de3.server.audit.tenant import Bounded, Settled, Tenant

BATCH = 250  # texts of a request
ROOM = 2**16  # hashes that a tenant may remember; every text is new
GROWTH = 3.0  # of the share of missed texts, in a change
TAUS = np.unique(FINE_TAUS)


@dataclass
class Population:
    """Recorded texts: the evidence of flagged ones, and the results of all at each τ."""

    recorded: Recorded
    scores: NDArray[np.float64]
    flag: Flag

    def __post_init__(self) -> None:
        is_flagged = self.recorded.flagged(self.flag)[:, -1]
        blocked, costs = self.recorded.blocked(self.flag), self.recorded.exit_costs
        _, (fails, self.rows) = self.recorded.failures(self.flag)[:2]
        self.fails, self.blocked, self.costs = fails, blocked[self.rows], costs
        own = self.scores[self.rows]
        self.flagged: Profiles = profiles(own, fails, costs, TAUS, self.blocked)
        safe = self.scores[~is_flagged], np.zeros_like(self.scores[~is_flagged], np.bool_)
        self.safe = profiles(*safe, costs, TAUS, blocked[~is_flagged])

    def cost(self, share: float) -> NDArray[np.float64]:
        """Mean cost of an answer at each τ, (G,). share: of flagged texts."""
        return np.asarray(share * self.flagged.layers.mean(0) + (1 - share) * self.safe.layers.mean(0))


@dataclass
class Stream:
    """The course of a stream.

    Attributes:
        is_above: the true rate at the τ in force was above the limit, before the change if there is one.
        first: texts before the first early exit.
        speedup: in the last tenth.
        unseen: texts from the change until τ was again within the limit; None without a change.
        missed: flagged texts missed meanwhile.
    """

    is_above: bool
    first: int
    speedup: float
    unseen: int | None = None
    missed: float = 0.0


def run(
    texts: Population, share: float, limit: float, audit_share: float, count: int, changes: bool, seed: int
) -> Stream:
    """One stream. share: of flagged texts. count: number of texts."""
    rng, limits = np.random.default_rng(seed), Limits(None, limit, texts.flag)
    criteria = [Bounded(one, TAUS, 1 - CONFIDENCE) for one in criteria_of(texts.recorded.kind, limits)]
    tenant, cost, exits = Tenant(TAUS, criteria, 0), texts.cost(share), len(texts.costs)
    chances = np.full(len(texts.rows), 1 / len(texts.rows))
    stream, costs, key = Stream(False, count, 0.0), list[float](), 0
    for start in range(0, count, BATCH):
        index = tenant.index
        if changes and start >= count // 2 and stream.unseen is None:
            is_missed = texts.flagged.differs[:, max(index, 1)]
            chances = chances * np.where(is_missed, GROWTH, 1.0)
            chances, stream.unseen, ends = chances / chances.sum(), 0, False
        rate = float(chances @ texts.flagged.differs[:, index])
        if stream.unseen is None:
            stream.is_above |= rate > limit
        elif not ends:
            ends = rate <= limit
            stream.unseen += 0 if ends else BATCH
            stream.missed += 0.0 if ends else BATCH * share * rate
        if index and stream.first == count:
            stream.first = start
        costs.append(cost[index])
        q = audit_share if index else 1.0
        drawn = rng.choice(len(texts.rows), rng.binomial(BATCH, share * q), p=chances)
        settled = Settled("", 0, q, BATCH - len(drawn), may_rise=True)
        for row in drawn.tolist():
            key += 1
            scores = [None if np.isnan(one) else float(one) for one in texts.scores[texts.rows[row]]]
            failures = [[False] * exits, texts.fails[row].tolist()]
            settled.add(key, Audited(scores, failures, texts.blocked[row].tolist()), False)
        tenant.count(settled, texts.costs, ROOM)
    stream.speedup = texts.costs[-1] / float(np.mean(costs[-len(costs) // 10 :]))
    return stream


def study(
    recorded: Recorded,
    signal: Signal,
    flag: Flag,
    shares: Sequence[float],
    limits: Sequence[float],
    audit_share: float,
    count: int,
    streams: int,
) -> list[dict[str, Any]]:
    """A row for each share of flagged texts and each limit."""
    texts, rows = Population(recorded, signal.scores(recorded), flag), []
    with ProcessPoolExecutor() as pool:
        for share in shares:
            for limit in limits:
                rates, cost = texts.flagged.differs.mean(0), texts.cost(share)
                found = list[Stream]()
                for changes in (False, True):
                    one = partial(run, texts, share, limit, audit_share, count, changes)
                    name = f"{100 * share:g}% flagged, {100 * limit:g}%"
                    found += track(pool.map(one, range(streams // 2)), name, streams // 2)
                still, changed = found[: streams // 2], found[streams // 2 :]
                unseen = [one.unseen or 0 for one in changed if one.missed]
                rows.append(
                    {
                        "flagged": share,
                        "limit": limit,
                        "above": float(np.mean([one.is_above for one in found])),
                        "first": float(np.median([one.first for one in found])),
                        "speedup": float(np.mean([one.speedup for one in still])),
                        "hindsight": texts.costs[-1] / float(cost[rates <= limit].min()),
                        "unseen": float(np.median(unseen)) if unseen else 0.0,
                        "missed": float(np.median([one.missed for one in changed if one.missed] or [0.0])),
                        "affected": float(np.mean([one.missed > 0 for one in changed])),
                    }
                )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = [
        *("flagged", "limit", "streams ever above", "first early exit", "speed-up in layers (hindsight)"),
        *("above the limit after a change", "texts until τ is lower", "missed meanwhile"),
    ]
    return columns, [
        [
            *(f"{100 * r['flagged']:g}%", f"{100 * r['limit']:g}%", f"{100 * r['above']:.1f}%"),
            *(f"{r['first']:,.0f} texts", f"{r['speedup']:.2f}× ({r['hindsight']:.2f}×)"),
            *(f"{100 * r['affected']:.0f}%", f"{r['unseen']:,.0f}", f"{r['missed']:.1f}"),
        ]
        for r in rows
    ]
