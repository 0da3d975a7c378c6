"""Drift without labels: prototypes that follow the texts, and a risk signal refitted on audits.

    python -m lab experiment drift DATA RUNS sst2-minilm-D-0 clinc150-minilm-D-0
    python -m lab experiment drift --redraw

A stream has in-domain texts, followed by texts of another domain. The signal is risk. τ is calibrated on in-domain
texts, for at most 2% disagreement with full depth, and never changes. A few random texts are audited, as in the server:
after such a text is answered, it runs to full depth. No labels are used.

The other domain's texts are split at random. One half, drawn with replacement, makes up most of the stream, to give
enough audits. The other half ends the stream, each text once, and is measured. So nothing is fitted on a measured text
before that text is answered.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from de3.exits.betting import Floats
from de3.exits.calibration import speedup
from de3.exits.recorded import Recorded
from de3.exits.risk import cross_fit, fit
from de3.exits.rule import exit_index
from de3.exits.signals import Risk
from de3.progress import track
from lab.experiments.cells import Cell, States, Trained
from lab.experiments.command import command
from lab.experiments.measures import (
    bootstrap,
    markdown,
    mean_auroc,
    speed_within,
)
from lab.experiments.shift import (
    AUDITED,
    DISAGREEMENT,
    both,
    domains,
    tau_within,
)

NAME = "drift"
ORDERS = 20
HOME, AWAY = 2_000, 11_000  # in-domain texts (at most), and other texts before the measured ones
AUDITS = 500  # number of audits on which the risk is refitted
BATCH = 64  # texts per step of the moving average, as in training
SURE = 0.5  # an early answer is a pseudo-label if its score is below this share of τ

Rows = NDArray[np.int64]
Prototypes = NDArray[np.float32]  # (spaces, K, metric_dim)


class Texts(NamedTuple):
    """Texts with their embeddings h'^(m), (n, spaces, metric_dim)."""

    embedded: NDArray[np.float32]
    recorded: Recorded

    @classmethod
    @torch.no_grad()
    def of(cls, trained: Trained, states: States) -> Self:
        """Embed texts, given their pooled states."""
        return cls(trained.model.embed(torch.from_numpy(states.pooled).float()).numpy(), states.recorded)

    def rows(self, rows: Rows, prototypes: Prototypes) -> Recorded:
        """A subset of the texts, with their distances to these prototypes."""
        recorded = self.recorded.rows(rows)
        distances = np.full_like(recorded.distances, np.nan)
        distances[:, : len(prototypes)] = 1 - cosines(self.embedded[rows], prototypes)
        return replace(recorded, distances=distances)


def cosines(embedded: NDArray[np.float32], prototypes: Prototypes) -> NDArray[np.float32]:
    """Cosines of embeddings (n, spaces, metric_dim) with each prototype, (n, spaces, K)."""
    units = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (embedded, prototypes)]
    return np.asarray((units[0].transpose(1, 0, 2) @ units[1].transpose(0, 2, 1)).transpose(1, 0, 2))


def slide(
    prototypes: Prototypes,
    embedded: NDArray[np.float32],
    labels: Rows,
    passed: NDArray[np.bool_],
    gamma: float,
) -> Prototypes:
    """One step of the moving average (Eq. 1); returns the new prototypes.

    labels: class of each text, (n,). passed: True where a text reached the exit of a space, (n, spaces).
    """
    moved = prototypes.copy()
    for k in np.unique(labels):
        rows = labels == k
        counts = passed[rows].sum(0)[:, None]
        sums = np.einsum("ns,nsd->sd", passed[rows].astype(np.float32), embedded[rows])
        step = (1 - gamma) * moved[:, k] + gamma * sums / np.maximum(counts, 1)
        moved[:, k] = np.where(counts > 0, step, moved[:, k])
    return moved


def pseudo_labels(
    recorded: Recorded, scores: Floats, index: Rows, tau: float, audited: NDArray[np.bool_]
) -> tuple[Rows, NDArray[np.bool_]]:
    """The label of each text, and True where it is used, both (n,).

    The label is full depth's answer where known, else the given answer, which is used only if its score is below
    SURE·τ.

    index: the exit that each text takes, (n,).
    """
    rows = np.arange(len(index))
    known = audited | (index == scores.shape[1] - 1)
    labels = np.where(known, recorded.answers[:, -1], recorded.answers[rows, index])
    return labels, known | (scores[rows, index] < SURE * tau)


