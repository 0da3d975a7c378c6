"""The models of a server of several processes: each change is made in all processes, or in none."""

import asyncio
from collections.abc import Sequence
from typing import Any

from de3.model_store.manifest import fingerprint
from de3.server.errors import RequestError
from de3.server.processes.books import SharedBooks
from de3.server.processes.group import Group, Process, ask_all
from de3.server.processes.weights import Weights
from de3.server.processes.worker import artifact_of
from de3.server.rules import Rules
from de3.server.settings import Settings


class SharedModels:
    """The models that the processes serve. The first process proves them (prove.py), then the others load them."""

    def __init__(self, settings: Settings, group: Group, weights: Weights, books: SharedBooks) -> None:
        self._settings, self._group, self._weights, self._books = settings, group, weights, books
        self._ledgers = books.ledgers
        # Models and their roles; None until the first process has loaded them.
        self._state: dict[str, Any] | None = None
        self._version = 0  # incremented at each change of the state
        self._changing = asyncio.Lock()
        self._is_changing = False

    @property
    def are_loaded(self) -> bool:
        """True once a process has loaded the models."""
        return self._state is not None

    async def load(self, process: Process) -> None:
        """Have a new process load the models, then let it answer requests.

        If the process cannot load them, `process.reason` says why, and the process ends. Raises ChannelClosedError if
        it ends before it has answered.
        """
        while not await self._load(process):
            process.models = []  # the served models have changed in the meantime

    async def _load(self, process: Process) -> bool:
        """Have a process load the served models; False if these changed meanwhile, so that it must load them again."""
        if self._state is None:
            async with self._changing:
                if self._state is None:
                    answer = await process.channel.call("load", None)
                    if not self._loaded(process, answer):
                        return True
                    self._set_state(answer)
                    for model in answer["models"]:
                        self._open_ledger(model)
                    self._note_current()
        assert self._state is not None
        version = self._version
        if not process.models:
            plans = [model["plan"] for model in self._state["models"]]
            self._weights.send(process.sockets, [plan["artifact"] for plan in plans])
            answer = await process.channel.call("load", [plans, self._state["routes"]])
            if not self._loaded(process, answer):
                return True
        async with self._changing:
            if version != self._version:
                return False
            for ledger in self._ledgers.all:
                process.channel.tell("standing", fingerprint(ledger.manifest), *ledger.standing)
            process.channel.tell("open")
            process.is_member = True
            return True

    def _loaded(self, process: Process, answer: dict[str, Any]) -> bool:
        """Record the models that a process has loaded; False if it could not load them, in which case it ends."""
        process.receive(self._weights)  # the weights that it sent before its answer
        process.reason = answer.get("failed", "")
        process.models = answer.get("models", [])
        return not process.reason

    def _set_state(self, state: dict[str, Any]) -> None:
        self._state = state
        self._version += 1
        self._forget_weights()

    def _forget_weights(self) -> None:
        assert self._state is not None
        self._weights.keep(model["plan"]["artifact"] for model in self._state["models"])

    def _note_current(self) -> None:
        if self._books.learners is not None and self._state is not None:
            routes = self._state["routes"]
            self._books.learners.set_current({name: route["current"] for name, route in routes.items()})

    def _open_ledger(self, model: dict[str, Any]) -> None:
        if self._settings.share_of_audits:
            artifact = artifact_of(model["plan"]["artifact"])
            if self._books.learners is not None:
                self._books.learners.serve(artifact)
            manifest = artifact.manifest
            rules = Rules(manifest, self._settings)
            self._ledgers.serve(manifest, rules, model["runtime"], model["tau_factor"])

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
        plan = await first.ask("plan", change)
        try:
            loaded = await first.ask("prepare", plan)
            first.receive(self._weights)
            plan["no_kernels"] = loaded["no_kernels"]
            for process in others:
                self._weights.send(process.sockets, [plan["artifact"]] if plan["artifact"] else [])
            await ask_all(others, "prepare", plan)
        except Exception:
            await ask_all(members, "abort")
            self._forget_weights()
            raise
        if plan["artifact"]:
            self._open_ledger({**loaded, "plan": plan})
        answers = await _commit(members)
        if states := await ask_all(members, "state"):
            self._set_state(states[0])
        assert self._state is not None
        names = {model["full_name"] for model in self._state["models"]}
        for ledger in self._ledgers.all:
            if ledger.full_name not in names:
                self._ledgers.forget(ledger.full_name)
        self._note_current()
        if not answers:
            raise RequestError("every process ended during this change; try again", cause="conflict")
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
