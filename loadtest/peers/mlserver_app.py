# /// script
# dependencies = ["mlserver>=1.6", "uvloop<0.22", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph as a custom runtime of MLServer (Open Inference Protocol).

Usage: mlserver_app.py FOLDER --port PORT [--workers N]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceResponse


class Peer(MLModel):
    async def load(self) -> bool:
        from graph import Graph

        self.graph = Graph(Path(os.environ["PEER_FOLDER"]))
        return True

    async def predict(self, payload):
        answer = self.graph(StringCodec.decode_input(payload.inputs[0])[0])
        label = StringCodec.encode_output("label", [answer["label"]])
        return InferenceResponse(model_name=self.name, outputs=[label])


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
