"""The trade-off table and the choice of the default, against plain loops and known values."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exits import calibration
from exits.calibration import Samples
from exits.recorded import Recorded
from exits.signals import Edr, Entropy, signal_of


def recorded(n: int = 400, seed: int = 0) -> Recorded:
    """Made exits that get better with depth; the last has no prototypes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    strength = np.array([0.5, 1.5, 3.0])[None, :, None] * (np.eye(3)[labels][:, None, :])
    logits = (strength + rng.normal(size=(n, 3, 3))).astype(np.float32)
    distances = np.clip(1 - 0.2 * logits, 0, 2).astype(np.float32)
    distances[:, -1] = np.nan
    return Recorded([0, 1, 2], logits, distances, labels)


@pytest.mark.parametrize(("lam", "tau"), [(0.0, 0.4), (1.0, 0.3), (4.0, 1.0), (2.0, 0.0)])
def test_an_outcome_is_what_a_loop_over_samples_finds(lam: float, tau: float) -> None:
    r, signal = recorded(), signal_of("edr", lam)
    o = calibration.outcome(Samples.independent(r), signal.scores(r), tau, signal)
    right = full = differs = layers = 0
    for i in range(len(r.labels)):
        for j in range(3):
            h, dr = r.entropy[i, j], r.distance_ratio[i, j]
            edr = h if lam == 0 else (0 if min(h, dr) == 0 else (lam + 1) / (lam / dr + 1 / h))
            if j == 2 or edr < tau:
                break
        label = r.logits[i, j].argmax()
        right += label == r.labels[i]
        full += r.logits[i, 2].argmax() == r.labels[i]
        differs += label != r.logits[i, 2].argmax()
        layers += j
    n = len(r.labels)
    assert o.accuracy == pytest.approx(right / n)
    assert o.loss == pytest.approx((full - right) / n)
    assert o.disagreement == pytest.approx(differs / n)
    assert o.mean_exit_layer == pytest.approx(layers / n)
    assert sum(o.histogram) == pytest.approx(1)


def test_wilson_against_published_values() -> None:
    assert calibration.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert calibration.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert calibration.wilson(10, 10)[1] == pytest.approx(1)


def test_speedup_counts_layer_0_as_nothing() -> None:
    assert calibration.speedup(6, 2.0) == 3
    assert calibration.speedup(6, 0.0) == calibration.MAX_SPEEDUP


def test_full_depth_is_exact_and_always_allowed() -> None:
    r, signal = recorded(40), Edr(1.0)
    full = calibration.outcome(Samples.independent(r), signal.scores(r), 0.0, signal)
    assert (full.loss, full.loss_interval, full.mean_exit_layer) == (0, (0, 0), 2)
    assert calibration.within_loss([full], max_loss=0.0) == full


@given(st.floats(0, 0.2), st.integers(0, 5))
def test_the_choice_keeps_its_margin_up_to_the_first_that_does_not(max_loss: float, seed: int) -> None:
    samples = Samples.independent(recorded(seed=seed))
    table = calibration.trade_off(samples, Edr(2.0), (0.0, 0.1, 0.3, 0.6, 1.0))
    chosen = calibration.within_loss(table, max_loss)

    def kept(o: calibration.Outcome) -> bool:
        se = (o.loss_interval[1] - o.loss) / 1.959964
        return o.tau == 0 or o.loss + 1.644854 * se < max_loss

    assert all(kept(o) for o in table if o.tau <= chosen.tau)
    later = [o for o in table if o.tau > chosen.tau]
    assert not later or not kept(later[0])


def test_the_choice_stops_at_the_first_row_that_fails_whatever_comes_later() -> None:
    table = calibration.trade_off(Samples.independent(recorded()), Entropy(), (0.0, 0.1, 0.2, 0.3))
    losses = (0.0, 0.001, 0.05, 0.001)
    rows = [replace(r, loss=x, loss_interval=(x, x)) for r, x in zip(table, losses, strict=True)]
    assert calibration.within_loss(reversed(rows), 0.01) == rows[1]


def test_the_margin_for_chance_holds() -> None:
    """Of many calibrations on fresh samples, few choose a τ whose true loss is above the limit."""
    signal = Edr(1.0)
    truth = recorded(40_000, seed=99)
    taus = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    scores = signal.scores(truth)
    true_loss = {t: calibration.outcome(Samples.independent(truth), scores, t, signal).loss for t in taus}
    violated = 0
    for seed in range(100):
        samples = Samples.independent(recorded(600, seed))
        chosen = calibration.within_loss(calibration.trade_off(samples, signal, taus), 0.05)
        violated += true_loss[chosen.tau] > 0.05
    assert violated <= 10