class Guard:
    """Stops the moving average of the prototypes once it does harm.

    On the latest WINDOW audits, the guard compares how often the nearest prototype belongs to full depth's answer,
    among the moved prototypes and among the initial ones. Once it has LEAST audits, it fires if the moved prototypes
    are worse by more than MARGIN.
    """

    WINDOW, LEAST, MARGIN = 100, 30, 0.02

    def __init__(self) -> None:
        self._gains: deque[float] = deque(maxlen=self.WINDOW)
        self.has_fired = False

    def add(self, moved: NDArray[np.bool_], start: NDArray[np.bool_]) -> None:
        """Add an audit. moved, start: True where the nearest moved or initial prototype was right, (spaces,)."""
        self._gains.append(float(moved.mean()) - float(start.mean()))
        if len(self._gains) >= self.LEAST and np.mean(self._gains) < -self.MARGIN:
            self.has_fired = True


@dataclass(frozen=True)
class Arm:
    """A combination of adaptations: prototypes that follow the texts, with or without a guard, and a refitted risk."""

    follow: bool = False
    refit: bool = False
    guarded: bool = True


ARMS = {
    "frozen": Arm(),
    "follow": Arm(follow=True),
    "follow, no guard": Arm(follow=True, guarded=False),
    "refit": Arm(refit=True),
    "both": Arm(follow=True, refit=True),
}


@dataclass(frozen=True)
class Start:
    """The state of a model after its calibration."""

    prototypes: Prototypes
    risk: Risk
    tau: float
    gamma: float


@dataclass(frozen=True)
class Stream:
    """Texts in the order of a stream, a mask of the audited ones, and the index of the first measured one.

    Attributes:
        order: rows of the texts; a row may occur several times.
    """

    order: Rows
    audited: NDArray[np.bool_]
    measured: int


