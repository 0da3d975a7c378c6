"""Records the outputs of every exit of a PyTorch model for every sample."""

import numpy as np
import torch

from de3.exits.kinds import kind_of_text
from de3.exits.recorded import Recorded
from de3.progress import track
from de3.training.encoded import Encoded, evaluation_batches
from de3.training.model import De3Model


@torch.no_grad()
def predict(
    model: De3Model, data: Encoded, pad_id: int, batch_size: int = 128, what: str = "", bf16: bool = False
) -> Recorded:
    """The logits and distances of all exits, in the order of `data`. Leaves the model in evaluation mode.

    Computes in float32 unless `bf16`, which is several times faster on CPUs that support it and accurate to about 2
    digits.
    """
    model.eval()
    config = model.config
    exits = len(config.exit_layers)
    logits = np.zeros((len(data), exits, config.num_labels), np.float32)
    distances = np.full_like(logits, np.nan)
    batches = evaluation_batches([len(x) for x in data.ids], batch_size)
    for rows in track(batches, f"Evaluating {what}"):
        inputs, _ = data.batch(rows, pad_id)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            out = model(**{k: v.to(model.device) for k, v in inputs.items()})
        logits[rows] = out.logits.float().cpu().numpy()
        distances[rows, : out.distances.shape[1]] = out.distances.float().cpu().numpy()
    return Recorded(
        config.exit_layers,
        logits,
        distances,
        data.labels.numpy(),
        kind=kind_of_text(config.thresholds, None),
    )
