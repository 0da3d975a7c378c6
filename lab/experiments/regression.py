"""Early exit of a regression model on STS-B: signals that predict an exit's distance from full depth's value.

    python -m lab experiment regression DATA RUNS
    python -m lab experiment regression --redraw      # the tables and the plot again, from the JSON

MiniLM is trained with a linear value head at every exit; everything else uses its recorded states. Heads are refitted,
and ordered anchor prototypes (lab.experiments.anchors) fitted, on training pairs; signals
(lab.experiments.value_signals) are fitted on held-out pairs. All are measured on dev.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from de3.training import data
from de3.training.checkpoint import Checkpoint, is_finished, quiet
from de3.training.data import evaluation_batches
from de3.training.evaluate import correlation
from de3.training.model import De3Model
from de3.training.progress import console, track
from de3.training.settings import TrainSettings
from de3.training.split import Split, split
from de3.training.trainer import train
from lab.experiments import measures
from lab.experiments.anchors import KINDS, Anchors
from lab.experiments.tasks import REGRESSIONS, minilm
from lab.experiments.value_signals import (
    ONE_LAYER,
    PLAIN,
    PLOTTED,
    SIGNALS,
    SPEEDUPS,
    Fold,
    Pairs,
    measure,
    of_states,
    ridge,
)

NAME = "regression"
TOLERANCE = 0.5  # of STS-B's 0 to 5; used to choose the epoch only
SETTINGS = TrainSettings(epochs=5, batch_size=32, lr=1e-4, head_lr=1e-3, alpha=0.0)
HIGHEST = 5.0  # of STS-B's values
COUNTS = (6, 11)  # of anchors
SEEDS = (0, 1, 2)  # of the anchors, with each encoder
OF_READ = (PLAIN, "value, value², change", "anchors", ONE_LAYER)
OF_EACH_KIND = ("anchors", "value, value², anchors")


def parts_of(root: Path) -> Split:
    """STS-B's training pairs: train, and two held-out parts of a tenth each."""
    return split(data.to_examples(REGRESSIONS["stsb"].train(root), [], regression=True), 0)


