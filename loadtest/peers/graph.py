"""The full-depth graph in ONNX Runtime, one unpadded text per call."""

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # same as in our server

import numpy as np
import onnxruntime as ort
from classifier import GraphClassifier


class Graph(GraphClassifier):
    def __init__(self, folder: Path, default_session: bool = False) -> None:
        super().__init__(folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if not default_session:  # same as in our server: the fastest level for its graphs
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(self.file, options, providers=["CPUExecutionProvider"])
        self.names = [x.name for x in self.session.get_inputs()]
        self.warm_up()

    def logits(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self.session.run(None, inputs)[0][0]


class Windowed(Graph):
    """The same, for long texts: windows that overlap by a quarter, one after the other."""

    def __init__(self, folder: Path, default_session: bool = False) -> None:
        super().__init__(folder, default_session)
        self.tokenizer.enable_truncation(self.max_tokens, stride=self.max_tokens // 4)

    def __call__(self, text: str) -> dict[str, object]:
        first = self.tokenizer.encode_batch([text])[0]
        logits = np.array([self.logits(self.inputs(one)) for one in (first, *first.overflowing)])
        weights = np.exp(logits - logits.max(1, keepdims=True))
        probs = (weights / weights.sum(1, keepdims=True)).max(0)
        return {"label": self.labels[int(probs.argmax())], "probs": probs.tolist()}
