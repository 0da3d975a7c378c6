"""Base classes of the peers' classifiers: tokenizer, labels, one unpadded text per call."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer


class Classifier:
    """Classifies a text; returns its label and probabilities. A subclass computes the logits with its engine."""

    def __init__(self, tokenizer: Path, labels: list[str], max_tokens: int) -> None:
        self.labels, self.max_tokens = labels, max_tokens
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)

    def inputs(self, encoding: Any) -> Any:
        """Input of `logits`: the ids and token types of a tokenized text, as the engine takes them."""
        raise NotImplementedError

    def logits(self, inputs: Any) -> np.ndarray:
        """The logits of a text, (num_labels,)."""
        raise NotImplementedError

    def encode(self, text: str) -> Any:
        """Input of `logits` for a text."""
        return self.inputs(self.tokenizer.encode_batch_fast([text])[0])

    def warm_up(self) -> None:
        """Run texts of several lengths, so that later calls are not slowed by initialization."""
        for tokens in (8, 64, self.max_tokens):
            self("warm " * tokens)

    def __call__(self, text: str) -> dict[str, object]:
        logits = self.logits(self.encode(text))
        weights = np.exp(logits - logits.max())
        probs = weights / weights.sum()
        return {"label": self.labels[int(probs.argmax())], "probs": probs.tolist()}


class GraphClassifier(Classifier):
    """A classifier in a folder that `de3 export --full-depth` wrote; a subclass opens `file` and sets `names`.

    Attributes:
        names: names of the graph's inputs.
    """

    names: list[str]

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        super().__init__(folder / "tokenizer.json", config["labels"], config["max_tokens"])
        self.file = folder / "model.onnx"

    def inputs(self, encoding: Any) -> dict[str, np.ndarray]:
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        return {name: np.array([arrays[name]], np.int64) for name in self.names}
