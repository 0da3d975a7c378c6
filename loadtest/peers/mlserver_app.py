# /// script
# dependencies = ["mlserver>=1.6", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph as a custom runtime of MLServer (Open Inference Protocol).

Run by: mlserver_app.py FOLDER --port PORT [--workers N]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceResponse


class Peer(MLModel):
    async def load(self) -> bool:
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
        return True

    async def predict(self, payload):
        text = StringCodec.decode_input(payload.inputs[0])[0]
        encoding = self.tokenizer.encode_batch_fast([text])[0]
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        logits = self.session.run(None, {n: np.array([arrays[n]], np.int64) for n in self.takes})[0][0]
        label = self.labels[int(logits.argmax())]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("label", [label])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    repository = Path(tempfile.mkdtemp())
    ports = {"http_port": args.port, "grpc_port": args.port + 1000, "metrics_port": args.port + 2000}
    settings = {
        "parallel_workers": args.workers,
        "host": "127.0.0.1",
        "debug": False,
        "metrics_dir": str(repository),
        **ports,
    }
    (repository / "settings.json").write_text(json.dumps(settings))
    (repository / "model").mkdir()
    model = {"name": "peer", "implementation": "mlserver_app.Peer"}
    (repository / "model" / "model-settings.json").write_text(json.dumps(model))
    os.environ |= {"PEER_FOLDER": str(args.folder.resolve()), "PYTHONPATH": str(Path(__file__).parent)}
    command = str(Path(sys.executable).parent / "mlserver")
    os.execv(command, [command, "start", str(repository)])
