"""Shares of a limit: a lone client may use all of it, no client shuts others out, and the counts stay right."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from de3.runtime.errors import RequestError
from de3.runtime.shares import Shares
from de3.server.http.clients import Clients

LIMIT = 40


class SharesMachine(RuleBasedStateMachine):
    """Clients take and return shares; each refusal is justified and gives the right reason."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, list[int]] = {}

    @initialize(limit=st.sampled_from([4, LIMIT]))
    def start(self, limit: int) -> None:
        self.shares = Shares(limit, "texts", lambda: 7)

    def of(self, client: str) -> int:
        return sum(self.held.get(client, []))

    @rule(client=st.sampled_from("abcd"), amount=st.integers(1, LIMIT))
    def take(self, client: str, amount: int) -> None:
        total = sum(map(self.of, self.held))
        others = sum(1 for c in self.held if c != client and self.of(c))
        room = self.shares.most - total - amount - self.of(client) if others else self.shares.limit - total
        fits = amount <= room
        try:
            self.shares.take(client, amount)
        except RequestError as error:
            assert not fits
            over = self.of(client) + amount > self.shares.limit // (others + 1)
            assert error.cause == ("over_share" if others and over else "queue_full")
            assert error.retry_after_s == 7
        else:
            assert fits
            self.held.setdefault(client, []).append(amount)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([c for c, amounts in self.held.items() if amounts]))
        self.shares.release(client, self.held[client].pop())

    @invariant()
    def it_counts(self) -> None:
        assert self.shares.most == max(self.shares.limit + 1, self.shares.limit * 9 // 8)
        assert self.shares.total == sum(map(self.of, self.held)) <= self.shares.most
        assert all(self.shares.amount(c) == self.of(c) for c in "abcd")


TestShares = SharesMachine.TestCase
TestShares.settings = settings(max_examples=50)


def scope(peer: str | None, *forwarded: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    return {"client": (peer, 1234) if peer else None, "headers": headers}


@pytest.mark.parametrize(
    ("peer", "forwarded", "name"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", ["203.0.113.9"], "192.0.2.7"),  # an untrusted client can claim any address
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9, 10.2.3.4"], "203.0.113.9"),  # 1.1.1.1 may be invented
        ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [" , "], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, [::1]nonsense\xff"], "unknown"),
        ("::ffff:10.0.0.1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", [], "2001:db8:1:2::/64"),
        ("fd00::1", ["192.0.2.7"], "192.0.2.7"),
        (None, [], ""),
    ],
)
def test_clients_are_told_apart_by_address(peer: str | None, forwarded: list[str], name: str) -> None:
    assert Clients(["10.0.0.0/8", "fd00::/8"]).name(scope(peer, *forwarded)) == name
