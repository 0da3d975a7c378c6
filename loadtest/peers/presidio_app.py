# /// script
# dependencies = [
#   "presidio-analyzer", "transformers", "torch>=2.4", "spacy-huggingface-pipelines", "fastapi", "uvicorn[standard]",
#   "orjson",
# ]
# ///
"""Peer: Presidio's analyzer with a token classifier as its only recognizer, in the minimal FastAPI app.

FOLDER holds a token classifier of transformers. Engines: `transformers` is Presidio's TransformersNlpEngine, on a blank
spaCy pipeline (a trained one would take more time); `huggingface` is its HuggingFaceNerRecognizer, without spaCy.
Usage: presidio_app.py FOLDER --port PORT [--threads N] [--engine NAME]
"""

import argparse
import logging
import os
from tempfile import TemporaryDirectory

import spacy
import torch
import uvicorn
from lean import create
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import NerModelConfiguration, NlpEngineProvider, TransformersNlpEngine
from presidio_analyzer.predefined_recognizers import TransformersRecognizer
from presidio_analyzer.predefined_recognizers.ner import HuggingFaceNerRecognizer
from transformers import AutoConfig

CORES = len(os.sched_getaffinity(0))


def analyzer(folder: str, engine: str) -> AnalyzerEngine:
    """The analyzer; it keeps the labels' names."""
    labels = AutoConfig.from_pretrained(folder).id2label.values()
    tags = (label.removeprefix("B-").removeprefix("I-") for label in labels)
    mapping = {tag: tag for tag in tags if tag != "O"}
    if engine == "huggingface":
        nlp = NlpEngineProvider(
            nlp_configuration={
                "nlp_engine_name": "no_op",
                "models": [{"lang_code": "en", "model_name": "no_op"}],
            }
        ).create_engine()
        recognizer = HuggingFaceNerRecognizer(
            model_name=folder, label_mapping=mapping, threshold=0.0, device="cpu"
        )
    else:
        with TemporaryDirectory() as blank:
            spacy.blank("en").to_disk(blank)
            nlp = TransformersNlpEngine(
                [{"lang_code": "en", "model_name": {"spacy": blank, "transformers": folder}}],
                NerModelConfiguration(
                    model_to_presidio_entity_mapping=mapping,
                    aggregation_strategy="simple",
                    labels_to_ignore=["O"],
                ),
            )
            nlp.load()
        recognizer = TransformersRecognizer(supported_entities=list(mapping))
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=["en"])
    return AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument(
        "--threads", type=int, default=CORES, help="concurrent calls, of one PyTorch thread each"
    )
    parser.add_argument("--engine", choices=("transformers", "huggingface"), default="transformers")
    args = parser.parse_args()
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    engine = analyzer(args.folder, args.engine)

    def answer(text: str) -> dict[str, object]:
        found = sorted(engine.analyze(text, "en"), key=lambda one: one.start)
        spans = [
            {"start": x.start, "end": x.end, "label": x.entity_type, "score": float(x.score)} for x in found
        ]
        return {"spans": spans}

    answer("warm")
    uvicorn.run(create(answer, args.threads), port=args.port, access_log=False, log_level="warning")
