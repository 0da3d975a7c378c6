# /// script
# dependencies = ["litserve>=0.2.5", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind LitServe, one worker process per core.

Run by: litserve_app.py FOLDER --port PORT [--workers N] [--batch N]
"""

import argparse
import json
import os
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import litserve
import numpy as np


class Api(litserve.LitAPI):
    def __init__(self, folder, **settings):
        super().__init__(**settings)
        self.folder = folder

    def setup(self, device):
        import onnxruntime as ort
        from tokenizers import Tokenizer

        config = json.loads((self.folder / "config.json").read_text())
        self.labels = config["labels"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(config["max_tokens"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(self.folder / "model.onnx", options)
        self.takes = [x.name for x in self.session.get_inputs()]

    def decode_request(self, request):
        return request["input"]

    def one(self, text):
        encoding = self.tokenizer.encode_batch_fast([text])[0]
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        logits = self.session.run(None, {n: np.array([arrays[n]], np.int64) for n in self.takes})[0][0]
        e = np.exp(logits - logits.max())
        return e / e.sum()

    def predict(self, texts):  # batched: a list; the graph is fastest one unpadded sample at a time
        return [self.one(t) for t in texts] if isinstance(texts, list) else self.one(texts)

    def encode_response(self, probs):
        return {"label": self.labels[int(probs.argmax())], "probs": probs.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    batching = {"max_batch_size": args.batch, "batch_timeout": 0.002} if args.batch > 1 else {}
    api = Api(args.folder, api_path="/classify", **batching)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=args.workers)
    server.run(port=args.port, generate_client_file=False, log_level="warning")
