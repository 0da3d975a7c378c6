"""The counted audits of one model, from all processes of a server, and the τ that they allow with a guarantee.

Each process settles the audits of its own texts (`auditor.py`) and sends them here in order. A text that was counted
before, by any process, never counts towards a rise of τ, and τ rises only between two requests.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import CONFIDENCE
from de3.exits.promise import Evidence, Reason, error_of, profile
from de3.exits.promises import ALL, NEWCOMER, Promises
from de3.exits.signals import Signal
from de3.model_store.manifest import Manifest
from de3.server.learn.record import HeldOut
from de3.server.rules import Choice, Promised, Rules
from de3.server.settings import Settings

log = logging.getLogger("de3")

MAX_SEEN = 2**16  # hashes of counted texts; when full, the older half is forgotten
MIN_AUDITS = 100  # with fewer, the mean exit layer is not known well enough
MAX_RESETS = 20  # resets kept for the report
# Shared by all ledgers, so that texts drawn for a version are not counted for the same version exported anew.
_EPOCHS = itertools.count(1)


@dataclass(slots=True)
class Audited:
    """The exits of a text that ran to full depth.

    Attributes:
        scores: the score at each exit; None at an exit without one.
        differs: disagreement of each exit with the last one.
        layers: layers of the exits.
        served_differs: disagreement of the sent answer with the last exit.
    """

    scores: list[float | None]
    differs: list[bool]
    layers: list[int]
    served_differs: bool


@dataclass(slots=True)
class Settled:
    """Consecutive texts of one client: some that were not drawn, then possibly one that was.

    Attributes:
        share: probability with which each text was drawn.
        skipped: number of texts that were not drawn.
        keys: with a guarantee, hashes of the texts, in order, the drawn one last.
        audit: audit of the drawn text; None if no text was drawn, or if its audit was dropped.
    """

    client: str
    share: float
    skipped: int = 0
    keys: list[int] = field(default_factory=list)
    audit: Audited | None = None


class Standing(NamedTuple):
    """The part of a ledger's state that the processes need.

    Attributes:
        epoch: identifies the current evidence. Each new ledger and each reset starts a new epoch; texts that were drawn
            in an earlier epoch do not count.
        promised: τ of each client; None without a guarantee.
    """

    epoch: int
    promised: Promised | None


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset of the evidence.

    Attributes:
        at: seconds since 1970.
        tau: τ in force before the reset.
        audits: number of audits counted before the reset.
    """

    at: float
    reason: Reason
    tau: float
    audits: int


