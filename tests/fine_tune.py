"""Fine-tuning with transformers alone, for the tests and for lab/."""

from typing import Any

import torch

from de3.data.examples import Example
from de3.progress import Meter
from de3.training.encoded import encode
from de3.training.settings import TrainSettings


def fine_tune(
    encoder: str, names: list[str], examples: list[Example], settings: TrainSettings
) -> tuple[Any, Any]:
    """A stock classifier and its tokenizer, fine-tuned as in transformers' examples.

    encoder: folder or name on the hub. names: label names; a single one makes a regression model. If the labels of the
    examples are tuples, the model is multi-label.
    """
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        get_linear_schedule_with_warmup,
    )

    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    pad_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        dtype=torch.float32,
        problem_type="multi_label_classification" if isinstance(examples[0].label, tuple) else None,
    )
    encoded = encode(examples, tokenizer, settings.max_length, "train", len(names))
    if encoded.labels.ndim > 1 and hasattr(model.classifier, "bias"):
        # With initial probabilities of ½, hundreds of steps would only teach the model that most labels are rare.
        model.classifier.bias.data = torch.logit((encoded.labels.sum(0) + 0.5) / (len(encoded) + 1))
    steps = settings.epochs * -(-len(encoded) // settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    meter, generator = Meter(), torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        model.train()
        order = torch.randperm(len(encoded), generator=generator).tolist()
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        with meter.epoch(epoch + 1, settings.epochs, len(batches)) as progress:
            for i, rows in enumerate(batches, 1):
                inputs, labels = encoded.batch(rows, pad_id)
                if labels.dtype is torch.bool or len(names) == 1:
                    labels = labels.float()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.bf16):
                    loss = model(**inputs, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.step(i, loss.item())
    model.eval()
    return model, tokenizer
