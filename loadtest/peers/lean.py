"""A minimal FastAPI app around a classifier, one text per call and thread; also measures it without HTTP."""

import argparse
import asyncio
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

from classifier import Classifier

CORES = len(os.sched_getaffinity(0))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The argument parser of a lean peer; the caller adds the options of its engine."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("folder", type=Path)
    result.add_argument("--port", type=int, default=8100)
    # Twice the number of cores was the best of the tested values: while one thread waits for the GIL, another computes.
    result.add_argument("--threads", type=int, default=2 * CORES, help="concurrent calls")
    result.add_argument(
        "--measure",
        type=Path,
        metavar="TEXTS",
        help="instead of serving, run the texts (a JSON list) one by one, and print one line of JSON",
    )
    result.add_argument("--seconds", type=float, default=2.0, help="minimum duration of --measure")
    return result


def run(args: argparse.Namespace, classifier: Classifier) -> None:
    """Serve the classifier, or measure it if --measure is given."""
    if args.measure is not None:
        texts = json.loads(args.measure.read_text())
        print(json.dumps(measure(classifier, texts, args.seconds)))
        return
    import uvicorn  # measuring needs no server

    uvicorn.run(create(classifier, args.threads), port=args.port, access_log=False, log_level="warning")


def measure(classifier: Classifier, texts: list[str], seconds: float) -> dict[str, object]:
    """Texts per second without HTTP, one text per call, tokenized beforehand, in whole passes over the texts.

    The first pass is not timed; it gives the logits, with which the caller checks that the engine runs the same model.
    """
    inputs = [classifier.encode(text) for text in texts]
    logits = [classifier.logits(each).tolist() for each in inputs]
    start, passes, elapsed = perf_counter(), 0, 0.0
    while elapsed < seconds:
        for each in inputs:
            classifier.logits(each)
        passes += 1
        elapsed = perf_counter() - start
    return {"texts_per_s": passes * len(texts) / elapsed, "passes": passes, "logits": logits}


def create(answer: Callable[[str], dict[str, object]], threads: int):
    """The app: POST /classify {"input": text}, answered by `answer` in one of the threads."""
    import orjson
    from fastapi import FastAPI, Request, Response
    from pydantic import BaseModel, TypeAdapter

    class Body(BaseModel):
        input: str

    pool, adapter, app = ThreadPoolExecutor(threads), TypeAdapter(Body), FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        body = adapter.validate_json(await request.body())
        result = await asyncio.get_running_loop().run_in_executor(pool, answer, body.input)
        return Response(orjson.dumps(result), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return Response()

    return app
