"""The upstreams in a server of several processes: messages to the supervisor, which makes the calls."""

import asyncio
from collections import Counter
from typing import Any

from de3.runtime.upstream.client import Reply
from de3.runtime.upstream.usage import Query
from de3.server.processes.channel import Channel
from de3.server.processes.messages import decode

SEND_S = 0.2  # counts are collected for this long, then sent together


class RemoteUpstreams:
    """Implements `Asks` in one of several processes; the supervisor's `Upstreams` makes the calls."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._local, self._others = Counter[str](), Counter[str]()

    async def ask(self, name: str, query: Query, timeout_s: float, is_budget: bool) -> Reply:
        """Have the supervisor call a model's upstream."""
        found: Any = await self._channel.call("ask_upstream", name, query, timeout_s, is_budget)
        return decode(Reply, found)

    def answered(self, name: str, local: int, others: int) -> None:
        """Count texts; the counts are sent together with later ones."""
        if not self._local and not self._others:
            asyncio.get_running_loop().call_later(SEND_S, self.send)
        self._local[name] += local
        self._others[name] += others

    def send(self) -> None:
        """Send the counts that were collected."""
        local, others = self._local, self._others
        self._local, self._others = Counter(), Counter()
        for name in {*local, *others}:
            self._channel.tell("answered", name, local[name], others[name])
