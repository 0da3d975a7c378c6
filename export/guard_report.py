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
from de3.progress import empty_table

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
RECALLS = (0.9, 0.95, 0.99)


def flag_table(recorded: Recorded, flag: Flag, tau: float, signal: Signal) -> Table:
    """Recall and false alarms at full depth by threshold, and the flagged samples that one-sided exits at τ miss.

    A row's threshold is that of all labels of the flag. Raises ValueError for models without labels, and for samples of
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
    columns = ("threshold", "", "recall", "false alarms", "missed by exits at the default τ")
    table = empty_table(columns, f"{len(found)} samples to find among {len(wanted)}, at full depth")
    for least, name in sorted(names.items()):
        at = replace(flag, thresholds=(least,) * len(flag.thresholds))
        fails, rows = recorded.failures(at)[-1]
        blocked = recorded.blocked(at)[rows]
        missed = profiles(scores[rows], fails, recorded.exit_costs, np.array([tau]), blocked).differs
        shares = [_percent(probs[of] >= least) for of in (wanted, ~wanted)]
        table.add_row(
            f"{least:.4g}", name, *shares, f"{_percent(missed)} of {len(rows)}" if len(rows) else "–"
        )
    return table


def _percent(hits: NDArray[np.bool_]) -> str:
    return f"{100 * hits.mean():.1f}%"
