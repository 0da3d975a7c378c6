"""Signals out of distribution, and the effect of the OOD policy and the guarantee there.

    python -m lab experiment shift DATA RUNS sst2-minilm-D-0 clinc150-minilm-D-0
    python -m lab experiment shift --redraw

Each τ is chosen on in-domain texts that training held out, and measured on other in-domain texts. The SST-2 model is
also measured on product reviews, and the CLINC150 model on out-of-scope questions, which have no label: alone, and
mixed with its test texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.exits import formulas, reference
from de3.exits.betting import Floats
from de3.exits.calibration import FINE_TAUS, LAMS, speedup
from de3.exits.guarantee import Guarantee, Profiles
from de3.exits.recorded import Recorded
from de3.exits.risk import cross_fit, fit
from de3.exits.rule import exit_index
from de3.exits.signals import Edr
from lab.experiments.cells import Cell, States, Trained
from lab.experiments.command import command
from lab.experiments.measures import (
    markdown,
    mean_auroc,
    mean_speedup,
    number,
    thresholds,
)
from lab.experiments.tasks import out_of_scope, reviews

NAME = "shift"
REVIEWS = ("books", "electronics")
TEST_OUT_OF_SCOPE = 1_000  # the last questions, which are those of the test part
SPEEDUP, DISAGREEMENT = 3.0, 0.02
OOD_TAU_FACTOR = 0.5  # factor of τ in the OOD policy (runtime.ood)
STREAMS, TEXTS, AUDITED = 20, 20_000, 0.05


class Signal(NamedTuple):
    """A signal: its scores of the held-out texts, (n, exits), and a function that scores other texts."""

    held: Floats
    scores: Callable[[Recorded], Floats]


def domains(trained: Trained, root: Path) -> dict[str, States]:
    """The texts of each domain, the model's own first. The label of an out-of-scope question is −1."""
    home = trained.states("unseen")
    if trained.cell.task == "sst2":
        names = trained.checkpoint.names
        texts = {d: [Example(text, names.index(label)) for text, label in reviews(root, d)] for d in REVIEWS}
        return {"dev": home} | {d: trained.of(examples, d) for d, examples in texts.items()}
    outside = trained.of(
        [Example(text, -1) for text in out_of_scope(root)[-TEST_OUT_OF_SCOPE:]], "out-of-scope"
    )
    return {"test": home, "mixed": both(home, outside), "out of scope": outside}


def both(first: States, second: States) -> States:
    """Concatenate two sets of texts."""
    pooled = np.concatenate([first.pooled, second.pooled])
    return States(pooled, Recorded.joined([first.recorded, second.recorded]))


def signals(held: Recorded) -> dict[str, Signal]:
    """The signals, fitted on held-out texts where necessary; small means sure."""

    def without(recorded: Recorded) -> Recorded:
        return replace(recorded, distances=np.full_like(recorded.distances, np.nan))

    def unsure(recorded: Recorded) -> Floats:
        return np.asarray(1 - formulas.softmax(recorded.logits).max(-1))

    lam = max(LAMS, key=lambda lam: mean_speedup(Edr(lam).scores(held), held))
    plain: dict[str, Callable[[Recorded], Floats]] = {
        "maximum probability": unsure,
        "entropy": lambda r: r.entropy,
        "DR alone": lambda r: r.distance_ratio,
        f"EDR, λ = {lam:g}": Edr(lam).scores,
    }
    found = {name: Signal(scores(held), scores) for name, scores in plain.items()}
    blind, risk = fit(without(held)), fit(held)
    found["risk without DR"] = Signal(cross_fit(without(held)), lambda r: blind.scores(without(r)))
    found["risk"] = Signal(cross_fit(held), risk.scores)
    return found


def tau_for_speedup(scores: Floats, recorded: Recorded, wanted: float) -> float:
    """The smallest τ with at least the wanted speed-up in layers, or the largest τ if there is none."""
    layers, taus = np.asarray(recorded.exit_layers), thresholds(scores)
    low, high = 0, len(taus) - 1  # the mean layer falls as τ rises
    while high - low > 1:
        middle = (low + high) // 2
        is_fast = layers[exit_index(scores, float(taus[middle]))].mean() <= layers[-1] / wanted
        low, high = (low, middle) if is_fast else (middle, high)
    return float(taus[high])


