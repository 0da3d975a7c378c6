# /// script
# dependencies = ["bentoml>=1.4", "onnxruntime>=1.20", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind BentoML, one worker process per core.

Usage: bentoml_app.py FOLDER --port PORT [--workers N]
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml

QUIET = {"access": {"enabled": False}}


@bentoml.service(workers=int(os.environ.get("PEER_WORKERS", "1")), traffic={"timeout": 60}, logging=QUIET)
class Peer:
    def __init__(self):
        from graph import Graph

        self.graph = Graph(Path(os.environ["PEER_FOLDER"]))

    @bentoml.api
    def classify(self, input: str) -> dict:
        return self.graph(input)


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
