"""Simulated tenants of one server, one of which tries to break the guarantee for the others.

Every tenant but the hostile one has texts of its own difficulty, drawn at random from recorded ones, each counted as
new. The hostile tenant sends easy texts, copies of them, and in the second half texts that early exits get wrong. All
send requests of BATCH texts in turn, and the server's own ledger counts them; audits run immediately.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from de3.exits.guarantee import Audited, profiles
from de3.exits.recorded import Recorded
from de3.model_store.manifest import Manifest
from de3.progress import track
from de3.runtime.rules import Rules
from de3.server.audit.ledger import Ledger
from de3.server.audit.tenant import Settled
from de3.server.settings import Settings

BATCH = 50
SKEW = 2.0  # the hardest texts are drawn up to this many times as often by one tenant as by another


def run(
    manifest: Manifest, recorded: Recorded, rate: float, share: float, tenants: int, texts: int, seed: int
) -> list[tuple[bool, float, float]]:
    """One stream: for each tenant but the hostile one, whether the true rate was ever above `rate` at the τ in force,
    and over the stream the rate of disagreement and the mean exit layer.

    recorded: outputs of the model's exits. share: share of the texts that are audited while τ is above 0. tenants:
    number of tenants. texts: number of texts of each.
    """
    options: dict[str, Any] = {"guarantee": rate}
    rng, settings = np.random.default_rng(seed), Settings(**options)
    ledger = Ledger(manifest, Rules(manifest, settings), "", 1.0, settings)
    scores, unlike = manifest.default_signal.scores(recorded), recorded.differs
    differs, layers = profiles(scores, unlike, recorded.exit_layers, ledger.taus)
    names = ["hostile", *(f"tenant-{number}" for number in range(1, tenants))]
    hardness = differs.mean(1).argsort().argsort() / len(differs)  # rank, from 0 to 1
    weights = [SKEW ** (hardness * rng.uniform(-1, 1)) for _ in names]
    chances = [each / each.sum() for each in weights]
    truth = [(chance @ differs, chance @ layers) for chance in chances]
    easy, hard = np.flatnonzero(~differs.any(1)), np.flatnonzero(differs.any(1))
    above, wrong, depth = np.zeros(tenants, bool), np.zeros(tenants), np.zeros(tenants)
    key = 0
    rounds = texts // BATCH
    for number in range(rounds):
        for k, name in enumerate(names):
            tenant = ledger.tenant(name)
            index = tenant.index
            if k:
                chosen = rng.choice(len(differs), BATCH, p=chances[k])
                above[k] |= truth[k][0][index] > rate
                wrong[k] += truth[k][0][index] / rounds
                depth[k] += truth[k][1][index] / rounds
            else:
                chosen = rng.choice(easy if 2 * number < rounds else hard, BATCH)
            q = 1.0 if index == 0 else share
            settled = Settled(name, tenant.epoch, q, may_rise=True)
            for row, is_drawn in zip(chosen, rng.random(BATCH) < q, strict=True):
                key += bool(k or number % 2)  # half of the hostile tenant's requests are copies of one text
                if is_drawn:
                    audited = Audited(scores[row].tolist(), [unlike[row].tolist()])
                    settled.add(key, audited, bool(differs[row, index]))
                else:
                    settled.skipped += 1
            ledger.count([settled])
    return list(zip(above.tolist()[1:], wrong.tolist()[1:], depth.tolist()[1:], strict=True))


def study(
    manifest: Manifest,
    recorded: Recorded,
    rate: float,
    share: float,
    tenants: int,
    texts: int,
    streams: int,
) -> list[dict[str, Any]]:
    """Simulate streams; returns a row for each tenant but the hostile one."""
    one = partial(run, manifest, recorded, rate, share, tenants, texts)
    with ProcessPoolExecutor() as pool:
        found = list(track(pool.map(one, range(streams)), f"{streams} streams"))
    return [
        {
            "tenant": k + 1,
            "above": float(np.mean([stream[k][0] for stream in found])),
            "mean": float(np.mean([stream[k][1] for stream in found])),
            "worst": float(np.max([stream[k][1] for stream in found])),
            "speedup": manifest.num_layers / float(np.mean([stream[k][2] for stream in found])),
        }
        for k in range(tenants - 1)
    ]


def table(rows: Sequence[dict[str, Any]], rate: float) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = [
        "tenant",
        f"streams ever above {100 * rate:g}%",
        "disagreement, mean (worst)",
        "speed-up in layers",
    ]
    return columns, [
        [
            *(r["tenant"], f"{100 * r['above']:.1f}%"),
            *(f"{100 * r['mean']:.2f}% ({100 * r['worst']:.2f}%)", f"{r['speedup']:.2f}×"),
        ]
        for r in rows
    ]
