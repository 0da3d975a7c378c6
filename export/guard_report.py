"""How well a guard finds what it is to find, on labelled samples, by the threshold of its flag."""

from dataclasses import replace
from math import ceil

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from de3.exits.flags import Flag
from de3.exits.guarantee import profiles
from de3.exits.kinds import Classes, Labels
from de3.exits.recorded import Recorded
from de3.exits.signals import Signal
from de3.model_store.manifest import Missed
from de3.progress import empty_table

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RECALLS = (0.9, 0.95, 0.99)
LIMITS = (0.01, 0.02, 0.05)  # of max_missed


def flag_table(
    recorded: Recorded, flag: Flag, tau: float, signal: Signal, missed: Missed | None = None
) -> Table:
    """Recall and false alarms at full depth by threshold, and the flagged samples that one-sided exits at τ miss.

    A row's threshold is that of all labels of the flag. missed: the model's certificate, if it is for this flag; its
    row also has what exits miss at each limit of max_missed in LIMITS.

    Raises ValueError for models without labels, and for samples of
    which none, or every one, has a label of the flag.
    """
    if not isinstance(recorded.kind, Classes | Labels):
        raise ValueError("--flag: needs a model with labels")
    labels, scores = list(flag.labels), signal.scores(recorded)
    has_several = isinstance(recorded.kind, Labels)
    wanted = np.asarray(
        recorded.labels[:, labels].any(1) if has_several else np.isin(recorded.labels, labels)
    )
    if not 0 < wanted.sum() < len(wanted):
        raise ValueError("--flag: needs samples with its labels, and others")
    probs = flag.probs(recorded.kind, recorded.logits[:, -1])
    found = np.sort(probs[wanted])
    names = dict.fromkeys(THRESHOLDS, "") | {flag.thresholds[0]: "the flag"}
    for recall in RECALLS:
        least = float(found[len(found) - ceil(recall * len(found))])
        names[least] = names.get(least) or f"recall {100 * recall:g}%"
    certified = [] if missed is None else [missed.taus[missed.row_within(limit)] for limit in LIMITS]
    limits = [f"max_missed {100 * limit:g}%" for limit in LIMITS[: len(certified)]]
    columns = (
        "if the flag's threshold were",
        "",
        "recall",
        "false alarms",
        "missed by exits at the default τ",
        *limits,
    )
    table = empty_table(columns, f"{len(found)} samples to find among {len(wanted)}, at full depth")
    for least, name in sorted(names.items()):
        at = replace(flag, thresholds=(least,) * len(flag.thresholds))
        fails, rows = recorded.failures(at)[-1]
        blocked = recorded.blocked(at)[rows]
        taus = np.array([tau, *(certified if name == "the flag" else ())])
        shares = [_percent(probs[of] >= least) for of in (wanted, ~wanted)]
        early = ["–"] * len(taus)
        if len(rows):
            fails_at = profiles(scores[rows], fails, recorded.exit_costs, taus, blocked).differs
            early = [_percent(one) for one in fails_at.T]
            early[0] += f" of {len(rows)}"
        table.add_row(f"{least:.4g}", name, *shares, *early)
    return table


def _percent(hits: NDArray[np.bool_]) -> str:
    return f"{100 * hits.mean():.1f}%"
