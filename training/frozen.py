"""Exits for a frozen encoder, fitted on its pooled states to the model's own answers, without labels.

The states are computed once, in chunks on disk: an interrupted run continues with the next chunk.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from de3.exits import calibration, risk
from de3.exits.calibration import FINE_TAUS, Samples
from de3.exits.recorded import Recorded
from de3.training import loss as losses
from de3.training import prototypes
from de3.training.data import Encoded, evaluation_batches
from de3.training.model import POOLINGS, De3Model
from de3.training.predict import logit_thresholds
from de3.training.progress import console, track

CHUNK = 1024  # texts
RIDGES = (1e-2, 1e-3, 1e-4)
VALUE_RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # of standardized states
LR = 1e-3  # of the prototypical networks
BATCH = 64


@dataclass(frozen=True)
class States:
    """Pooled states and logits of the frozen model for n texts, in chunks on disk.

    Attributes:
        chunks: files of tensors: POOLING_LAYER, the pooled states (texts, hidden); the logits of full depth (texts, K);
            rows, the indices of the texts.
        logits: of full depth, (n, K), float32.
        thresholds: of a multi-label model, as logits, (K,).
        tolerance: of a regression model, whose logits are values, K = 1.
    """

    chunks: list[Path]
    logits: Tensor
    thresholds: NDArray[np.float64] | None
    tolerance: float | None

    def pooled(self, pooling: str, layer: int) -> Tensor:
        """The pooled states of a layer, (n, hidden), float32."""
        return self._gather(f"{pooling}_{layer:02}")

    @property
    def answers(self) -> Tensor:
        """Answers of full depth: classes or values, (n,), or the assigned labels, (n, K) bool."""
        if self.tolerance is not None:
            return self.logits[:, 0].double()
        if self.thresholds is None:
            return self.logits.argmax(-1)
        return torch.from_numpy(self.logits.numpy() > self.thresholds)

    @property
    def probabilities(self) -> Tensor:
        """Probabilities of full depth, (n, K)."""
        return F.softmax(self.logits, -1) if self.thresholds is None else torch.sigmoid(self.logits)

    def _gather(self, name: str) -> Tensor:
        parts = []
        for chunk in self.chunks:
            with safe_open(chunk, "pt") as file:
                parts.append((file.get_tensor("rows"), file.get_tensor(name).float()))
        rows, values = (torch.cat(column) for column in zip(*parts, strict=True))
        result = torch.empty_like(values)
        result[rows] = values
        return result


@torch.no_grad()
def states(model: De3Model, data: Encoded, pad_id: int, folder: Path, what: str, bf16: bool) -> States:
    """Run the model over texts; chunks in `folder` from an earlier run with the same model and texts are reused.

    bf16: compute in bfloat16, several times faster on CPUs that support it; logits are accurate to about 2 digits.
    """
    model.eval()
    config = model.config
    digest = hashlib.sha256(
        repr((data.ids, data.type_ids, bf16, sorted(config.encoder.items(), key=repr), config.head)).encode()
    )
    kept = ("encoder.", "head", f"classifiers.{len(config.exit_layers) - 1}.")
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(kept):
            digest.update(name.encode() + weight.numpy().tobytes())
    cache = folder / f"{what}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    order = [row for batch in evaluation_batches([len(ids) for ids in data.ids], 1) for row in batch]
    pieces = [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]
    files = [cache / f"{i:05}.safetensors" for i in range(len(pieces))]
    missing = [(file, piece) for file, piece in zip(files, pieces, strict=True) if not _is_whole(file)]
    if done := len(files) - len(missing):
        console.print(f"{what}: {done} of {len(files)} chunks are reused from an earlier run")
    for file, piece in track(missing, f"Running the model on {len(order)} {what} texts"):
        tensors = _run(model, data, pad_id, piece, bf16)
        save_file(tensors, new := file.with_suffix(".new"))
        new.replace(file)
    empty = States(files, torch.empty(0), logit_thresholds(config), config.tolerance)
    return replace(empty, logits=empty._gather("logits"))


def _is_whole(file: Path) -> bool:
    """True if a chunk exists and is complete."""
    try:
        with safe_open(file, "pt") as opened:
            return bool(opened.keys())
    except (OSError, SafetensorError):
        return False


def _run(model: De3Model, data: Encoded, pad_id: int, rows: list[int], bf16: bool) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for i in range(0, len(rows), BATCH):
        inputs, _ = data.batch(rows[i : i + BATCH], pad_id)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            hidden = model.states(**inputs)
        mask = inputs["attention_mask"]
        for layer, x in zip(model.config.exit_layers, hidden, strict=True):
            for pooling in POOLINGS:
                parts.setdefault(f"{pooling}_{layer:02}", []).append(model.pool(x, mask, pooling).half())
        last = model.pool(hidden[-1], mask, model.config.head["pooling"])[:, None]
        parts.setdefault("logits", []).append(model.classifiers[-1](model.through_head(last)[:, 0]))
    return {"rows": torch.tensor(rows), **{name: torch.cat(values) for name, values in parts.items()}}


def fit(model: De3Model, train: States, tune: States, seed: int) -> None:
    """Fit all exits but the last, and their prototypes, in place, with the pooling that is better on tune."""
    found = {}
    for pooling in POOLINGS:
        model.config.pooling = pooling
        _fit_classifiers(model, train, tune)
        if model.prototypical:
            _fit_prototypes(model, train, seed)
        exits = recorded(model, tune)
        merit = _merit(exits)
        agreement = " ".join(f"{100 * a:.1f}" for a in exits.correct.mean(0)[:-1])
        console.print(
            f"exits on the {'mean of the tokens' if pooling == 'mean' else 'first token'} agree with full depth on "
            f"{agreement}% of the tuning texts; speed-up about {merit:.2f}×",
            soft_wrap=True,
        )
        heads = ("classifiers.", "prototypical.", "prototype")
        kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(heads)}
        found[pooling] = merit, kept
    model.config.pooling = max(POOLINGS, key=lambda pooling: found[pooling][0])
    model.load_state_dict(found[model.config.pooling][1], strict=False)


def recorded(model: De3Model, of: States) -> Recorded:
    """All exits of texts, from their states; the labels are the answers of full depth."""
    pooling, exits = model.config.pooling, model.config.exit_layers
    logits, distances = [], []
    with torch.no_grad():
        for j, layer in enumerate(exits[:-1]):
            x = of.pooled(pooling, layer)
            logits.append(model.classifiers[j](x))
            if not model.prototypical:
                distances.append(torch.full_like(of.logits, torch.nan))
                continue
            unit = F.normalize(model.prototypical[j](x), dim=-1)
            distances.append(1 - unit @ F.normalize(model.prototypes[j], dim=-1).T)
    logits.append(of.logits)
    distances.append(torch.full_like(of.logits, torch.nan))
    outputs, spaces = (torch.stack(parts, 1).numpy() for parts in (logits, distances))
    answers = of.answers.numpy()
    return Recorded(list(exits), outputs, spaces, answers, thresholds=of.thresholds, tolerance=of.tolerance)


def _merit(of: Recorded) -> float:
    """The merit of risk, cross-fitted: fitted on a part of the samples and measured on the others."""
    samples = Samples.independent(of)
    return calibration.merit(calibration.trade_off(samples, risk.fit(of), FINE_TAUS, risk.cross_fit(of)))


def _fit_classifiers(model: De3Model, train: States, tune: States) -> None:
    """Fit the classifiers by cross-entropy to the probabilities of full depth, or least squares to its values."""
    fit_one = _fit_values if train.tolerance is not None else _fit_probabilities
    exits = list(enumerate(model.config.exit_layers[:-1]))
    for j, layer in track(exits, f"Fitting exits ({model.config.pooling})"):
        x, y = (of.pooled(model.config.pooling, layer) for of in (train, tune))
        mean, spread = x.mean(0), x.std(0) + 1e-4
        weight, bias = fit_one((x - mean) / spread, train, (y - mean) / spread, tune)
        weight = weight / spread
        with torch.no_grad():
            for parameter, value in zip(
                model.classifiers[j].parameters(), (weight, bias - weight @ mean), strict=True
            ):
                parameter.copy_(value)


def _fit_values(x: Tensor, train: States, y: Tensor, tune: States) -> tuple[Tensor, Tensor]:
    """Weights (1, hidden) and bias (1,) of a ridge regression of values on states (n, hidden).

    The ridge of VALUE_RIDGES with the smallest error of `tune` on `y` is used.
    """
    mean = train.logits.mean(0)
    moments, products = x.T @ x / len(x), x.T @ (train.logits - mean) / len(x)
    found = [
        torch.linalg.solve(moments + ridge * torch.eye(len(moments)), products) for ridge in VALUE_RIDGES
    ]
    errors = [float((y @ weight + mean - tune.logits).square().mean()) for weight in found]
    return found[int(np.argmin(errors))].T, mean


def _fit_probabilities(x: Tensor, train: States, y: Tensor, tune: States) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy if train.thresholds is None else losses.binary_cross_entropy
    return _regress(x, train.probabilities, y, tune.probabilities, loss)


def _regress(
    x: Tensor, wanted: Tensor, y: Tensor, held: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Weights (K, hidden) and bias (K,) of a regression of probabilities (n, K) on states (n, hidden), by a loss.

    The ridge of RIDGES with the smallest loss of `held` on `y` is used.
    """
    weight = torch.zeros(wanted.shape[1], x.shape[1], requires_grad=True)
    bias = wanted.mean(0).clamp_min(1e-6).log().requires_grad_()
    best, least = (weight.detach().clone(), bias.detach().clone()), float("inf")
    for ridge in RIDGES:  # from the strongest: each starts at the previous solution
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer, ridge: float = ridge) -> Tensor:
            optimizer.zero_grad()
            total = loss(x @ weight.T + bias, wanted) + ridge * weight.square().sum()
            total.backward()
            return total

        optimizer.step(closure)
        with torch.no_grad():
            found = float(loss(y @ weight.T + bias, held))
        if found < least:
            best, least = (weight.detach().clone(), bias.detach().clone()), found
    return best