class Ledger:
    """The counted audits of one model, for requests without exit options.

    Attributes:
        manifest, rules, runtime: those of the model.
        caution: factor applied to the τ of out-of-distribution texts.
        taus: the grid of τ, ascending from 0.
        evidence: the audits since the start, or the last change or reset.
        promises: the tests that choose each client's τ so that the promised rate is kept; None without a guarantee.
        since: start of the evidence, in seconds since 1970.
        resets, num_resets: the latest resets, and the total number by reason.
        is_changed: the ledger has changed since it was last saved.
    """

    def __init__(
        self,
        manifest: Manifest,
        rules: Rules,
        runtime: str,
        caution: float,
        settings: Settings,
        publish: Callable[[Standing], None] = lambda _: None,
    ) -> None:
        """publish: called with the standing whenever it has changed."""
        self.manifest, self._publish = manifest, publish
        self.taus = np.unique([*FINE_TAUS, *(c.rule.tau for c in [rules.default, *rules.steps])])
        self.evidence = Evidence(self.taus)
        self.promises: Promises | None = None
        if settings.guarantee is not None:
            start = int(np.searchsorted(self.taus, rules.default.rule.tau))
            error = error_of(1 if manifest.learned is None else manifest.learned.attempt)
            # Without --learn no other exits will be tested, so this test may use all of δ.
            error = error if settings.learn else 1 - CONFIDENCE
            self.promises = Promises(settings.guarantee, self.taus, start, error)
        self._seen: list[set[int]] = [set(), set()]  # the older, and the newer half
        self._epoch = next(_EPOCHS)
        self._published: Standing | None = None
        self.since = time.time()
        self.resets: list[Reset] = []
        self.num_resets: dict[Reason, int] = {"change": 0, "reset": 0}
        self.is_changed = False
        self._held_out_layers: NDArray[np.float64] | None = None  # mean exit layer at each τ
        self.serve(rules, runtime, caution)

    def serve(self, rules: Rules, runtime: str, caution: float) -> None:
        """Continue with the same model after it was reloaded."""
        self.rules, self.runtime, self.caution = rules, runtime, caution
        self._published = None
        self._apply()

    @property
    def full_name(self) -> str:
        """name:version."""
        return f"{self.manifest.name}:{self.manifest.version}"

    @property
    def standing(self) -> Standing:
        """The epoch, and τ of each client."""
        return Standing(self._epoch, self._promised())

    def _promised(self) -> Promised | None:
        promises = self.promises
        if promises is None:
            return None
        clients = [(client, *promises.choose(client)) for client in promises.tracked()]
        return Promised(promises.rate, promises.choose(NEWCOMER), clients)

    def _apply(self) -> None:
        """If the standing has changed, take τ from it, and tell the processes."""
        standing = self.standing
        if standing == self._published:
            return
        self._published = standing
        if standing.promised is not None:
            self.rules.apply_guarantee(standing.promised)
        self._publish(standing)

    @property
    def signal(self) -> Signal:
        """The signal whose score is compared with τ."""
        return self.rules.default.rule.signal

    @property
    def promised_rate(self) -> float | None:
        """The promised rate of disagreement: the guarantee, or the default max_disagreement; None without either."""
        default = self.rules.default
        return default.wanted if default.by in ("guarantee", "max_disagreement") else None

    def count(self, settled: Sequence[Settled], epoch: int, may_rise: bool) -> None:
        """Count texts that one process has settled.

        epoch: the epoch in which the texts were drawn; those of an earlier one are ignored. may_rise: they end with the
        last text of a request, so τ may rise.
        """
        if epoch != self._epoch:  # drawn before a reset
            return
        audits, tau = self.evidence.audits, self.rules.default.rule.tau
        for one in settled:
            is_repeat = [self._was_counted(key) for key in one.keys]
            self._skip(one, sum(is_repeat[: one.skipped]))
            if one.audit is not None:
                self._add(one, one.audit, bool(is_repeat) and is_repeat[-1])
            if epoch != self._epoch:
                return
        self.is_changed = True
        if self.promises is not None and self.evidence.audits != audits:
            if may_rise:
                self.promises.advance()
            self._apply()
            if self.rules.default.rule.tau > tau:
                log.info("%s: audits allow τ = %g", self.full_name, self.rules.default.rule.tau)

    def count_held_out(self, rows: Sequence[HeldOut]) -> None:
        """Count held-out texts towards the guarantee, if there is one.

        They were recorded before the model was served, and its exits were not fitted to them. They are not audits of
        its answers, so the report does not count them.
        """
        if self.promises is None:
            return
        for one in rows:
            row = profile(one.scores, one.differs, self.manifest.exit_layers, self.taus)
            self.promises.add(one.client, 1.0, row, self._was_counted(one.key))
        self.promises.advance()
        self.is_changed = True
        self._apply()
        layers = [profile(r.scores, r.differs, self.manifest.exit_layers, self.taus).layers for r in rows]
        self._held_out_layers = np.mean(layers, 0) if layers else None

    def _skip(self, one: Settled, repeats: int) -> None:
        self.evidence.skip(one.share, one.skipped)
        if self.promises is not None:
            self.promises.skip(one.client, one.share, one.skipped, repeats)

    def _was_counted(self, key: int) -> bool:
        """True if the text with this hash is known to have been counted before; otherwise remembers it."""
        older, newer = self._seen
        if key in newer or key in older:
            return True
        newer.add(key)
        if len(newer) >= MAX_SEEN // 2:
            self._seen = [newer, set()]
        return False

    def _add(self, one: Settled, audit: Audited, is_repeat: bool) -> None:
        """Count an audit, and discard the evidence of every promise that finds that the rate has risen."""
        before, tau = self.evidence.audits, self.rules.default.rule.tau
        row = profile(audit.scores, audit.differs, audit.layers, self.taus)
        self.evidence.add(one.share, row, audit.served_differs)
        if self.promises is None:
            return
        changed = self.promises.add(one.client, one.share, row, is_repeat)
        if not changed:
            return
        log.warning(
            "%s: at the τ that audits had proved, answers now differ from full depth more often than the promised "
            "%g%%: texts run to full depth until audits of new texts allow more",
            self.full_name,
            100 * self.promises.rate,
        )
        if ALL in changed:
            self._begin_anew(Reset(time.time(), "change", tau, before + 1))

    def reset(self) -> None:
        """Discard the evidence at an admin's request; with a guarantee, τ returns to 0."""
        tau, audits = self.rules.default.rule.tau, self.evidence.audits
        if self.promises is not None:
            self.promises.reset("reset")
        self._begin_anew(Reset(time.time(), "reset", tau, audits))

    def _begin_anew(self, reset: Reset) -> None:
        # The evidence from the texts seen so far is discarded, so they may count again.
        self.evidence, self._seen = Evidence(self.taus), [set(), set()]
        self._epoch = next(_EPOCHS)
        self.since, self.is_changed = reset.at, True
        self.resets = [*self.resets, reset][-MAX_RESETS:]
        self.num_resets[reset.reason] += 1
        self._apply()

    def restore(
        self, evidence: Evidence, since: float, resets: list[Reset], promises: Promises | None
    ) -> None:
        """Continue from saved audits. promises: None unless they were saved by a server with a guarantee."""
        self.evidence, self.since, self.resets = evidence, since, resets
        if promises is not None and self.promises is not None:
            self.promises = promises
        self._apply()

    def speedup(self) -> float:
        """Speed-up in layers at the τ in force, by the audits, or by held-out texts if audits are few; 1 if unknown."""
        tau, means = self.rules.default.rule.tau, self._held_out_layers
        if self.evidence.audits >= MIN_AUDITS:
            means = self.evidence.mean_layers()
        if len(self.manifest.exit_layers) == 1 or tau == 0 or means is None:
            return 1.0
        return self.manifest.num_layers / max(float(means[int(np.searchsorted(self.taus, tau))]), 1e-3)

    def allowed(self) -> float:
        """Speed-up in layers at the highest τ up to which the audited rate is within the promise; at least speedup().

        Returns speedup() without a guarantee, with fewer than MIN_AUDITS audits, or for a model with a single exit.
        """
        evidence, speedup = self.evidence, self.speedup()
        if self.promises is None or evidence.audits < MIN_AUDITS or len(self.manifest.exit_layers) == 1:
            return speedup
        above = np.flatnonzero(evidence.rates() > self.promises.rate)
        index = max(0, (int(above[0]) if len(above) else len(self.taus)) - 1)
        return max(speedup, self.manifest.num_layers / max(float(evidence.mean_layers()[index]), 1e-3))

    def measured(self, in_force: Choice) -> tuple[float, float, float] | None:
        """The rate of disagreement at the τ in force, and its lower and upper bound; None without audits."""
        index = int(np.searchsorted(self.taus, in_force.rule.tau))
        evidence = self.evidence.copy()  # a scrape calls this in another thread
        if not evidence.audits:
            return None
        lower, upper = evidence.bounds(slice(index, index + 1))
        return float(evidence.rates()[index]), float(lower[0]), float(upper[0])


def tau_row(choice: Choice) -> dict[str, Any]:
    """τ for requests without exit options, and the reason for it."""
    return {"tau": choice.rule.tau, "reason": choice.promise["reason"] if choice.promise else choice.by}
