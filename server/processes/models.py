"""The models of a server of several processes: each change is made in all processes, or in none."""

import asyncio
from collections.abc import Sequence
from typing import Any

from de3.model_store.manifest import Manifest, fingerprint
from de3.runtime.errors import RequestError
from de3.runtime.rules import Rules
from de3.server.audit.coordinator import Coordinator
from de3.server.manager import Plan
from de3.server.processes.group import Group, Process, ask_all
from de3.server.processes.messages import decode
from de3.server.processes.weights import Weights
from de3.server.processes.worker import State
from de3.server.settings import Settings


class SharedModels:
    """The models that the processes serve. The first process test-runs them (prove.py), then the others load them.

    Attributes:
        coordinator: counts the audits of the models.
    """

    def __init__(self, settings: Settings, group: Group, weights: Weights) -> None:
        """Raises ValueError as Coordinator does."""
        self._settings, self._group, self._weights = settings, group, weights
        self.coordinator = Coordinator(settings, self.change, group.publish, group.live_of, group.sync)
        self._state: State | None = None  # None until the first process has loaded the models
        self._version = 0  # incremented at each change of the state
        self._changing = asyncio.Lock()
        self._is_changing = False

    @property
    def are_loaded(self) -> bool:
        """True once a process has loaded the models."""
        return self._state is not None

    @property
    def manifests(self) -> list[Manifest]:
        """Manifests of the models that the processes serve; none before a process has loaded them."""
        return [] if self._state is None else [artifact.manifest for artifact in self._state.artifacts]

    async def load(self, process: Process) -> None:
        """Have a new process load the models, then let it answer requests.

        If the process cannot load them, `process.reason` says why, and the process ends. Raises ChannelClosedError if
        it ends before it has answered.
        """
        while not await self._load(process):
            pass

    async def _load(self, process: Process) -> bool:
        """Have a process load the served models; False if they changed meanwhile, so that it must load them again."""
        is_first = False
        if self._state is None:
            async with self._changing:
                if self._state is None:
                    state, is_first = await self._ask_to_load(process, None), True
                    if state.failed:
                        return True
                    for plan in state.plans:
                        self._open_ledger(plan)
                    self._set_state(state)
        assert self._state is not None
        version = self._version
        if not is_first:
            self._weights.send(process.sockets, self._state.artifacts)
            if (await self._ask_to_load(process, self._state)).failed:
                return True
        async with self._changing:
            if version != self._version:
                return False
            for ledger in self.coordinator.ledgers.all:
                process.channel.tell("standing", fingerprint(ledger.manifest), ledger.standing)
            process.is_member = True
            self._group.loaded(process)
            return True

    async def _ask_to_load(self, process: Process, state: State | None) -> State:
        """Have a process load models (see Worker._load); returns those that it has loaded.

        If loading fails, the process exits.
        """
        loaded = decode(State, await process.channel.call("load", state))
        process.receive(self._weights)  # receives the weights that it sent before its answer
        process.reason = loaded.failed
        return loaded

    def _set_state(self, state: State) -> None:
        self._state = state
        self._version += 1
        self._weights.keep(state.artifacts)
        self.coordinator.set_current({name: route.current for name, route in state.routes.items()})

    def _open_ledger(self, plan: Plan) -> None:
        if self._settings.share_of_audits and plan.artifact is not None:
            rules = Rules(plan.artifact.manifest, self._settings)
            self.coordinator.serve(plan.artifact, rules, plan.runtime, plan.tau_factor)

    async def change(self, change: dict[str, Any]) -> dict[str, Any]:
        """Change the models of all processes, or of none; returns the body of the admin route's response.

        change: the fields of a manager.Change. Raises RequestError if the change is not possible, or if another one is
        in progress.
        """
        if self._is_changing:
            raise RequestError("another change of the models is in progress; try again", cause="conflict")
        self._is_changing = True
        try:
            async with self._changing:
                return await self._change(change)
        finally:
            self._is_changing = False

    async def _change(self, change: dict[str, Any]) -> dict[str, Any]:
        members = [process for process in self._group.all if process.is_member]
        if not members:
            raise RequestError("the models are still loading", cause="loading", retry_after_s=1)
        first, *others = members
        plan = decode(Plan, await first.ask("plan", change))
        try:
            plan = decode(Plan, await first.ask("prepare", plan))
            first.receive(self._weights)
            for process in others:
                self._weights.send(process.sockets, [plan.artifact] if plan.artifact else [])
            await ask_all(others, "prepare", plan)
        except Exception:
            await ask_all(members, "abort")
            assert self._state is not None
            self._weights.keep(self._state.artifacts)
            raise
        self._open_ledger(plan)
        answers = await _commit(members)
        if states := await ask_all(members, "state"):
            self._set_state(decode(State, states[0]))
        assert self._state is not None
        names = {artifact.full_name for artifact in self._state.artifacts}
        for ledger in self.coordinator.ledgers.all:
            if ledger.manifest.full_name not in names:
                self.coordinator.forget(ledger.manifest)
        if not answers:
            raise RequestError("every process ended during this change; try again", cause="conflict")
        for process in members:  # by the first that is still running
            if pinned := await ask_all([process], "pin", plan.change):
                answers[0] |= pinned[0]
                break
        return answers[0]


async def _commit(members: Sequence[Process]) -> list[dict[str, Any]]:
    """Commit a change in every process; a process that fails is killed and replaced, as the others have changed."""
    calls = (process.call("commit") for process in members)
    answers = []
    for process, answer in zip(members, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(answer, dict):
            answers.append(answer)
        else:
            process.os_process.kill()
    return answers
