"""A stand-in for the service that is an upstream: it answers from a table, over HTTP, and misbehaves as told.

    python -m lab.standin FILE --port 8200 --limited 0.02

FILE is JSON: `labels`, and `models`, a list of {text: probabilities}; the first model answers until POST /switch.
"""

import asyncio
import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

BREAK = "\n\n"  # separates the instructions from the text in a prompt
CHARS_PER_TOKEN = 4
RETRY_AFTER_S = 1
HANG_S = 3600.0


class Standin:
    """The service.

    Attributes:
        calls: number of calls so far, the failed ones included.
        model: number of the model that answers.
    """

    def __init__(
        self, file: Path, noise: float, latency_s: float, faults: dict[str, float], prose: float
    ) -> None:
        content = json.loads(file.read_text())
        self._labels, self._models = content["labels"], content["models"]
        self._noise, self._latency_s, self._faults, self._prose = noise, latency_s, faults, prose
        self._random, self.calls, self.model = random.Random(0), 0, 0

    async def chat(self, request: Request) -> JSONResponse:
        """OpenAI's chat completions."""
        prompt = (await request.json())["messages"][-1]["content"]
        found = await self._answer(prompt.partition(BREAK)[2])
        if isinstance(found, JSONResponse):
            return found
        label = self._labels[found[0]]
        reply = f"The label is **{label}**." if self._random.random() < self._prose else label
        tokens = [-(-len(part) // CHARS_PER_TOKEN) for part in (prompt, reply)]
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply},
            "finish_reason": "stop",
        }
        head = {"id": f"chatcmpl-{self.calls}", "object": "chat.completion", "created": 0, "model": "standin"}
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    async def classify(self, request: Request) -> JSONResponse:
        """The /classify of vLLM and of DE3; a random label comes without probabilities."""
        found = await self._answer((await request.json())["input"])
        if isinstance(found, JSONResponse):
            return found
        label, probs = found
        return JSONResponse({"data": [{"index": 0, "label": self._labels[label], "probs": probs}]})

    async def _answer(self, text: str) -> tuple[int, list[float] | None] | JSONResponse:
        """The number of a label, and the probabilities of all; or the response of a call that fails."""
        self.calls += 1
        probs = self._models[self.model].get(text)
        if probs is None:
            return _error(400, "the table does not have this text")
        draw, fault = self._random.random(), ""
        for name, share in self._faults.items():
            if 0 <= draw < share:
                fault = name
            draw -= share
        await asyncio.sleep(HANG_S if fault == "hang" else self._latency_s * self._random.uniform(0.5, 1.5))
        if fault == "limit":
            return _error(429, "too many requests", {"Retry-After": str(RETRY_AFTER_S)})
        if fault == "error":
            return _error(503, "overloaded")
        label = probs.index(max(probs))
        if self._random.random() < self._noise:
            others = [one for one in range(len(self._labels)) if one != label]
            return self._random.choice(others), None
        return label, probs


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "standin", "code": status}}, status, headers)


def main(
    file: Path,
    port: int = 8200,
    noise: Annotated[float, typer.Option(help="Share of replies with a random other label.")] = 0.0,
    latency: Annotated[float, typer.Option(help="Mean latency, seconds.", min=0)] = 0.0,
    limited: Annotated[float, typer.Option(help="Share of calls answered with 429 and Retry-After.")] = 0.0,
    errors: Annotated[float, typer.Option(help="Share of calls answered with 503.")] = 0.0,
    hangs: Annotated[float, typer.Option(help="Share of calls that are not answered.")] = 0.0,
    prose: Annotated[float, typer.Option(help="Share of chat replies with words around the label.")] = 0.0,
) -> None:
    """Serve until SIGTERM."""
    faults = {"limit": limited, "error": errors, "hang": hangs}
    standin, app = Standin(file, noise, latency, faults, prose), FastAPI()
    app.post("/v1/chat/completions")(standin.chat)
    app.post("/classify")(standin.classify)

    @app.post("/switch")
    async def switch() -> dict[str, Any]:
        standin.model += 1
        return {"model": standin.model}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"calls": standin.calls}

    config = uvicorn.Config(
        app, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    typer.run(main)
