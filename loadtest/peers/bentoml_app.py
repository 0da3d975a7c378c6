# /// script
# dependencies = ["bentoml>=1.4", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind BentoML, one worker process per core.

Run by: bentoml_app.py FOLDER --port PORT [--workers N]
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml
import numpy as np


@bentoml.service(
    workers=int(os.environ.get("PEER_WORKERS", "1")),
    traffic={"timeout": 60},
    logging={"access": {"enabled": False}},
)
class Peer:
    def __init__(self):
        import onnxruntime as ort
        from tokenizers import Tokenizer

        folder = Path(os.environ["PEER_FOLDER"])
        config = json.loads((folder / "config.json").read_text())
        self.labels = config["labels"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(config["max_tokens"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self.session = ort.InferenceSession(folder / "model.onnx", options)
        self.takes = [x.name for x in self.session.get_inputs()]

    @bentoml.api
    def classify(self, input: str) -> dict:
        encoding = self.tokenizer.encode_batch_fast([input])[0]
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        logits = self.session.run(None, {n: np.array([arrays[n]], np.int64) for n in self.takes})[0][0]
        e = np.exp(logits - logits.max())
        probs = e / e.sum()
        return {"label": self.labels[int(probs.argmax())], "probs": probs.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", default="8100")
    parser.add_argument("--workers", default=str(len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    os.environ |= {"PEER_FOLDER": str(args.folder.resolve()), "PEER_WORKERS": args.workers}
    os.chdir(Path(__file__).parent)
    command = str(Path(sys.executable).parent / "bentoml")
    os.execv(command, [command, "serve", "bentoml_app:Peer", "--port", args.port, "--host", "127.0.0.1"])
