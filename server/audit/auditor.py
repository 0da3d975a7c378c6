"""Samples texts of one process for audits, runs them to full depth while nothing else is pending, and settles them.

A text is drawn with a probability that is fixed before anything about the text is known, and answered like any other.
A tenant's texts are settled in the order of their answers, and then counted (`ledger.py`): a text is settled only after
the audits of all earlier ones have run, so the counts do not depend on how long audits take. (They depend on the order
in which texts in flight were answered, but few texts are in flight compared with the number that a decision needs.)
"""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.criteria import Criterion, Failures, criteria_of
from de3.exits.guarantee import Audited
from de3.exits.kinds import differs
from de3.exits.reading import Reading, SpansReading
from de3.exits.rule import ExitRule
from de3.exits.windows import exits_of
from de3.model_store.fitted import client_hash
from de3.model_store.records import packed
from de3.model_store.segments import Tokens
from de3.model_store.tokenizer import Windows
from de3.runtime.background import run_once
from de3.runtime.choice import Standing
from de3.runtime.engine.audit import Audit
from de3.runtime.engine.head import Part
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Text
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.networks import network_hash
from de3.runtime.options import NO_OPTIONS
from de3.server.audit.tenant import Settled, add_settled
from de3.server.learn.record import Record
from de3.server.settings import Settings

log = logging.getLogger("de3")

# Tenants with pending audits divide ROOM equally. A tenant's audit share halves with every eighth of its part that
# pending audits fill; once they reach twice its part, no more texts are drawn.
ROOM, LEAST_ROOM = 256, 16
LEARN_TEXTS = 4096
# With an upstream, audits of local answers cost calls, and exits also learn from all texts that it answers.
LEARN_CALLS = 1024
# Limits on unsettled entries, which wait for the audit of an earlier one: over all tenants, and per tenant; and the
# number of texts at which an entry is full.
MAX_ENTRIES, LEAST_ENTRIES, ENTRY_TEXTS = 2**12, 2**9, 256
# Entries and records that wait for the next audit. If there are more, they are settled or, after a dropped audit, the
# older ones are discarded.
MAX_HELD = LEAST_ENTRIES // 2
TICK_S = 0.05  # drawn texts are collected for this long, then submitted together
NO_LOGITS, NO_IDS = np.zeros(0, np.float32), np.zeros(0, np.int32)
# Answers that τ alone did not determine; and texts whose audit an upstream did not answer.
EXCLUDED, UPSTREAM_FAILED = ("deadline", "max_layer", "windows"), "upstream_failed"

# Answers a text of a client as an upstream does, as the reading of an exit; raises RequestError.
Ask = Callable[[Text, str], Awaitable[Reading]]
# Counts settled texts of a model.
Count = Callable[[Sequence[Settled]], None]


@dataclass(slots=True, eq=False)
class _Entry:
    """Texts to be settled together: some that are ready, or one whose audit has not run yet.

    Attributes:
        is_audit: it is one text whose audit has run or is pending.
        waits: they are settled only together with a later audit that has run: an upstream that is slow may answer only
            texts that are sent to it anyway, which agree.
        key: key of the text whose audit is pending; see Settled.
        records: of its audited texts.
    """

    settled: Settled
    is_audit: bool = False
    is_pending: bool = False
    waits: bool = False
    key: int | None = None
    records: list[Record] = field(default_factory=list)


@dataclass(slots=True)
class _Tenant:
    """The audits of one tenant in this process.

    Attributes:
        epoch: epoch of the tenant's evidence.
        entries: texts that are not yet settled, in the order of their answers.
        pending: number of audits that have not run yet.
        is_failing: an audit was dropped, and none has run since.
    """

    epoch: int
    entries: deque[_Entry] = field(default_factory=deque)
    pending: int = 0
    is_failing: bool = False

    def begin(self, epoch: int) -> None:
        """If the epoch is new, discard texts that were drawn in an earlier one."""
        if epoch != self.epoch:
            self.epoch, self.is_failing = epoch, False
            self.entries.clear()

    def discard(self, entry: _Entry) -> None:
        """Discard a text whose audit did not run, and the texts between it and the audit before; later texts wait.

        Leaving out only the text without a result would give too much weight to those that ran to full depth anyway.
        """
        if entry not in self.entries:
            return
        self.is_failing = True
        kept, at = list(self.entries), self.entries.index(entry)
        later = kept[at + 1 :]
        while kept[at - 1 : at] and not kept[at - 1].is_audit:
            at -= 1
        for one in takewhile(lambda one: not one.is_audit, later):
            one.waits = True
        self.entries = deque(kept[:at] + later)

    def discard_waiting(self) -> None:
        """Discard the latest entries that wait for an audit."""
        while self.entries and self.entries[-1].waits:
            self.entries.pop()

    @property
    def size(self) -> int:
        """Number of entries and records, which are limited. A scrape of the metrics asks for it in another thread."""
        return sum(1 + len(entry.records) for entry in list(self.entries))


