"""The full-depth graph of the peers: tokenizer and session, one unpadded text per call."""

import json
import os
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as in our server

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


class Graph:
    def __init__(self, folder: Path, default_session: bool = False) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.labels, self.max_tokens = config["labels"], config["max_tokens"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.max_tokens)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if not default_session:  # the fastest level for our engine
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [x.name for x in self.session.get_inputs()]
        for tokens in (8, 64, self.max_tokens):
            self("warm " * tokens)

    def __call__(self, text: str) -> dict[str, object]:
        encoding = self.tokenizer.encode_batch_fast([text])[0]
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        logits = self.session.run(None, {n: np.array([arrays[n]], np.int64) for n in self.inputs})[0][0]
        weights = np.exp(logits - logits.max())
        probs = weights / weights.sum()
        return {"label": self.labels[int(probs.argmax())], "probs": probs.tolist()}
