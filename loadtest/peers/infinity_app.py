# /// script
# dependencies = ["infinity-emb[torch,server,optimum]", "click<8.2"]
# ///
"""Peer: Infinity's own command, serving a stock sequence classification model at /classify.

Usage: infinity_app.py FOLDER --port PORT [--engine torch|optimum]
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", default="8100")
    parser.add_argument("--engine", default="torch")
    args = parser.parse_args()
    command = str(Path(sys.executable).parent / "infinity_emb")
    model = ["--model-id", args.folder, "--served-model-name", "peer", "--port", args.port]
    engine = ["--engine", args.engine, "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
    os.execv(command, [command, "v2", *model, *engine])
