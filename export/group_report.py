"""The groups of texts whose early answers differ most from full depth's."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table

from de3.data.tables import TextOrPair, pair_of
from de3.exits.calibration import wilson
from de3.exits.kinds import Classes
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Signal
from de3.model_store.printable import printable
from de3.progress import empty_table

# English words that turn what follows into its opposite: an exit that sees a mean of embeddings may overlook them.
NEGATION = re.compile(
    r"\b(not|no|never|none|nobody|nothing|nowhere|neither|nor|without|hardly|barely|cannot|\w*n['’]t)\b", re.I
)
FEW = 10  # texts; smaller groups are not the worst, as chance decides about them
SHOWN = 40  # maximum number of characters shown of a group's name


def groups_of(recorded: Recorded, texts: Sequence[TextOrPair], names: Sequence[str]) -> dict[str, list[str]]:
    """Ways to group n texts: by negation, length and, if a text has one class, label; the group of each text.

    recorded: the texts' outputs, with tokens. names: the labels.
    """
    assert recorded.tokens is not None
    negated = [any(NEGATION.search(part or "") for part in pair_of(text)) for text in texts]
    thirds = np.zeros(len(texts), np.int64)
    for third, rows in enumerate(np.array_split(np.argsort(recorded.tokens, kind="stable"), 3)):
        thirds[rows] = third
    lengths = [recorded.tokens[thirds == third] for third in range(3)]
    spans = [f"{some.min()} to {some.max()} tokens" if len(some) else "" for some in lengths]
    groups = {
        "negation": ["with" if one else "without" for one in negated],
        "length": [spans[third] for third in thirds],
    }
    if isinstance(recorded.kind, Classes):
        groups["label"] = [names[label] for label in recorded.labels.tolist()]
    return groups


def group_table(recorded: Recorded, tau: float, signal: Signal, groups: Mapping[str, Sequence[str]]) -> Table:
    """For each way to group n texts, the group whose answers at τ differ most from full depth's.

    That is the one of FEW texts or more with the highest lower end of the 95% interval.
    """
    columns = ("by", "worst group", "texts", "differ", "95% interval", "others")
    reference = "full depth" if recorded.original is None else "the original"
    table = empty_table(columns, f"Groups whose answers differ most from {reference}, at the default τ")
    index = exit_index(signal.scores(recorded), tau)
    differs = recorded.differs[np.arange(len(index)), index]
    for by, of in groups.items():
        names = np.array(of)
        parts = {name: differs[names == name] for name in np.unique(names).tolist()}
        intervals = {n: wilson(float(p.sum()), len(p)) for n, p in parts.items() if len(p) >= FEW}
        if len(parts) < 2 or not intervals:
            continue
        worst = max(intervals, key=lambda name: intervals[name][0])
        low, high = intervals[worst]
        shares = (parts[worst].mean(), differs[names != worst].mean())
        here, others = (f"{100 * float(share):.2f}%" for share in shares)
        name = escape(printable(worst[:SHOWN] + ("…" if len(worst) > SHOWN else "")))
        table.add_row(by, name, str(len(parts[worst])), here, f"{100 * low:.2f} … {100 * high:.2f}", others)
    return table