def tau_within(scores: Floats, recorded: Recorded, disagreement: float) -> float:
    """The largest τ up to which no τ exceeds a rate of disagreement with full depth."""
    rows, differs = np.arange(len(scores)), recorded.differs
    chosen = -np.inf
    for tau in thresholds(scores):
        if differs[rows, exit_index(scores, float(tau))].mean() > disagreement:
            break
        chosen = float(tau)
    return chosen


def at(scores: Floats, recorded: Recorded, tau: float) -> dict[str, float]:
    """Results at a τ, by name.

    `speedup` is in layers. `loss` is the loss of accuracy against full depth on texts with a label; NaN if no text has
    one. `disagreement` is with full depth. `early` is the share of texts that exit early.
    """
    index, rows = exit_index(scores, tau), np.arange(len(scores))
    labelled, correct = recorded.labels >= 0, recorded.correct
    lost = (correct[:, -1].astype(float) - correct[rows, index])[labelled]
    layers = np.asarray(recorded.exit_layers)
    return {
        "speedup": speedup(recorded.exit_layers[-1], float(layers[index].mean())),
        "loss": float(lost.mean()) if len(lost) else float("nan"),
        "disagreement": float(recorded.differs[rows, index].mean()),
        "early": float((index < len(layers) - 1).mean()),
    }


def limits(held: Recorded) -> Floats:
    """The distance to the nearest prototype beyond which a text is far, (exits,); inf at exits without prototypes."""
    nearest = held.distances.min(-1)
    return np.array(
        [
            reference.far(reference.quantiles(nearest[:, j])) if np.isfinite(nearest[:, j]).all() else np.inf
            for j in range(nearest.shape[1])
        ]
    )


def cautious(scores: Floats, recorded: Recorded, limits: Floats) -> Floats:
    """Scores with the effect of the OOD policy.

    The policy halves τ from the first exit at which a text is far from every prototype, as if the scores were doubled.
    """
    far = np.maximum.accumulate(recorded.distances.min(-1) > limits, axis=1)
    return np.where(far, scores / OOD_TAU_FACTOR, scores)


def guaranteed(scores: Floats, recorded: Recorded, texts: int, seed: int) -> tuple[float, float, float]:
    """Simulate a stream under a guarantee; returns disagreement with full depth, mean exit layer, and the last τ.

    texts: number of texts in the stream.

    The texts are drawn at random from the recorded ones, whose rates are therefore the true rates. Audits add no
    layers, because a server runs them when it is idle.
    """
    rng, rows = np.random.default_rng(seed), np.arange(len(scores))
    index = np.stack([exit_index(scores, tau) for tau in FINE_TAUS], 1)
    differs = recorded.differs[rows[:, None], index]
    layers = np.asarray(recorded.exit_layers)[index]
    rates, depths = differs.mean(0), layers.mean(0)
    guarantee = Guarantee(DISAGREEMENT, np.array(FINE_TAUS))
    text, disagreement, depth = 0, 0.0, 0.0
    while text < texts:
        share = AUDITED if guarantee.index else 1.0
        skipped = min(int(rng.geometric(share)), texts - text) - 1
        disagreement += float(rates[guarantee.index]) * (skipped + 1)
        depth += float(depths[guarantee.index]) * (skipped + 1)
        k = int(rng.integers(len(scores)))
        guarantee.count(share, Profiles(differs[k, None], layers[k, None]))
        guarantee.advance()
        text += skipped + 1
    return disagreement / texts, depth / texts, guarantee.tau


