# /// script
# dependencies = ["fastapi", "uvicorn[standard]", "onnxruntime>=1.20", "orjson", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind lean FastAPI, one unpadded sample per core.

The strongest plain server we know: `de3 export --full-depth` makes its graph, as fused as the segments are.
Run by: fused.py FOLDER --port PORT [--threads N] [--default-session]
"""

import argparse
import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import onnxruntime as ort
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, TypeAdapter
from tokenizers import Tokenizer


class Body(BaseModel):
    input: str


def create(folder: Path, threads: int, default_session: bool) -> FastAPI:
    config = json.loads((folder / "config.json").read_text())
    labels = config["labels"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(config["max_tokens"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not default_session:  # what the engine found fastest
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    takes = [x.name for x in session.get_inputs()]
    pool, adapter = ThreadPoolExecutor(threads), TypeAdapter(Body)

    def classify(text: str) -> tuple[str, list[float]]:
        encoding = tokenizer.encode_batch_fast([text])[0]
        arrays = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        feed = {name: np.array([arrays[name]], np.int64) for name in takes}
        logits = session.run(None, feed)[0][0]
        e = np.exp(logits - logits.max())
        probs = e / e.sum()
        return labels[int(probs.argmax())], probs.tolist()

    app = FastAPI()

    @app.post("/classify")
    async def post_classify(request: Request) -> Response:
        body = adapter.validate_json(await request.body())
        label, probs = await asyncio.get_running_loop().run_in_executor(pool, classify, body.input)
        return Response(orjson.dumps({"label": label, "probs": probs}), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response()

    for n in (8, 64, config["max_tokens"]):
        classify("warm " * n)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--default-session", action="store_true", help="ONNX Runtime's own settings")
    args = parser.parse_args()
    app = create(args.folder, args.threads, args.default_session)
    uvicorn.run(app, port=args.port, access_log=False, log_level="warning")
