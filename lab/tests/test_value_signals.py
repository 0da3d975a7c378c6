"""The calculations of the regression study, and the whole study on a tiny model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from de3.exits.recorded import Recorded
from de3.training.evaluate import correlation
from lab.experiments import measures, regression
from lab.experiments.anchors import KINDS, Anchors, distance_to, hats
from lab.experiments.measures import right_at
from lab.experiments.value_signals import Pairs, of_one_layer, resampled
from tests.fixtures import make_rows


def test_a_value_lies_between_its_two_anchors() -> None:
    anchors = torch.tensor([0.0, 1.0, 3.0])
    shares = hats(torch.tensor([-1.0, 0.0, 0.25, 1.0, 2.5, 9.0]), anchors)
    expected = [[1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.25, 0.75], [0, 0, 1]]
    assert torch.allclose(shares, torch.tensor(expected))
    # Between the anchors x and y, the point of 0.5 is at 45°.
    points = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
    diagonal = hats(torch.tensor([[0.5]]), anchors)
    units = torch.tensor([[[2**-0.5, 2**-0.5, 0]]])
    assert torch.allclose(distance_to(units, points, diagonal), torch.zeros(1, 1), atol=1e-6)
    assert torch.allclose(distance_to(points[:, :1], points, diagonal), torch.tensor([[1 - 2**-0.5]]))


def test_anchors_read_the_values_that_states_encode() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = 5 * torch.rand(600, generator=generator)
    angle = labels * torch.pi / 10  # of the value: a quarter of a circle
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    states = torch.cat([circle, 0.1 * torch.randn(600, 2, generator=generator)], -1)[:, None]
    for kind in KINDS[1:]:
        anchors = Anchors.fit(states, labels, torch.linspace(0, 5, 6), kind, seed=0)
        temperatures = anchors.temperatures(states, labels)
        off = anchors.read(states, temperatures)[:, 0] - labels
        assert off.square().mean().sqrt() < 0.3, kind  # their spread is 1.4
        # Correct heads agree with the geometry; heads that are off by 2 do not.
        right, wrong = (
            anchors.geometry(states, values[:, None], temperatures)[:, 0, :2].mean(0)
            for values in (labels, (labels + 2.5) % 5)
        )
        assert right[0] < 0.3 < 1.5 < wrong[0] and right[1] < 0.3 < 0.6 < wrong[1], kind


def test_correlations_of_resamples_are_those_of_the_rows_they_have() -> None:
    rng = np.random.default_rng(0)
    x = 100 + rng.normal(size=40)
    y = x + rng.normal(size=40)
    rows = rng.integers(40, size=40)
    counts = np.bincount(rows, minlength=40)
    both = resampled(np.stack([x, x * x]), y, np.stack([counts, np.ones(40)]) / 40)
    expected = [[correlation(z[r], y[r])[0] for z in (x, x * x)] for r in (rows, np.arange(40))]
    assert np.allclose(both, expected)


def test_one_layer_for_all_has_the_asked_speedup() -> None:
    values = torch.arange(1.0, 7).expand(3, 6)  # of layers 1 to 6: the layer itself
    layers = Pairs(torch.zeros(3, 6, 1), values, torch.zeros(3), first=1)
    for speedup in (1.0, 1.5, 2.0, 6.0):
        assert np.allclose(of_one_layer(layers, speedup), 6 / speedup)
    # A signal has it, too: the mean layer of its answers.
    scores = np.random.default_rng(0).random((3, 6))
    recorded: Recorded = layers.recorded
    for speedup in (1.0, 2.0, 3.0):
        assert np.isclose(right_at(scores, recorded, speedup, recorded.answers).mean(), 6 / speedup)


def test_the_study_runs_on_a_tiny_model(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stsb").mkdir()
    for part, count, seed in (("train", 300, 1), ("dev", 80, 2)):
        pairs = zip(make_rows(count, seed), make_rows(count, seed + 10), strict=True)
        lines = (f"{a}\t{b}\t{3 * int(x) + int(y)}\n" for (a, x), (b, y) in pairs if a.strip() and b.strip())
        (tmp_path / f"stsb/{part}.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(lines))
    monkeypatch.setattr(regression, "minilm", lambda: str(encoder))
    monkeypatch.setattr(regression, "SETTINGS", replace(regression.SETTINGS, epochs=1))
    monkeypatch.setattr(regression, "SEEDS", (0,))
    monkeypatch.setattr(measures, "RESULTS", tmp_path / "results")
    regression.main(tmp_path, tmp_path / "runs")
    found = measures.load("regression")
    assert found["chosen"] in found["kinds"]
    assert set(found["with"]) == {"as trained", "fitted again", "read from anchors"}
    regression.main(redraw=True)
    assert (tmp_path / "results/regression.png").stat().st_size > 5_000
