"""Samples texts for audits, runs them to full depth while nothing else is pending, and counts the results.

A text is drawn with a probability that is fixed before anything about the text is known, and answered like any other.
Texts are counted in the order of their answers: a text is counted only after the audits of all earlier ones have run,
so the counts do not depend on the duration of audits. (They depend on the order in which texts in flight were answered,
but few texts are in flight compared with the number that a decision needs.)

With a guarantee, τ rises only between requests, and a text that was counted before never counts towards a rise.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from de3.exits.calibration import FINE_TAUS
from de3.exits.promise import Evidence, Profile, Reason, profile
from de3.exits.promises import ALL, Promises
from de3.exits.reading import Reading, differs
from de3.exits.signals import Signal
from de3.model_store.segments import Tokens
from de3.server.audit.log import AuditLog
from de3.server.engine.audit import Audit
from de3.server.engine.job import Job
from de3.server.engine.request import Text
from de3.server.engine.served import Served
from de3.server.networks import party
from de3.server.rules import Choice
from de3.server.settings import ExitOptions, Settings

log = logging.getLogger("de3")

# Capacity for audits not yet run. The share of audited texts halves with each eighth of it that is in use.
ROOM = 256
MAX_PENDING = 2 * ROOM  # nothing is drawn beyond it; only large batches reach it
MAX_ENTRIES = 2**15  # entries not yet counted, because the audit of an earlier one is pending
MAX_SEEN = 2**16  # hashes of counted texts; when full, the older half is forgotten
TICK_S = 0.05  # drawn texts are collected for this long, then submitted together
MAX_RESETS = 20  # resets kept for the report
EXCLUDED = ("deadline", "max_layer", "windows")  # answers that τ alone did not determine
NO_WISH = ExitOptions()


@dataclass(slots=True, eq=False)
class _Entry:
    """Consecutive answered texts of one client: some that were not drawn, then possibly one that was.

    Attributes:
        skipped, repeats: texts that were not drawn, and those of them that were counted before.
        is_open: the next text may be added; no text was drawn yet.
        is_repeat: the drawn text was counted before.
        is_last: it ends a request.
        is_pending: the audit of the drawn text has not run yet.
        audit: result of the audit; None if it has not run or was dropped.
    """

    client: str
    share: float
    skipped: int = 0
    repeats: int = 0
    is_open: bool = True
    is_pending: bool = False
    is_repeat: bool = False
    is_last: bool = False
    audit: Profile | None = None
    served_differs: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """The audited texts of a job, drawn before anything about them is known.

    Attributes:
        share: probability with which each text was drawn.
        epoch: number of the evidence that they count towards; each reset starts a new epoch.
        is_drawn: a flag for each text.
    """

    share: float
    epoch: int
    is_drawn: list[bool]


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


class Auditor:
    """The audits of one model, for requests without exit options. Only the event loop changes its evidence.

    Attributes:
        served: the loaded model.
        evidence: the audits since the start, or the last change or reset.
        promises: keep the rate that the server promises; None without a guarantee.
        since: start of the evidence, in seconds since 1970.
        audits, disagreements, seconds: totals since the model was loaded: audited texts; those whose answer, as sent,
            differs from full depth; and the model time of audits.
        excluded: number of texts that are not audited, by reason.
        resets, num_resets: the latest resets, and the total number by reason.
        is_changed: there are changes to save.
    """

    def __init__(
        self,
        served: Served,
        settings: Settings,
        submit: Callable[[Sequence[Audit]], None],
        in_force: Callable[[Served], Choice],
        audit_log: AuditLog | None = None,
    ) -> None:
        """submit: enqueues audits. in_force: the choice for requests without options, which may change under load."""
        self._submit, self._in_force = submit, in_force
        self._log, self._random = audit_log, random.Random()
        self._epoch = 0  # of the evidence
        self._share = settings.share_of_audits
        rules = served.rules
        steps = [rules.default, *rules.steps]
        self.taus = np.unique([*FINE_TAUS, *(choice.rule.tau for choice in steps)])
        self.evidence = Evidence(self.taus)
        self.promises: Promises | None = None
        if settings.guarantee is not None:
            start = int(np.searchsorted(self.taus, rules.default.rule.tau))
            self.promises = Promises(settings.guarantee, self.taus, start)
        self._seen: list[set[int]] = [set(), set()]  # hashes of counted texts: the older, and the newer half
        self._entries: deque[_Entry] = deque()
        self._fresh: list[Audit] = []
        self._outstanding = 0  # drawn texts whose separate audit has not run yet
        self.since = time.time()
        self.audits, self.disagreements, self.seconds = 0, 0, 0.0
        self.excluded = dict.fromkeys(EXCLUDED, 0)
        self.resets: list[Reset] = []
        self.num_resets: dict[Reason, int] = {"change": 0, "reset": 0}
        self.is_changed = False
        self.serve(served)

    def serve(self, served: Served) -> None:
        """Audit a loaded model; after the first call, only the same model, reloaded."""
        self.served = served
        self._apply_guarantee()

    def _apply_guarantee(self) -> None:
        if self.promises is not None:
            self.served.rules.apply_guarantee(self.promises)

    @property
    def signal(self) -> Signal:
        """The signal whose score is compared with τ."""
        return self.served.rules.default.rule.signal

    @property
    def promised(self) -> float | None:
        """The promised rate of disagreement: the guarantee, or the default max_disagreement; None without either."""
        default = self.served.rules.default
        return default.wanted if default.by in ("guarantee", "max_disagreement") else None

    @property
    def pending(self) -> int:
        """Number of audits that have not run yet."""
        return self._outstanding

    @property
    def share(self) -> float:
        """Probability that the next text of a request without options is drawn."""
        return self._share_at(self.served.rules.default.rule.tau)

    def _share_at(self, tau: float) -> float:
        """The share at this τ: 1 at τ = 0 with a guarantee, as an answer at full depth is its own audit."""
        if self._outstanding >= MAX_PENDING or len(self._entries) >= MAX_ENTRIES:
            return 0.0
        if self.promises is not None and tau == 0:
            return 1.0
        return float(self._share * 0.5 ** (8 * self._outstanding // ROOM))

    def draw(self, job: Job) -> Draw | None:
        """Draw texts of a job that is about to be submitted; None if its request sets exit options."""
        if job.request.options != NO_WISH:
            return None
        share = self._share_at(job.choice.rule.tau)
        draw = Draw(share, self._epoch, [self._random.random() < share for _ in job.items])
        for item, is_drawn in zip(job.items, draw.is_drawn, strict=True):
            item.asks_all_exits |= is_drawn
        if job.choice.rule.tau > 0:
            self._outstanding += sum(draw.is_drawn)
        return draw

    def abandon(self, job: Job, draw: Draw) -> None:
        """Release the draws of a job that was not answered: its texts do not count."""
        if job.choice.rule.tau > 0:
            self._outstanding -= sum(draw.is_drawn)

    def answered(self, job: Job, draw: Draw | None) -> None:
        """Count the texts of a finished job, and enqueue the audits of the drawn ones."""
        is_void = draw is None or draw.epoch != self._epoch or not draw.share
        share, drawn = (0.0, [False] * len(job.items)) if draw is None else (draw.share, draw.is_drawn)
        client, entry = party(job.client), None
        for item, outcome, is_drawn in zip(job.items, job.outcomes(), drawn, strict=True):
            needs_audit = is_drawn and job.choice.rule.tau > 0
            reason = "windows" if outcome.windows else outcome.reason
            if reason in EXCLUDED:
                self.excluded[reason] += 1
            if reason in EXCLUDED or is_void:
                self._outstanding -= needs_audit
                continue
            entry = self._open(client, share)
            entry.is_last = False
            is_repeat = self._was_counted(item.progress.tokens)
            if not is_drawn:
                entry.skipped += 1
                entry.repeats += is_repeat
                continue
            entry.is_open, entry.is_repeat = False, is_repeat
            if len(outcome.passed) == len(self.served.model.manifest.exit_layers):
                self._outstanding -= needs_audit
                self._conclude(entry, outcome.reading, outcome.passed, outcome.tokens, item.text)
            else:
                assert item.progress.tokens is not None
                self._enqueue(entry, item.progress.tokens, outcome.reading, item.text)
        if entry is not None:
            entry.is_last = True
        self._settle()

    def _open(self, client: str, share: float) -> _Entry:
        last = self._entries[-1] if self._entries else None
        if last is not None and last.is_open and (last.client, last.share) == (client, share):
            return last
        if last is not None:
            last.is_open = False
        self._entries.append(_Entry(client, share))
        return self._entries[-1]

    def _was_counted(self, tokens: Tokens | None) -> bool:
        """True if a text is known to have been counted before; remembers it otherwise."""
        if self.promises is None or tokens is None:
            return False
        older, newer = self._seen
        key = hash((tokens.ids.tobytes(), tokens.type_ids.tobytes()))
        if key in newer or key in older:
            return True
        newer.add(key)
        if len(newer) >= MAX_SEEN // 2:
            self._seen = [newer, set()]
        return False

    def _enqueue(self, entry: _Entry, tokens: Tokens, answer: Reading, text: Text) -> None:
        """Schedule the audit of a text. Audits are submitted together, after the answers have been sent."""
        entry.is_pending = True
        # The audit needs only the tokens, so large texts are not kept.
        logged = text if self._log is not None and self._log.has_texts else None
        rule = self.served.rules.default.rule

        def done(audit: Audit) -> None:
            self._done(audit, entry, answer, logged)

        if not self._fresh:
            asyncio.get_running_loop().call_later(TICK_S, self._submit_fresh)
        self._fresh.append(Audit(self.served, rule, tokens, done))

    def _submit_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._submit(fresh)

    def _done(self, audit: Audit, entry: _Entry, answer: Reading, text: Text | None) -> None:
        self._outstanding -= 1
        entry.is_pending = False  # first, so that no error below blocks the later entries
        if audit.is_dropped:  # a dropped audit is not evidence
            pass
        elif audit.error is not None:
            log.error("an audit failed, and counts as a disagreement: %s", audit.error)
            last = self.served.model.manifest.num_layers
            worst = Profile(self.taus > 0, np.full(len(self.taus), last))
            self._count(entry, worst, True)
        else:
            self.seconds += audit.model_s
            self._conclude(entry, answer, audit.passed, len(audit.tokens), text)
        self._settle()

    def _conclude(
        self, entry: _Entry, answer: Reading, passed: list[Reading], tokens: int, text: Text | None
    ) -> None:
        """Record the audit of a text that passed every exit and was answered with `answer`."""
        tolerance = self.served.model.manifest.tolerance
        last = passed[-1]
        unlike = [differs(reading.answer, last.answer, tolerance) for reading in passed]
        layers = [reading.layer for reading in passed]
        served_differs = differs(answer.answer, last.answer, tolerance)
        self._count(entry, profile(self._scores(passed), unlike, layers, self.taus), served_differs)
        if self._log is not None:
            self._log.write(self.served, entry.share, passed, tokens, text)

    def _scores(self, passed: list[Reading]) -> list[float | None]:
        """The scores of a text at its exits, raised from the first exit at which it is out of distribution.

        A raised score has the same effect as the lowered τ of the OOD policy.
        """
        monitor, scores, caution = self.served.monitor, list[float | None](), 1.0
        for reading in passed:
            if monitor.is_far(reading):
                caution = monitor.caution
            scores.append(None if reading.score is None else reading.score / caution)
        return scores

    def _count(self, entry: _Entry, audit: Profile, served_differs: bool) -> None:
        entry.audit, entry.served_differs = audit, served_differs
        self.audits += 1
        self.disagreements += served_differs

    def _settle(self) -> None:
        """Count the texts up to the first audit that has not run yet; then, between two requests, τ may rise."""
        audits, may_rise = self.evidence.audits, False
        while self._entries and not self._entries[0].is_pending:
            entry = self._entries[0]
            self.evidence.skip(entry.share, entry.skipped)
            if self.promises is not None:
                self.promises.skip(entry.client, entry.share, entry.skipped, entry.repeats)
            entry.skipped, entry.repeats, self.is_changed = 0, 0, True
            if entry.is_open:
                break
            self._entries.popleft()
            may_rise = entry.is_last
            if entry.audit is not None:
                self._add(entry, entry.audit)
        if self.promises is not None and self.evidence.audits != audits:
            if may_rise or not self._entries or self._entries[0].is_open:
                self.promises.advance()
            before = self.served.rules.default.rule.tau
            self._apply_guarantee()
            tau = self.served.rules.default.rule.tau
            if tau > before:
                log.info("%s: audits allow τ = %g", self.served.model.full_name, tau)

    def _add(self, entry: _Entry, audit: Profile) -> None:
        """Count an audit; a promise may find that the rate has risen."""
        before, tau = self.evidence.audits, self.served.rules.default.rule.tau
        self.evidence.add(entry.share, audit, entry.served_differs)
        if self.promises is None:
            return
        changed = self.promises.add(entry.client, entry.share, audit, entry.is_repeat)
        if not changed:
            return
        self._seen = [set(), set()]  # the evidence on these texts was discarded
        log.warning(
            "%s: at the τ that audits had proved, answers now differ from full depth more often than the promised "
            "%g%%: texts run to full depth until audits of new texts allow more",
            self.served.model.full_name,
            100 * self.promises.rate,
        )
        if ALL in changed:
            self._begin_anew(Reset(time.time(), "change", tau, before + 1))

    def reset(self) -> None:
        """Discard the evidence at an admin's request; with a guarantee, τ returns to 0."""
        tau, audits = self.served.rules.default.rule.tau, self.evidence.audits
        if self.promises is not None:
            self.promises.reset("reset")
            self._apply_guarantee()
        self._begin_anew(Reset(time.time(), "reset", tau, audits))

    def _begin_anew(self, reset: Reset) -> None:
        self.evidence, self._seen = Evidence(self.taus), [set(), set()]
        self._entries.clear()  # pending audits belong to the discarded evidence
        self._epoch += 1
        self.since, self.is_changed = reset.at, True
        self.resets = [*self.resets, reset][-MAX_RESETS:]
        self.num_resets[reset.reason] += 1

    def restore(
        self, evidence: Evidence, since: float, resets: list[Reset], promises: Promises | None
    ) -> None:
        """Continue from the saved state of an earlier server. promises: None if it had no guarantee."""
        self.evidence, self.since, self.resets = evidence, since, resets
        if promises is not None and self.promises is not None:
            self.promises = promises
        self.serve(self.served)

    def measured(self) -> tuple[float, float, float] | None:
        """The rate of disagreement at the τ in force, and its bounds; None without audits."""
        index = int(np.searchsorted(self.taus, self._in_force(self.served).rule.tau))
        evidence = self.evidence.copy()  # a scrape calls this in another thread
        if not evidence.audits:
            return None
        lower, upper = evidence.bounds(slice(index, index + 1))
        return float(evidence.rates()[index]), float(lower[0]), float(upper[0])

    def in_force(self) -> dict[str, Any]:
        """τ in force for requests without exit options, and the reason for it; with a guarantee, those of the client
        with the most texts."""
        choice = self._in_force(self.served)
        return {"tau": choice.rule.tau, "reason": choice.promise["reason"] if choice.promise else choice.by}
