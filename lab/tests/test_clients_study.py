"""The simulated clients: an attacker can break a promise shared by all clients, but not one for each client."""

import numpy as np
import pytest

from de3.exits.calibration import FINE_TAUS
from lab.studies import clients
from lab.studies.audit import Population
from lab.studies.clients import ATTACKS, Attack


@pytest.fixture(scope="module")
def population() -> Population:
    """200 texts that disagree with full depth from an index of the τ grid on: the first at 20, about a fifth by 40."""
    first = np.random.default_rng(0).integers(20, 200, 200)
    first[:20] = np.linspace(20, 40, 20)
    return Population(np.arange(len(FINE_TAUS)) >= first[:, None], np.full((200, len(FINE_TAUS)), 3))


@pytest.mark.parametrize("name", ["easy texts, half of the traffic", f"{clients.BURST} copies once"])
def test_one_attacker_breaks_only_what_is_promised_to_all_alike(
    population: Population, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "TEXTS", 1500)
    (attack,) = (a for a in ATTACKS if a.name == name)
    quiet = clients.run(Attack("none"), 1, population, 0.05, 0.2, False, 1)
    kept = clients.run(attack, 1, population, 0.05, 0.2, False, 1)
    alike = clients.run(attack, 1, population, 0.05, 0.2, True, 1)
    assert quiet[0] <= 0.05 and kept[0] <= 0.05
    assert alike[0] > kept[0]
