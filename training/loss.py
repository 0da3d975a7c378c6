"""The training loss of DE3-BERT (Eq. 2 and 6), with optional distillation."""

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_weights(exit_layers: list[int], by: str) -> Tensor:
    """Weights of the exits, shape (exits,), summing to 1.

    "depth": the weight of layer m is proportional to m, or to m + 1 if the embeddings have an exit. "uniform": all
    weights are equal.

    Raises ValueError for any other `by`.
    """
    if by == "uniform":
        weights = torch.ones(len(exit_layers))
    elif by == "depth":
        weights = torch.tensor(exit_layers, dtype=torch.float32) + (exit_layers[0] == 0)
    else:
        raise ValueError(f"layer weights must be depth or uniform, got {by!r}")
    return weights / weights.sum()


def dar(distances: Tensor, labels: Tensor) -> Tensor:
    """L_DAR of each exit (Eq. 2), (spaces,), in [0, 2].

    The mean over the batch of the cosine distance between h' and the prototype of the true class;
    distances are (batch, spaces, num_labels), labels (batch,).
    """
    own = distances.gather(2, labels[:, None, None].expand(-1, distances.shape[1], 1))
    return own.squeeze(2).mean(0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every exit, shape (exits,); logits (batch, exits, num_labels), labels (batch,)."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none")
    return flat.view(logits.shape[:2]).mean(0)


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ exit) of every exit, shape (exits,), averaged over the batch.

    logits: (batch, exits, num_labels). teacher_logits: (batch, num_labels).
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    q = F.log_softmax(teacher_logits / temperature, dim=-1).unsqueeze(1).expand_as(log_p)
    kl = F.kl_div(log_p, q, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl.mean(0)


def total(
    logits: Tensor,
    distances: Tensor,
    labels: Tensor,
    weights: Tensor,
    alpha: float,
    teacher_logits: Tensor | None = None,
    distill: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Σ w_m·(CE_m + α·DAR_m) (Eq. 6), a scalar; with a teacher, CE becomes (1−d)·CE + d·distillation.

    labels: classes, (batch,), or for a multi-label model, whose CE is binary and summed over labels, the correct
    labels, (batch, num_labels) bool. weights: (exits,). distill: d. For the other shapes, see `cross_entropy`, `dar`
    and `distillation`.
    """
    if labels.ndim == 1:
        per_exit = cross_entropy(logits, labels)
    else:
        wanted = labels[:, None].expand_as(logits).to(logits.dtype)
        per_exit = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1).mean(0)
    if teacher_logits is not None:
        per_exit = (1 - distill) * per_exit + distill * distillation(logits, teacher_logits, temperature)
    loss = (weights * per_exit).sum()
    spaces = distances.shape[1]
    if spaces:
        loss = loss + alpha * (weights[:spaces] * dar(distances, labels)).sum()
    return loss