def squared_error(values: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean squared error over the exits, by their weights; values (batch, exits, 1), labels (batch,)."""
    return (weights * (values[..., 0] - labels[:, None].float()).square().mean(0)).sum()


def trained(root: Path, runs: Path, seed: int) -> Checkpoint:
    """A value head at every exit of MiniLM, the embeddings included; trained unless runs has it."""
    folder = runs / f"stsb-minilm-{seed}"
    if not is_finished(folder):
        parts, encoder = parts_of(root), minilm()
        torch.manual_seed(seed)
        layers = list(range(AutoConfig.from_pretrained(encoder).num_hidden_layers + 1))
        model = De3Model.from_encoder(
            encoder, ["score"], exit_layers=layers, tolerance=TOLERANCE, input="pair"
        )
        mean = float(np.mean(data.label_array([e.label for e in parts.train], 1)))
        for head in model.classifiers:  # from 0, the first epoch would only learn the mean
            torch.nn.init.constant_(head.get_parameter("bias"), mean)
        train(
            model,
            AutoTokenizer.from_pretrained(encoder),
            parts,
            replace(SETTINGS, seed=seed),
            folder,
            resume=folder.exists(),
            objective=lambda values, _, labels, weights, *more: squared_error(values, labels, weights),
        )
    return Checkpoint(folder)


@torch.no_grad()
def recorded(checkpoint: Checkpoint, examples: Sequence[data.Example], what: str) -> Pairs:
    """Run the model on pairs, in float32, unless the checkpoint's folder has their states."""
    file = checkpoint.folder / f"states-{what}.safetensors"
    if not file.exists():
        model, tokenizer = checkpoint.model.eval(), checkpoint.tokenizer
        encoded = data.encode(examples, tokenizer, SETTINGS.max_length, what)
        states = torch.zeros(len(encoded), len(model.config.exit_layers), model.config.hidden_size)
        for rows in track(evaluation_batches([len(ids) for ids in encoded.ids], 64), f"Running {what}"):
            inputs, _ = encoded.batch(rows, tokenizer.pad_token_id)
            states[rows] = model.pooled(**inputs)
        values = torch.cat([head(states[:, j]) for j, head in enumerate(model.classifiers)], 1)
        kept = {"states": states, "values": values, "labels": encoded.labels.float()}
        save_file(kept, new := file.with_suffix(".new"))
        new.replace(file)
    return Pairs(**load_file(file))


def by_exit(values: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Both correlations and the root of the mean squared error of values (n, exits) with labels (n,), by exit."""
    y = labels.double().numpy()
    both = [correlation(v, y) for v in values.double().numpy().T]
    rmse = (values - labels[:, None]).square().mean(0).sqrt().tolist()
    return {"pearson": [p for p, _ in both], "spearman": [s for _, s in both], "rmse": rmse}


def again(train_pairs: Pairs, fold: Fold) -> Fold:
    """The fold with the values of heads that are refitted to the trained encoder's states by ridge."""
    y = train_pairs.labels.double().numpy()

    def values(p: Pairs) -> Tensor:
        exits = range(p.values.shape[1])
        columns = [ridge(of_states(train_pairs, j), y, of_states(p, j)) for j in exits]
        return torch.from_numpy(np.stack(columns, 1)).float()

    return Fold(*(replace(p, values=values(p)) for p in fold))


class Fitted(NamedTuple):
    """The fold with anchors of one seed.

    Attributes:
        beside: the heads' values, with the anchors' geometry.
        read: the values read from the anchors, with their geometry.
        error: mean squared error of `read` on held-out pairs.
    """

    beside: Fold
    read: Fold
    error: float


def with_anchors(train_pairs: Pairs, fold: Fold, count: int, kind: str, seed: int) -> Fitted:
    """Fit anchors on training states, and their temperatures on held-out pairs."""
    values = torch.linspace(0, HIGHEST, count)
    anchors = Anchors.fit(train_pairs.states, train_pairs.labels, values, kind, seed)
    temperatures = anchors.temperatures(fold.held.states, fold.held.labels)
    read = [replace(p, values=anchors.read(p.states, temperatures)) for p in fold]
    error = float((read[0].values - read[0].labels[:, None]).square().mean())
    beside, of_read = (Fold(*(p.with_anchors(anchors, temperatures) for p in of)) for of in (fold, read))
    return Fitted(beside, of_read, error)


def study(root: Path, runs: Path, encoders: int) -> dict[str, Any]:
    """Train, record, and measure."""
    parts = parts_of(root)
    dev = data.to_examples(REGRESSIONS["stsb"].unseen(root), [], regression=True)
    trainings, trained_folds = [], []
    for seed in range(encoders):
        checkpoint = trained(root, runs, seed)
        trainings.append(recorded(checkpoint, parts.train, "train"))
        held = recorded(checkpoint, parts.tune + parts.certify, "held-out")
        trained_folds.append(Fold(held, recorded(checkpoint, dev, "dev")))
    console.print("fitting the heads again")
    folds = [again(t, fold) for t, fold in zip(trainings, trained_folds, strict=True)]
    heads = {"value heads as trained": _heads(trained_folds), "value heads, fitted again": _heads(folds)}
    kinds, fitted = {}, {}
    for count in COUNTS:
        for kind in KINDS:
            name = f"{count} anchors, {kind}"
            console.print(name, highlight=False)
            pairs = [pair for pair in zip(trainings, folds, strict=True) for _ in SEEDS]
            seeds = [seed for _ in folds for seed in SEEDS]
            fitted[name] = [
                with_anchors(*pair, count, kind, seed) for pair, seed in zip(pairs, seeds, strict=True)
            ]
            heads[name] = _heads([f.read for f in fitted[name]])
            kinds[name] = {
                "held_out_error": float(np.mean([f.error for f in fitted[name]])),
                **measure([f.beside for f in fitted[name]], folds, OF_EACH_KIND),
            }
    chosen = min(kinds, key=lambda name: kinds[name]["held_out_error"])
    console.print(f"chosen: {chosen}", highlight=False)
    systems = {
        "as trained": (trained_folds, (PLAIN, ONE_LAYER)),
        "fitted again": ([f.beside for f in fitted[chosen]], SIGNALS),
        "read from anchors": ([f.read for f in fitted[chosen]], OF_READ),
    }
    sizes = [len(p.labels) for p in (trainings[0], *folds[0])]
    return {
        "encoders": encoders,
        "pairs": dict(zip(("train", "held-out", "dev"), sizes, strict=True)),
        "heads": heads,
        "kinds": kinds,
        "chosen": chosen,
        "with": {name: measure(of, folds, signals) for name, (of, signals) in systems.items()},
        "without": {
            name: measure(_without_first(of), _without_first(folds), signals)
            for name, (of, signals) in systems.items()
        },
    }


def _heads(folds: Sequence[Fold]) -> dict[str, list[float]]:
    """Correlations and errors of the values of unseen pairs by exit, the mean of the folds."""
    each = [by_exit(fold.unseen.values, fold.unseen.labels) for fold in folds]
    return {key: np.mean([one[key] for one in each], 0).tolist() for key in each[0]}


def _without_first(folds: Sequence[Fold]) -> list[Fold]:
    return [Fold(*(p.without_first() for p in fold)) for fold in folds]


def tables(results: dict[str, Any]) -> str:
    """The page's tables, in Markdown: correlations in hundredths."""
    layers = len(results["heads"]["value heads as trained"]["pearson"])
    lines = [_row(["Pearson, Spearman by exit", *range(layers)]), _row(["---"] * (layers + 1))]
    for name, head in results["heads"].items():
        both = zip(head["pearson"], head["spearman"], strict=True)
        lines.append(_row([name, *(f"{100 * p:.1f}, {100 * s:.1f}" for p, s in both)]))
    for part in ("with", "without"):
        lines += ["", _row([f"{part} layer 0: values", "signal", *(f"{s:g}×" for s in SPEEDUPS[1:])])]
        lines.append(_row(["---"] * (1 + len(SPEEDUPS))))
        for system, signals in results[part].items():
            lines += [_row([system, name, *_cells(signal)]) for name, signal in signals.items()]
    lines += ["", _row(["anchors", "held-out error", "signal", "2×", "3×"]), _row(["---"] * 5)]
    for name, kind in results["kinds"].items():
        error = f"{kind['held_out_error']:.3f}"
        lines += [_row([name, error, signal, *_cells(kind[signal])[1:]]) for signal in OF_EACH_KIND]
    lines += ["", "Spearman of the scores with |ŷ_m − ŷ_M|, by exit:", ""]
    for system, signals in results["with"].items():
        for name, signal in signals.items():
            if signal["knows"]:
                lines.append(f"- {system}, {name}: {' '.join(f'{k:.2f}' for k in signal['knows'])}")
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    escaped = [str(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _cells(signal: dict[str, Any]) -> list[str]:
    """Cells of each speed-up: both correlations, and Pearson's gain with its interval."""
    cells = []
    for s in SPEEDUPS[1:]:
        at = signal["speedups"][f"{s:g}"]
        gain, low, high = (100 * x for x in at["pearson_gain"])
        both = f"{100 * at['pearson']:.1f}, {100 * at['spearman']:.1f}"
        cells.append(f"{both} ({gain:+.1f}: {low:+.1f} … {high:+.1f})".replace("-", "−"))
    return cells


def draw(results: dict[str, Any], path: Path) -> None:
    """Pearson's correlation against speed-up, by values and signal, with and without the exit on the embeddings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2))
    heads = {"value heads as trained": "v", "value heads, fitted again": "o", results["chosen"]: "^"}
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("with", "without"), strict=True):
        for name, signal in results[part]["fitted again"].items():
            if name != ONE_LAYER:
                axes.plot(PLOTTED, 100 * np.array(signal["curve"], float), linewidth=1.2, label=name)
        for name, marker in heads.items():
            by_layer = results["heads"][name]["pearson"][1:]
            speedups = [len(by_layer) / m for m in range(1, len(by_layer) + 1)]
            axes.plot(speedups, [100 * p for p in by_layer], marker, label=f"{ONE_LAYER}: {name}", alpha=0.7)
        axes.set(
            ylim=(55, 87), xlabel="speed-up: M / mean exit layer", title=f"{part} the exit on the embeddings"
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Pearson · 100, STS-B dev")
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})


def main(
    root: Annotated[Path | None, typer.Argument(help="Folder of the data sets.")] = None,
    runs: Annotated[Path | None, typer.Argument(help="Folder of the trained model.")] = None,
    redraw: Annotated[bool, typer.Option(help="Only print and plot the results again.")] = False,
    encoders: Annotated[int, typer.Option(min=1, help="Number of encoders to train, with seeds from 0.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch; by default it chooses.")] = None,
) -> None:
    """Train a value head at every exit, fit the signals, and compare them at equal speed-up."""
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    if not redraw:
        if root is None or runs is None:
            raise typer.BadParameter("give the folder of the data sets and that of the trained model")
        measures.save(NAME, study(root, runs, encoders))
    results = measures.load(NAME)
    print(tables(results))
    draw(results, measures.RESULTS / f"{NAME}.png")
