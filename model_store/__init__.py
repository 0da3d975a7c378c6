"""The artifact format: schema, integrity, versions, lookup, and the loaded model. Does not import torch."""

import os

# Builds of ONNX Runtime send telemetry unless it is disabled before they are imported. A server that handles other
# people's texts must not send any; set the variable to 0 to allow it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