def stream(home: Rows, away: Rows, seed: int) -> Stream:
    """A random stream of in-domain texts, followed by texts of the other domain.

    home, away: rows of the in-domain texts and of the other domain's. They may overlap: a measured text never occurs
    before its measurement.
    """
    rng = np.random.default_rng(seed)
    away = rng.permutation(away)
    first, last = np.split(away, [len(away) // 2])
    before = rng.permutation(np.setdiff1d(home, last))[:HOME]
    order = np.concatenate([before, rng.choice(first, AWAY), last])
    return Stream(order, rng.random(len(order)) < AUDITED, len(before) + AWAY)


def run(texts: Texts, stream: Stream, start: Start, arm: Arm) -> dict[str, float]:
    """The results of an arm on the measured texts of a stream.

    `speedup` is in layers. `auroc` is the mean over the exits. `hindsight` is the highest speed-up at any τ within
    DISAGREEMENT. `fired` is 1 if the guard fired, else 0.
    """
    prototypes, risk, guard = start.prototypes, start.risk, Guard()
    audits: list[Recorded] = []  # with the distances at the time of the audit
    fitted = False
    scored: list[Floats] = []
    for i in range(0, len(stream.order), BATCH):
        rows, audited = stream.order[i : i + BATCH], stream.audited[i : i + BATCH]
        recorded = texts.rows(rows, prototypes)
        scores = risk.scores(recorded)
        scored.append(scores)
        # Changes from here on take effect for later texts only.
        audits.append(recorded.rows(audited))
        if arm.follow and not guard.has_fired:
            if arm.guarded and audited.any():
                _compare(guard, texts, rows[audited], prototypes, start.prototypes)
            if guard.has_fired:
                prototypes = start.prototypes
            else:
                index = exit_index(scores, start.tau)
                labels, use = pseudo_labels(recorded, scores, index, start.tau, audited)
                reached = np.where(audited, scores.shape[1] - 1, index)
                passed = np.arange(len(prototypes)) <= reached[:, None]
                prototypes = slide(
                    prototypes, texts.embedded[rows[use]], labels[use], passed[use], start.gamma
                )
        if arm.refit and not fitted and sum(len(r.labels) for r in audits) >= AUDITS:
            risk, fitted = fit(Recorded.joined(audits).rows(np.arange(AUDITS))), True
    scores = np.concatenate(scored)[stream.measured :]
    last = texts.recorded.rows(stream.order[stream.measured :])
    index, n = exit_index(scores, start.tau), np.arange(len(scores))
    layer = float(np.asarray(last.exit_layers)[index].mean())
    return {
        "speedup": speedup(last.exit_layers[-1], layer),
        "disagreement": float(last.differs[n, index].mean()),
        "auroc": mean_auroc(scores, last),
        "hindsight": speed_within(scores, last, DISAGREEMENT),
        "fired": float(guard.has_fired),
    }


def _compare(guard: Guard, texts: Texts, rows: Rows, moved: Prototypes, start: Prototypes) -> None:
    """Add the audits of these texts to the guard."""
    wanted = texts.recorded.answers[rows, -1][:, None]
    right = [cosines(texts.embedded[rows], prototypes).argmax(-1) == wanted for prototypes in (moved, start)]
    for one, other in zip(*right, strict=True):
        guard.add(one, other)


def calibrated(trained: Trained) -> Start:
    """A model's prototypes and γ, and its risk and τ from its held-out texts."""
    texts = Texts.of(trained, trained.states("held-out"))
    prototypes = trained.model.prototypes.numpy().astype(np.float32)
    recorded = texts.rows(np.arange(len(texts.embedded)), prototypes)
    tau = tau_within(cross_fit(recorded), recorded, DISAGREEMENT)
    return Start(prototypes, fit(recorded), tau, trained.config.gamma)


def streams(trained: Trained, root: Path) -> dict[str, tuple[Texts, Rows, Rows]]:
    """All texts, the rows of the in-domain ones, and the rows of the other domain's, by name of the other domain."""
    (_, home), *others = domains(trained, root).items()
    n = len(home.pooled)
    found = {}
    for name, states in others:
        if name == "mixed":  # contains the in-domain texts
            found[name] = (Texts.of(trained, states), np.arange(n), np.arange(len(states.pooled)))
        elif name != "out of scope":
            texts = Texts.of(trained, both(home, states))
            found[name] = (texts, np.arange(n), n + np.arange(len(states.pooled)))
    return found


def measure(
    domain: str, texts: Texts, home: Rows, away: Rows, start: Start
) -> dict[str, list[dict[str, float]]]:
    """The results of every arm on the same ORDERS streams, by name of the arm."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in track(range(ORDERS), f"Streams, then {domain}"):
        order = stream(home, away, seed)
        for name, arm in ARMS.items():
            results[name].append(run(texts, order, start, arm))
    return results


def results_of(cells: Sequence[Cell], root: Path, runs: Path) -> dict[str, Any]:
    """Measure cells; returns the results by name of the other domain."""
    found = {}
    for cell in cells:
        trained = Trained(cell, root, runs)
        start = calibrated(trained)
        for domain, (texts, home, away) in streams(trained, root).items():
            found[domain] = measure(domain, texts, home, away, start)
    return found


def table(results: dict[str, Any]) -> str:
    """The means over the orders as Markdown, with 95% paired-bootstrap intervals of differences from frozen."""
    keys = {
        "speedup": (1, 2),
        "disagreement": (100, 2),
        "auroc": (1000, 0),
        "hindsight": (1, 2),
    }  # factor and digits
    columns = ["then", "arm", "speed-up", "disagreement, %", "AUROC, ‰", "2% in hindsight", "guard"]
    rows = []
    for domain, arms in results.items():
        for name, runs in arms.items():
            cells = []
            for key, (scale, digits) in keys.items():
                values, frozen = (scale * np.array([r[key] for r in of]) for of in (runs, arms["frozen"]))
                cell = f"{values.mean():.{digits}f}"
                if name != "frozen":
                    low, high = bootstrap(values - frozen)
                    cell += f" ({low:+.{digits}f} … {high:+.{digits}f})".replace("-", "−")
                cells.append(cell)
            first = domain if name == "frozen" else ""
            rows.append([first, name, *cells, f"{sum(r['fired'] for r in runs):.0f}"])
    return markdown(columns, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the speed-up and the disagreement with full depth, for every order and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8))
    for axis, (domain, arms) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        for name, runs in arms.items():
            points = ([r["speedup"] for r in runs], [100 * r["disagreement"] for r in runs])
            axis.scatter(*points, s=14, alpha=0.7, label=name)
        axis.axhline(100 * DISAGREEMENT, color="black", linestyle=":", linewidth=1)
        axis.set(title=f"then {domain}", xlabel="speed-up in layers", ylabel="differ from full depth, %")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


main = command(NAME, results_of, table, plot)
