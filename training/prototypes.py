"""The final prototype spaces, computed once the encoder is trained.

L_DAR has no term that separates classes (Eq. 2). In joint training over several epochs, the prototypical networks map
every sample to nearly the same direction, and cosine distances no longer separate classes. If the networks are trained
with the same loss for one epoch on the finished encoder, the distances do separate classes, and EDR beats entropy
(lab/docs/experiments.md).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from de3.progress import track
from de3.training import loss as losses
from de3.training.encoded import Encoded, training_batches
from de3.training.model import De3Model


def finish(model: De3Model, data: Encoded, pad_id: int, how: str, lr: float, seed: int, bf16: bool) -> None:
    """Compute the final prototypes in one pass over the training data, with the encoder frozen.

    how: "refit" retrains the prototypical networks with L_DAR and takes the class means of h' over all data
    as prototypes; "means" takes the class means with the networks unchanged; "sliding" keeps the moving
    averages of training (Eq. 1) without a pass. lr: initial learning rate of "refit".
    """
    if how == "sliding" or not model.prototypical:
        return
    model.eval()
    batches = training_batches([len(ids) for ids in data.ids], 64, seed)

    def pooled() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in track(batches, f"Prototypes: {how}"):
            inputs, labels = data.batch(rows, pad_id)
            with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                states = model.pooled(**{k: v.to(model.device) for k, v in inputs.items()})
            yield states, labels.to(model.device)

    fit(model, pooled(), len(batches), lr if how == "refit" else None, seed)


def fit(
    model: De3Model, batches: Iterable[tuple[Tensor, Tensor]], count: int, lr: float | None, seed: int
) -> None:
    """Compute prototypes from `count` batches of pooled states, (batch, exits, hidden), and labels, (batch,).

    Exits without a prototype space are ignored. lr: initial learning rate for retraining the prototypical networks;
    None: they are not retrained.
    """
    spaces, labels_count = len(model.config.prototype_layers), model.config.num_labels
    if lr is not None:
        torch.manual_seed(seed)
        for p in model.prototypical.parameters():
            torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.0)  # biases start at 0
        model.prototype_seen.zero_()
        optimizer = torch.optim.AdamW(model.prototypical.parameters(), lr=lr)
    sums = torch.zeros(labels_count, spaces, model.config.hidden_size, device=model.device)
    counts = torch.zeros(labels_count, device=model.device)
    for step, (states, labels) in enumerate(batches):
        pooled = states[:, :spaces]
        sums.index_add_(0, labels, pooled)
        counts += torch.bincount(labels, minlength=labels_count)
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / count)
            embedded = model.embed(pooled)
            model.update_prototypes(embedded.detach(), labels)
            losses.dar(model.distances(embedded), labels).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    _take_means(model, sums, counts)


@torch.no_grad()
def _take_means(model: De3Model, sums: Tensor, counts: Tensor) -> None:
    """Set each prototype to its class's mean h', which is the network's output for the mean h, as h' is affine in h.

    Classes without samples keep their prototypes. sums: sums of h, (num_labels, spaces, hidden); counts: number of
    samples of each class, (num_labels,).
    """
    seen = counts > 0
    means = model.embed(sums[seen] / counts[seen, None, None])  # (classes, spaces, metric_dim)
    model.prototypes[:, seen] = means.transpose(0, 1)
    model.prototype_seen[:, seen] = True
