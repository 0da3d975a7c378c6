"""Tokenized texts, and batches of them for PyTorch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from de3.data.examples import Example, label_array
from de3.data.tables import pair_of
from de3.progress import track


@dataclass(frozen=True)
class Encoded:
    """Unpadded token ids of examples; `type_ids` is empty if the tokenizer returns no token types."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    labels: torch.Tensor  # (n,) int64, (n, K) bool or (n,) float64

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], pad_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Padded model inputs, each (batch, tokens), and labels, (batch,) or (batch, K), of these rows."""

        def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(sequences[i]) for i in rows], batch_first=True, padding_value=fill
            )

        ids = padded(self.ids, pad_id)
        lengths = torch.tensor([len(self.ids[i]) for i in rows])
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }
        if self.type_ids:
            inputs["token_type_ids"] = padded(self.type_ids, 0)
        return inputs, self.labels[list(rows)]


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, what: str = "texts", num_labels: int = 0
) -> Encoded:
    """Tokenize examples, truncated to max_length tokens (in a pair, the longer text is shortened first).

    what: name of the texts in the progress display. num_labels: needed for multi-label examples only.
    """
    ids: list[list[int]] = []
    types: list[list[int]] = []
    step = 1000
    for i in track(range(0, len(examples), step), f"Tokenizing {what}"):
        texts = [e.text for e in examples[i : i + step]]
        first = [pair_of(t)[0] for t in texts]
        pair = [t[1] for t in texts if isinstance(t, tuple)] or None
        out = tokenizer(first, pair, truncation=True, max_length=max_length, padding=False)
        ids += out["input_ids"]
        types += out.get("token_type_ids", [])
    return Encoded(ids, types, torch.from_numpy(label_array([e.label for e in examples], num_labels)))


def training_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Batches of rows of similar length (little padding), in random order.

    A random number up to 4 is added to each length before sorting, so that batches differ from epoch to epoch.
    """
    rng = random.Random(seed)
    rows = sorted(range(len(lengths)), key=lambda i: lengths[i] + 4 * rng.random())
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows of similar length, shortest first."""
    rows = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
