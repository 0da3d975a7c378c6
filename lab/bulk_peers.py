# /// script
# dependencies = [
#     "ctranslate2>=4.5", "numpy", "onnx", "onnxruntime>=1.20", "safetensors", "sympy",
#     "tokenizers", "torch>=2.4", "transformers>=4.44,<5",
# ]
# ///
"""Peers in bulk: a stock BERT classifier on the texts of a file, sorted by length, in batches.

Usage: bulk_peers.py FOLDER TEXTS.json OUT   Prints a JSON object: the best batch size of each engine, and its texts/s.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

CORES = len(os.sched_getaffinity(0))
BATCHES = (8, 32, 64)
SAMPLE = 2000  # texts on which the batch size is chosen


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    """Yield batches of `size` texts of similar length."""
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def to_onnx(folder: Path, out: Path) -> Path:
    """Convert the classifier to a fused int8 graph with ONNX Runtime's tools, unless `out` has it; returns its path."""
    plain, fused, final = (out / f"{name}.onnx" for name in ("plain", "fused", "int8"))
    if final.exists():
        return final
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(folder)(["a text", "two texts"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    torch.onnx.export(
        model,
        tuple(inputs[name] for name in names),
        str(plain),
        input_names=names,
        output_names=["logits"],
        dynamic_axes=axes | {"logits": {0: "batch"}},
        dynamo=False,
    )
    config = model.config
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimize_model(str(plain), model_type="bert", **sizes).save_model_to_file(str(fused))
    quantize_dynamic(
        str(fused),
        str(final),
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return final


def onnx_runtime(folder: Path, out: Path) -> Callable[[list[str], int], None]:
    """A function that classifies texts in batches of a given size with ONNX Runtime in int8."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = CORES
    session = ort.InferenceSession(str(to_onnx(folder, out)), options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def run(texts: list[str], size: int) -> None:
        for batch in batches(texts, size):
            encoded = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
            given = {one.name: encoded[one.name].astype(np.int64) for one in session.get_inputs()}
            session.run(None, given)[0].argmax(1)

    return run


def transformers(folder: Path) -> Callable[[list[str], int], None]:
    """A function that classifies texts in batches of a given size with the transformers pipeline in fp32."""
    torch.set_num_threads(CORES)
    classify: Any = pipeline("text-classification", model=str(folder), device="cpu")

    def run(texts: list[str], size: int) -> None:
        for _ in classify(sorted(texts, key=len), batch_size=size, truncation=True):
            pass

    return run


def ctranslate(folder: Path, out: Path) -> Callable[[list[str], int], None]:
    """A function that classifies texts in batches of a given size with CTranslate2 in int8.

    CTranslate2 does not convert the classifier head, so NumPy runs it.
    """
    converted = out / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization="int8")
    encoder = ctranslate2.Encoder(
        str(converted), device="cpu", compute_type="int8", inter_threads=CORES, intra_threads=1
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer("a text", truncation=True)  # sets the truncation before several threads use it
    with safe_open(folder / "model.safetensors", "np") as weights:
        weight, bias = weights.get_tensor("classifier.weight").T, weights.get_tensor("classifier.bias")

    def classify(batch: list[str]) -> None:
        ids = tokenizer(batch, truncation=True)["input_ids"]
        (np.array(encoder.forward_batch(ids).pooler_output) @ weight + bias).argmax(1)

    def run(texts: list[str], size: int) -> None:
        # A call runs on one of the encoder's threads, so as many calls run at the same time.
        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(classify, batches(texts, size)):
                pass

    return run


def rate(run: Callable[[list[str], int], None], texts: list[str], size: int) -> float:
    """Texts/s of one run over the texts."""
    started = time.perf_counter()
    run(texts, size)
    return len(texts) / (time.perf_counter() - started)


def main(folder: Path, texts: list[str], out: Path) -> None:
    """Measure each engine at its best batch size, and print the results as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    engines = {
        "transformers pipeline, fp32": transformers(folder),
        "ONNX Runtime, int8": onnx_runtime(folder, out),
        "CTranslate2, int8": ctranslate(folder, out),
    }
    found = {}
    for name, run in engines.items():
        run(texts[:64], 8)
        best = max(BATCHES, key=lambda size: rate(run, texts[:SAMPLE], size))
        found[name] = {"batch": best, "texts_per_s": rate(run, texts, best)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
