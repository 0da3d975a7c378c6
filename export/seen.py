"""Tells whether a calibration's texts are those that a model's exits were fitted to, from a few of their hashes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from de3.data.tables import TextOrPair, pair_of
from de3.model_store.manifest import Manifest

SEEN = "fitted"  # entry of the manifest's `export`
KEPT = 512  # hashes
FEW, MANY = 0.02, 0.1  # share of the texts that may have been fitted without a warning, and with one


def hashes_of(texts: Sequence[TextOrPair]) -> list[str]:
    """The smallest hashes of distinct texts: a sample that does not depend on their order."""
    return sorted(_hashes(texts))[:KEPT]


def warnings_of(manifest: Manifest, texts: Sequence[TextOrPair], file: Path) -> list[str]:
    """A warning if some of a calibration's texts were fitted, as exits agree with full depth there more than elsewhere.

    How many were is estimated from the texts whose hashes are not above the largest one that is kept. No warning for a
    model without such hashes. file: that of the texts, for the message. Raises ValueError if many were, as the
    certificate would be false.
    """
    kept: Any = manifest.export.get(SEEN)
    if not isinstance(kept, list) or not kept or not all(isinstance(one, str) for one in kept):
        return []
    found = _hashes(texts)
    # Of hashes up to the largest one that is kept, all that were fitted are known.
    comparable = {one for one in found if len(kept) < KEPT or one <= max(kept)}
    share = len(comparable.intersection(kept)) / max(len(comparable), 1)
    if share <= FEW:
        return []
    said = (
        f"{file}: about {100 * share:.0f}% of the texts are among those that {manifest.full_name}'s exits were fitted "
        "to, where exits agree with full depth more often than elsewhere: calibrate on others"
    )
    if share > MANY:
        raise ValueError(said)
    return [said]


def _hashes(texts: Sequence[TextOrPair]) -> set[str]:
    parts = ("\0".join(part or "" for part in pair_of(text)) for text in texts)
    return {hashlib.sha256(one.encode(errors="surrogatepass")).hexdigest()[:12] for one in parts}