def measure(held: Recorded, texts: dict[str, Recorded]) -> dict[str, Any]:
    """All results of one model. held: held-out texts, to choose τ on. texts: texts to measure, by domain."""
    result: dict[str, Any] = {
        "signals": {},
        "risk": {},
        "texts": {d: len(r.labels) for d, r in texts.items()},
    }
    result["full depth"] = {
        d: float(r.correct[r.labels >= 0, -1].mean()) if (r.labels >= 0).any() else float("nan")
        for d, r in texts.items()
    }
    known = signals(held)
    for name, signal in known.items():
        taus = {
            "speed": tau_for_speedup(signal.held, held, SPEEDUP),
            "agreement": tau_within(signal.held, held, DISAGREEMENT),
        }
        result["signals"][name] = {
            d: {
                **{target: at(signal.scores(r), r, tau) for target, tau in taus.items()},
                "auroc": mean_auroc(signal.scores(r), r),
            }
            for d, r in texts.items()
        }
    tau = tau_within(known["risk"].held, held, DISAGREEMENT)
    start = max(0, int(np.searchsorted(FINE_TAUS, tau, side="right")) - 1)
    far = limits(held)
    for d, recorded in texts.items():
        scores = known["risk"].scores(recorded)
        ways = {"nothing": scores, "policy": cautious(scores, recorded, far)}
        rows = {name: at(s, recorded, FINE_TAUS[start]) for name, s in ways.items()}
        for name, s in (("guarantee", scores), ("both", ways["policy"])):
            runs = np.array([guaranteed(s, recorded, TEXTS, seed) for seed in range(STREAMS)])
            rows[name] = {
                "speedup": speedup(recorded.exit_layers[-1], float(runs[:, 1].mean())),
                "disagreement": float(runs[:, 0].mean()),
                "worst": float(runs[:, 0].max()),
                "tau": float(np.median(runs[:, 2])),
            }
        rows["far"] = {"share": float((recorded.distances.min(-1) > far).any(1).mean())}
        result["risk"][d] = rows
    result["tau"] = FINE_TAUS[start]
    return result


def results_of(cells: Sequence[Cell], root: Path, runs: Path) -> dict[str, Any]:
    """Measure cells; returns the results by task."""
    found = {}
    for cell in cells:
        trained = Trained(cell, root, runs)
        texts = {name: states.recorded for name, states in domains(trained, root).items()}
        found[cell.task] = measure(trained.states("held-out").recorded, texts)
    return found


def tables(results: dict[str, Any]) -> str:
    """For each model, a table of the signals and one of risk under the policy and the guarantee, as Markdown."""
    found = []
    for task, result in results.items():
        columns = [
            task,
            "signal",
            "3×: speed-up, lost, disagreement, %",
            "2%: speed-up, lost, disagreement, %",
        ]
        columns += ["exit early, %", "AUROC"]
        rows = []
        for domain, count in result["texts"].items():
            for i, (name, by_domain) in enumerate(result["signals"].items()):
                row = by_domain[domain]
                fast, like = row["speed"], row["agreement"]
                cells = [_cells(fast), _cells(like), number(100 * like["early"], 0), number(row["auroc"])]
                rows.append(["" if i else f"{domain} ({count})", name, *cells])
        found.append(markdown(columns, rows))
        columns = [task, "far, %"]
        columns += [
            "nothing: speed-up, disagreement, %",
            "policy",
            "guarantee (worst stream)",
            "both (worst stream)",
        ]
        rows = []
        for domain, ways in result["risk"].items():
            cells = []
            for name in ("nothing", "policy", "guarantee", "both"):
                way = ways[name]
                worst = f" ({100 * way['worst']:.2f})" if "worst" in way else ""
                cells.append(f"{way['speedup']:.2f}×, {100 * way['disagreement']:.2f}{worst}")
            rows.append([domain, number(100 * ways["far"]["share"], 0), *cells])
        found.append(markdown(columns, rows))
    return "\n".join(found)


def _cells(row: dict[str, Any]) -> str:
    lost = None if row["loss"] is None else 100 * row["loss"]
    return f"{row['speedup']:.2f}×, {number(lost, 2)}, {100 * row['disagreement']:.2f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the disagreement with full depth by signal and domain, at the τ chosen for 2% in domain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    for axis, (task, result) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        width = 0.8 / len(result["texts"])
        places: NDArray[np.float64] = np.arange(len(result["signals"]), dtype=float)
        for i, domain in enumerate(result["texts"]):
            heights = [100 * rows[domain]["agreement"]["disagreement"] for rows in result["signals"].values()]
            axis.bar(places + i * width, heights, width, label=domain)
        axis.axhline(100 * DISAGREEMENT, color="black", linestyle=":", linewidth=1)
        axis.set_xticks(
            places + 0.4 - width / 2, list(result["signals"]), rotation=25, ha="right", fontsize=8
        )
        axis.set(title=task, ylabel="differ from full depth, %")
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


main = command(NAME, results_of, tables, plot)
