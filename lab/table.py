"""Compares `de3 fit` with scikit-learn on the same rows, and tests its certified trade-offs on unseen texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from de3.data.examples import Example, label_order, to_examples
from de3.data.tables import Columns, read_rows
from de3.exits import calibration
from de3.exits.calibration import DISAGREEMENTS, Samples
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Signal
from de3.exits.trade_offs import TradeOffs
from de3.export import from_table, states
from de3.export.encoder import encoder_of
from de3.export.record import record
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.progress import track

CS = np.logspace(-3, 2, 6)  # inverse regularization strengths


def examples_of(table: Path, names: Sequence[str] | None = None) -> tuple[list[Example], list[str]]:
    """The examples of a table with the columns text and label, and the labels."""
    rows = read_rows(table, Columns())
    names = label_order(rows) if names is None else names
    return to_examples(rows, names), list(names)


def by_layer(table: Path, test: Path, encoder: str, store: Path) -> Iterator[tuple[int, float, float]]:
    """Yield each layer, with scikit-learn's accuracy in cross-validation and on the test texts.

    A logistic regression is fitted to the standardized states of the rows to which `de3 fit` fits exits; C is chosen by
    five-fold cross-validation.
    """
    examples, names = examples_of(table)
    unseen, _ = examples_of(test, names)
    with encoder_of(encoder, Store(store), "int8") as (artifact, poolings), TemporaryDirectory() as folder:
        model = Model(artifact, "auto")
        fitting, _, _ = from_table._parts(from_table._with_same_tokens(model, examples))
        seen, other = (
            states.compute(model, [e.text for e in part], Path(folder), what, poolings[:1])
            for part, what in ((fitting, "fitting"), (unseen, "test"))
        )
        truth, expected = (np.array([e.label for e in part]) for part in (fitting, unseen))
        for layer in track(range(artifact.manifest.num_layers + 1), "scikit-learn"):
            regression = LogisticRegressionCV(
                Cs=CS,
                cv=5,
                max_iter=1000,
                n_jobs=-1,
                use_legacy_attributes=False,
                l1_ratios=(0,),
                scoring="accuracy",
            )
            pipeline = make_pipeline(StandardScaler(), regression)
            with catch_warnings():
                simplefilter("ignore")
                pipeline.fit(seen.states(poolings[0], layer), truth)
            yield (
                layer,
                float(np.max(regression.scores_.mean(0))),
                float((pipeline.predict(other.states(poolings[0], layer)) == expected).mean()),
            )


def served(name: str, test: Path, store: Path) -> list[tuple[str, ...]]:
    """Rows of a table: a setting, and its τ, accuracy, disagreement and speed-up on the test texts.

    A row for a limit on disagreement also has the highest speed-up that keeps the limit in hindsight, on these texts.
    """
    model = Model(Store(store).open(name), "auto")
    manifest = model.manifest
    recorded = record(model, examples_of(test, manifest.labels)[0], "the test texts")
    signal = manifest.default_signal
    scores = signal.scores(recorded)
    rows = [
        ("full depth", *_cells(recorded, scores, 0.0)),
        ("default", *_cells(recorded, scores, manifest.defaults.tau)),
    ]
    certified = TradeOffs(manifest.trade_offs()[manifest.defaults.signal, manifest.defaults.lam])
    for most in DISAGREEMENTS:
        tau = certified.within_disagreement(most).tau
        rows.append(
            (f"≤ {100 * most:g}%", *_cells(recorded, scores, tau), _hindsight(recorded, signal, scores, most))
        )
    return rows


def _cells(recorded: Recorded, scores: NDArray[np.float64], tau: float) -> tuple[str, ...]:
    """The τ, accuracy, disagreement and speed-up."""
    index, rows = exit_index(scores, tau), np.arange(len(scores))
    layers = np.asarray(recorded.exit_layers)
    return (
        f"{tau:.4f}",
        f"{100 * recorded.correct[rows, index].mean():.2f}",
        f"{100 * recorded.differs[rows, index].mean():.2f}",
        f"{calibration.speedup(int(layers[-1]), float(layers[index].mean())):.2f}×",
    )


def _hindsight(recorded: Recorded, signal: Signal, scores: NDArray[np.float64], most: float) -> str:
    """The highest speed-up of any τ whose disagreement on these texts is at most `most`."""
    taus = np.unique(np.nanquantile(scores[:, :-1], np.linspace(0, 1, 1000)))
    table = calibration.trade_off(Samples.independent(recorded), signal, [0.0, *taus], scores)
    return f"{calibration.speed_within(table, most):.2f}×"
