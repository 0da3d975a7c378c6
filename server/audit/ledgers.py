"""The ledgers of a server's models, and the task that saves them."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from threading import Lock

from de3.model_store.manifest import Manifest, base_of
from de3.runtime.background import keep_running
from de3.runtime.choice import Standing
from de3.runtime.fit import HeldOut
from de3.runtime.rules import Rules
from de3.server.audit.ledger import Ledger
from de3.server.audit.state import StateDir
from de3.server.audit.tenant import Settled
from de3.server.learn.learner import Changes, InService
from de3.server.settings import Settings

log = logging.getLogger("de3")
SAVE_S = 2.0  # interval between saves; a crash loses the audits since the last one
MAX_KEPT = 32  # states of unloaded models, which may be loaded again


class Ledgers:
    """A ledger for each served model, by name:version."""

    def __init__(self, settings: Settings, publish: Callable[[Manifest, Standing], None]) -> None:
        """publish: called with a model's manifest and new standing. Raises ValueError if state_dir cannot be used."""
        self._settings, self._publish = settings, publish
        self._by_model: dict[str, Ledger] = {}
        self._unloaded: dict[str, Ledger] = {}
        # For a learned version that is about to be served: its held-out texts, the ledger of the version in service,
        # that ledger's number of resets, and the number of changes of each tenant's traffic.
        self._held_out: dict[str, tuple[Sequence[HeldOut], Ledger, int, dict[str, int]]] = {}
        is_on, state_dir = settings.share_of_audits > 0, settings.state_dir
        self._state = StateDir(state_dir) if is_on and state_dir is not None else None
        self._writing, self._has_failed = Lock(), False

    def serve(self, manifest: Manifest, rules: Rules, runtime: str, tau_factor: float) -> Standing:
        """Start counting for a model, or continue with its earlier evidence; returns its ledger's Standing.

        tau_factor: factor applied to the τ of out-of-distribution texts.
        """
        name = manifest.full_name
        known = self._by_model.get(name)
        if known is not None and known.manifest == manifest:  # reloaded
            known.serve(rules, runtime, tau_factor)
            return known.standing

        def publish(standing: Standing) -> None:
            self._publish(manifest, standing)

        earlier, held_out = self._unloaded.pop(name, None), self._held_out.pop(name, None)
        if earlier is not None and earlier.can_continue(manifest, rules, runtime, tau_factor):
            self._by_model[name] = earlier
            earlier.serve(rules, runtime, tau_factor)
            return earlier.standing
        ledger = self._by_model[name] = Ledger(manifest, rules, runtime, tau_factor, self._settings, publish)
        if held_out is not None:
            rows, current, resets, before = held_out
            # If a tenant's traffic has changed meanwhile, its texts may predate the change.
            changed = dict(current.changes().items() - before.items())
            if current.num_resets["reset"] == resets:
                rows = [row for row in rows if (row.client if self._settings.has_keys else "") not in changed]
                ledger.count_held_out(rows, current.traffic())
        elif self._state is not None and earlier is None:
            self._state.read(ledger)
        return ledger.standing

    def base(self, name: str) -> str | None:
        """The base of a served model, by name:version (see base_of); None if it is not served."""
        ledger = self._by_model.get(name)
        return None if ledger is None else base_of(ledger.manifest)

    def in_service(self, name: str, version: int) -> InService:
        """The performance of a served version; a speed-up of 1 if it is not served. Any thread may call this."""
        ledger = self._by_model.get(f"{name}:{version}")
        return InService(version, 1.0 if ledger is None else ledger.speedup())

    def traffic_changes(self, name: str, version: int) -> Changes:
        """The changes in the traffic that the audits of a version have found; none if it is not served."""
        ledger = self._by_model.get(f"{name}:{version}")
        if ledger is None:
            return Changes(version, 0, {})
        return Changes(version, ledger.num_changes, ledger.changes())

    def versions(self, name: str) -> set[int]:
        """The served versions of a model name."""
        return {one.manifest.version for one in self.all if one.manifest.name == name}

    def start_speedup(self, manifest: Manifest, rows: Sequence[HeldOut], current: str) -> float:
        """The speed-up over the traffic with which a version would start, given held-out texts.

        current: name:version of the served version, whose tenants and traffic are assumed.
        """
        ledger = Ledger(manifest, Rules(manifest, self._settings), "", 1.0, self._settings)
        ledger.count_held_out(rows, self._by_model[current].traffic())
        return ledger.speedup()

    def prepare(self, name: str, rows: Sequence[HeldOut], current: str) -> None:
        """Set the held-out texts of a learned version, name:version, that is about to be served; see start_speedup."""
        ledger = self._by_model[current]
        self._held_out = {name: (rows, ledger, ledger.num_resets["reset"], ledger.changes())}

    def forget(self, name: str) -> None:
        """Stop counting for an unloaded model; the evidence of the last MAX_KEPT such models stays in memory."""
        ledger = self._by_model.pop(name, None)
        if ledger is None:
            return
        self._unloaded[name] = ledger
        while len(self._unloaded) > MAX_KEPT:
            self._save(self._unloaded.pop(next(iter(self._unloaded))))

    def reset(self, name: str) -> None:
        """Discard the evidence of all versions of a model name, served or not, at an admin's request."""
        for ledger in [*self.all, *self._unloaded.values()]:
            if ledger.manifest.name == name:
                ledger.reset()
        with self._writing:
            if self._state is not None:
                self._state.forget(name)

    def get(self, name: str) -> Ledger | None:
        """The ledger of a model; None if it is not served."""
        return self._by_model.get(name)

    @property
    def all(self) -> list[Ledger]:
        """All ledgers; safe to call from another thread."""
        return list(self._by_model.values())

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model; see Ledger.count."""
        ledger = self._by_model.get(name)
        if ledger is not None:
            ledger.count(settled)

    def start(self) -> None:
        """Start the task that saves changes."""
        if self._state is not None:
            keep_running("saving_audits", self._save_often)

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            for ledger in [*self.all, *self._unloaded.values()]:
                await asyncio.to_thread(self._save, ledger)

    def _save(self, ledger: Ledger) -> None:
        with self._writing:
            if self._state is None:
                return
            try:
                self._state.write(ledger)
                self._has_failed = False
            except Exception as error:  # an error here must not stop the server from answering requests
                if not self._has_failed:
                    log.error("state_dir: cannot be written; retrying every %g s: %s", SAVE_S, error)
                self._has_failed = True

    def stop(self) -> None:
        """Save all evidence and close the files; called once no more texts are counted."""
        for ledger in [*self.all, *self._unloaded.values()]:
            self._save(ledger)
        with self._writing:
            if self._state is not None:
                self._state.close()
            self._state = None
