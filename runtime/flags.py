"""Flags as users give them, by the names of labels: in settings, and in requests."""

import re
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple, assert_never

from de3.exits.flags import Flag
from de3.exits.kinds import Classes, Kind, Labels, Spans, Value
from de3.exits.reading import sigmoid
from de3.model_store.manifest import Manifest
from de3.runtime.errors import RequestError

ANY_SPAN = "*"
DEFAULT_THRESHOLD = 0.5  # of classes
MAX_NAMED = 20  # labels in a message
# [NAME=]WHAT, where WHAT is labels with an optional probability, a number to compare with, or * for spans.
SETTING = re.compile(
    r"((?P<name>[^\s=:<>]+)=)?((?P<sign>[<>])=(?P<limit>\S+)|(?P<labels>[^=]+?)(@(?P<least>[^@,]+))?)"
)


class Wanted(NamedTuple):
    """A flag by name.

    Attributes:
        labels: names of labels; "*" for any span; empty for a value.
        threshold: lowest probability; for a value, the lowest or, with `is_below`, the highest value that is flagged.
            None: that of each label in a multi-label model, else DEFAULT_THRESHOLD.
    """

    labels: Sequence[str]
    threshold: float | None = None
    is_below: bool = False

    def __str__(self) -> str:
        """As in a setting."""
        if not self.labels:
            return f"{'<' if self.is_below else '>'}={self.threshold:g}"
        return ",".join(self.labels) + ("" if self.threshold is None else f"@{self.threshold:g}")


def parsed(setting: str) -> tuple[str, Wanted]:
    """The model's name, empty for all models, and the flag of a setting; raises ValueError for another text."""
    found = SETTING.fullmatch(setting)
    try:
        assert found is not None
        if found["sign"]:
            limit = float(found["limit"])
            assert isfinite(limit)
            return found["name"] or "", Wanted((), limit, found["sign"] == "<")
        least = None if found["least"] is None else float(found["least"])
        if least is not None and not 0 < least <= 1:
            raise ValueError
        return found["name"] or "", Wanted(found["labels"].split(","), least)
    except (AssertionError, ValueError):
        raise ValueError(
            f"flag: {setting[:100]!r}: give NAME=LABEL,LABEL@PROBABILITY, with or without @PROBABILITY (above 0, at "
            "most 1); NAME=>=NUMBER or NAME=<=NUMBER for a regression model; or NAME=* for a token classifier"
        ) from None


def flag_of(wanted: Wanted, manifest: Manifest, kind: Kind) -> Flag:
    """The flag of a model; raises RequestError if the model cannot have it."""
    names, threshold, is_below = wanted

    def refusal(why: str) -> RequestError:
        return RequestError(f"flag: {why}", "flag")

    match kind:
        case Value():
            if names or threshold is None:
                raise refusal(f"{manifest.name} is a regression model: its texts have no classes")
            return Flag((0,), (threshold,), is_below)
        case Spans():
            if list(names) != [ANY_SPAN]:
                raise refusal(f"{manifest.name} is a token classifier: its texts have no classes")
            return Flag()
        case Classes() | Labels():
            known = {name: k for k, name in enumerate(manifest.labels)}
            if unknown := [name for name in names if name not in known]:
                more = ["…"] * (len(manifest.labels) > MAX_NAMED)
                shown = ", ".join([*manifest.labels[:MAX_NAMED], *more])
                raise refusal(f"{unknown[0][:100]!r} is not a label of {manifest.name}: {shown}")
            if not names:
                raise refusal(f"{manifest.name} has labels; name those that are flagged")
            labels = sorted({known[name] for name in names})
            if isinstance(kind, Classes) and len(labels) == len(known) > 1:
                raise refusal(
                    f"it has every label of {manifest.name}, so no text could exit early; leave some out"
                )
            if isinstance(kind, Classes):
                return Flag(tuple(labels), (DEFAULT_THRESHOLD if threshold is None else threshold,))
            own = [sigmoid(kind.logits[k]) if threshold is None else threshold for k in labels]
            return Flag(tuple(labels), tuple(own))
        case _:
            assert_never(kind)


def guard_of(setting: str | None, manifest: Manifest) -> tuple[Wanted, Flag] | None:
    """The flag in a setting without a model's name, by name and of a model; raises ValueError for an invalid one."""
    if setting is None:
        return None
    name, wanted = parsed(setting)
    if name:
        raise ValueError(
            f"flag: {setting[:100]!r}: there is one model, so give the flag without {name!r} and ="
        )
    try:
        return wanted, flag_of(wanted, manifest, manifest.kind)
    except RequestError as error:
        raise ValueError(error.message) from None


def certified_flag(manifest: Manifest) -> Wanted | None:
    """The flag for which missed texts are certified; None if there is none."""
    if (missed := manifest.missed) is None:
        return None
    return Wanted(missed.labels, missed.threshold, missed.is_below)
