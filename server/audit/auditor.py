"""Samples texts of one process for audits, runs them to full depth while nothing else is pending, and settles them.

A text is drawn with a probability that is fixed before anything about the text is known, and answered like any other.
Texts are settled in the order of their answers, and then counted (`ledger.py`): a text is settled only after the audits
of all earlier ones have run, so the counts do not depend on the duration of audits. (They depend on the order in which
texts in flight were answered, but few texts are in flight compared with the number that a decision needs.)
"""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from de3.exits.reading import Reading, differs
from de3.model_store.segments import Array, Tokens
from de3.server.audit.ledger import Audited, Settled, Standing
from de3.server.audit.log import line_of
from de3.server.audit.report import Live
from de3.server.engine.audit import Audit
from de3.server.engine.job import Job
from de3.server.engine.request import Text
from de3.server.engine.served import Served
from de3.server.learn.record import Record
from de3.server.networks import party
from de3.server.settings import ExitOptions, Settings

log = logging.getLogger("de3")

# The share of audited texts halves with every ROOM / 8 audits that have not run yet.
ROOM = 256
LEARN_TEXTS = 4096
MAX_PENDING = 2 * ROOM  # nothing is drawn beyond it; only large batches reach it
MAX_ENTRIES = 2**15  # entries not yet settled, because the audit of an earlier one is pending
TICK_S = 0.05  # drawn texts are collected for this long, then submitted together
EXCLUDED = ("deadline", "max_layer", "windows")  # answers that τ alone did not determine
NO_OPTIONS = ExitOptions()

# Counts the settled texts of a model: the texts, the epoch in which they were drawn, and whether they end with the last
# text of a request, after which τ may rise.
Count = Callable[[Sequence[Settled], int, bool], None]


@dataclass(slots=True, eq=False)
class _Entry:
    """Texts to be settled together.

    Attributes:
        is_open: more texts may be added: none of its texts was drawn, and it is the last entry.
        is_pending: the audit of the drawn text has not run yet.
        is_last: it ends with the last text of a request.
    """

    settled: Settled
    is_open: bool = True
    is_pending: bool = False
    is_last: bool = False


@dataclass(slots=True)
class Traffic:
    """The traffic of one model name in this process, from which exits are learned.

    Attributes:
        processes: number of processes of the server.
        texts: number of texts in this process, over all versions, since the start or the last reset.
    """

    processes: int
    texts: int = 0

    @property
    def share(self) -> float:
        """Share of texts to audit so that exits are learned fast.

        It is 1 for the first LEARN_TEXTS texts of the server, and halves with each doubling of the number of texts.
        """
        return float(0.5 ** math.ceil(math.log2(max(1.0, self.texts * self.processes / LEARN_TEXTS))))


@dataclass(frozen=True, slots=True)
class Draw:
    """The audited texts of a job, drawn before anything about them is known.

    Attributes:
        share: probability with which each text was drawn.
        epoch: epoch of the evidence that the texts count towards; each reset starts a new one.
        is_drawn: for each text, True if it was drawn.
    """

    share: float
    epoch: int
    is_drawn: list[bool]