def _fit_prototypes(model: De3Model, train: States, seed: int) -> None:
    """Fit prototypical networks and prototypes to full depth's answers, as at the end of training."""
    pooled = torch.stack([train.pooled(model.config.pooling, m) for m in model.config.prototype_layers], 1)
    states, answers = _with_every_class(model, pooled, train.answers)
    order = np.random.default_rng(seed).permutation(len(states))
    batches = np.array_split(order, -(-len(order) // BATCH))

    def each() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in track(batches, "Fitting prototypes"):
            yield states[rows], answers[rows]

    prototypes.fit(model, each(), len(batches), LR, seed)


def _with_every_class(model: De3Model, states: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Add a state for each class that is never the answer: the mean, moved along its classifier's weights.

    states: (n, spaces, hidden), answers: (n,).
    """
    absent = sorted(set(range(model.config.num_labels)) - set(answers.tolist()))
    if not absent:
        return states, answers
    mean = states.mean(0)
    spread = (states - mean).norm(dim=-1).mean(0)
    classifiers = list(model.classifiers)[: states.shape[1]]
    weights = torch.stack([next(c.parameters()).detach()[absent] for c in classifiers], 1)
    made = mean + spread[:, None] * F.normalize(weights, dim=-1)
    return torch.cat([states, made]), torch.cat([answers, torch.tensor(absent)])
