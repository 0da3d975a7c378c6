"""Early exit of a regression model, STS-B: which signal knows best how far an exit's value is from full depth's?

    python -m training.studies.regression DATA RUNS
    python -m training.studies.regression --redraw      # the tables and the plot again, from the JSON

MiniLM is trained once, with a linear value head at every exit; all that follows works on its recorded states. Signals
(training.studies.value_signals) and ordered anchor prototypes (training.studies.anchors) are fitted on train and
held-out pairs, and measured on dev.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from training import data
from training.checkpoint import Checkpoint, is_finished, quiet
from training.data import evaluation_batches
from training.evaluate import correlation
from training.model import De3Model
from training.progress import console, track
from training.split import Split, split
from training.studies import measures
from training.studies.anchors import KINDS, Anchors
from training.studies.tasks import REGRESSIONS, minilm
from training.studies.value_signals import (
    ONE_LAYER,
    PLAIN,
    PLOTTED,
    SPEEDUPS,
    Pairs,
    measure,
    of_states,
    ridge,
)
from training.trainer import TrainSettings, train

NAME = "regression"
TOLERANCE = 0.5  # of STS-B's 0 to 5; it chooses the epoch only
SETTINGS = TrainSettings(epochs=5, batch_size=32, lr=1e-4, head_lr=1e-3, alpha=0.0)
HIGHEST = 5.0  # of STS-B's values
COUNTS = (6, 11)  # of anchors
SEEDS = (0, 1, 2)  # of the anchors
OF_EACH_KIND = ("anchors", "value, value², anchors", "value, value², change, anchors")


def parts_of(root: Path) -> Split:
    """STS-B's training pairs: train, and two held-out parts of a tenth each."""
    return split(data.to_examples(REGRESSIONS["stsb"].train(root), [], regression=True), 0)


