# /// script
# dependencies = ["fastapi", "uvicorn[standard]", "openvino>=2025.0", "nncf>=2.14", "orjson", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth fp32 ONNX graph in OpenVINO, in int8 or bf16, behind the minimal FastAPI app of lean.py.

--convert quantizes the graph to int8 with NNCF (post-training) and keeps the result in FOLDER, where serving reads it.
Usage: openvino_app.py FOLDER --precision int8|bf16|fp32 --port PORT [--threads N] [--streams N]
"""

import json
import threading
from pathlib import Path

import numpy as np
import openvino as ov
from classifier import GraphClassifier
from lean import CORES, parser, run

INT8 = "openvino-int8.xml"


class OpenVino(GraphClassifier):
    """One stream per core, each with one thread; each calling thread has its own infer request.

    On one core, these settings made no difference beyond noise: the performance hints, no pinning, bf16 or f32 for the
    operators that are not quantized, and the stock model converted from PyTorch instead of this graph. Over HTTP, on
    two cores, 2 streams and 4 calling threads were the fastest combination of 1, 2 or 4 streams and 2, 3 or 4 calling
    threads.
    """

    def __init__(self, folder: Path, precision: str, streams: int) -> None:
        super().__init__(folder)
        core, local = ov.Core(), threading.local()
        settings = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams}
        if precision != "int8":  # in int8, OpenVINO chooses the precision of unquantized operators
            settings["INFERENCE_PRECISION_HINT"] = {"bf16": "bf16", "fp32": "f32"}[precision]
        file = folder / INT8 if precision == "int8" else self.file
        self.compiled, self.local = core.compile_model(core.read_model(file), "CPU", settings), local
        self.names = [x.any_name for x in self.compiled.inputs]
        self.warm_up()

    def logits(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if not hasattr(self.local, "request"):
            self.local.request = self.compiled.create_infer_request()
        return self.local.request.infer(inputs)[0][0].copy()


def quantize(folder: Path, texts: list[str]) -> None:
    """Write the int8 model, calibrated on the texts, unless it already exists."""
    if (folder / INT8).exists():
        return
    import nncf

    graph, model = GraphClassifier(folder), ov.Core().read_model(folder / "model.onnx")
    graph.names = [x.any_name for x in model.inputs]
    dataset = nncf.Dataset(texts, graph.encode)
    # The heads, the graph's only Gemm nodes, stay float32, as in the fused graph: NNCF's smoothing shifts their logits.
    heads = nncf.IgnoredScope(patterns=[".*/WithoutBiases"])
    kind, count = nncf.ModelType.TRANSFORMER, len(texts)
    quantized = nncf.quantize(model, dataset, model_type=kind, subset_size=count, ignored_scope=heads)
    ov.save_model(quantized, folder / "openvino-new.xml", compress_to_fp16=False)
    (folder / "openvino-new.bin").replace((folder / INT8).with_suffix(".bin"))
    (folder / "openvino-new.xml").replace(folder / INT8)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--precision", choices=("int8", "bf16", "fp32"), default="int8")
    options.add_argument("--streams", type=int, default=CORES)
    options.add_argument("--convert", type=Path, metavar="TEXTS", help="quantize, calibrated on a JSON list")
    args = options.parse_args()
    if args.convert is not None:
        quantize(args.folder, json.loads(args.convert.read_text()))
    else:
        run(args, OpenVino(args.folder, args.precision, args.streams))
