# /// script
# dependencies = ["fastapi", "uvicorn[standard]", "onnxruntime>=1.20", "orjson", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth ONNX graph behind a minimal FastAPI app, one unpadded sample per call and thread.

The fastest server without early exit that we know of. `de3 export --full-depth` writes its graph, with the segments'
fused operators.
Usage: fused_app.py FOLDER --port PORT [--threads N] [--default-session] [--windows]
"""

from graph import Graph, Windowed
from lean import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "--default-session", action="store_true", help="use ONNX Runtime's default optimization level"
    )
    options.add_argument("--windows", action="store_true", help="run a long text in overlapping windows")
    args = options.parse_args()
    run(args, (Windowed if args.windows else Graph)(args.folder, args.default_session))