class Auditor:
    """The audits of one model in one process, for requests without exit options. Only the event loop changes it.

    Attributes:
        served: the loaded model.
        audits, disagreements, seconds: totals since the model was loaded: audited texts; those whose answer, as sent,
            differs from full depth; and the model time of audits.
        excluded: number of texts that are not audited, by reason.
    """

    def __init__(
        self,
        served: Served,
        settings: Settings,
        submit: Callable[[Sequence[Audit]], None],
        count: Count,
        write: Callable[[str], None] | None = None,
        is_behind: Callable[[], bool] = lambda: False,
        learn: Callable[[Record], None] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """submit: enqueues audits. count: counts settled texts. write: writes a line of the audit log; None: there is
        no log. is_behind: see Books. learn: keeps a record of each audited text. traffic: the traffic of the model's
        name. learn and traffic are None if the server does not learn."""
        self._is_behind, self._learn, self._traffic = is_behind, learn, traffic
        self._submit, self._count_settled, self._write = submit, count, write
        self._logs_texts = settings.log_audit_texts
        self._random = random.Random()
        self._epoch = 0  # of the evidence
        self._share = settings.share_of_audits
        self._has_guarantee = settings.guarantee is not None
        self._entries: deque[_Entry] = deque()
        self._fresh: list[Audit] = []
        self._outstanding = 0  # drawn texts whose separate audit has not run yet
        self.audits, self.disagreements, self.seconds = 0, 0, 0.0
        self.excluded = dict.fromkeys(EXCLUDED, 0)
        self.served = served

    def serve(self, served: Served, standing: Standing) -> None:
        """Start auditing the model, or continue after it was reloaded."""
        self.served = served
        self.apply(standing)

    def apply(self, standing: Standing) -> None:
        """Take τ from the ledger's standing; after a reset, discard texts that were drawn before it."""
        if standing.epoch != self._epoch:
            self._entries.clear()
            if self._traffic is not None and self._epoch:  # a reset: the traffic has changed
                self._traffic.texts = 0
            self._epoch = standing.epoch
        if standing.promised is not None:
            self.served.rules.apply_guarantee(standing.promised)

    @property
    def pending(self) -> int:
        """Number of audits that have not run yet."""
        return self._outstanding

    @property
    def live(self) -> Live:
        """The current state of these audits, for the report."""
        return Live(self.share, self.pending, self.excluded)

    @property
    def share(self) -> float:
        """Probability that the next text of a request without options is drawn."""
        return self._share_at(self.served.rules.default.rule.tau)

    def _share_at(self, tau: float) -> float:
        """The share at this τ; 0 while too many audits or texts are pending, or the ledgers are behind.

        With a guarantee it is 1 at τ = 0, as an answer at full depth is its own audit.
        """
        if self._outstanding >= MAX_PENDING or len(self._entries) >= MAX_ENTRIES or self._is_behind():
            return 0.0
        if self._has_guarantee and tau == 0:
            return 1.0
        share = self._share if self._traffic is None else max(self._share, self._traffic.share)
        return float(share * 0.5 ** (8 * self._outstanding // ROOM))

    def draw(self, job: Job) -> Draw | None:
        """Draw texts to audit from a job that is about to be submitted; None if its request sets exit options."""
        if job.request.options != NO_OPTIONS:
            return None
        share = self._share_at(job.choice.rule.tau)
        draw = Draw(share, self._epoch, [self._random.random() < share for _ in job.items])
        for item, is_drawn in zip(job.items, draw.is_drawn, strict=True):
            item.asks_all_exits |= is_drawn
            item.keeps_states = is_drawn and self._learn is not None
        if job.choice.rule.tau > 0:
            self._outstanding += sum(draw.is_drawn)
        return draw

    def abandon(self, job: Job, draw: Draw) -> None:
        """Release the drawn texts of a job that was not answered; its texts do not count."""
        if job.choice.rule.tau > 0:
            self._outstanding -= sum(draw.is_drawn)

    def answered(self, job: Job, draw: Draw | None) -> None:
        """Count the texts of a finished job, and enqueue the audits of drawn texts that did not pass every exit.

        draw: as returned by draw(). If it is None, is from before a reset, or has share 0, only excluded texts are
        counted.
        """
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
            if self._traffic is not None:
                self._traffic.texts += 1
            if self._has_guarantee and item.progress.tokens is not None:
                entry.settled.keys.append(_key(item.progress.tokens))
            if not is_drawn:
                entry.settled.skipped += 1
                continue
            entry.is_open = False
            if len(outcome.passed) == len(self.served.model.manifest.exit_layers):
                self._outstanding -= needs_audit
                self._conclude(entry, outcome.reading, outcome.passed, outcome.tokens, item.text)
                self._record(entry, item.progress.tokens, item.progress.states, outcome.passed[-1])
            else:
                assert item.progress.tokens is not None
                self._enqueue(entry, item.progress.tokens, outcome.reading, item.text)
        if entry is not None:
            entry.is_last = True
        self._settle()

    def _open(self, client: str, share: float) -> _Entry:
        last = self._entries[-1] if self._entries else None
        if last is not None and last.is_open and (last.settled.client, last.settled.share) == (client, share):
            return last
        if last is not None:
            last.is_open = False
        self._entries.append(_Entry(Settled(client, share)))
        return self._entries[-1]

    def _enqueue(self, entry: _Entry, tokens: Tokens, answer: Reading, text: Text) -> None:
        """Schedule the audit of a text. Audits are submitted together after TICK_S, so that answers are sent first."""
        entry.is_pending = True
        # The audit needs only the tokens, so large texts are not kept.
        logged = text if self._write is not None and self._logs_texts else None
        rule = self.served.rules.default.rule

        def done(audit: Audit) -> None:
            self._done(audit, entry, answer, logged)

        if not self._fresh:
            asyncio.get_running_loop().call_later(TICK_S, self._submit_fresh)
        states = None if self._learn is None else self.served.model.empty_states()
        self._fresh.append(Audit(self.served, rule, tokens, done, states))

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
            worst = Audited([0.0, None], [True, False], [last, last], True)  # differs at every τ above 0
            self._count(entry, worst)
        else:
            self.seconds += audit.model_s
            self._conclude(entry, answer, audit.passed, len(audit.tokens), text)
            self._record(entry, audit.tokens, audit.states, audit.passed[-1])
        self._settle()

    def _conclude(
        self, entry: _Entry, answer: Reading, passed: list[Reading], tokens: int, text: Text | None
    ) -> None:
        """Record the audit of a text that passed every exit and was answered with `answer`."""
        tolerance = self.served.model.manifest.tolerance
        last = passed[-1]
        differing = [differs(reading.answer, last.answer, tolerance) for reading in passed]
        layers = [reading.layer for reading in passed]
        served_differs = differs(answer.answer, last.answer, tolerance)
        self._count(entry, Audited(self._scores(passed), differing, layers, served_differs))
        if self._write is not None:
            logged = text if self._logs_texts else None
            line = line_of(self.served, entry.settled.share, passed, tokens, logged)
            if line is not None:
                self._write(line)

    def _record(self, entry: _Entry, tokens: Tokens | None, states: Array | None, last: Reading) -> None:
        """Keep a record of a text that ran to full depth, if the server learns and all values are finite."""
        if self._learn is None or tokens is None or states is None:
            return
        settled, logits = entry.settled, np.array(last.logits, np.float32)
        with np.errstate(over="ignore"):
            pooled = states.astype(np.float16)
        if np.isfinite(pooled).all() and np.isfinite(logits).all():
            self._learn(Record(settled.client, settled.share, _key(tokens), pooled, logits))

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

    def _count(self, entry: _Entry, audit: Audited) -> None:
        entry.settled.audit = audit
        self.audits += 1
        self.disagreements += audit.served_differs

    def _settle(self) -> None:
        """Count the texts up to the first audit that has not run yet."""
        settled, may_rise = list[Settled](), False
        while self._entries and not self._entries[0].is_pending:
            entry = self._entries[0]
            if entry.settled.keys or entry.settled.skipped or entry.settled.audit is not None:
                settled.append(entry.settled)
            may_rise = entry.is_last
            if entry.is_open:
                entry.settled = Settled(entry.settled.client, entry.settled.share)
                break
            self._entries.popleft()
        if settled:
            self._count_settled(settled, self._epoch, may_rise or not self._entries)


def _key(tokens: Tokens) -> int:
    """A hash of a text's tokens."""
    digest = blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.type_ids.tobytes())
    return int.from_bytes(digest.digest())
