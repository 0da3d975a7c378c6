# /// script
# dependencies = [
#     "fastapi", "uvicorn[standard]", "orjson", "numpy",
#     "ctranslate2>=4.5", "transformers>=4.44,<5", "torch>=2.4",
# ]
# ///
"""Peer: the encoder of a stock BERT classifier in CTranslate2, in int8, behind the minimal FastAPI app of lean.py.

FOLDER holds the stock model; --convert writes the encoder to the folder --converted, and serving reads it from there.
Usage: ctranslate2_app.py FOLDER --converted FOLDER --port PORT [--threads N] [--streams N]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from classifier import Classifier
from lean import CORES, parser, run
from safetensors import safe_open


class Encoder(Classifier):
    """One worker per core, each with one thread. NumPy runs the output layer, which CTranslate2 does not convert.

    On an AMD core, MKL was 12 times slower than oneDNN, which CTranslate2 chooses there, and CTranslate2 rejected
    bfloat16, both alone and with int8. Over HTTP, on two cores, 2 workers and 4 calling threads were the fastest
    combination of 1, 2 or 4 workers and 2, 3 or 4 calling threads.
    """

    def __init__(self, folder: Path, converted: Path, streams: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "np") as weights:
            self.weight = weights.get_tensor("classifier.weight").T
            self.bias = weights.get_tensor("classifier.bias")
        names = config.get("id2label", {})  # transformers omits it if the labels have no names
        labels = [names.get(str(k), f"LABEL_{k}") for k in range(len(self.bias))]
        super().__init__(folder / "tokenizer.json", labels, config["max_position_embeddings"])
        self.encoder = ctranslate2.Encoder(
            str(converted), device="cpu", compute_type="int8", inter_threads=streams, intra_threads=1
        )
        self.warm_up()

    def inputs(self, encoding: Any) -> tuple[list[list[int]], list[list[int]]]:
        return [encoding.ids], [encoding.type_ids]

    def logits(self, inputs: tuple[list[list[int]], list[list[int]]]) -> np.ndarray:
        ids, types = inputs
        pooled = np.array(self.encoder.forward_batch(ids, token_type_ids=types).pooler_output)[0]
        return pooled @ self.weight + self.bias


def convert(folder: Path, converted: Path) -> None:
    """Convert a BERT encoder, unless that was done after the stock model last changed.

    Ends the process with an error message for any other encoder.
    """
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind != "bert":
        sys.exit(f"this peer runs only BERT classifiers, not {kind}")
    done = converted / "model.bin"
    if done.exists() and done.stat().st_mtime > (folder / "model.safetensors").stat().st_mtime:
        return
    new = converted.with_name(converted.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(new), quantization="int8")
    shutil.rmtree(converted, ignore_errors=True)
    new.replace(converted)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--converted", type=Path, required=True)
    options.add_argument("--streams", type=int, default=CORES)
    options.add_argument("--convert", action="store_true", help="convert instead of serving")
    args = options.parse_args()
    if args.convert:
        convert(args.folder, args.converted)
    else:
        run(args, Encoder(args.folder, args.converted, args.streams))