def squared_error(values: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean squared error over the exits, by their weights; values (batch, exits, 1), labels (batch,)."""
    return (weights * (values[..., 0] - labels[:, None].float()).square().mean(0)).sum()


def trained(root: Path, runs: Path) -> Checkpoint:
    """A value head at every exit of MiniLM, the embeddings included; trained unless runs has it."""
    folder = runs / "stsb-minilm"
    if not is_finished(folder):
        parts, encoder = parts_of(root), minilm()
        torch.manual_seed(SETTINGS.seed)
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
            SETTINGS,
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


def again(train_pairs: Pairs, unseen: Pairs) -> Tensor:
    """What heads say of unseen pairs, (n, exits), if they are fitted again to the training states, by ridge."""
    y = train_pairs.labels.double().numpy()
    exits = range(unseen.values.shape[1])
    columns = [ridge(of_states(train_pairs, j), y, of_states(unseen, j)) for j in exits]
    return torch.from_numpy(np.stack(columns, 1)).float()


def study(root: Path, runs: Path) -> dict[str, Any]:
    """Train, record, and measure."""
    checkpoint, parts = trained(root, runs), parts_of(root)
    dev = data.to_examples(REGRESSIONS["stsb"].unseen(root), [], regression=True)
    train_pairs = recorded(checkpoint, parts.train, "train")
    held = recorded(checkpoint, parts.tune + parts.certify, "held-out")
    unseen = recorded(checkpoint, dev, "dev")
    heads = {
        "value head": by_exit(unseen.values, unseen.labels),
        "value head, fitted again": by_exit(again(train_pairs, unseen), unseen.labels),
    }
    kinds, geometries = {}, {}
    for count in COUNTS:
        for kind in KINDS:
            name = f"{count} anchors, {kind}"
            console.print(name, highlight=False)
            errors, reads, pairs = [], [], []
            for seed in SEEDS:
                values = torch.linspace(0, HIGHEST, count)
                anchors = Anchors.fit(train_pairs.states, train_pairs.labels, values, kind, seed)
                temperatures = anchors.temperatures(held.states, held.labels)
                read = anchors.read(held.states, temperatures)
                errors.append(float((read - held.labels[:, None]).square().mean()))
                reads.append(by_exit(anchors.read(unseen.states, temperatures), unseen.labels))
                pairs.append([p.with_anchors(anchors, temperatures) for p in (held, unseen)])
            heads[name] = {key: np.mean([r[key] for r in reads], 0).tolist() for key in reads[0]}
            geometries[name] = [p[0] for p in pairs], [p[1] for p in pairs]
            kinds[name] = {
                "held_out_error": float(np.mean(errors)),
                **measure(*geometries[name], OF_EACH_KIND),
            }
    chosen = min(kinds, key=lambda name: kinds[name]["held_out_error"])
    held_seeds, unseen_seeds = geometries[chosen]
    sizes = {"train": len(train_pairs.labels), "held-out": len(held.labels), "dev": len(unseen.labels)}
    return {
        "pairs": sizes,
        "heads": heads,
        "kinds": kinds,
        "chosen": chosen,
        "with": measure(held_seeds, unseen_seeds),
        "without": measure(
            [p.without_first() for p in held_seeds], [p.without_first() for p in unseen_seeds]
        ),
    }


def tables(results: dict[str, Any]) -> str:
    """The page's tables, in Markdown."""
    layers = len(results["heads"]["value head"]["pearson"])
    lines = [
        "| Pearson, Spearman by exit | " + " | ".join(str(m) for m in range(layers)) + " |",
        "| --- |" + " --- |" * layers,
    ]
    for name, head in results["heads"].items():
        cells = [
            f"{100 * p:.1f}, {100 * s:.1f}" for p, s in zip(head["pearson"], head["spearman"], strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for part in ("with", "without"):
        head = " | ".join(f"{s:g}×" for s in SPEEDUPS[1:])
        lines += ["", f"| {part} the exit on the embeddings | {head} |", "| --- |" + " --- |" * 3]
        for name, signal in results[part].items():
            lines.append(f"| {name} | " + " | ".join(_cells(signal)) + " |")
    lines += ["", "| anchors | held-out error | signal | 2× | 3× |", "| --- | --- | --- | --- | --- |"]
    for name, kind in results["kinds"].items():
        for signal in OF_EACH_KIND:
            cells = _cells(kind[signal])[1:]
            lines.append(f"| {name} | {kind['held_out_error']:.3f} | {signal} | " + " | ".join(cells) + " |")
    lines += ["", "Spearman of the scores with |ŷ_m − ŷ_M|, by exit:", ""]
    for name, signal in results["with"].items():
        if signal["knows"]:
            lines.append(f"- {name}: {' '.join(f'{k:.2f}' for k in signal['knows'])}")
    return "\n".join(lines)


def _cells(signal: dict[str, Any]) -> list[str]:
    """Of each speed-up both correlations, and what Pearson's gains over the plain signal."""
    cells = []
    for s in SPEEDUPS[1:]:
        at = signal["speedups"][f"{s:g}"]
        gain, low, high = (100 * x for x in at["pearson_gain"])
        both = f"{100 * at['pearson']:.1f}, {100 * at['spearman']:.1f}"
        cells.append(f"{both} ({gain:+.1f}: {low:+.1f} … {high:+.1f})")
    return cells


def draw(results: dict[str, Any], path: Path) -> None:
    """Pearson's correlation against speed-up, by signal, with and without the exit on the embeddings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("with", "without"), strict=True):
        for name, signal in results[part].items():
            dashes = {PLAIN: "-", ONE_LAYER: ":"}.get(name, "--" if "anchors" in name else "-")
            strong = name in (PLAIN, ONE_LAYER)
            axes.plot(
                PLOTTED,
                [100 * p for p in signal["curve"]],
                dashes,
                label=name,
                color="black" if strong else None,
                linewidth=2 if strong else 1.2,
            )
        axes.set(xlabel="speed-up: M / mean exit layer", title=f"{part} the exit on the embeddings")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Pearson · 100, STS-B dev")
    figure.axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(
    root: Annotated[Path | None, typer.Argument(help="Folder of the data sets.")] = None,
    runs: Annotated[Path | None, typer.Argument(help="Folder of the trained model.")] = None,
    redraw: Annotated[bool, typer.Option(help="Only print and draw the results again.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch; by default it chooses.")] = None,
) -> None:
    """Train a value head at every exit, fit the signals, and compare them at equal speed-up."""
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    if not redraw:
        if root is None or runs is None:
            raise typer.BadParameter("give the folder of the data sets and that of the trained model")
        measures.save(NAME, study(root, runs))
    results = measures.load(NAME)
    print(tables(results))
    draw(results, measures.RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    typer.run(main)
