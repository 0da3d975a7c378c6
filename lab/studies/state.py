"""Compare risk with and without exits' states: speed-up, and disagreement on texts with a negation and on others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from de3.data.examples import Example
from de3.exits import risk
from de3.exits.calibration import DISAGREEMENTS, Samples, outcome
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.export.group_report import NEGATION
from de3.export.record import record
from de3.model_store.model import Model

QUANTILES = np.linspace(0, 1, 800)


def recorded(model: Model, texts: Sequence[str], what: str) -> Recorded:
    """Record every exit, and its states, for texts without labels."""
    return record(model, [Example(text, 0) for text in texts], what, for_fit=True)


def study(fitting: Recorded, unseen: Recorded, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for a risk without and with the state, fitted to some texts, on others, (n,), at the best τ in hindsight."""
    rows, negated = [], np.array([bool(NEGATION.search(text)) for text in texts])
    samples = Samples.independent(unseen)
    for form, part in (("features", replace(fitting, states=None)), ("and state", fitting)):
        signal = risk.fit(part)
        scores = signal.scores(unseen)
        taus = np.unique(np.nanquantile(scores[:, :-1], QUANTILES)).tolist()
        table = [outcome(samples, scores, tau, signal) for tau in [0.0, *taus]]
        for limit in DISAGREEMENTS:
            best = max((row for row in table if row.disagreement <= limit), key=lambda row: row.speedup)
            index = exit_index(scores, best.tau)
            differs = unseen.differs[np.arange(len(index)), index]
            rows.append(
                {
                    **{"risk": form, "limit": limit, "tau": best.tau, "speedup": best.speedup},
                    **{"all": float(differs.mean()), "negated": float(differs[negated].mean())},
                    **{"others": float(differs[~negated].mean()), "texts": [int(negated.sum()), len(texts)]},
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
    negated, count = rows[0]["texts"]
    columns = ["risk of", "limit", "speed-up", f"{count} texts differ", f"{negated} negated", "others"]
    cells = []
    for row in rows:
        shares = (f"{100 * row[name]:.2f}%" for name in ("all", "negated", "others"))
        cells.append([row["risk"], f"{100 * row['limit']:g}%", f"{row['speedup']:.2f}×", *shares])
    return columns, cells
