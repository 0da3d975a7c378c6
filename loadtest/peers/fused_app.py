# /// script
# dependencies = ["fastapi", "uvicorn[standard]", "onnxruntime>=1.20", "orjson", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind a minimal FastAPI app, one unpadded sample per call and thread.

The fastest plain server we know. `de3 export --full-depth` makes its graph, with the segments' fused operators.
Run by: fused_app.py FOLDER --port PORT [--threads N] [--default-session]
"""

import argparse
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from graph import Graph
from pydantic import BaseModel, TypeAdapter


class Body(BaseModel):
    input: str


def create(graph: Graph, threads: int) -> FastAPI:
    pool, adapter, app = ThreadPoolExecutor(threads), TypeAdapter(Body), FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        body = adapter.validate_json(await request.body())
        answer = await asyncio.get_running_loop().run_in_executor(pool, graph, body.input)
        return Response(orjson.dumps(answer), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response()

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8100)
    # Twice the cores, the best of the tested values: while one thread waits for the GIL, another computes.
    parser.add_argument("--threads", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--default-session", action="store_true", help="use ONNX Runtime's default settings")
    args = parser.parse_args()
    app = create(Graph(args.folder, args.default_session), args.threads)
    uvicorn.run(app, port=args.port, access_log=False, log_level="warning")
