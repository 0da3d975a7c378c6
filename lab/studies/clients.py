"""Simulated clients of one server, one of which tries to break the guarantee for the others.

The others send texts drawn at random from recorded ones, each counted as new, in requests of one text. The attacker
sends texts that agree with full depth at every τ. The streams run through the server's own code (`exits.promises`);
audits run immediately. The answers to the others' first TEXTS texts are measured.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from de3.exits.calibration import FINE_TAUS
from de3.exits.promise import Profile
from de3.exits.promises import Promises
from de3.training.progress import track
from lab.studies.audit import Population

TEXTS = 5_000
BURST = 256  # texts in one request
ATTACKER = "attacker"


@dataclass(frozen=True)
class Attack:
    """An attacker's traffic.

    Attributes:
        name: as shown in the table.
        burst: number of copies of one text in one request, before the others' first text.
        share: the attacker's share of all later texts.
        is_copy: all later texts are copies of one text.
        networks: number of clients that the attacker appears as.
    """

    name: str
    burst: int = 0
    share: float = 0.0
    is_copy: bool = True
    networks: int = 1


ATTACKS = (
    Attack("none"),
    Attack(f"{BURST} copies once", BURST),
    Attack("copies, half of the traffic", BURST, 0.5),
    Attack("copies, nine tenths", 0, 0.9),
    Attack("easy texts, half of the traffic", 0, 0.5, is_copy=False),
    Attack("easy texts, nine tenths", 0, 0.9, is_copy=False),
    Attack("easy texts from 3 networks, half", 0, 0.5, is_copy=False, networks=3),
)


def run(
    attack: Attack, others: int, population: Population, rate: float, share: float, is_alone: bool, seed: int
) -> tuple[float, float]:
    """The others' rate of disagreement, and their mean exit layer, in one stream.

    others: number of other clients. rate: the promised rate. share: share of the texts that are audited while τ is
    above 0. is_alone: one promise for all clients, and repeats count like other texts, as before version 0.2.
    """
    rng = np.random.default_rng(seed)
    promises = Promises(rate, np.array(FINE_TAUS))
    size = len(population.differs)
    easy = Profile(np.zeros(len(FINE_TAUS), bool), population.layers.min(0))
    sent, wrong, depth, copies = 0, 0, 0, 0

    indices: dict[str, int] = {}  # of τ, by client; cleared when τ may have changed
    skipped = Counter[tuple[str, bool]]()

    def serve(client: str, audit: Profile, is_repeat: bool) -> int:
        """Answer one text; returns the index of its τ."""
        known, is_new = ("all", True) if is_alone else (client, not is_repeat)
        if known not in indices:
            indices[known] = int(np.searchsorted(promises.taus, promises.choose(known)[0]))
        index = indices[known]
        q = 1.0 if index == 0 else share
        if rng.random() >= q:
            skipped[known, is_new] += 1
            return index
        for (name, were_new), texts in skipped.items():
            promises.skip(name, share, texts, 0 if were_new else texts)
        skipped.clear()
        promises.add(known, q, audit, not is_new)
        indices.clear()
        return index

    for copies in range(attack.burst):
        serve(ATTACKER, easy, copies > 0)
        if is_alone:
            promises.advance()
    while sent < TEXTS:
        if rng.random() < attack.share:
            name = f"{ATTACKER} {rng.integers(attack.networks)}" if attack.networks > 1 else ATTACKER
            serve(name, easy, attack.is_copy and copies > 0)
            copies += 1
        else:
            text = int(rng.integers(size))
            audit = Profile(population.differs[text], population.layers[text])
            index = serve(f"client {rng.integers(others)}", audit, False)
            sent, wrong, depth = sent + 1, wrong + int(audit.differs[index]), depth + int(audit.layers[index])
        if not indices:
            promises.advance()
    return wrong / TEXTS, depth / TEXTS


def study(
    population: Population, others: Sequence[int], rate: float, share: float, streams: int, is_alone: bool
) -> list[dict[str, Any]]:
    """Simulate `streams` streams for each pair of an attack and a number of other clients; returns a row per pair."""
    rows, layers = [], float(population.layers.max())
    with ProcessPoolExecutor() as pool:
        for count in others:
            for attack in ATTACKS:
                one = partial(run, attack, count, population, rate, share, is_alone)
                found = list(track(pool.map(one, range(streams)), f"{count}: {attack.name}"))
                rates = np.array([r for r, _ in found])
                rows.append(
                    {
                        "others": count,
                        "attack": attack.name,
                        "held": float((rates <= rate).mean()),
                        "mean": float(rates.mean()),
                        "worst": float(rates.max()),
                        "speedup": layers / float(np.mean([depth for _, depth in found])),
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = [
        "other clients",
        "attack",
        "guarantee held",
        "disagreement, mean (worst)",
        "speed-up in layers",
    ]
    return columns, [
        [
            *(r["others"], r["attack"], f"{100 * r['held']:.1f}%"),
            *(f"{100 * r['mean']:.2f}% ({100 * r['worst']:.2f}%)", f"{r['speedup']:.2f}×"),
        ]
        for r in rows
    ]
