"""The counted audits of one model, from all processes of a server, by tenant.

Each process settles the audits of its own texts (`auditor.py`) and sends them here in order. A text that was counted
before, by any process, never counts toward a rise of τ, and τ rises only between two requests.
"""

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.bound import CONFIDENCE
from de3.exits.calibration import FINE_TAUS
from de3.exits.criteria import Disagreement, Limits, MissedFlag, MissedSpan, criteria_of
from de3.exits.guarantee import Reason, error_of, profiles_of
from de3.exits.signals import Signal
from de3.model_store.manifest import Manifest
from de3.runtime.choice import Choice, InForce, Standing
from de3.runtime.fit import HeldOut
from de3.runtime.rules import Rules
from de3.server.audit.tenant import MAX_SEEN, MOST_SEEN, Bounded, Settled, Tenant
from de3.server.settings import Settings

log = logging.getLogger("de3")

MIN_AUDITS = 100  # with fewer, the mean exit layer is too uncertain
LOG_S = 10.0  # minimum time between two log lines about the τ of a tenant
RECENT_TEXTS = 20_000  # half-life of the tenants' shares of the traffic, in texts
# Shared by all ledgers, so that texts drawn for a version are not counted for the same version exported again.
_EPOCHS = itertools.count(1)


class Ledger:
    """The counted audits of one model, for requests without exit options.

    Attributes:
        manifest, rules, runtime: those of the model.
        tau_factor: factor applied to the τ of out-of-distribution texts.
        taus: the grid of τ, ascending from 0.
        epoch: see Standing.
        tenants: the audits of each tenant that has sent texts, by name.
        num_resets: number of resets by reason; an admin's reset of all tenants counts once.
        num_changes: number of resets that void what was learned: those by an admin, and those of tenants that sent at
            least half of the recent texts.
    """

    def __init__(
        self,
        manifest: Manifest,
        rules: Rules,
        runtime: str,
        tau_factor: float,
        settings: Settings,
        publish: Callable[[Standing], None] = lambda _: None,
    ) -> None:
        """publish: called with the standing of the tenants whose τ or epoch has changed."""
        self.manifest, self._publish, self._has_keys = manifest, publish, settings.has_keys
        self.taus = _grid(rules)
        attempt = 1 if manifest.learned is None else manifest.learned.attempt
        # Without --learn no other exits will be tested, so these may use all of δ.
        self.error = error_of(attempt) if settings.learn else 1 - CONFIDENCE
        self.epoch = next(_EPOCHS)
        self.tenants: dict[str, Tenant] = {}
        self.num_resets: dict[Reason, int] = {"change": 0, "reset": 0}
        self.num_changes = 0
        self._texts = Counter[str]()  # number of recent texts, by tenant
        # By tenant, the highest τ logged, as an index in the grid, and the time of the log line (monotonic seconds).
        self._logged: dict[str, tuple[int, float]] = {}
        self._start_cost: float | None = None  # mean cost of an answer, by held-out texts
        self.serve(rules, runtime, tau_factor)

    def serve(self, rules: Rules, runtime: str, tau_factor: float) -> None:
        """Continue with the same model after it was reloaded."""
        self.rules, self.runtime, self.tau_factor = rules, runtime, tau_factor
        self._tell(self.tenants)

    def can_continue(self, manifest: Manifest, rules: Rules, runtime: str, tau_factor: float) -> bool:
        """True if the evidence also holds for a model with these properties."""
        other = manifest, rules.default.rule.signal, runtime, tau_factor
        same = (self.manifest, self.signal, self.runtime, self.tau_factor) == other
        same &= self.limits == rules.limits
        return same and self.taus.tolist() == _grid(rules).tolist()

    @property
    def standing(self) -> Standing:
        """The epoch, and the τ of each tenant."""
        return self._standing_of(self.tenants)

    def _standing_of(self, names: Iterable[str]) -> Standing:
        return Standing(self.epoch, self.num_changes, {name: _in_force(self.tenants[name]) for name in names})

    def tenant(self, name: str) -> Tenant:
        """The audits of a tenant, which begin with its first text."""
        if name not in self.tenants:
            self.tenants[name] = self.new_tenant()
            self._tell([name])
        return self.tenants[name]

    def new_tenant(self) -> Tenant:
        """A tenant without evidence."""
        criteria = criteria_of(self.manifest.kind, self.limits)
        return Tenant(self.taus, [Bounded(one, self.taus, self.error) for one in criteria], self.epoch)

    def restore(self, name: str, tenant: Tenant) -> None:
        """Continue with the saved audits of a tenant."""
        tenant.epoch = self.epoch
        self.tenants[name] = tenant
        self._logged[name] = tenant.index, -inf
        self._tell([name])

    def _tell(self, names: Iterable[str]) -> None:
        """Apply the τ of some tenants, and tell the processes."""
        standing = self._standing_of(names)
        self.rules.apply(standing)
        self._publish(standing)

    @property
    def _room(self) -> int:
        """Number of hashes that each tenant may remember."""
        return min(MOST_SEEN, MAX_SEEN // max(1, len(self.tenants)))

    @property
    def signal(self) -> Signal:
        """The signal whose score is compared with τ."""
        return self.rules.default.rule.signal

    @property
    def guaranteed_rate(self) -> float | None:
        """The guaranteed rate of disagreement: the guarantee, or the default max_disagreement; None without either."""
        default = self.rules.default
        return default.requested if default.set_by == "max_disagreement" else self.limits.differing

    @property
    def limits(self) -> Limits:
        """What audits are to keep within, for each tenant."""
        return self.rules.limits

    def count(self, settled: Sequence[Settled]) -> None:
        """Count texts that one process has settled; those that were drawn in an earlier epoch are ignored."""
        for one in settled:
            tenant = self.tenant(one.tenant)
            if one.epoch != tenant.epoch:  # drawn before a reset
                continue
            before = _in_force(tenant)
            self._texts[one.tenant] += one.texts
            if tenant.count(one, self.manifest.exit_costs, self._room):
                self._changed(one.tenant, tenant)
            if _in_force(tenant) != before:
                self._tell([one.tenant])
            self._log_rise(one.tenant, tenant)
        if self._texts.total() > RECENT_TEXTS:
            self._texts = Counter({name: texts // 2 for name, texts in self._texts.items() if texts > 1})

    def _log_rise(self, name: str, tenant: Tenant) -> None:
        """Log the τ of a tenant if it has risen since it was last logged, at most every LOG_S."""
        index, at = self._logged.get(name, (0, -inf))
        if tenant.index < index:
            self._logged[name] = tenant.index, at
        elif tenant.index > index and monotonic() - at >= LOG_S and len(self.manifest.exit_layers) > 1:
            self._logged[name] = tenant.index, monotonic()
            of = f" for {name}" if name else ""
            log.info("%s: audits allow τ = %g%s", self.manifest.full_name, self.taus[tenant.index], of)

    def _changed(self, name: str, tenant: Tenant) -> None:
        """Begin a new epoch for a tenant whose rate had risen."""
        of = f" of {name}" if name else ""
        log.warning(
            "%s: at the τ that audits had proved, answers now differ from full depth, or miss what it flags, more "
            "often than guaranteed: texts%s run to full depth until new audits allow early exits",
            self.manifest.full_name,
            of,
        )
        tenant.epoch = next(_EPOCHS)
        self.num_resets["change"] += 1
        all_texts = self._texts.total()
        self.num_changes += all_texts >= MIN_AUDITS and 2 * self._texts[name] >= all_texts

    def count_held_out(self, rows: Sequence[HeldOut], traffic: Mapping[str, int]) -> None:
        """Count held-out texts toward the guarantee of the tenants that sent them.

        They were recorded before the model was served, but after the last text that its fit could read. traffic: recent
        texts of each tenant; held-out texts of other clients are not counted. Raises ValueError for texts of another
        fit.
        """
        learned = self.manifest.learned
        if learned is None or any(one.cut != learned.cut for one in rows):
            raise ValueError(f"{self.manifest.full_name}: these held-out texts are those of another fit")
        self._texts = Counter(traffic)
        costs, by_tenant = self.manifest.exit_costs, defaultdict[str, list[HeldOut]](list)
        for one in rows:
            by_tenant[one.client if self._has_keys else ""].append(one)
        total, mean = sum(traffic.values()), 0.0
        for name, texts in traffic.items():
            cost = float(costs[-1])
            if held := by_tenant[name]:
                tenant = self.tenant(name)
                audited = [one.audited for one in held]
                if tenant.guarantees:
                    tenant.count_held_out([one.key for one in held], audited, costs, self._room)
                _, of_all = profiles_of(audited, 0, costs, self.taus)
                cost = float(of_all.layers[:, tenant.index].mean())
            mean += texts / total * cost
        self._start_cost = mean if traffic else None
        self._tell(traffic.keys() & self.tenants.keys())

    def reset(self) -> None:
        """Discard the evidence of all tenants at an admin's request; with a guarantee, τ returns to 0."""
        self.epoch = next(_EPOCHS)
        for tenant in self.tenants.values():
            tenant.reset(self.epoch)
        self.num_resets["reset"] += 1
        self.num_changes += 1
        self._tell(self.tenants)

    def traffic(self) -> dict[str, int]:
        """Number of recent texts of each tenant, audited or not."""
        return dict(self._texts)

    def changes(self) -> dict[str, int]:
        """Number of changes found in each tenant's traffic."""
        return {name: tenant.num_changes for name, tenant in self.tenants.items() if tenant.num_changes}

    @property
    def audits(self) -> int:
        """Number of audited texts in the evidence."""
        return sum(tenant.evidence.audits for tenant in list(self.tenants.values()))

    def tenant_taus(self) -> list[float]:
        """With a guarantee, the τ of each tenant."""
        return [float(one.taus[one.index]) for one in list(self.tenants.values()) if one.guarantees]

    def index(self, tenant: Tenant, tau: float) -> int:
        """Index of a tenant's τ in the grid. tau: the τ in force without a guarantee."""
        return tenant.index if self.limits.are_set else int(np.searchsorted(self.taus, tau))

    def speedup(self) -> float:
        """Speed-up over the traffic, in layers or calls of the upstream, with each tenant at its τ; 1 if unknown.

        Any thread may call this. It is measured by audits or, while there are few, by held-out texts.
        """
        tau, cost, weight, total = self.rules.default.rule.tau, self._start_cost, 0.0, 0.0
        for tenant in list(self.tenants.values()):
            index = self.index(tenant, tau)
            for share, tally in list(tenant.evidence.tallies.items()):
                total += int(tally.layers[index]) / share
                weight += tally.audits / share
        if self.audits >= MIN_AUDITS:
            cost = total / weight
        if len(self.manifest.exit_layers) == 1 or cost is None:
            return 1.0
        return self.manifest.exit_costs[-1] / max(cost, 1e-3)

    def measured(self, in_force: Choice) -> tuple[float, float, float] | None:
        """The rate of disagreement at the τ in force, and its lower and upper bound; None without audits.

        With a guarantee, they are those of the tenant whose audits are the strongest evidence against it: bounds hold
        for one tenant, because the texts of others are drawn with other probabilities. This may be
        the rate of another criterion than disagreement. Any thread may call this.
        """
        every = [(tenant, each) for tenant in list(self.tenants.values()) for each in tenant.criteria]
        wanted = (Disagreement, MissedSpan) if self.limits.are_set else Disagreement
        return self._worst(in_force, [one for one in every if isinstance(one[1].criterion, wanted)])

    def missed(self, in_force: Choice) -> tuple[float, float, float] | None:
        """The same for the rate of flagged texts that early exits miss; None without a flag."""
        every = [(tenant, each) for tenant in list(self.tenants.values()) for each in tenant.criteria]
        return self._worst(in_force, [one for one in every if isinstance(one[1].criterion, MissedFlag)])

    def _worst(
        self, in_force: Choice, found: Sequence[tuple[Tenant, Bounded]]
    ) -> tuple[float, float, float] | None:
        """The rate of one of these criteria, and its bounds; None without audits."""
        found = [(tenant, each) for tenant, each in found if each.evidence.audits]
        if not found:
            return None
        tau, otherwise = in_force.rule.tau, self.guaranteed_rate or 0.5

        def evidence_against(one: tuple[Tenant, Bounded]) -> float:
            tenant, each = one
            return each.evidence.e_value_above(each.criterion.limit or otherwise, self.index(tenant, tau))

        worst, each = max(found, key=evidence_against)
        index = self.index(worst, tau)
        lower, upper = each.evidence.bounds(slice(index, index + 1))
        return float(each.evidence.rates()[index]), float(lower[0]), float(upper[0])


def _grid(rules: Rules) -> NDArray[np.float64]:
    """The grid of τ: a fine one, and the values that may be in force."""
    return np.unique([*FINE_TAUS, *(choice.rule.tau for choice in [rules.default, *rules.steps])])


def _in_force(tenant: Tenant) -> InForce:
    if (guarantee := tenant.strictest) is None:
        return InForce(tenant.epoch, None, None)
    return InForce(tenant.epoch, float(tenant.taus[guarantee.index]), guarantee.reason)


def tau_row(choice: Choice, manifest: Manifest) -> dict[str, Any]:
    """τ for requests without exit options, and the reason for it."""
    if len(manifest.exit_layers) == 1:  # audits would allow any τ, but every text runs to full depth
        return {"tau": 0.0, "reason": "no_exits"}
    return {
        "tau": choice.rule.tau,
        "reason": choice.guarantee["reason"] if choice.guarantee else choice.set_by,
    }
