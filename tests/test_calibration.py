"""The trade-off table and the choice of the default, compared with plain loops and known values."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.data.examples import Example
from de3.exits import calibration, risk
from de3.exits.bound import CONFIDENCE, CROSSED, upper_bound
from de3.exits.calibration import Samples
from de3.exits.recorded import Recorded
from de3.exits.signals import Edr, Entropy, Signal, signal_of
from de3.export import calibrate as export_calibrate
from de3.export.calibrate import MIN_CERTIFY, Calibrated, CalibrationPart, calibrate


def recorded(n: int = 400, seed: int = 0, of_a_group: int = 1) -> Recorded:
    """Synthetic exits that improve with depth; the last has no prototypes.

    of_a_group: number of consecutive samples that share their label and, if more than one, 64% of their noise variance.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 3, n // of_a_group), of_a_group)
    strength = np.array([0.5, 1.5, 3.0])[None, :, None] * (np.eye(3)[labels][:, None, :])
    noise = rng.normal(size=(n, 3, 3))
    if of_a_group > 1:
        shared = np.repeat(rng.normal(size=(n // of_a_group, 3, 3)), of_a_group, 0)
        noise = 0.6 * noise + 0.8 * shared
    logits = (strength + noise).astype(np.float32)
    distances = np.clip(1 - 0.2 * logits, 0, 2).astype(np.float32)
    distances[:, -1] = np.nan
    return Recorded([0, 1, 2], logits, distances, labels)


@pytest.mark.parametrize(("lam", "tau"), [(1.0, 0.3), (2.0, 0.0)])
def test_an_outcome_is_what_a_loop_over_samples_finds(lam: float, tau: float) -> None:
    r, signal = recorded(), signal_of("edr", lam)
    o = calibration.outcome(Samples.independent(r), signal.scores(r), tau, signal)
    right = full = differs = layers = 0
    entropy, ratio = r.entropy, r.distance_ratio
    for i in range(len(r.labels)):
        for j in range(3):
            h, dr = entropy[i, j], ratio[i, j]
            if j == 2 or (lam + 1) / (lam / dr + 1 / h) < tau:
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
    assert o.speedup == 2 / o.mean_exit_layer
    assert calibration.speedup(6, 0.0) == calibration.MAX_SPEEDUP == calibration.speedup(6, 1e-9)
    assert sum(o.histogram) == pytest.approx(1)
    assert (o.loss_interval == (0, 0)) == (tau == 0)


def test_wilson_against_published_values() -> None:
    assert calibration.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert calibration.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert calibration.wilson(10, 10)[1] == pytest.approx(1)


def test_the_mean_is_the_geometric_mean_of_the_highest_speed_ups_at_1_2_and_5_percent() -> None:
    cells = ((0.0, 1.0, 0.0), (0.1, 2.0, 0.01), (0.2, 4.0, 0.03), (0.3, 3.0, 0.05), (0.4, 9.0, 0.051))
    rows: list[Any] = [SimpleNamespace(tau=t, speedup=s, disagreement=d) for t, s, d in cells]
    assert calibration.mean_speedup(rows) == pytest.approx((2 * 2 * 4) ** (1 / 3))


@given(
    st.lists(
        st.tuples(st.sampled_from([-0.01, 0.0, 0.01, 0.02]), st.sampled_from([0.0, 0.003, 0.011])), max_size=5
    ),
    st.sampled_from([0.0, 0.01, 0.02, 0.03]),
)
def test_the_choice_is_the_last_row_before_the_first_whose_loss_may_reach_the_limit(
    cells: list[tuple[float, float]], max_loss: float
) -> None:
    row = calibration.trade_off(Samples.independent(recorded(5)), Entropy(), (0.0,))[0]
    rows = [row]
    for k, (loss, error) in enumerate(cells, 1):
        interval = (loss - 1.959964 * error, loss + 1.959964 * error)
        rows.append(replace(row, tau=k / 10, loss=loss, loss_interval=interval))
    fits = [max(0.0, loss) + 1.644854 * error < max_loss for loss, error in cells]
    assert calibration.within_loss(reversed(rows), max_loss) == rows[[*fits, False].index(False)]


def times(r: Recorded, k: int) -> Samples:
    """k copies of every sample; the copies of a sample form a group."""
    rows = np.repeat(np.arange(len(r.labels)), k)
    return Samples(r.rows(rows), rows)


def test_copies_of_a_sample_in_one_group_add_no_information() -> None:
    r, k, signal = recorded(500), 5, Edr(1.0)
    once, often = (calibration.trade_off(s, signal) for s in (Samples.independent(r), times(r, k)))
    for a, b in zip(once, often, strict=True):
        assert (b.accuracy, b.disagreement, b.loss) == pytest.approx((a.accuracy, a.disagreement, a.loss))
        # Equal up to the factor n/(n − 1) of the variance of n groups.
        assert b.disagreement_bound == pytest.approx(a.disagreement_bound, rel=0.01)
        assert b.disagreement_bound >= a.disagreement_bound - 1e-9
        for one, other in ((a.accuracy_interval, b.accuracy_interval), (a.loss_interval, b.loss_interval)):
            assert other == pytest.approx(one, abs=0.002)
            assert other[1] - other[0] >= one[1] - one[0] - 1e-9


def test_uncorrelated_groups_cost_nothing() -> None:
    hits = np.random.default_rng(0).random(3000) < 0.1
    size = calibration.effective_size(hits, np.random.default_rng(1).permutation(3000) // 3)
    assert 2700 < size <= 3000
    assert calibration.effective_size(hits, np.arange(3000)) == 3000
    assert calibration.mean_and_error(hits * 1.0, np.zeros(3000, np.int64))[1] == 1.0  # of one group
    opposites = np.arange(60) % 2 == 0, np.arange(60) // 2  # no more precise than independent samples
    assert calibration.mean_and_error(opposites[0] * 1.0, opposites[1])[1] == pytest.approx(
        (0.25 / 60) ** 0.5
    )
    none = np.zeros(3000, bool)
    assert calibration.effective_size(none, np.arange(3000) // 3) == 1000  # no hits: correlation unknown


def examples(n: int, group_of: int = 1, fragments: int = 0) -> list[Example]:
    """n examples in groups of `group_of`; the last `fragments` of them are fragments."""
    return [Example(f"t{i}", 0, f"g{i // group_of}", i >= n - fragments) for i in range(n)]


def broken_rows(r: Recorded, which: slice) -> Recorded:
    """A copy of `r` in which the early exits of some samples are confident, and disagree with the last exit.

    which: these samples; the others are unchanged.
    """
    logits = r.logits.copy()
    logits[which, :-1] = 30 * np.eye(3)[(r.logits[which, -1].argmax(-1) + 1) % 3][:, None, :]
    return Recorded(r.exit_layers, logits, r.distances, r.labels)


@pytest.mark.usefixtures("few_taus")
def test_fragments_neither_choose_nor_certify() -> None:
    """Fragments are not real traffic: they change the fit of risk, but no number reported for the other signals."""
    tune, certify = recorded(1200, 1), recorded(1200, 2)
    found = []
    for change in (False, True):
        parts = []
        for r in (tune, certify):
            changed = broken_rows(r, slice(1000, 1200)) if change else r
            parts.append(CalibrationPart.of(changed, examples(1200, fragments=200)))
        found.append(calibrate(*parts, 0.02, "entropy"))
    one, other = (f.calibration for f in found)
    assert one.certify_size == one.groups == 1000
    assert (one.default, one.exit_accuracy) == (other.default, other.exit_accuracy)
    assert one.references == other.references
    rows = [[row for row in c.table if row.signal != "risk"] for c in (one, other)]
    assert rows[0] == rows[1] and rows[0]
    assert found[0].risk != found[1].risk


def test_correlated_samples_count_for_less() -> None:
    pairs = np.repeat(np.arange(2), 2)
    values = np.array([1.0, 1, 0, 0])
    assert calibration.mean_and_error(values, pairs) == (0.5, pytest.approx(0.5))  # as two independent values
    for hits in (np.ones(6, np.bool_), np.zeros(6, np.bool_)):  # their correlation is not known
        assert calibration.effective_size(hits, np.repeat(np.arange(2), 3)) == 2
    # 5 of 40 texts differ, in groups of four that are correlated: fractions of an error count as whole ones.
    hits, groups = np.arange(40) < 5, np.repeat(np.arange(10), 4)
    n = round(calibration.effective_size(hits, groups))
    assert 10 <= n < 40 and 0.05 < hits.mean() * n % 1 < 0.5
    logits = np.zeros((40, 2, 2), np.float32)
    logits[:, 1, 0], logits[:, 0, 0] = 9, np.where(hits, -9, 9)
    samples = Samples(Recorded([0, 1], logits, np.full_like(logits, np.nan), np.zeros(40, np.int64)), groups)
    (row,) = calibration.trade_off(samples, Entropy(), [0.5])
    assert row.disagreement_bound == upper_bound(math.ceil(hits.mean() * n), n)


@pytest.mark.usefixtures("few_taus")
def test_with_many_samples_only_the_certifying_part_certifies() -> None:
    n = MIN_CERTIFY
    tune, certify = recorded(n, 1), recorded(n, 2)
    parts = [CalibrationPart.of(r, examples(n)) for r in (tune, certify)]
    found = calibrate(*parts, 0.02)
    fitted = risk.fit(tune)
    assert found.risk == fitted
    sizes = found.calibration.tune_size, found.calibration.certify_size, found.calibration.groups
    assert sizes == (n, n, n) and not found.calibration.cross_fitted
    assert_certified(found, Samples.independent(certify), fitted.scores(certify))


@pytest.mark.usefixtures("few_taus")
def test_with_few_samples_both_parts_certify_each_with_a_fit_on_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group_of, n = 3, 3 * MIN_CERTIFY + 57  # one group of whole texts too few
    tune, certify = recorded(n, 1, group_of), recorded(n, 2, group_of)
    whole = n - 60
    parts = [CalibrationPart.of(r, examples(n, group_of, fragments=60)) for r in (tune, certify)]
    found = calibrate(*parts, 0.02)
    assert f"fewer than {MIN_CERTIFY} independent groups of certifying samples" in capsys.readouterr().err
    together = parts[0].joined(parts[1])
    both, groups = together.samples.recorded, together.samples.groups
    assert len(np.unique(groups)) == 2 * n // group_of and len(both.labels) == 2 * n
    scores = [risk.fit(b).scores(a)[:whole] for a, b in ((tune, certify), (certify, tune))]
    assert found.calibration.tune_size == n
    assert found.calibration.certify_size == 2 * whole
    assert found.calibration.groups == 2 * whole // group_of
    assert found.calibration.cross_fitted
    assert_certified(found, together.whole, np.concatenate(scores))
    assert found.risk == risk.fit(both, groups)  # the exported risk is fitted on both


@pytest.mark.usefixtures("few_taus")
def test_without_a_certifying_part_the_tuning_part_certifies_cross_fitted() -> None:
    part = CalibrationPart.of(recorded(900, 1), examples(900))
    found = calibrate(part, None, 0.02)
    assert found.calibration.cross_fitted and found.calibration.certify_size == 900
    assert_certified(found, part.samples, risk.cross_fit(part.samples.recorded, part.samples.groups))


def assert_certified(found: Calibrated, samples: Samples, scores: np.ndarray) -> None:
    """Check the calibration's rows of risk against those of these samples and scores."""
    rows = [row for row in found.calibration.table if row.signal == "risk"]
    confidence = CROSSED if found.calibration.cross_fitted else CONFIDENCE
    expected = calibration.trade_off(samples, found.risk, [row.tau for row in rows], scores, confidence)
    as_saved = [type(rows[0]).model_validate(export_calibrate.as_fields(row)) for row in expected]
    assert rows == as_saved and len(rows) > 1


@pytest.mark.usefixtures("few_taus")
def test_rivals_are_the_risk_fitted_on_other_groups_and_edr_at_its_best_lambda() -> None:
    part = CalibrationPart.of(recorded(600, 1, 3), examples(600, 3, fragments=60))
    fitted = risk.fit(part.samples.recorded)
    scores = risk.cross_fit(part.samples.recorded, part.samples.groups)[part.is_whole]

    def mean_speedup(signal: Signal, scores: np.ndarray | None = None) -> float:
        taus = export_calibrate.FINE_TAUS
        return calibration.mean_speedup(calibration.trade_off(part.whole, signal, taus, scores))

    rivals = export_calibrate._rivals(part.whole, fitted, scores)
    assert rivals["risk"] == (fitted, mean_speedup(fitted, scores))
    speedups = {Edr(lam): mean_speedup(Edr(lam)) for lam in calibration.LAMS}
    best, found = rivals["edr"]
    assert isinstance(best, Edr) and found == speedups[best] == max(speedups.values()) > min(
        speedups.values()
    )


def test_another_signal_than_risk_is_chosen_only_if_clearly_faster() -> None:
    for gain, chosen in ((1.04, "risk"), (1.06, "edr")):
        speedups = {"entropy": 1.0, "edr": 2.0 * gain, "risk": 2.0}
        signals = {name: (Entropy(), value) for name, value in speedups.items()}
        assert export_calibrate._choose(signals) == chosen


@pytest.mark.usefixtures("few_taus")
def test_a_chosen_signal_is_the_default() -> None:
    parts = [CalibrationPart.of(recorded(300, seed), examples(300)) for seed in (1, 2)]
    found = calibrate(*parts, 0.02, "edr")
    assert found.defaults.signal == found.calibration.default.signal == "edr"
    assert {row.signal for row in found.calibration.table} == {"risk", "edr", "entropy"}
    with pytest.raises(ValueError, match="--signal must be one of auto, entropy, edr, risk, got 'margin'"):
        calibrate(*parts, 0.02, "margin")


def test_a_bound_never_falls_even_where_the_disagreement_does() -> None:
    """The values of τ are tested in sequence: a test counts only if all earlier ones passed."""
    logits = np.zeros((100, 3, 2), np.float32)
    logits[:, :, 0] = [1, -1, 1]  # only the second exit answers differently
    r = Recorded([0, 1, 2], logits, np.full_like(logits, np.nan), np.zeros(100, np.int64))
    scores = np.tile([0.5, 0.1, np.nan], (100, 1))
    rows = calibration.trade_off(Samples.independent(r), Entropy(), (0.0, 0.2, 0.6), scores)
    assert [row.disagreement for row in rows] == [0, 1, 0]
    assert [row.disagreement_bound for row in rows] == [0, 1, 1]


def test_full_depth_of_a_changed_model_disagrees_with_the_original_and_has_a_bound() -> None:
    r = recorded(400)
    rows = calibration.trade_off(Samples.independent(replace(r, original=r.labels)), Entropy())
    assert 0 < rows[0].disagreement < rows[0].disagreement_bound < 1
    assert calibration.speed_within(rows, rows[0].disagreement / 2) == 1  # full depth
