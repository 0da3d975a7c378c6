# /// script
# dependencies = ["transformers>=4.44", "torch>=2.4", "fastapi", "uvicorn[standard]"]
# ///
"""Peer: the most common setup, a transformers pipeline in a FastAPI function.

FOLDER holds a stock sequence classification model. Usage: transformers_app.py FOLDER --port PORT
"""

import argparse

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Body(BaseModel):
    input: str


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    classifier = pipeline("text-classification", model=args.folder, device="cpu", truncation=True)
    app = FastAPI()

    @app.post("/classify")
    def classify(body: Body) -> dict[str, object]:
        return dict(classifier(body.input)[0])

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, port=args.port, access_log=False, log_level="warning")
