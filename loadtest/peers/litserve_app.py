# /// script
# dependencies = ["litserve>=0.2.5", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind LitServe, one worker process per core.

Usage: litserve_app.py FOLDER --port PORT [--workers N] [--batch N]
"""

import argparse
import os
from pathlib import Path

import litserve


class Api(litserve.LitAPI):
    def __init__(self, folder, **settings):
        super().__init__(**settings)
        self.folder = folder

    def setup(self, device):
        from graph import Graph

        self.graph = Graph(self.folder)

    def decode_request(self, request):
        return request["input"]

    def predict(self, texts):  # a list if batched; the graph is fastest with one unpadded text at a time
        return [self.graph(t) for t in texts] if isinstance(texts, list) else self.graph(texts)

    def encode_response(self, answer):
        return answer


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