@dataclass(slots=True)
class Traffic:
    """The traffic of one model name in this process, from which exits are learned.

    Attributes:
        processes: number of processes of the server.
        first: see share.
        texts: number of texts in this process, over all versions, since the start or the last reset.
    """

    processes: int
    first: int = LEARN_TEXTS
    texts: int = 0

    @property
    def share(self) -> float:
        """Share of texts to audit for learning.

        It is 1 for the `first` texts of the server, and halves with each doubling of the number of texts.
        """
        return float(0.5 ** math.ceil(math.log2(max(1.0, self.texts * self.processes / self.first))))


@dataclass(frozen=True, slots=True)
class Draw:
    """The audited texts of a job, drawn before anything about them is known.

    Attributes:
        share: probability with which each text was drawn.
        epoch: epoch of the evidence that the texts count toward; each reset starts a new one.
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
        is_behind: Callable[[], bool] = lambda: False,
        learn: Callable[[Sequence[Record]], None] | None = None,
        traffic: Traffic | None = None,
        ask: Ask | None = None,
    ) -> None:
        """submit: enqueues audits. count: counts settled texts. is_behind: see AuditStore.

        learn, traffic: keeps records of audited texts, and the traffic of the model's name; None if the server does
        not learn. ask: asks the model's upstream, if it has one.
        """
        self._ask = ask
        self._is_behind, self._learn, self._traffic = is_behind, learn, traffic
        self._submit, self._count_settled = submit, count
        self._random = random.Random()
        self._epoch = 0  # epoch of tenants that have sent no texts
        self._num_changes = 0
        self._share = settings.share_of_audits
        self._has_guarantee = settings.has_guarantee
        self._tenants: dict[str, _Tenant] = {}
        self._fresh: list[Audit] = []
        self.audits, self.disagreements, self.seconds = 0, 0, 0.0
        self.excluded = dict.fromkeys(EXCLUDED if ask is None else (*EXCLUDED, UPSTREAM_FAILED), 0)
        self.served = served

    def serve(self, served: Served, standing: Standing) -> None:
        """Start auditing the model, or continue after it was reloaded."""
        self.served = served
        self.apply(standing)

    def apply(self, standing: Standing) -> None:
        """Take τ from its ledger's Standing; after a reset, discard texts that were drawn before it."""
        if self._traffic is not None and standing.num_changes != self._num_changes:
            self._traffic.texts = 0
        self._num_changes = standing.num_changes
        if standing.epoch != self._epoch:
            self._epoch = standing.epoch
            for tenant in self._tenants.values():
                tenant.begin(standing.epoch)
        for name, state in standing.tenants.items():
            self._tenant(name).begin(state.epoch)
        self.served.rules.apply(standing)

    @property
    def _keeps_states(self) -> bool:
        """True if states are kept for learning; of a token classifier's texts, the tokens are."""
        return self._learn is not None and not self.served.model.manifest.is_spans

    def _name(self, job: Job) -> str:
        """The tenant of a request; without a guarantee, all requests share one tenant."""
        return job.sender.tenant if self._has_guarantee else ""

    def _tenant(self, name: str) -> _Tenant:
        return self._tenants.setdefault(name, _Tenant(self._epoch))

    @property
    def pending(self) -> int:
        """Number of audits that have not run yet."""
        return sum(tenant.pending for tenant in list(self._tenants.values()))

    @property
    def share(self) -> float:
        """Probability that the next text of a request without options is drawn, of a tenant with the median τ."""
        idle = _Tenant(self._epoch)
        tenant = max(list(self._tenants.values()), key=lambda one: one.pending, default=idle)
        return self._share_of(tenant, self.served.rules.default.rule.tau)

    def _share_of(self, tenant: _Tenant, tau: float) -> float:
        """A tenant's share at this τ; 0 while too many of its audits or texts are pending, or the ledgers are behind.

        With a guarantee it is 1 at τ = 0, as an answer at full depth is its own audit.
        """
        waiting = sum(one.pending > 0 for one in list(self._tenants.values()) if one is not tenant)
        room = max(LEAST_ROOM, ROOM // (1 + waiting))
        most = max(LEAST_ENTRIES, MAX_ENTRIES // max(1, len(self._tenants)))
        if tenant.pending >= 2 * room or tenant.size >= most or self._is_behind():
            return 0.0
        if self._has_guarantee and tau == 0:
            return 1.0
        share = self._share if self._traffic is None else max(self._share, self._traffic.share)
        return float(share * 0.5 ** (8 * tenant.pending // room))

    def draw(self, job: Job, part: Part) -> Draw | None:
        """Draw texts to audit from a job that is about to be submitted.

        None if its request sets exit options, or has another flag than the model: with a guarantee its texts run to
        full depth, so they would outnumber those that the τ of the others applies to.
        """
        flag = self.served.rules.limits.flag
        if part.entry.options != NO_OPTIONS or (flag is not None and part.choice.rule.flag != flag):
            return None
        tenant = self._tenant(self._name(job))
        share = self._share_of(tenant, part.choice.rule.tau)
        draw = Draw(share, tenant.epoch, [self._random.random() < share for _ in part.heads])
        is_private = job.request.is_private
        for head, is_drawn in zip(part.heads, draw.is_drawn, strict=True):
            head.is_drawn = is_drawn
            head.is_deep |= is_drawn and is_private  # the answer is its own audit, so nothing keeps the text
            head.asks_all_exits |= is_drawn
            head.keeps_states = self._keeps_states and (is_drawn or self._ask is not None)
        if part.choice.rule.tau > 0:
            tenant.pending += sum(draw.is_drawn)
        else:  # every answer is its own audit now
            tenant.discard_waiting()
        return draw

    def abandon(self, job: Job, part: Part, draw: Draw) -> None:
        """Release the drawn texts of a job that was not answered; its texts do not count."""
        if part.choice.rule.tau > 0:
            self._tenant(self._name(job)).pending -= sum(draw.is_drawn)

    def answered(self, job: Job, part: Part, draw: Draw | None) -> None:
        """Count the texts of a finished job, and enqueue the audits of drawn texts that did not pass every exit.

        draw: as returned by draw(). If it is None, is from before a reset, or has share 0, only excluded texts are
        counted.
        """
        name = self._name(job)
        tenant = self._tenant(name)
        rows = job.rows(part)
        is_void = draw is None or draw.epoch != tenant.epoch or not draw.share
        share, drawn = (0.0, [False] * len(rows)) if draw is None else (draw.share, draw.is_drawn)
        client = job.sender.tenant or network_hash(job.client)
        exits = len(self.served.model.manifest.exit_costs)
        entry: _Entry | None = None
        waits = self._ask is not None and part.choice.rule.tau > 0
        for (item, head), is_drawn in zip(rows, drawn, strict=True):
            needs_audit, outcome = is_drawn and part.choice.rule.tau > 0, head.outcome
            if outcome is None:  # the text failed, and the others of its request were answered
                tenant.pending -= needs_audit
                continue
            windows = item.windows
            reason = "windows" if windows is not None and not self._covers_windows else outcome.reason
            is_excluded = reason in (*EXCLUDED, UPSTREAM_FAILED)
            if is_excluded:
                self.excluded[reason] += 1
            if is_excluded or is_void:
                tenant.pending -= needs_audit
                continue
            if self._traffic is not None:
                self._traffic.texts += 1
            tokens = item.tokens if windows is None else windows
            assert tokens is not None
            key = self._evidence_key(tokens, name) if is_drawn else None
            passed = [one.passed for one in outcome.windows] or [outcome.passed]
            is_pending = is_drawn and any(len(one) < exits for one in passed)
            if is_pending or entry is None or entry.is_pending:
                settled = Settled(name, tenant.epoch, share)
                entry = self._open(tenant, settled, is_pending, waits and not is_pending)
            if is_pending:
                entry.key = key
                ask = None if self._ask is None else partial(self._ask, item.text, job.client)
                self._enqueue(tenant, entry, client, tokens, outcome.reading, part.choice.rule, ask)
            elif is_drawn:
                tenant.pending -= needs_audit
                self._conclude(entry.settled, key, outcome.reading, tokens, passed)
                if not job.request.is_private:
                    entry.records += self._record(client, share, tokens, head.states, outcome.passed[-1])
            else:
                entry.settled.skipped += 1
                if outcome.reason == "upstream":
                    self._keep(self._record(client, 1.0, tokens, head.states, outcome.reading, is_extra=True))
        if entry is not None:
            entry.settled.may_rise = True
        self._settle(tenant)

    def _open(self, tenant: _Tenant, settled: Settled, is_pending: bool, waits: bool = False) -> _Entry:
        """Begin an entry for a tenant's next texts, or return its last one if they can be added to it."""
        last = tenant.entries[-1] if tenant.entries and not is_pending else None
        is_open = last is not None and not last.is_pending and last.settled.texts < ENTRY_TEXTS
        if last is not None and is_open and last.waits == waits and settled.continues(last.settled):
            last.settled.may_rise = False
            return last
        tenant.entries.append(_Entry(settled, is_pending, is_pending, waits))
        return tenant.entries[-1]

    def _enqueue(
        self,
        tenant: _Tenant,
        entry: _Entry,
        client: str,
        tokens: Tokens | Windows,
        answer: Reading,
        rule: ExitRule,
        ask: Callable[[], Awaitable[Reading]] | None,
    ) -> None:
        """Schedule the audit of a text. Audits are submitted together after TICK_S, so that answers are sent first."""

        def done(audit: Audit) -> None:
            if ask is None or audit.is_dropped or audit.error is not None:
                self._done(audit, tenant, entry, client, answer)
            else:
                run_once("upstream_audit", self._complete(ask(), audit, done_with_answer))

        def done_with_answer(audit: Audit) -> None:
            self._done(audit, tenant, entry, client, answer)

        if not self._fresh:
            asyncio.get_running_loop().call_later(TICK_S, self._submit_fresh)
        states = self.served.model.empty_states() if self._keeps_states else None
        self._fresh.append(Audit(self.served, rule, tokens, done, states, tenant=entry.settled.tenant))

    async def _complete(
        self, asking: Awaitable[Reading], audit: Audit, done: Callable[[Audit], None]
    ) -> None:
        """Complete an audit with the answer of the upstream.

        It is dropped if the upstream is away. If the upstream does not label this text, no answer can differ from its
        label: the text counts like one that was not drawn.
        """
        try:
            audit.passed.append(await asking)
        except RequestError as error:
            self.excluded[UPSTREAM_FAILED] += 1
            audit.passed.clear()
            audit.is_dropped = error.retry_after_s is not None
        except BaseException:
            audit.is_dropped = True
            raise
        finally:
            done(audit)

    def _submit_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._submit(fresh)

    def _done(
        self,
        audit: Audit,
        tenant: _Tenant,
        entry: _Entry,
        client: str,
        answer: Reading,
    ) -> None:
        tenant.pending -= 1
        entry.is_pending = False  # first, so that an error below does not block later entries
        # An answer without a label proves nothing: the failure goes on.
        tenant.is_failing &= audit.error is None and not audit.passed and not audit.windows
        if audit.is_dropped:  # its model was unloaded or reloaded, or its upstream is away
            tenant.discard(entry)
        elif audit.error is not None:
            log.error("an audit failed, and counts as a disagreement: %s", audit.error)
            # The deepest exit before the last one differs, at every τ above 0.
            exits = len(self.served.model.manifest.exit_costs)
            scores, differing = list[float | None]([None] * exits), [False] * exits
            if exits > 1:
                scores[-2], differing[-2] = 0.0, True
            failures: list[Failures] = [differing] * len(self._criteria)
            self._count(entry.settled, entry.key, Audited(scores, failures), True)
        elif not audit.passed and not audit.windows:
            entry.settled.skipped += 1
            entry.is_audit, entry.waits = False, True
        else:
            self.seconds += audit.model_s
            passed = audit.windows or [audit.passed]
            self._conclude(entry.settled, entry.key, answer, audit.tokens, passed)
            share, last = entry.settled.share, passed[-1][-1]
            entry.records += self._record(client, share, audit.tokens, audit.states, last)
        self._settle(tenant)

    @property
    def _criteria(self) -> list[Criterion]:
        return criteria_of(self.served.model.manifest.kind, self.served.rules.limits)

    def _conclude(
        self,
        settled: Settled,
        key: int | None,
        answer: Reading,
        tokens: Tokens | Windows,
        passed: Sequence[list[Reading]],
    ) -> None:
        """Record the audit of a text that was answered with `answer`.

        passed: the readings of every exit, by window if the text has several.
        """
        manifest, flag, readings = self.served.model.manifest, self.served.rules.limits.flag, passed[0]
        scores, costs, blocked = self._scores(readings), list[int](), list[bool]()
        if isinstance(tokens, Windows):
            every = [self._scores(one) for one in passed]
            readings, scores, costs = exits_of(
                manifest.kind, tokens.spans, flag, passed, every, manifest.exit_costs
            )
        elif flag is not None:
            blocked = [flag.blocks(one) for one in readings]
        failures = [one.failures(readings) for one in self._criteria]
        served_differs = differs(manifest.kind, answer.answer, readings[-1].answer)
        self._count(settled, key, Audited(scores, failures, blocked, costs), served_differs)

    def _record(
        self,
        client: str,
        share: float,
        tokens: Tokens | Windows,
        states: NDArray[np.floating[Any]] | None,
        last: Reading,
        is_extra: bool = False,
    ) -> list[Record]:
        """The record of a text that ran to full depth.

        None if the server keeps none, if the text has several windows, or if a value is not finite.
        """
        if self._learn is None or isinstance(tokens, Windows):
            return []
        marks = self.served.model.marks(tokens)
        ids: NDArray[np.int32] | None = NO_IDS
        if isinstance(last, SpansReading):
            states, logits, ids = marks.means[None], NO_LOGITS, packed(tokens)
        else:
            logits = np.array(last.logits, np.float32)
        if states is None or ids is None:
            return []
        with np.errstate(over="ignore"):
            pooled = states.astype(np.float16)
        if not (np.isfinite(pooled).all() and np.isfinite(logits).all()):
            return []
        text = client, share, _key(tokens), marks.pieces, float(marks.spreads)
        return [Record(*text, pooled, logits, is_extra, ids)]

    def _keep(self, records: Sequence[Record]) -> None:
        """Keep records, if there are any, for learning."""
        if records and self._learn is not None:
            self._learn(records)

    @property
    def _covers_windows(self) -> bool:
        """True if texts in windows are audited: those of a guard without learned exits, as they may exit early."""
        manifest, has_flag = self.served.model.manifest, self.served.rules.limits.flag is not None
        return has_flag and self._ask is None and not manifest.is_spans and manifest.learned is None

    def _evidence_key(self, tokens: Tokens | Windows, tenant: str) -> int | None:
        """The key of an audited text; see Settled."""
        if not self._has_guarantee:
            return None
        model = self.served.model
        parts = [tokens] if isinstance(tokens, Tokens) else [tokens[number] for number in range(len(tokens))]
        client = client_hash(tenant) if tenant else None
        if model.fitted is not None and any(model.fitted.is_near(model.marks(one), client) for one in parts):
            return None
        return _key(tokens if isinstance(tokens, Tokens) else tokens.whole)

    def _scores(self, passed: list[Reading]) -> list[float | None]:
        """The scores of a text at its exits, raised from the first exit at which it is out of distribution.

        A raised score has the same effect as the lowered τ of the OOD policy.
        """
        monitor, scores, tau_factor = self.served.monitor, list[float | None](), 1.0
        for reading in passed:
            if monitor.is_far(reading):
                tau_factor = monitor.tau_factor
            scores.append(None if reading.score is None else reading.score / tau_factor)
        return scores

    def _count(
        self,
        settled: Settled,
        key: int | None,
        audited: Audited,
        served_differs: bool,
    ) -> None:
        settled.add(key, audited, served_differs)
        self.audits += 1
        self.disagreements += served_differs

    def _settle(self, tenant: _Tenant) -> None:
        """Count a tenant's texts up to the first audit that has not run yet, and keep their records.

        So records are in the order of the answers, too, and a fit never sees more of the texts that need no audit.
        """
        settled, records, ready = list[Settled](), list[Record](), 0
        for number, entry in enumerate(tenant.entries, 1):
            if entry.is_pending:
                break
            if not entry.waits:
                ready = number
        size = tenant.size
        if size > MAX_HELD and not tenant.pending and not tenant.is_failing:
            ready = len(tenant.entries)  # no answer of the model was drawn for long
        for _ in range(ready):
            entry = tenant.entries.popleft()
            add_settled(settled, [entry.settled])
            records += entry.records
            size -= 1 + len(entry.records)
        self._keep(records)
        while tenant.entries and size > MAX_HELD and not tenant.pending:
            size -= 1 + len(tenant.entries.popleft().records)
        if settled:
            self._count_settled(settled)


def _key(tokens: Tokens) -> int:
    """A hash of a text's tokens."""
    digest = blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.type_ids.tobytes())
    return int.from_bytes(digest.digest())
