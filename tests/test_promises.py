"""A promise to many clients: the texts of one client do not raise τ for the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits.promise import Profile, Promise
from de3.exits.promises import ALL, MAX_CLIENTS, MAX_COUNTED, NEWCOMER, OTHERS, Promises
from de3.server.networks import network_of, party

GRID = np.array([0.0, 0.1, 0.2, 0.4])
LAYERS = np.array([3, 2, 1, 0])
CLEAN = Profile(np.zeros(4, np.bool_), LAYERS)


def unlike_from(index: int) -> Profile:
    """The profile of a text whose answer differs at every τ of GRID from this index on."""
    return Profile(np.arange(4) >= index, LAYERS)


def index_of(promises: Promises, client: str) -> int:
    return int(np.searchsorted(GRID, promises.choose(client)[0]))


def send(promises: Promises, client: str, texts: int, profile: Profile = CLEAN) -> None:
    for _ in range(texts):
        promises.add(client, 1.0, profile)
        promises.advance()


events = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.integers(1, 60)), max_size=30)


@settings(max_examples=60)
@given(events)
def test_each_of_two_clients_has_the_tau_of_its_own_texts(stream: list[tuple[str, int, int]]) -> None:
    promises, alone = Promises(0.1, GRID), {"a": Promise(0.1, GRID), "b": Promise(0.1, GRID)}
    for client, first, texts in [("a", 4, 1), ("b", 4, 1), *stream]:
        for n in range(texts):
            audit = unlike_from(first) if n % 12 == 0 else CLEAN
            promises.skip(client, 0.5, 1)
            promises.add(client, 0.5, audit)
            promises.advance()
            alone[client].skip(0.5, 1)
            alone[client].add(0.5, audit)
            alone[client].advance()
    for client, promise in alone.items():
        own = promises.deciding(client)
        # The other client's first text may count: at that time, there was no client to leave out.
        assert own.evidence.texts - promise.evidence.texts in (0, 2)
        if own.evidence.texts == promise.evidence.texts:
            assert own.saved() == promise.saved() and own.index == promise.index


def test_one_client_alone_has_the_tau_of_all_texts_and_a_newcomer_has_none() -> None:
    promises, same = Promises(0.1, GRID), Promise(0.1, GRID)
    for n in range(300):
        audit = unlike_from(3) if n % 5 == 0 else CLEAN
        promises.add("a", 1.0, audit)
        promises.advance()
        same.add(1.0, audit)
        same.advance()
    assert promises.choose("a") == (same.tau, same.reason) == (0.2, "evidence")
    assert promises.choose(NEWCOMER) == (0.0, "start")
    promises.add("b", 1.0, CLEAN)
    assert index_of(promises, "a") == 2 and index_of(promises, "b") == 0


def test_many_easy_texts_of_one_client_raise_no_tau_but_its_own() -> None:
    promises, rng = Promises(0.1, GRID), np.random.default_rng(1)
    for _ in range(1500):
        send(promises, "attacker", 9)
        send(promises, f"client {rng.integers(3)}", 1, unlike_from(2) if rng.random() < 0.2 else CLEAN)
    assert index_of(promises, "attacker") == 3
    # A fifth of the other clients' texts differ at τ = 0.2 and above.
    assert [index_of(promises, f"client {n}") for n in range(3)] == [1, 1, 1]
    assert promises.of_all.index == 3  # with one promise for all, 20% of their answers would differ


def test_no_tau_stays_above_what_the_client_s_own_recent_audits_allow() -> None:
    """This holds even if several attackers together raise τ for the others."""
    promises = Promises(0.1, GRID)
    for n in range(900):
        send(promises, f"attacker {n % 3}", 1)
    for n in range(300):
        send(promises, "client", 1, unlike_from(2) if n % 5 == 0 else CLEAN)
        send(promises, f"attacker {n % 3}", 3)
    assert promises.deciding("client").index == 3
    assert promises.choose("client") == (0.1, "recent")


def test_further_clients_count_as_one_until_they_send_more() -> None:
    promises = Promises(0.1, GRID)
    for number in range(MAX_CLIENTS):
        send(promises, f"client {number}", 10)
    assert len(promises.tracked()) == MAX_CLIENTS
    for number in range(30):
        send(promises, f"small {number}", 10)
    assert len(promises.by_left_out) == MAX_CLIENTS + 2 and OTHERS in promises.by_left_out
    assert promises.by_left_out[OTHERS].evidence.texts == 10 * MAX_CLIENTS
    assert promises.choose("small 3") == promises.choose("small 99") == promises.choose(NEWCOMER)
    send(promises, "small 3", 1)  # now it has sent more than the smallest tracked client
    assert promises.tracked()[0] == "small 3" and len(promises.tracked()) == MAX_CLIENTS
    left_out = promises.by_left_out["small 3"].evidence.texts
    send(promises, "small 3", 50)
    assert promises.by_left_out["small 3"].evidence.texts == left_out
    assert set(promises.own) == set(promises.by_left_out) - {ALL}


def test_counted_clients_are_limited() -> None:
    promises = Promises(0.1, GRID)
    send(promises, "large", 100)
    for number in range(MAX_CLIENTS + 3 * MAX_COUNTED):
        promises.add(f"client {number}", 1.0, CLEAN)
    assert len(promises.texts) <= MAX_CLIENTS + MAX_COUNTED + 1
    assert promises.tracked()[0] == "large"
    assert len(promises.by_left_out) == MAX_CLIENTS + 2


def test_after_a_reset_every_client_is_at_full_depth() -> None:
    promises = Promises(0.1, GRID, start=2)
    send(promises, "a", 300)
    send(promises, "b", 300)
    promises.reset("reset")
    assert promises.choose("a") == promises.choose("c") == (0.0, "reset")
    assert not promises.tracked() and not promises.texts and not promises.own


def test_resets_are_reported() -> None:
    promises, found = Promises(0.1, GRID, start=2), list[str]()
    promises.add("a", 1.0, CLEAN)
    promises.add("b", 1.0, CLEAN)
    while not found:
        found = promises.add("a", 1.0, unlike_from(1))
    assert ALL in found and "b" in found and "a" not in found
    assert index_of(promises, "b") == 2  # its own texts agree
    assert index_of(promises, "a") == 0


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("10.1.2.3", "10.1.2.0/24"),
        ("2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("2001:db8:1:2::7", "2001:db8:1::/48"),
        ("key shop", "key shop"),
        ("", ""),
        ("unknown", "unknown"),
        ("1/2", "1/2"),
    ],
)
def test_clients_of_one_network_are_one_party(client: str, network: str) -> None:
    assert network_of(client) == network
    assert party(client) == party(network_of(client)) and len(party(client)) == 16
